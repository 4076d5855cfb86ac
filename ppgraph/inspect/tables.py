"""Tables of blocks, as text that fits a terminal and as HTML for notebooks."""

from __future__ import annotations

import html
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from tabulate import MIN_PADDING, tabulate

from ppgraph.passes import Site

TEXT_WIDTH = 100
# Text is never cut to less than this, so that something of it can still be read.
LEAST_WIDTH = 6
PREFIXES = ("", "K", "M", "G", "T", "P")


@dataclass(frozen=True)
class Column:
    """A header and one cell a row.

    `cut`: the side at which cells lose characters when the table is too wide. `html_only`: left out of text.
    """

    header: str
    cells: Sequence[str]
    is_number: bool = False
    cut: Literal["", "start", "end"] = ""
    html_only: bool = False

    @property
    def width(self) -> int:
        """Characters of the widest cell, or of the header's widest line, to which tabulate adds `MIN_PADDING`."""
        header = max(map(len, self.header.split("\n"))) + MIN_PADDING
        return max(header, *map(len, self.cells)) if self.cells else header

    def cut_to(self, width: int) -> Column:
        """The same column with no cell wider than `width` characters."""
        cells = [_shortened(cell, width, at_start=self.cut == "start") for cell in self.cells]
        return Column(self.header, cells, self.is_number, self.cut)


@dataclass(frozen=True)
class Table:
    """A title, columns, totals as (what, how much) below them, and notes in whole sentences."""

    title: str
    columns: Sequence[Column]
    totals: Sequence[tuple[str, str]]
    notes: Sequence[str] = ()

    def text(self) -> str:
        """Plain text, no line longer than `TEXT_WIDTH`."""
        columns = _fitted([column for column in self.columns if not column.html_only])
        parts = [textwrap.fill(self.title, TEXT_WIDTH), _tabulated(columns, "simple")]
        parts.append("\n".join(_total_line(self.totals, *total) for total in self.totals))
        parts += ["\n".join(textwrap.fill(note, TEXT_WIDTH, subsequent_indent="  ") for note in self.notes)]
        return "\n\n".join(part for part in parts if part)

    def html(self) -> str:
        """HTML with every text escaped."""
        totals = tabulate([list(total) for total in self.totals], tablefmt="html", disable_numparse=True)
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return (
            f"<p><b>{html.escape(self.title)}</b></p>\n{_tabulated(self.columns, 'html')}\n{totals}\n<ul>{notes}</ul>"
        )


def why_dense(sites: Iterable[Site]) -> list[str]:
    """One sentence for each reason that blocks stay dense: which blocks, and the reason in full.

    Refusals that differ only in the name of the graph's node are one reason.
    """
    groups: dict[str, list[Site]] = {}
    for site in sites:
        if site.reason:
            groups.setdefault(re.sub(r"^\S+ (?=\()", "", site.reason), []).append(site)
    return [f"dense: {_names(group)}: {group[0].reason}" for group in groups.values()]


def _names(sites: Sequence[Site]) -> str:
    if len(sites) <= 2:
        return ", ".join(site.name for site in sites)
    return f"{sites[0].name} to {sites[-1].name} ({len(sites)} blocks)"


def block_lines(sites: Iterable[Site]) -> list[str]:
    """What each block keeps, one line for the layers that are alike: `model.layers.3-31.mlp: 6272 of 11008 channels`.

    Blocks that differ in more than the layer's number have lines of their own.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for site in sites:
        pattern = re.sub(
            rf"(^|\.){site.layer}(\.|$)", r"\1{}\2", site.name.replace("{", "{{").replace("}", "}}"), count=1
        )
        groups.setdefault((pattern, _kept(site)), []).append(site.layer)
    return [f"{pattern.format(_ranges(layers))}: {kept}" for (pattern, kept), layers in groups.items()]


def _kept(site: Site) -> str:
    if site.status == "dense":
        reason = re.sub(r"^\S+ (?=\()", "", site.reason)
        return f"dense, {reason}" if reason else "dense"
    unit = "heads" if site.kind == "attention" else "channels"
    return f"keeps {site.kept_units} of {site.units} {unit}"


def _ranges(numbers: Sequence[int]) -> str:
    """`0-2,5` for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def count(value: float, unit: str) -> str:
    """`1.53 GFLOP`."""
    prefix, divisor = decimal_prefix(value)
    return f"{number(value / divisor)} {prefix}{unit}"


def size(nbytes: float) -> str:
    """`12.3 MiB`."""
    prefix, divisor = binary_prefix(nbytes)
    return f"{number(nbytes / divisor)} {prefix}B"


def decimal_prefix(largest: float) -> tuple[str, float]:
    """The prefix that leaves fewer than four digits of `largest`, and what to divide by: `("G", 1e9)`."""
    power = _power(largest, 1000)
    return PREFIXES[power], 1000.0**power


def binary_prefix(largest: float) -> tuple[str, float]:
    """As `decimal_prefix` for bytes: `("Mi", 2**20)`."""
    power = _power(largest, 1024)
    return PREFIXES[power] + ("i" if power else ""), 1024.0**power


def number(value: float) -> str:
    """Three digits, at most two of them decimals."""
    if value == 0 or value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _power(largest: float, base: int) -> int:
    if largest < base:
        return 0
    return min(int(math.log(largest, base) + 1e-9), len(PREFIXES) - 1)


def _shortened(text: str, width: int, *, at_start: bool) -> str:
    if len(text) <= width:
        return text
    return "…" + text[len(text) - width + 1 :] if at_start else text[: width - 1] + "…"


def _fitted(columns: list[Column]) -> list[Column]:
    """Columns cut, the last first, until the table is no wider than `TEXT_WIDTH`."""
    fitted = list(columns)
    for place in reversed(range(len(fitted))):
        column = fitted[place]
        excess = sum(other.width for other in fitted) + 2 * (len(fitted) - 1) - TEXT_WIDTH
        if excess > 0 and column.cut:
            fitted[place] = column.cut_to(max(column.width - excess, LEAST_WIDTH))
    return fitted


def _tabulated(columns: Sequence[Column], form: str) -> str:
    rows = list(zip(*(column.cells for column in columns), strict=True))
    headers = [column.header if form == "simple" else column.header.replace("\n", " ") for column in columns]
    sides = ["right" if column.is_number else "left" for column in columns]
    made: str = tabulate(rows, headers, tablefmt=form, disable_numparse=True, colalign=sides if rows else None)
    return str(made)


def _total_line(totals: Sequence[tuple[str, str]], name: str, value: str) -> str:
    width = max(len(name) for name, _ in totals)
    indent = " " * (width + 2)
    return textwrap.fill(f"{name:<{width}}  {value}", TEXT_WIDTH, subsequent_indent=indent)
