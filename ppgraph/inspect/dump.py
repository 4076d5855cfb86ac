"""Graph dumps: one file of readable Python a stage of the rewriting, and a page to look at all of them.

`PPGRAPH_DUMP=folder` makes every graph that ppgraph rewrites leave a folder there:

    folder/index.html                 lists the graphs
    folder/01-prefill/index.html      the pipeline, each layer's graph, refusals, code and differences
    folder/01-prefill/00_captured.py, 02_insert_probe.py, ...

A stage that changed nothing leaves no file; the number is its place in the pipeline. The page opens from disk and
loads nothing else. The same texts go to `TORCH_TRACE`, where tlparse shows them beside Dynamo's and Inductor's.
"""

from __future__ import annotations

import html
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch.fx import Node

from ppgraph import _torch
from ppgraph.errors import InputError
from ppgraph.passes.base import Observer, PassResult, Program, target_name
from ppgraph.passes.operators import is_fused_attention, is_product, is_view

log = logging.getLogger("ppgraph")

VARIABLE = "PPGRAPH_DUMP"
PAGE = "index.html"
# print_readable's line for a node, what it deletes behind it, and what `readable` adds.
LINE = re.compile(r"^ +(\w+)(?:: \"[^\"]*\")? = (.*?)(?:;  [\w =]+ = None)?(?:  # inserted by \w+)?$")


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline: its name, the file that shows the graph after it (empty: nothing changed), counts."""

    name: str
    file: str
    elapsed_ms: float
    added: int
    removed: int
    refused: tuple[str, ...]


@dataclass
class NodeRecord:
    """A node as the page shows it. `inputs` and `code` hold [stage, value] at which they changed."""

    name: str
    target: str
    kind: str
    type: str
    layer: int | None
    author: str
    born: int
    source: str
    module: str
    label: str
    died: int | None = None
    inputs: list[tuple[int, list[str]]] = field(default_factory=list)
    code: list[tuple[int, str]] = field(default_factory=list)


def observers(phase: str) -> Observer | None:
    """Who watches a graph of this phase be rewritten: the dump that `PPGRAPH_DUMP` asks for, and `TORCH_TRACE`."""
    folder = os.environ.get(VARIABLE)
    return GraphDump(phase, Path(folder)) if folder else _trace(phase)


def _trace(phase: str) -> Observer:
    def observe(program: Program, stage: str, outcome: PassResult, elapsed_ms: float) -> None:
        if stage == "captured" or outcome.inserted:
            _torch.trace_artifact(f"ppgraph_{phase}_{stage}", lambda: readable(program))

    return observe


class GraphDump:
    """Writes one graph's stages into a folder of its own, and the page after the last one.

    Raises:
        InputError: the folder can't be written.
    """

    def __init__(self, phase: str, folder: Path) -> None:
        self.phase, self.root = phase, folder
        self.folder = _new_folder(folder, phase)
        self.stages: list[Stage] = []
        self.nodes: dict[str, NodeRecord] = {}
        self.orders: list[list[str]] = []

    def __call__(self, program: Program, stage: str, outcome: PassResult, elapsed_ms: float) -> None:
        _trace(self.phase)(program, stage, outcome, elapsed_ms)
        text = readable(program)
        added, removed = self._record(program, text)
        changed = stage == "captured" or added or removed
        file = f"{len(self.stages):02}_{stage}.py" if changed else ""
        if file:
            (self.folder / file).write_text(text, encoding="utf-8")
        self.stages.append(Stage(stage, file, elapsed_ms, added, removed, tuple(outcome.refused)))
        if stage == "attach_results":
            self._write_page(program)

    def _record(self, program: Program, text: str) -> tuple[int, int]:
        """Take over the graph as it is now; return how many nodes came and went."""
        stage = len(self.stages)
        lines = {match[1]: match[2] for match in map(LINE.match, text.splitlines()) if match}
        layers = layers_of(program)
        now = [node for node in program.graph.nodes if node.op != "output"]
        for node in now:
            record = self.nodes.get(node.name)
            if record is None or record.died is not None:
                record = self.nodes[node.name] = _node_record(program, node, stage, layers.get(node))
            inputs = [operand.name for operand in node.all_input_nodes]
            if not record.inputs or record.inputs[-1][1] != inputs:
                record.inputs.append((stage, inputs))
            code = lines.get(node.name, "")
            if not record.code or record.code[-1][1] != code:
                record.code.append((stage, code))
        added = sum(record.born == stage for record in self.nodes.values())
        self.orders.append([node.name for node in now])
        left = set(self.orders[-1])
        gone = [record for name, record in self.nodes.items() if record.died is None and name not in left]
        for record in gone:
            record.died = stage
        return added, len(gone)

    def _write_page(self, program: Program) -> None:
        (self.folder / PAGE).write_text(page(self._data(program)), encoding="utf-8")
        (self.root / PAGE).write_text(_overview(self.root), encoding="utf-8")
        log.info("graph dump: %s", self.folder / PAGE)

    def _data(self, program: Program) -> dict[str, Any]:
        numbers = {name: number for number, name in enumerate(self.nodes)}
        names = [stage.name for stage in self.stages]
        return {
            "phase": self.phase,
            "config": program.config.to_dict(),
            "sites": [site.to_dict() | {"refused": site.refused} for site in program.sites],
            "stages": [
                {
                    "name": stage.name,
                    "file": stage.file,
                    "ms": round(stage.elapsed_ms, 1),
                    "added": stage.added,
                    "removed": stage.removed,
                    "refused": stage.refused,
                    "order": [numbers[name] for name in order],
                }
                for stage, order in zip(self.stages, self.orders, strict=True)
            ],
            "nodes": [
                {
                    "name": record.name,
                    "target": record.target,
                    "kind": record.kind,
                    "type": record.type,
                    "layer": record.layer,
                    "author": names.index(record.author) if record.author in names else None,
                    "born": record.born,
                    "died": record.died,
                    "source": record.source,
                    "module": record.module,
                    "label": record.label,
                    "inputs": [[stage, [numbers[name] for name in inputs]] for stage, inputs in record.inputs],
                    "code": record.code,
                }
                for record in self.nodes.values()
            ],
        }


def readable(program: Program) -> str:
    """The graph as Python with dtype and shape, where its lines come from in the model, and who inserted what."""
    authors = {node.name: node.meta.get("ppgraph_pass") for node in program.graph.nodes}
    labels = program.parameters | state_labels(program)
    spelled = {node.name: re.sub(r"\W+", "_", label) for node, label in labels.items()}
    text = program.module.print_readable(print_output=False, fast_sympy_print=True)
    symbols = batch_symbols(program)
    sizes: dict[str, Node] = {}
    for node in program.placeholders():
        if isinstance(node.meta["val"], torch.SymInt):
            sizes.setdefault(str(node.meta["val"]), node)  # a size may be given twice, and arguments need one name each
    spelled |= {node.name: symbols[size] for size, node in sizes.items() if size in symbols}
    text = _respelled(text, spelled | symbols)
    lines = []
    for line in text.splitlines():
        match = LINE.match(line)
        author = authors.get(match[1]) if match else None
        if line.strip() == "# No stacktrace found for following nodes":
            continue
        lines.append(f"{line}  # inserted by {author}" if author else line)
    return "\n".join(lines) + "\n"


def batch_symbols(program: Program) -> dict[str, str]:
    """`B` and `S` for the symbols of samples and tokens, where a graph has such, of inputs with known names."""
    if "batch_symbols" not in program.shared:
        formulas = [_torch.expression(size) for size in program.batch or ()]
        program.shared["batch_symbols"] = {
            str(formula): name for formula, name in zip(formulas, "BS", strict=False) if formula.is_Symbol
        }
    symbols: dict[str, str] = program.shared["batch_symbols"]
    return symbols


def _respelled(text: str, names: Mapping[str, str]) -> str:
    return re.sub(r"\b\w+\b", lambda word: names.get(word[0], word[0]), text)


def state_labels(program: Program) -> dict[Node, str]:
    """What the inputs that the passes added stand for."""
    count = len(program.state_inputs)
    nodes = program.placeholders()[-count:] if count else []
    return {
        node: f"{item.role} of {item.site}" if item.site else item.role
        for node, item in zip(nodes, program.state_inputs, strict=True)
    }


def layers_of(program: Program) -> dict[Node, int]:
    """Which decoder layer a node belongs to: that of the module it stands in, else the one its operands share."""
    by_site = {site.name: site.layer for site in program.sites}
    count = len(program.state_inputs)
    held = program.placeholders()[-count:] if count else []
    layers: dict[Node, int] = {
        node: by_site[item.site] for node, item in zip(held, program.state_inputs, strict=True) if item.site in by_site
    }
    layers |= {node: number for node, name in program.parameters.items() if (number := layer_number(name)) is not None}
    for node in program.graph.nodes:
        if node in layers or node.op == "placeholder":
            continue
        number = layer_number(_torch.module_path(node))
        if number is None and "ppgraph_pass" in node.meta:
            shared = {layers[operand] for operand in node.all_input_nodes if operand in layers}
            number = shared.pop() if len(shared) == 1 else None
        if number is not None:
            layers[node] = number
    return layers


def layer_number(path: str) -> int | None:
    """The first number in a dotted path."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return int(found[1]) if found else None


def _node_record(program: Program, node: Node, stage: int, layer: int | None) -> NodeRecord:
    return NodeRecord(
        name=node.name,
        target=target_name(node),
        kind=_kind(node),
        type=_respelled(_type(node.meta.get("val")), batch_symbols(program)),
        layer=layer,
        author=node.meta.get("ppgraph_pass", ""),
        born=stage,
        source=source_line(node),
        module=_torch.module_path(node),
        label=program.parameters.get(node) or state_labels(program).get(node, "") if node.op == "placeholder" else "",
    )


def _kind(node: Node) -> str:
    """How the page draws a node: inputs, products and plain operators; views and sizes can be left out."""
    if node.op == "placeholder":
        return "size" if isinstance(node.meta.get("val"), torch.SymInt) else "input"
    if isinstance(node.meta.get("val"), (torch.SymInt, int)):
        return "size"
    if is_fused_attention(node):
        return "attention"
    if is_product(node):
        return "product"
    return "view" if is_view(node) or target_name(node) in ("aten.to", "aten.lift_fresh_copy") else "plain"


def _type(value: Any) -> str:
    """`f32[s0, s1, 64]`, as print_readable has it."""
    if isinstance(value, torch.Tensor):
        return f"{_torch.dtype_abbrs[value.dtype]}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_type, value))})"
    return "" if value is None else str(value)


def source_line(node: Node) -> str:
    """`modeling_llama.py:270 attn_output = self.o_proj(attn_output)`: the model's line a node stands for."""
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+), in \S+\n +(.*)', trace)
    if not frames:
        return ""
    path, line, code = frames[-1]
    return f"{Path(path).name}:{line} {code.strip()}"


def page(data: dict[str, Any]) -> str:
    """The page for one graph, which needs no other file."""
    template = resources.files("ppgraph.inspect").joinpath("dump.html").read_text(encoding="utf-8")
    # "</script" and "<!--" inside the data would end or upset the element that holds it.
    return template.replace("@@DATA@@", json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))


def _new_folder(root: Path, phase: str) -> Path:
    """A numbered folder that no other graph has, of this process or another."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        for number in range(1, 10_000):
            folder = root / f"{number:02}-{phase}"
            if not any(root.glob(f"{number:02}-*")):
                folder.mkdir()
                return folder
    except OSError as error:
        raise InputError(f"cannot write graph dumps to {root}: {error}; set {VARIABLE} to another folder") from None
    raise InputError(f"{root} holds too many graphs; set {VARIABLE} to another folder")


def _overview(root: Path) -> str:
    """A list of the graphs below `root`; straight to the graph where there is only one."""
    graphs = sorted(path.parent.name for path in root.glob(f"*/{PAGE}"))
    forward = f'<meta http-equiv="refresh" content="0; url={graphs[0]}/{PAGE}">' if len(graphs) == 1 else ""
    items = "".join(f'<li><a href="{html.escape(name)}/{PAGE}">{html.escape(name)}</a></li>' for name in graphs)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>ppgraph graphs</title>{forward}'
        "<style>:root{color-scheme:light dark;font:16px system-ui,sans-serif}body{margin:2rem}</style></head>"
        f"<body><h1>Graphs that ppgraph rewrote</h1><ul>{items}</ul></body></html>\n"
    )
