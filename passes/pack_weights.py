"""Pack the weights: what depends only on a selection and on parameters is computed once, not at every step."""

from __future__ import annotations

import hashlib
import operator

import torch
from torch.fx import Graph, GraphModule, Node

from ppgraph._torch import unset_fake_temporarily
from ppgraph.passes.base import Packing, PassResult, Program, StateInput, ancestors, shape_of

aten = torch.ops.aten

# On CPUs `index_select` copies whole rows in one thread, `index` single elements in all; measured with two threads
# (benchmarks/NOTES.md), where one is twice as fast as the other.
ROW_COPY_THREADS = 4


class PackWeights:
    """Moves the selection of weights into a graph of its own, `program.packing`.

    The packing graph takes the parameters and selections it needs and gives the packed tensors, which the step's
    graph takes as inputs in their place.
    """

    name = "pack_weights"
    requires: tuple[str, ...] = ("reuse_selection", "select_weights")

    def __call__(self, program: Program) -> PassResult:
        selected = nodes_of_selection(program)
        packed = [node for node in selected if any(user not in selected for user in node.users)]
        module, inputs = _packing_graph(program, packed)
        program.packing = Packing(module, inputs, packed, *_contents(program, inputs, packed))
        for number, node in enumerate(packed):
            placeholder = program.add_state_input(StateInput("packed", str(number)), node.meta["val"])
            node.replace_all_uses_with(placeholder)
        return PassResult(len(packed))


def nodes_of_selection(program: Program) -> dict[Node, None]:
    """Calls made of nothing but a selection, parameters, constants and what calibration left."""
    known = dict.fromkeys(program.parameters, False)
    known |= {node: False for role in ("centre", "moment") for node in program.state_nodes(role)}
    known |= {node: True for role in ("units", "rows") for node in program.state_nodes(role)}
    for node in program.graph.nodes:
        if _is_pure(node) and all(operand in known for operand in node.all_input_nodes):
            known[node] = any(known[operand] for operand in node.all_input_nodes)
    return {node: None for node, selected in known.items() if selected and node.op == "call_function"}


def _is_pure(node: Node) -> bool:
    target = node.target
    if target is operator.getitem:
        return True
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _packing_graph(program: Program, packed: list[Node]) -> tuple[GraphModule, list[Node]]:
    graph = Graph()
    copies: dict[Node, Node] = {}
    needed = ancestors(packed)
    inputs = [node for node in program.placeholders() if node in needed]
    for node in program.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    memory = {node: graph.create_node("placeholder", f"packed_{number}") for number, node in enumerate(packed)}
    for node in packed:
        _fill(graph, copies[node], memory[node])
    graph.output(tuple(memory.values()))
    graph.eliminate_dead_code()
    _placeholders_first(graph)
    return GraphModule(torch.nn.Module(), graph), inputs


def _contents(program: Program, inputs: list[Node], packed: list[Node]) -> tuple[list[str], list[list[int]]]:
    """Of each packed tensor what tells it from others, in no matter which graph, and the inputs that it is made of."""
    spelt, made_of = _names(program), {node: {place} for place, node in enumerate(inputs)}
    needed = ancestors(packed)
    for node in program.graph.nodes:
        if node in needed and node not in made_of:
            operands = torch.fx.map_arg((node.args, node.kwargs), spelt.__getitem__)
            spelt[node] = hashlib.sha256(f"{node.target} {operands}".encode()).hexdigest()
            made_of[node] = set().union(*(made_of[operand] for operand in node.all_input_nodes))
    return [spelt[node] for node in packed], [sorted(made_of[node]) for node in packed]


def _names(program: Program) -> dict[Node, str]:
    """Parameters by their names, and states by what they hold."""
    count = len(program.state_inputs)
    states = zip(program.placeholders()[-count:], program.state_inputs, strict=True) if count else ()
    names = dict(program.parameters)
    for node, item in states:
        with unset_fake_temporarily():
            constant = [] if item.constant is None else item.constant.tolist()
        names[node] = f"{item.role} {item.site} {item.tensor} {constant}"
    return names


def _fill(graph: Graph, node: Node, memory: Node) -> None:
    """Put a result into its memory: selections directly, and by an operator that is fast outside of Inductor."""
    if node.target is not aten.index_select.default:
        graph.call_function(aten.copy_.default, (memory, node))
        return
    source, dim, index = node.args
    assert isinstance(source, Node) and isinstance(index, Node) and isinstance(dim, int)
    if dim == 0:
        if torch.get_num_threads() > ROW_COPY_THREADS:
            graph.call_function(aten.index.Tensor_out, (source, [index]), {"out": memory})
        else:
            graph.call_function(aten.index_select.out, (source, dim, index), {"out": memory})
        return
    before, after = shape_of(source)[:dim], shape_of(source)[dim + 1 :]
    if source.meta["val"].itemsize == 2:  # of two bytes whole numbers are gathered faster than bfloat16
        source, memory = (graph.call_function(aten.view.dtype, (tensor, torch.int16)) for tensor in (source, memory))
    places = graph.call_function(aten.reshape.default, (index, [-1, *[1] * len(after)]))
    places = graph.call_function(aten.expand.default, (places, [*before, -1, *after]))
    graph.call_function(aten.gather.out, (source, dim, places), {"out": memory})


def _placeholders_first(graph: Graph) -> None:
    first = next(iter(graph.nodes))
    for node in reversed([node for node in graph.nodes if node.op == "placeholder" and node is not first]):
        first.append(node)
