"""Write docs/reference.md from the docstrings of the public names; `make test` fails when it is out of date.

python docs/make_reference.py
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import ppgraph
from ppgraph import errors
from ppgraph.inspect.explain import Explanation
from ppgraph.inspect.report import Report
from ppgraph.passes import Site
from ppgraph.runtime import GraphRecord
from ppgraph.state import History
from ppgraph.transform import Pruning

TARGET = Path(__file__).with_name("reference.md")
# What few need comes last.
PUBLIC = [getattr(ppgraph, name) for name in sorted(ppgraph.__all__, key=lambda name: name.startswith("register_"))]
FUNCTIONS = [function for function in PUBLIC if inspect.isfunction(function)]
# Under which name users meet a class.
CLASSES = {
    "ppgraph.PruneConfig": ppgraph.PruneConfig,
    "pruned.ppgraph": Pruning,
    "pruned.ppgraph.sites[i]": Site,
    "pruned.ppgraph.history": History,
    "pruned.ppgraph.graphs[i]": GraphRecord,
    "pruned.ppgraph.report()": Report,
    "ppgraph.explain()": Explanation,
}
# What the parts of ppgraph call each other with.
INTERNAL = {
    "of", "is_for", "runtime", "forward", "run", "extra_repr", "declare", "reserve", "rows", "seen",
    "full_batch_overlap", "keys",
}  # fmt: skip
SECTION = re.compile(r"^(Args|Raises|Attributes|Returns):$")


def reference() -> str:
    """The whole page."""
    parts = ["# Reference\n\nWritten by `docs/make_reference.py` from the docstrings.\n"]
    parts += [_function(f"ppgraph.{function.__name__}", function) for function in FUNCTIONS]
    parts += [_class(name, cls) for name, cls in CLASSES.items()]
    parts.append(_errors())
    return "\n".join(parts)


def _function(name: str, function: object) -> str:
    signature = inspect.signature(function)  # type: ignore[arg-type]
    shown = ",\n    ".join(_parameters(function))
    return f"## `{name}`\n\n```\n{name}(\n    {shown},\n) -> {signature.return_annotation}\n```\n\n{_text(function)}\n"


def _parameters(function: object) -> list[str]:
    """Parameters as they are written, without `self` and `cls`."""
    shown: list[str] = []
    for parameter in inspect.signature(function).parameters.values():  # type: ignore[arg-type]
        if parameter.kind is parameter.KEYWORD_ONLY and not any(text.startswith("*") for text in shown):
            shown.append("*")
        if parameter.name not in ("self", "cls"):
            text = re.sub(r": '([^']*)'", r": \1", str(parameter))
            shown.append(re.sub(r"<function (\w+) at 0x\w+>", r"\1", text))
    return shown


def _class(name: str, cls: type) -> str:
    lines = [f"## `{name}`\n\n{_text(cls)}\n"]
    for member, value in vars(cls).items():
        if member.startswith("_") or member in INTERNAL:
            continue
        if isinstance(value, property):
            lines.append(f"**`.{member}`** {_text(value)}\n")
        elif inspect.isfunction(value) or isinstance(value, classmethod):
            function = value.__func__ if isinstance(value, classmethod) else value
            lines.append(f"**`.{member}({', '.join(_parameters(function))})`** {_text(function)}\n")
    if dataclasses.is_dataclass(cls) and "Attributes:" not in (cls.__doc__ or ""):
        fields = ", ".join(f"`{field.name}`" for field in dataclasses.fields(cls) if field.name not in INTERNAL)
        lines.append(f"Fields: {fields}.\n")
    return "\n".join(lines)


def _errors() -> str:
    rows = [
        f"| `{name}` | {', '.join(base.__name__ for base in cls.__bases__)} | {_text(cls)} |"
        for name, cls in vars(errors).items()
        if inspect.isclass(cls)
    ]
    return "## Errors\n\n| in `ppgraph.errors` | is also | when |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n"


def _text(thing: object) -> str:
    """A docstring as Markdown: its sections become lists."""
    lines: list[str] = []
    for line in (inspect.getdoc(thing) or "").splitlines():
        section = SECTION.match(line)
        if section:
            lines += [f"*{section[1]}*", ""]
        elif re.match(r"^ {4}\S", line):
            name, _, rest = line.strip().partition(": ")
            lines.append(f"- `{name}`: {rest}" if rest else f"- {name}")
        else:
            lines.append(re.sub(r"^ {8}", "  ", line))
    return "\n".join(lines).strip()


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
