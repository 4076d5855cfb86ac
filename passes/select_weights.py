"""Select the weights: the full batch runs on the rows and columns that belong to what is kept."""

from __future__ import annotations

from torch.fx import Graph, Node

from ppgraph.passes.base import Builder, PassResult, Program
from ppgraph.passes.channels import Narrower, share_linears
from ppgraph.passes.find_sites import Block


class SelectWeights:
    """Rebuilds each pruned block on its kept units and puts it in the place of the dense one.

    Leaves in `program.shared`, for each site, `("narrowed", name)`: the exit linear's input [..., C'].
    """

    name = "select_weights"
    requires: tuple[str, ...] = ("find_sites",)

    def __call__(self, program: Program) -> PassResult:
        inserted = 0
        share_linears([program.analysis[site.name].narrowing for site in program.pruned_sites])
        for site in program.pruned_sites:
            block: Block = program.analysis[site.name]
            build = Builder(program, block.exit_linear, self.name)
            units, channels = program.shared["kept", site.name]
            narrower = Narrower(program, site, block.narrowing, build, units, channels)
            narrowed = narrower.input_of_exit(block.exit_input)
            program.shared["narrowed", site.name] = narrowed
            replacement = narrower.exit(block.exit_linear, block.exit_input, narrowed)
            block.exit_linear.replace_all_uses_with(replacement)
            program.graph.erase_node(block.exit_linear)
            inserted += build.inserted
        sort_topologically(program.graph)
        return PassResult(inserted)


def sort_topologically(graph: Graph) -> None:
    """Move nodes behind their operands, all others staying in order.

    The parts of a fused projection that stay whole are read where the dense projection was, before the new one.
    """
    placed: set[Node] = set()

    def place(node: Node) -> None:
        for operand in node.all_input_nodes:
            if operand not in placed:
                place(operand)
        if node not in placed:
            placed.add(node)
            end.prepend(node)

    nodes = list(graph.nodes)
    end = nodes[-1]
    for node in nodes[:-1]:
        place(node)
