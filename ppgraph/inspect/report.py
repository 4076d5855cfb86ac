"""What happened to a model: its blocks, the FLOPs of its last batch, its graphs and what it keeps in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule

from ppgraph.config import PruneConfig
from ppgraph.inspect.flops import (
    Sizes,
    WeightBytes,
    Work,
    count_flops,
    count_gathered_bytes,
    count_weight_bytes,
    uncounted_products,
)
from ppgraph.inspect.tables import Column, Table, count, size, why_dense
from ppgraph.passes import Site
from ppgraph.passes.base import shape_of
from ppgraph.runtime import CHOOSING, GraphRecord, Phase, Runtime
from ppgraph.selections import SelectionSummary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ppgraph.transform import Pruning


@dataclass(frozen=True)
class GraphSummary:
    """One compiled graph: its phase, the shapes of its inputs (parameters left out), and the seconds it took."""

    phase: Phase
    shapes: dict[str, tuple[str, ...]]
    seconds: float


@dataclass(frozen=True)
class BatchCost:
    """What one prefill of `batch` = [samples, tokens] computes and copies.

    `uncounted` names products that `flops` leaves out because nobody said what they cost.
    """

    batch: tuple[int, int]
    flops: Work
    gathered_bytes: int
    weights: WeightBytes
    uncounted: dict[str, int]

    @classmethod
    def of(cls, runtime: Runtime) -> BatchCost | None:
        """The cost of the last batch; None before the first prefill.

        Where the last call was none (a step of decoding, calibration), it is the batch that the newest graph was
        captured for.
        """
        prefills = [record for record in reversed(runtime.graphs) if record.phase in CHOOSING]
        for record in prefills if runtime.last_shape else ():
            assert runtime.last_shape is not None
            if record.phase != runtime.phase_of(False, runtime.last_shape):
                continue
            sizes = Sizes.of_batch(record.captured.graph, record.batch, runtime.last_shape)
            if sizes is not None:
                return cls._of_graph(record, sizes)
        return cls._of_graph(prefills[0], Sizes.of_first_call(prefills[0].captured.graph)) if prefills else None

    @classmethod
    def _of_graph(cls, record: GraphRecord, sizes: Sizes) -> BatchCost:
        captured, rewritten = record.captured.graph, record.rewritten.graph
        samples, tokens = record.batch
        after = count_flops(rewritten.nodes, sizes)
        return cls(
            batch=(sizes(samples), sizes(tokens)),
            flops=Work(count_flops(captured.nodes, sizes)["model"], after["probe"], after["model"]),
            gathered_bytes=count_gathered_bytes(rewritten.nodes, sizes),
            weights=WeightBytes(count_weight_bytes(captured.nodes, sizes), count_weight_bytes(rewritten.nodes, sizes)),
            uncounted=uncounted_products(captured.nodes),
        )


@dataclass(frozen=True)
class Report:
    """What `pruned.ppgraph.report()` gives: `str()` is a table, `to_dict()` all of it, HTML shows in notebooks.

    Memory is in bytes. `cost` is None before the first batch. `selections` holds, for each pruned site, how often its
    units were kept and how much consecutive batches share; `full_batch_overlap` is empty unless it was asked for.
    `dense_tokens` holds, for each site where tokens of the last prompt differ, how many kept all channels and how many
    channels the others kept; `kept` of a site is what steps of decoding keep.
    """

    config: PruneConfig
    sites: tuple[Site, ...]
    graphs: tuple[GraphSummary, ...]
    cost: BatchCost | None
    history_bytes: int
    history_positions: int
    packed_bytes: int
    selections: tuple[SelectionSummary, ...]
    full_batch_overlap: dict[str, float]
    dense_tokens: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, pruning: Pruning, full_batch: Mapping[str, Any] | None = None) -> Report:
        """Report on a pruned model; captures it when it has not run yet.

        Args:
            pruning: The model's `.ppgraph`.
            full_batch: Inputs for which `full_batch_overlap` compares the choices of probe and full batch.

        Raises:
            NothingToPruneError: not one block of the model can be rewritten.
        """
        sites, runtime = pruning.sites, pruning.runtime
        with runtime.lock:
            return cls(
                config=runtime.config,
                sites=tuple(sites),
                graphs=tuple(
                    GraphSummary(record.phase, _input_shapes(record.captured), record.seconds)
                    for record in runtime.graphs
                ),
                cost=BatchCost.of(runtime),
                history_bytes=runtime.history.nbytes,
                history_positions=runtime.history.positions,
                packed_bytes=runtime.packed_bytes,
                selections=tuple(runtime.statistics.summaries()),
                full_batch_overlap=pruning.full_batch_overlap(full_batch) if full_batch is not None else {},
                dense_tokens={
                    name: (int(tokens.sum()), len(others)) for name, (tokens, others) in pruning.dense_tokens().items()
                },
            )

    @property
    def recompiles(self) -> int:
        """Graphs of a phase beyond its first."""
        return len(self.graphs) - len({graph.phase for graph in self.graphs})

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values; FLOPs, bytes and batch are None before the first batch."""
        cost = self.cost
        return {
            "config": self.config.to_dict(),
            "sites": [site.to_dict() for site in self.sites],
            "batch": list(cost.batch) if cost else None,
            "flops": cost.flops.to_dict() if cost else {"dense": None, "probe": None, "pruned": None},
            "uncounted": cost.uncounted if cost else {},
            "gathered_bytes": cost.gathered_bytes if cost else None,
            "weight_bytes": cost.weights.to_dict() if cost else {"dense": None, "pruned": None},
            "history_bytes": self.history_bytes,
            "history_positions": self.history_positions,
            "packed_bytes": self.packed_bytes,
            "graphs": [
                {
                    "phase": graph.phase,
                    "shapes": {name: list(shape) for name, shape in graph.shapes.items()},
                    "seconds": graph.seconds,
                }
                for graph in self.graphs
            ],
            "recompiles": self.recompiles,
            "dense_tokens": {
                name: {"tokens": tokens, "kept_by_others": kept} for name, (tokens, kept) in self.dense_tokens.items()
            },
            "selections": [self._selection_to_dict(summary) for summary in self.selections],
        }

    def _selection_to_dict(self, summary: SelectionSummary) -> dict[str, Any]:
        return {
            "site": summary.site.name,
            "batches": summary.batches,
            "overlap": summary.overlap,
            "overlap_with_full_batch": self.full_batch_overlap.get(summary.site.name),
            "always_kept": summary.always,
            "never_kept": summary.never,
            "kept_share": [round(share, 4) for share in summary.kept_share.tolist()],
        }

    def plot(self) -> Figure:
        """Draw how selections behave: kept share of each head and channel, overlaps by layer. Needs `ppgraph[plot]`.

        Raises:
            InputError: no batch yet, or matplotlib is not installed.
        """
        from ppgraph.inspect.plot import draw

        return draw(self)

    def __str__(self) -> str:
        return self._table().text()

    def _repr_html_(self) -> str:
        return self._table().html()

    def _table(self) -> Table:
        return Table(
            title=title(self.config, self.sites),
            columns=[
                *site_columns(self.sites),
                *self._selection_columns(),
                *status_columns(self.sites, html_only=True),
            ],
            totals=[*self._cost_totals(), *self._memory_totals(), *self._graph_totals(), *self._selection_totals()],
            notes=[*why_dense(self.sites), *(uncounted_note(self.cost.uncounted) if self.cost else ())],
        )

    def _selection_columns(self) -> list[Column]:
        """Overlaps and the share of units that every batch kept, once there are batches."""
        found = {summary.site.name: summary for summary in self.selections}
        full = self.full_batch_overlap

        def column(header: str, value: Callable[[SelectionSummary], float | None]) -> Column:
            values = [value(found[site.name]) if site.name in found else None for site in self.sites]
            return Column(header, ["" if value is None else f"{value:.2f}" for value in values], is_number=True)

        columns = [column("overlap", lambda summary: summary.overlap), column("always", lambda summary: summary.always)]
        if full:
            columns.append(column("full\nbatch", lambda summary: full.get(summary.site.name)))
        return columns if found else []

    def _selection_totals(self) -> list[tuple[str, str]]:
        if not self.selections:
            return []
        return [
            (
                "selections",
                f"of {self.selections[0].batches} batches; overlap: mean Jaccard with the batch before; always: share "
                "of heads or channels that every batch kept"
                + ("; full batch: Jaccard with what probing everything chooses" if self.full_batch_overlap else ""),
            )
        ]

    def _cost_totals(self) -> list[tuple[str, str]]:
        if self.cost is None:
            return [("batch", "none yet")]
        samples, tokens = self.cost.batch
        return [
            ("batch", f"{samples} samples of {tokens} tokens"),
            *self._token_totals(),
            *flops_totals(self.cost.flops),
            ("gathered weights", f"{size(self.cost.gathered_bytes)} a batch, read once and written once"),
        ]

    def _token_totals(self) -> list[tuple[str, str]]:
        """Where tokens of the last prompt differ in what they keep."""
        if not self.dense_tokens:
            return []
        tokens, kept = zip(*self.dense_tokens.values(), strict=True)
        return [
            (
                "dense tokens",
                f"{span(tokens)} tokens of the last prompt kept all channels of {len(kept)} blocks, the others "
                f"{span(kept)}; steps of decoding keep what stands above",
            )
        ]

    def _memory_totals(self) -> list[tuple[str, str]]:
        totals = [("history", f"{size(self.history_bytes)}, {self.history_positions} positions")]
        if self.packed_bytes:
            totals.append(("packed weights", f"{size(self.packed_bytes)} for decoding"))
        return totals

    def _graph_totals(self) -> list[tuple[str, str]]:
        phases = Counter(graph.phase for graph in self.graphs)
        seconds = sum(graph.seconds for graph in self.graphs)
        return [
            ("graphs", ", ".join(f"{phase} {number}" for phase, number in phases.items()) or "none yet"),
            ("recompiles", str(self.recompiles)),
            ("compilation", f"{seconds:.1f} s"),
        ]


def span(numbers: Sequence[int]) -> str:
    """One number, or from the least to the most."""
    least, most = min(numbers), max(numbers)
    return str(least) if least == most else f"{least} to {most}"


def title(config: PruneConfig, sites: tuple[Site, ...]) -> str:
    """How much of the model is pruned, and by which method."""
    pruned = sum(site.status == "pruned" for site in sites)
    return f"{pruned} of {len(sites)} blocks pruned (method {config.method!r}, ratio {config.ratio:g})"


def site_columns(sites: tuple[Site, ...]) -> list[Column]:
    """Which block, and its width in channels."""
    return [
        Column("layer", [str(site.layer) for site in sites], is_number=True),
        Column("name", [site.name for site in sites], cut="start"),
        Column("kind", [site.kind for site in sites]),
        Column("width", [str(site.width) for site in sites], is_number=True),
        Column("kept", [str(site.kept) for site in sites], is_number=True),
    ]


def status_columns(sites: tuple[Site, ...], *, html_only: bool = False) -> list[Column]:
    """Whether a block is pruned, and why not (`html_only`: the reasons only where there is room)."""
    return [
        Column("status", [site.status for site in sites]),
        Column("reason", [site.reason for site in sites], cut="end", html_only=html_only),
    ]


def flops_totals(flops: Work) -> list[tuple[str, str]]:
    """Dense, probe and pruned FLOPs of a batch."""
    done = (flops.probe + flops.pruned) / flops.dense if flops.dense else 1.0
    return [
        ("FLOPs dense", count(flops.dense, "FLOP")),
        ("FLOPs probe", f"{count(flops.probe, 'FLOP')} ({flops.probe_share:.2%} of dense)"),
        ("FLOPs pruned", f"{count(flops.pruned, 'FLOP')} ({done:.1%} of dense with the probe)"),
    ]


def uncounted_note(uncounted: dict[str, int]) -> list[str]:
    """A sentence that names the products which the FLOPs leave out; nothing when there are none."""
    if not uncounted:
        return []
    names = ", ".join(f"{name} ({number})" for name, number in uncounted.items())
    return [f"FLOPs leave out operators without a formula: {names}"]


def _input_shapes(module: GraphModule) -> dict[str, tuple[str, ...]]:
    """Shapes of a graph's own inputs: parameters have no symbolic size and are no integers."""
    nodes = [node for node in module.graph.nodes if node.op == "placeholder" and shape_of(node)]
    return {
        node.name: tuple(str(size) for size in shape_of(node))
        for node in nodes
        if not node.meta["val"].is_floating_point() or any(isinstance(size, torch.SymInt) for size in shape_of(node))
    }
