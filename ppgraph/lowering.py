"""From a rewritten graph to something fast: the graph cut at its layers, and Inductor run once for layers alike.

Layers of a model are the same graph on other weights. Compiled as one graph they cost compile time each; cut apart
behind the streams that enter them (`Program.cuts`), Inductor compiles one of a kind and the others call it. What a cut
costs at run time is one call in Python, and that the stream's last addition is not fused with the norm that reads it.
On CPUs operators of ppgraph's own (`ppgraph.kernels`) take columns off weights and attend to keys that masks show.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import operator
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.split_module import split_module

from ppgraph import _torch
from ppgraph.errors import LoweringError
from ppgraph.kernels import ATTENTION_BY_BLOCKS, COLUMNS, KEYS_BY_BLOCK
from ppgraph.passes.base import Builder, Program, same_size, shape_of, signature
from ppgraph.passes.operators import argument, is_fused_attention, is_one, written_operands

log = logging.getLogger("ppgraph")

# The largest block that glibc ever keeps in its heap on 64 bits (DEFAULT_MMAP_THRESHOLD_MAX), less what malloc adds.
LARGEST_HEAP_BLOCK = 32 * 2**20 - 2**13

Compiled = Callable[..., Sequence[Any]]


def lower(program: Program, options: Mapping[str, Any]) -> Compiled:
    """Compile a program's graph with Inductor; takes ownership of it. Call inside `_torch.graph_world`.

    The result takes the graph's inputs and gives its outputs.

    Raises:
        LoweringError: Inductor failed.
    """
    _gather_columns(program)
    _add_masks(program)
    if program.pruned_sites:  # what prunes nothing is the compiled dense model, to the bit
        _attend_by_blocks(program)
    if not program.cuts:
        return _compiled([program.module], options)[0]
    whole = split_module(program.module, program.module, _parts(program), keep_original_order=True)
    calls = [node for node in whole.graph.nodes if node.op == "call_module"]
    kinds: dict[Any, list[str]] = {}
    for call in calls:
        part = getattr(whole, call.target)
        _give_tuple(call, part)
        kinds.setdefault(structure(part), []).append(call.target)
    # What takes longest starts first.
    alike = sorted(kinds.values(), key=lambda names: len(getattr(whole, names[0]).graph.nodes), reverse=True)
    compiled = _compiled([getattr(whole, names[0]) for names in alike], options)
    for names, code in zip(alike, compiled, strict=True):
        for name in names:
            delattr(whole, name)
            setattr(whole, name, code)
    whole.recompile()
    log.info("%d parts of the graph, %d of them compiled", len(calls), len(compiled))
    return whole.forward


def _gather_columns(program: Program) -> None:
    """Have weights and histories on CPUs lose columns by `columns`; what a kernel makes is better gathered in it."""
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.index_select.default):
        matrix, dim, index = node.args
        held = matrix.op == "placeholder" and not _off_the_cpu(matrix)
        if held and (dim, len(shape_of(matrix))) == (1, 2):
            node.target, node.args = COLUMNS, (matrix, index)


def _add_masks(program: Program) -> None:
    """Have attention on CPUs take masks that are added to its scores, as its kernel does.

    Torch makes them of boolean ones where they are read: made in each layer alike, they were made as often.
    """
    added: dict[tuple[Node, torch.dtype], Node] = {}
    for node in [*program.graph.nodes]:
        mask = argument(node, 3, "attn_mask") if is_fused_attention(node) else None
        if isinstance(mask, Node) and mask.meta["val"].dtype == torch.bool and not _off_the_cpu(mask):
            key = mask, node.meta["val"].dtype
            if key not in added:
                build = _behind(program, mask)
                nothing = build(torch.ops.aten.zeros_like.default, mask, dtype=key[1])
                hidden = build(torch.ops.aten.logical_not.default, mask)
                added[key] = build(torch.ops.aten.masked_fill.Scalar, nothing, hidden, -math.inf)
            node.replace_input_with(mask, added[key])


def _attend_by_blocks(program: Program) -> None:
    """Have attention on CPUs leave out keys that a block of its queries does not see; the mask tells, when it runs."""
    bounds: dict[Node, Node] = {}
    for node in [*program.graph.nodes]:
        if not is_fused_attention(node) or not _has_blocks(node):
            continue
        query, key, value, mask = node.args[0], node.args[1], node.args[2], argument(node, 3, "attn_mask")
        whole = _of_all_heads(mask)
        if whole not in bounds:
            bounds[whole] = _behind(program, whole)(KEYS_BY_BLOCK, whole)
        scale, enable_gqa = node.kwargs.get("scale"), node.kwargs.get("enable_gqa", False)
        build = Builder(program, node, "lowering")
        attended = build(ATTENTION_BY_BLOCKS, query, key, value, mask, bounds[whole], scale, enable_gqa)
        node.replace_all_uses_with(attended)
        program.graph.erase_node(node)


def _behind(program: Program, node: Node) -> Builder:
    """Adds nodes right behind a node; behind all inputs where it is one of them."""
    place = program.first_call() if node.op == "placeholder" else node.next
    return Builder(program, place, "lowering")


def _of_all_heads(mask: Node) -> Node:
    """The mask of which this one has the kept heads: all layers read that one."""
    source = mask.args[0] if mask.target is torch.ops.aten.index_select.default and mask.args[1] == 1 else mask
    assert isinstance(source, Node)
    return source


def _has_blocks(node: Node) -> bool:
    """Whether an attention has several queries, each with its row of a mask, and lays out what it gives as ours."""
    query, mask = node.args[0], argument(node, 3, "attn_mask")
    if not isinstance(mask, Node) or _off_the_cpu(mask) or not mask.meta["val"].is_floating_point():
        return False
    assert isinstance(query, Node)
    queries, rank = shape_of(query)[-2], len(shape_of(query))
    if rank != 4 or len(shape_of(mask)) != 4 or not same_size(shape_of(mask)[2], queries):
        return False
    dropout, is_causal = argument(node, 4, "dropout_p", 0.0), argument(node, 5, "is_causal", False)
    attended = node.meta["val"]
    return not (is_one(queries) or dropout or is_causal) and attended.transpose(1, 2).is_contiguous()


def _compiled(modules: Sequence[GraphModule], options: Mapping[str, Any]) -> list[Compiled]:
    # Not on GPUs: what waits there also tells Inductor's cache on disk which kernels belong to a graph.
    elsewhere = any(_off_the_cpu(node) for module in modules for node in module.graph.nodes)
    if not elsewhere:
        _let_the_heap_keep_a_layer()
    # What is recorded is recorded in `ppgraph.replay`.
    options = {**options, "triton.cudagraphs": False}
    spare = [_copy(module) for module in modules]
    try:
        with _torch.sizes_compared_by_hints(), _torch.indices_simplified_where_it_matters():
            try:
                meanwhile = contextlib.nullcontext() if elsewhere else _torch.kernels_compiled_meanwhile()
                with meanwhile:
                    return [_torch.lower_with_inductor(module, options) for module in modules]
            except _torch.CppCompileError:
                return [_compiled_alone(module, options) for module in spare]
    except _torch.TensorifyScalarRestartAnalysis:
        raise  # Inductor asks Dynamo for another trace, with a float as a constant that it has met as a symbol
    except RuntimeError as error:
        if _torch.hides_interrupt(error):
            raise KeyboardInterrupt from error
        found = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise LoweringError(
            f"expected Inductor to compile the pruned graph; found: {found}. Does torch.compile(model) run the dense "
            'model in the same call? lowering="eager" runs the pruned graph uncompiled, and nothing has changed'
        ) from error


def _copy(module: GraphModule) -> GraphModule:
    return GraphModule(module, copy.deepcopy(module.graph))


def _compiled_alone(module: GraphModule, options: Mapping[str, Any]) -> Compiled:
    """Compile one graph, by C++ without vector instructions where that with them is no C++.

    Inductor checks an index before the line that computes it, in some kernels that have vectors (seen with torch 2.13).
    """
    spare = _copy(module)
    try:
        return _torch.lower_with_inductor(module, options)
    except _torch.CppCompileError as error:
        found = next((line for line in error.output.splitlines() if "error:" in line), error.output)
        log.warning("a part of the graph is compiled without vector instructions; with them, g++ said: %s", found)
        return _torch.lower_with_inductor(spare, {**options, "cpp.simdlen": 1})


def _let_the_heap_keep_a_layer() -> None:
    """Let glibc's heap keep up to 64 MB that are free; until then it keeps twice the largest block freed so far.

    What a layer computes is freed where its part ends. Given back to the system there, its pages would be faulted in
    anew by the next layer, 4 % of the time at 20 x 256 tokens (`benchmarks/NOTES.md`). glibc does the same by itself
    once a block of this size has been freed; other allocators take no notice.
    """
    # Some of them may fit into what is free, the last hardly. A tensor would be a fake one here.
    [torch.UntypedStorage(LARGEST_HEAP_BLOCK) for _ in range(4)]


def _off_the_cpu(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.device.type != "cpu"


def _parts(program: Program) -> Callable[[Node], int]:
    """For each node the number of cuts before it.

    What several parts read but no stream enters (masks, rotary tables) goes to the first, so that no layer differs from
    the others by computing it.
    """
    parts: dict[Node, int] = {}
    number = 0
    for node in program.graph.nodes:
        parts[node] = number
        number += node in program.cuts
    first: set[Node] = set()
    for node in reversed(_nodes_without_stream(program)):
        readers = {0 if user in first else parts[user] for user in node.users}
        if len(readers) > 1 or readers == {0}:
            first.add(node)
    return lambda node: 0 if node in first else parts[node]


def _nodes_without_stream(program: Program) -> list[Node]:
    """Calls that can move to the graph's start: made of inputs that nothing writes to, by operators without effects."""
    written = _written(program)
    found: dict[Node, None] = dict.fromkeys(node for node in program.placeholders() if node not in written)
    for node in program.graph.nodes:
        stays = node.op != "call_function" or written_operands(node) or node in program.cuts or node in written
        if not stays and node.all_input_nodes and all(operand in found for operand in node.all_input_nodes):
            found[node] = None
    return [node for node in found if node.op == "call_function"]


def written_inputs(program: Program) -> frozenset[int]:
    """Places of the inputs that the graph may write to, through views of them too."""
    written = _written(program)
    return frozenset(place for place, node in enumerate(program.placeholders()) if node in written)


def _written(program: Program) -> set[Node]:
    """What the graph's operators write to, and what that is made of: a view is made of its first operand."""
    found: set[Node] = set()
    for node in program.graph.nodes:
        for operand in written_operands(node):
            written: Any = operand
            while isinstance(written, Node) and written not in found:
                found.add(written)
                written = next(iter(written.args), None)
    return found


def _give_tuple(call: Node, part: GraphModule) -> None:
    """A part with one result gives it as such; Inductor's callables give tuples."""
    output = next(iter(reversed(part.graph.nodes)))
    if not isinstance(output.args[0], Node):
        return
    output.args = ((output.args[0],),)
    with call.graph.inserting_after(call):
        result = call.graph.call_function(operator.getitem, (call, 0))
    call.replace_all_uses_with(result, lambda user: user is not result)


def structure(part: GraphModule) -> tuple[Any, ...]:
    """All that a graph's compiled code depends on, hashable: graphs where it is equal can share that code.

    A number that no other input has to do with, such as how much a layer's cache holds, is told by its bounds alone.
    """
    places = {node: place for place, node in enumerate(part.graph.nodes)}
    inputs = [node.meta["val"] for node in places if node.op == "placeholder"]
    uses = Counter(symbol for value in inputs for symbol in _symbols(value))

    def given(value: Any) -> Any:
        if isinstance(value, torch.SymInt) and uses[_torch.expression(value)] == 1:
            return ("number", *_torch.bounds(value))
        return signature(value)

    def described(operand: Any) -> Any:
        if isinstance(operand, Node):
            return ("node", places[operand])
        if isinstance(operand, (list, tuple)):
            return tuple(map(described, operand))
        return signature(operand)

    return tuple(
        ("input", given(node.meta["val"]))
        if node.op == "placeholder"
        else (node.op, node.target, described(node.args), described(tuple(node.kwargs.items())))
        for node in part.graph.nodes
    )


def _symbols(value: Any) -> set[Any]:
    """The symbols that a tensor's sizes and strides, or a number, are made of."""
    sizes = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)
    formulas = [_torch.expression(size) for size in sizes if isinstance(size, torch.SymInt)]
    return {symbol for formula in formulas for symbol in formula.free_symbols}
