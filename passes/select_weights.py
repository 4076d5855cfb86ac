"""Select the weights: the full batch runs on the rows and columns that belong to what is kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from ppgraph.errors import GraphError
from ppgraph.passes.base import Builder, PassResult, Program, shape_of, target_name
from ppgraph.passes.channels import Narrower, share_linears
from ppgraph.passes.find_sites import Block
from ppgraph.passes.operators import linear_bias, memory_of, written_operands

aten = torch.ops.aten


class SelectWeights:
    """Rebuilds each pruned block on its kept units and puts it in the place of the dense one.

    Leaves in `program.shared`, for each site, `("narrowed", name)`: the exit linear's input [..., C'], None when
    nothing is kept, `("exit", name)`: the exit linear on it, and `("products", name)`: the products that stand for
    entry linears, each with that linear and the indices of the outputs that it has.
    """

    name = "select_weights"
    requires: tuple[str, ...] = ("find_sites",)

    def __call__(self, program: Program) -> PassResult:
        inserted = 0
        share_linears([program.analysis[site.name].narrowing for site in program.scored_sites])
        for site in program.pruned_sites:
            block: Block = program.analysis[site.name]
            build = Builder(program, block.exit_linear, self.name)
            units, channels = program.shared["kept", site.name]
            narrowed = None
            if site.kept:
                narrower = Narrower(program, site, block.narrowing, build, units, channels)
                narrowed = narrower.input_of_exit(block.exit_input)
                replacement = narrower.exit(block.exit_linear, block.exit_input, narrowed)
                program.shared["products", site.name] = narrower.products
            else:
                replacement = _bias_alone(build, block)
            program.shared["narrowed", site.name] = narrowed
            program.shared["exit", site.name] = replacement
            block.exit_linear.replace_all_uses_with(replacement)
            program.graph.erase_node(block.exit_linear)
            inserted += build.inserted
        sort_topologically(program.graph)
        return PassResult(inserted)


def _bias_alone(build: Builder, block: Block) -> Node:
    """What an exit linear without channels gives: its bias, or 0."""
    rank = len(shape_of(block.exit_linear))
    sizes = [build.size(block.exit_input, dim) for dim in range(rank - 1)] + [shape_of(block.exit_linear)[-1]]
    value = block.exit_linear.meta["val"]
    nothing = build(aten.full.default, sizes, 0.0, dtype=value.dtype, device=value.device, pin_memory=False)
    bias = linear_bias(block.exit_linear)
    return nothing if bias is None else build.add(nothing, bias)  # type: ignore[no-any-return]


def sort_topologically(graph: Graph) -> None:
    """Move nodes behind their operands, all others staying in order.

    The parts of a fused projection that stay whole are read where the dense projection was, before the new one.

    Raises:
        GraphError: a node depends on itself, or has moved past a write to memory that it uses.
    """
    placed: set[Node] = set()
    opened: set[Node] = set()
    *nodes, end = graph.nodes
    for node in nodes:
        waiting = [node]  # no recursion: in a deep model a chain of operands is longer than Python's stack
        while waiting:
            missing = [operand for operand in waiting[-1].all_input_nodes if operand not in placed]
            if missing and waiting[-1] in opened:
                raise GraphError(f"{waiting[-1].name} depends on itself: a pass has put it ahead of what it is made of")
            opened.add(waiting[-1])
            waiting += reversed(missing)
            if not missing and (ready := waiting.pop()) not in placed:
                placed.add(ready)
                end.prepend(ready)
    _require_same_order_around_writes(nodes, list(graph.nodes)[:-1])


def _require_same_order_around_writes(before: Sequence[Node], after: Sequence[Node]) -> None:
    """Operands alone don't tell that a write in place changes what others read of the same memory."""
    old, new = ({node: place for place, node in enumerate(nodes)} for nodes in (before, after))
    users: dict[Node, list[Node]] = {}
    for node in after:
        for memory in set(map(memory_of, node.all_input_nodes)):
            users.setdefault(memory, []).append(node)
    for write in filter(written_operands, after):
        for node in (user for operand in written_operands(write) for user in users[memory_of(operand)]):
            if (old[node] < old[write]) != (new[node] < new[write]):
                raise GraphError(
                    f"{node.name} ({target_name(node)}) has moved past {write.name} ({target_name(write)}), which "
                    "writes to memory that it uses; expected writes that capture spells as new tensors: "
                    "`capture.NORMALISATIONS` needs a rule for this one"
                )
