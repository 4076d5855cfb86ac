"""The operator rules: from which dimension of which operand a dimension of a result comes.

Everything the passes know about operators is here, in one table. A rule answers one question: *if only some indices
of dimension `dim` of this result are wanted, which indices of which operands are enough?* The answer is a list of
operands with the dimension to narrow in each; operands that are needed whole are not listed. No answer is a refusal.

The channel analysis asks it for heads and MLP channels, the probe for samples and tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from ppgraph._torch import expression, quotient
from ppgraph.passes.base import Refusal, same_size, shape_of, target_name

aten = torch.ops.aten


@dataclass(frozen=True)
class Axis:
    """A dimension that counts units: [outer, units, block] folded into one.

    `block`: consecutive indices of one unit (a head's channels, or 1). `outer`: how often all units come around, an
    int or a sympy expression (the samples, where heads are folded with them into [B·H, S, D]).
    """

    dim: int
    block: int = 1
    outer: Any = 1

    def at(self, dim: int) -> Axis:
        """The same units along another dimension."""
        return replace(self, dim=dim)


Operands = list[tuple[Node, Axis]]
Rule = Callable[[Node, Axis], Operands]


def operand_axes(node: Node, axis: Axis) -> Operands:
    """The operands that `axis` of `node` comes from, each with its axis.

    Raises:
        Refusal: no rule for this operator, or this dimension is one it mixes.
    """
    rule = rule_of(node)
    if rule is None:
        raise Refusal(
            node,
            f"no operator rule says where dimension {axis.dim} comes from; RULES in passes/operators.py needs one",
        )
    return rule(node, axis)


def rule_of(node: Node) -> Rule | None:
    """The rule for a node's operator; None when there is none."""
    if node.op != "call_function":
        return None
    packet = _packet(node)
    if packet in RULES:
        return RULES[packet]
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        return None if target._schema.is_mutable else _pointwise
    return None


def is_product(node: Node) -> bool:
    """Whether the operator mixes channels: a matrix product, attention or a convolution.

    Operators from outside ATen are taken for products: nobody has said what they do.
    """
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return not (target.namespace in ("aten", "prims") or is_collective(node)) or _packet(node) in PRODUCTS
    return isinstance(target, torch._ops.HigherOrderOperator)


def is_collective(node: Node) -> bool:
    """Whether the operator exchanges tensors with other ranks, or waits for that."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "_c10d_functional"


def is_linear(node: Node) -> bool:
    """Whether this is a product of activations with a weight: `linear`, `addmm`, `mm` or `matmul`."""
    return _packet(node) in LINEARS


def is_pointwise(node: Node) -> bool:
    """Whether the operator treats elements one by one, broadcasting its operands."""
    return rule_of(node) is _pointwise


def is_rescaling(node: Node) -> bool:
    """Whether the operator treats the elements of one tensor one by one: a cast, a copy, a product with a number."""
    return len(node.all_input_nodes) == 1 and (is_pointwise(node) or _packet(node) in PASSING - {aten.slice})


def is_view(node: Node) -> bool:
    """Whether the operator only rearranges elements (or repeats them, as `expand` does)."""
    if _packet(node) is aten.index:
        return all(is_constant(index) for index in node.args[1] if index is not None)  # type: ignore[union-attr]
    return _packet(node) in VIEWS


def is_constant(node: Any) -> bool:
    """Whether this is a tensor known at compile time."""
    while isinstance(node, Node) and _packet(node) in (aten.lift_fresh_copy, aten.detach):
        node = _first(node)
    return isinstance(node, Node) and node.op == "get_attr"


def is_attention_softmax(node: Node) -> bool:
    """Whether this is the softmax of attention written out: over scores [..., S, S], a product of two activations."""
    return (
        _packet(node) in SOFTMAX
        and _rank(node) >= 3
        and any(_multiplies_activations(found) for found in before_products(node) if is_product(found))
    )


def before_products(node: Node) -> Iterator[Node]:
    """What a node comes from without a matrix product in between, itself and those products included, as it is met."""
    seen: set[Node] = set()
    queue = [node]
    while queue:
        current = queue.pop()
        if current in seen:
            continue
        seen.add(current)
        yield current
        if not is_product(current):
            queue += reversed(current.all_input_nodes)


def _multiplies_activations(product: Node) -> bool:
    """Whether both factors are computed in this graph: queries and keys, but no weight."""
    return _packet(product) in BATCHED_PRODUCTS and not any(map(_is_given, _factors(product)))


def _is_given(node: Node) -> bool:
    """Whether this is an input of the graph, seen through views and casts."""
    while node.op == "call_function" and (is_view(node) or _packet(node) in PASSING):
        node = _first(node)
    return node.op != "call_function"


def is_fused_attention(node: Node) -> bool:
    """Whether this is `scaled_dot_product_attention`."""
    return _packet(node) is aten.scaled_dot_product_attention


def is_reshape(node: Node) -> bool:
    """Whether the operator lays the same elements out in other dimensions."""
    return _packet(node) in RESHAPES


def is_sized(node: Node) -> bool:
    """Whether the operator is given the sizes of its result."""
    return is_reshape(node) or _packet(node) in EXPANDS or _packet(node) in FACTORIES


def mixes_tokens(node: Node) -> bool:
    """Whether each token's result depends on its neighbours, outside of attention."""
    return _packet(node) in TOKEN_MIXERS


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, wherever it was given."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def written_operands(node: Node) -> list[Node]:
    """The operands that a call writes to in place."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return []
    described = enumerate(target._schema.arguments)
    found: list[Node] = []
    torch.fx.map_arg([argument(node, place, one.name) for place, one in described if one.is_write], found.append)
    return found


def memory_of(node: Node) -> Node:
    """The node whose memory this one shows, through views and results of writes in place."""
    while node.op == "call_function" and node.all_input_nodes and _shows_operand(node):
        node = node.all_input_nodes[0]
    return node


def _shows_operand(node: Node) -> bool:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return any(result.alias_info is not None for result in target._schema.returns)
    return target is operator.getitem


def call_target(node: Node) -> Callable[..., Any]:
    """The function that a call node calls."""
    assert callable(node.target)
    return node.target


def _packet(node: Node) -> Any:
    target = node.target
    return target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target


def _rank(node: Node) -> int:
    return len(shape_of(node))


def _dim(node: Node, dim: int) -> int:
    """`dim` counted from the front."""
    return dim % max(_rank(node), 1)


def _first(node: Node) -> Node:
    operand = node.args[0]
    assert isinstance(operand, Node)
    return operand


def _mixed(node: Node, axis: Axis) -> Refusal:
    return Refusal(
        node,
        f"it mixes dimension {axis.dim}, so that a part of it takes all of its input; pruning needs an operator that "
        "keeps it apart",
    )


def _pointwise(node: Node, axis: Axis) -> Operands:
    """Broadcasting: aligned from the right; operands of size 1 there are needed whole."""
    from_right = _rank(node) - axis.dim
    operands: Operands = []
    for operand in dict.fromkeys(node.all_input_nodes):
        shape = shape_of(operand)
        if len(shape) < from_right or is_one(shape[-from_right]):
            continue
        operands.append((operand, axis.at(len(shape) - from_right)))
    return operands


def is_one(size: Any) -> bool:
    """Whether a size is known to be 1, without guarding on it."""
    return not isinstance(size, torch.SymInt) and size == 1


def _same(node: Node, axis: Axis) -> Operands:
    return [(_first(node), axis)]


def _reshape(node: Node, axis: Axis) -> Operands:
    source = _first(node)
    found = reshaped_axis(shape_of(node), shape_of(source), axis)
    if found is None:
        raise Refusal(
            node,
            f"its input {list(shape_of(source))} has no dimension of its own for dimension {axis.dim} of "
            f"{list(shape_of(node))}",
        )
    return [(source, found)]


def reshaped_axis(result: tuple[Any, ...], source: tuple[Any, ...], axis: Axis) -> Axis | None:
    """The dimension of `source` that holds exactly the units of `axis` of its reshaped `result`."""
    unit = expression(axis.block * _stride(result, axis.dim))
    extent = expression(result[axis.dim]) / (axis.block * axis.outer) * unit
    folded = None
    for dim in range(len(source)):
        stride = expression(_stride(source, dim))
        block, outer = quotient(unit, stride), quotient(expression(source[dim]) * stride, extent)
        if block is None or outer is None or not block.is_Integer:
            continue
        found = Axis(dim, int(block), int(outer) if outer.is_Integer else outer)
        if found.outer == 1:
            return found
        folded = folded or found
    return folded


def _stride(shape: tuple[Any, ...], dim: int) -> Any:
    stride: Any = 1
    for size in shape[dim + 1 :]:
        stride = stride * size
    return stride


def _transpose(node: Node, axis: Axis) -> Operands:
    first, second = _dim(node, node.args[1]), _dim(node, node.args[2])  # type: ignore[arg-type]
    swapped = {first: second, second: first}
    return [(_first(node), axis.at(swapped.get(axis.dim, axis.dim)))]


def _t(node: Node, axis: Axis) -> Operands:
    return [(_first(node), axis.at(_rank(node) - 1 - axis.dim))]


def _permute(node: Node, axis: Axis) -> Operands:
    order: Any = node.args[1]
    return [(_first(node), axis.at(_dim(node, order[axis.dim])))]


def _unsqueeze(node: Node, axis: Axis) -> Operands:
    added = _dim(node, node.args[1])  # type: ignore[arg-type]
    if axis.dim == added:
        return []
    return [(_first(node), axis.at(axis.dim - (axis.dim > added)))]


def _squeeze(node: Node, axis: Axis) -> Operands:
    source = _first(node)
    dims: Any = node.args[1] if len(node.args) > 1 else [d for d, size in enumerate(shape_of(source)) if is_one(size)]
    removed = {d % _rank(source) for d in ([dims] if isinstance(dims, int) else dims)}
    left = [d for d in range(_rank(source)) if d not in removed or not is_one(shape_of(source)[d])]
    return [(source, axis.at(left[axis.dim]))]


def _expand(node: Node, axis: Axis) -> Operands:
    source = _first(node)
    dim = axis.dim - (_rank(node) - _rank(source))
    if dim < 0 or is_one(shape_of(source)[dim]):
        return []
    return [(source, axis.at(dim))]


def _like(node: Node, axis: Axis) -> Operands:
    """`new_empty` and its kin take only dtype and device from their operand."""
    return []


def _complex(node: Node, axis: Axis) -> Operands:
    """`view_as_complex` joins pairs along a last dimension that `view_as_real` makes."""
    if axis.dim == len(shape_of(_first(node))):
        raise _mixed(node, axis)
    return [(_first(node), axis)]


def _slice_scatter(node: Node, axis: Axis) -> Operands:
    base, source = node.args[:2]
    assert isinstance(base, Node) and isinstance(source, Node)
    if axis.dim == argument(node, 2, "dim", 0) % _rank(node):
        raise _mixed(node, axis)
    return [(base, axis), (source, axis)]


def _constant_index(node: Node, axis: Axis) -> Operands:
    """Indexing one dimension with a constant vector leaves the others apart."""
    indices: Any = node.args[1]
    indexed = [place for place, index in enumerate(indices) if index is not None]
    if len(indexed) != 1 or len(shape_of(indices[indexed[0]])) != 1 or axis.dim == indexed[0] or not is_view(node):
        raise _mixed(node, axis)
    return [(_first(node), axis)]


def _slice(node: Node, axis: Axis) -> Operands:
    source = _first(node)
    if is_slice(node, axis.dim):
        raise _mixed(node, axis)
    return [(source, axis)]


def _select(node: Node, axis: Axis) -> Operands:
    source = _first(node)
    taken: int = node.args[1] % _rank(source)  # type: ignore[operator, assignment]
    return [(source, axis.at(axis.dim + (axis.dim >= taken)))]


def _split(node: Node, axis: Axis) -> Operands:
    """`split`, `chunk` and `unbind` give several results; `getitem` picks one of them."""
    pieces = _first(node)
    source = _first(pieces)
    packet = _packet(pieces)
    position = 1 if packet is aten.unbind else 2
    dim = argument(pieces, position, "dim", 0) % _rank(source)
    if packet is aten.unbind:
        return [(source, axis.at(axis.dim + (axis.dim >= dim)))]
    if axis.dim == dim:
        raise _mixed(node, axis)
    return [(source, axis)]


def _getitem(node: Node, axis: Axis) -> Operands:
    if _packet(_first(node)) in PIECES:
        return _split(node, axis)
    if _packet(_first(node)) in EXTREMES:
        return _reduce(node, axis)
    raise Refusal(node, f"it picks one result of {target_name(_first(node))}, for which there is no operator rule")


def _cat(node: Node, axis: Axis) -> Operands:
    joined = argument(node, 1, "dim", 0) % _rank(node)
    if axis.dim == joined:
        raise _mixed(node, axis)
    return [(operand, axis) for operand in dict.fromkeys(node.all_input_nodes) if shape_of(operand)]


def _stack(node: Node, axis: Axis) -> Operands:
    joined = argument(node, 1, "dim", 0) % _rank(node)
    if axis.dim == joined:
        raise _mixed(node, axis)
    return [(operand, axis.at(axis.dim - (axis.dim > joined))) for operand in dict.fromkeys(node.all_input_nodes)]


def _reduce(node: Node, axis: Axis) -> Operands:
    source, reduced = _reduction(node)
    if not reduced:
        raise _mixed(node, axis)
    if _rank(node) == _rank(source):
        if axis.dim in reduced:
            raise _mixed(node, axis)
        return [(source, axis)]
    left = [d for d in range(_rank(source)) if d not in reduced]
    return [(source, axis.at(left[axis.dim]))]


def _reduction(node: Node) -> tuple[Node, set[int]]:
    """What a reduction reduces, and the dimensions that go (none: all of them)."""
    call = _first(node) if node.target is operator.getitem else node
    source, dims = _first(call), argument(call, 1, "dim")
    if dims is None:
        return source, set()
    return source, {d % _rank(source) for d in ([dims] if isinstance(dims, int) else dims)}


def reduced_axis(node: Node, dim: int) -> Node | None:
    """The operand that a reduction leaves 1 wide in `dim`, None for anything else."""
    pair = node.target is operator.getitem and _packet(_first(node)) in EXTREMES
    if not pair and RULES.get(_packet(node)) is not _reduce:
        return None
    source, reduced = _reduction(node)
    return source if dim in reduced and _rank(node) == _rank(source) else None


def joined_operands(node: Node, dim: int) -> list[Node]:
    """The tensors that a `cat` joins along `dim`, in order; none for anything else."""
    if _packet(node) is not aten.cat or argument(node, 1, "dim", 0) % _rank(node) != dim:
        return []
    return list(node.args[0])  # type: ignore[arg-type]


def is_slice(node: Node, dim: int) -> bool:
    """Whether this takes a part of dimension `dim`."""
    if _packet(node) is not aten.slice or argument(node, 1, "dim", 0) % _rank(node) != dim:
        return False
    return not same_size(shape_of(node)[dim], shape_of(_first(node))[dim])


def sliced_range(node: Node) -> tuple[Any, Any]:
    """Start and end of a slice; steps other than 1 have no start."""
    if argument(node, 4, "step", 1) != 1:
        return None, None
    return argument(node, 2, "start") or 0, argument(node, 3, "end")


def _normalise(node: Node, axis: Axis) -> Operands:
    """`layer_norm` and `rms_norm` mix their last dimensions and leave the others apart."""
    shape: Any = node.args[1]
    if axis.dim >= _rank(node) - len(shape):
        raise _mixed(node, axis)
    return [(_first(node), axis)]


def softmax_dim(node: Node) -> int:
    """The dimension that a softmax normalises, counted from the front."""
    return int(argument(node, 1, "dim")) % _rank(node)


def _softmax(node: Node, axis: Axis) -> Operands:
    if axis.dim == softmax_dim(node):
        raise _mixed(node, axis)
    return [(_first(node), axis)]


def _linear(node: Node, axis: Axis) -> Operands:
    """Rows of activations; the last dimension is made by the weight and is narrowed there, not by this rule."""
    if axis.dim == _rank(node) - 1:
        raise _mixed(node, axis)
    activations = linear_activations(node)
    return [(activations, axis)]


def linear_activations(node: Node) -> Node:
    """The activations that a linear, addmm or mm multiplies with its weight."""
    operand = node.args[1 if _packet(node) is aten.addmm else 0]
    assert isinstance(operand, Node)
    return operand


def linear_weight(node: Node) -> tuple[Node, int]:
    """The weight of a linear and the dimension of it that holds the *input* channels."""
    place, dim = weight_operand(node)
    weight = node.args[place]
    assert isinstance(weight, Node)
    while _packet(weight) in TRANSPOSES and _rank(weight) == 2:
        weight, dim = _first(weight), 1 - dim
    return weight, dim


def weight_operand(node: Node) -> tuple[int, int]:
    """Which of its arguments a linear multiplies with, and the dimension of that one that holds the input channels."""
    if _packet(node) is aten.linear:
        return 1, 1
    return (2 if _packet(node) is aten.addmm else 1), 0


def linear_bias(node: Node) -> Node | None:
    """The bias of a linear or addmm; None without one."""
    bias = argument(node, 2, "bias") if _packet(node) is aten.linear else None
    if _packet(node) is aten.addmm:
        bias = node.args[0]
    return bias if isinstance(bias, Node) else None


def _matmul(node: Node, axis: Axis) -> Operands:
    """Batched product of two activations: batch dimensions broadcast, rows come left, columns right."""
    left, right = _factors(node)
    operands: Operands = []
    from_right = _rank(node) - axis.dim
    if _packet(node) is aten.baddbmm:
        operands += _broadcast(node.args[0], from_right, axis)
    if from_right != 1:
        operands += _broadcast(left, from_right, axis)
    if from_right != 2:
        operands += _broadcast(right, from_right, axis)
    return operands


def _factors(node: Node) -> tuple[Node, Node]:
    """What a `matmul`, `bmm` or `baddbmm` multiplies."""
    left, right = node.args[-2:] if _packet(node) is aten.baddbmm else node.args[:2]
    assert isinstance(left, Node) and isinstance(right, Node)
    return left, right


def _broadcast(operand: Any, from_right: int, axis: Axis) -> Operands:
    shape = shape_of(operand)
    if len(shape) < from_right or is_one(shape[-from_right]):
        return []
    return [(operand, axis.at(len(shape) - from_right))]


def _attention(node: Node, axis: Axis) -> Operands:
    """Fused attention [B, H, S, D]: samples and heads stay apart, query tokens come from q and the mask's rows."""
    query, key, value = node.args[:3]
    assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)
    mask = argument(node, 3, "attn_mask")
    from_right = _rank(node) - axis.dim
    if from_right == 1:
        return [(value, axis)]
    operands: Operands = [(query, axis)]
    if from_right == 3 and not same_size(shape_of(query)[-3], shape_of(key)[-3]):
        raise Refusal(node, "its query heads share key heads (enable_gqa), which the channel analysis resolves itself")
    if from_right != 2:
        operands += [(key, axis), (value, axis)]
    if isinstance(mask, Node):
        operands += _broadcast(mask, from_right, axis)
    return operands


def key_axes(node: Node) -> Operands:
    """The operands of an attention product that are indexed by *key* token, each with that dimension.

    Attention probabilities times values, or the fused operator; an empty list for any other operator.
    """
    if is_fused_attention(node):
        key, value = node.args[1], node.args[2]
        mask = argument(node, 3, "attn_mask")
        assert isinstance(key, Node) and isinstance(value, Node)
        axes = [(key, Axis(_rank(key) - 2)), (value, Axis(_rank(value) - 2))]
        return axes + (_broadcast(mask, 1, Axis(0)) if isinstance(mask, Node) else [])
    if _packet(node) in (aten.matmul, aten.bmm):
        weights, values = node.args[:2]
        assert isinstance(weights, Node) and isinstance(values, Node)
        if _comes_from_softmax(weights):
            return [(weights, Axis(_rank(weights) - 1)), (values, Axis(_rank(values) - 2))]
    return []


def slot_write(node: Node) -> Node | None:
    """The operator that wrote new keys or values [B, H, S, D] into the slots of a cache, seen through views.

    An `index_copy`, or the `index_put` that a full window which made room for one more is overwritten with.
    """
    while is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    if _rank(node) != 4:
        return None
    if _packet(node) is aten.index_put:
        return node if _writes_slots(node) else None
    if _packet(node) not in (aten.index_copy, aten.index_copy_):
        return None
    return node if _dim(node, node.args[1]) == _rank(node) - 2 else None  # type: ignore[arg-type]


def _writes_slots(put: Node) -> bool:
    """Whether an `index_put` [B, H, S, D] indexes the third dimension alone."""
    indices = put.args[1]
    return isinstance(indices, (list, tuple)) and [index is not None for index in indices] == [False, False, True]


def _comes_from_softmax(node: Node) -> bool:
    """Whether a node is attention probabilities: a softmax, seen through casts, dropout, slices and views."""
    while not is_attention_softmax(node):
        if is_product(node) or not node.all_input_nodes or not (_packet(node) in PASSING or is_view(node)):
            return False
        node = _first(node)
    return True


TRANSPOSES = {aten.t, aten.transpose, aten.numpy_T, aten.permute}
RESHAPES = {aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten}
EXPANDS = {aten.expand, aten.broadcast_to}
FACTORIES = {aten.new_empty, aten.new_zeros, aten.new_ones, aten.new_full}
EXTREMES = {aten.max, aten.min}
TOKEN_MIXERS = {aten.convolution, aten.conv1d, aten.conv2d, aten.cumsum, aten.cumprod}
PIECES = {aten.split, aten.split_with_sizes, aten.chunk, aten.unbind, aten.tensor_split}
PASSING = {aten.to, aten._to_copy, aten.dropout, aten.contiguous, aten.clone, aten.alias, aten.detach, aten.slice,
           aten.lift_fresh_copy}  # fmt: skip
VIEWS = RESHAPES | PIECES | TRANSPOSES | {
    aten.unsqueeze, aten.squeeze, aten.expand, aten.broadcast_to, aten.slice, aten.select, aten.contiguous, aten.clone,
    aten.alias, aten.detach, aten.narrow, operator.getitem,
}  # fmt: skip
SOFTMAX = {aten.softmax, aten._softmax}
BATCHED_PRODUCTS = {aten.matmul, aten.bmm, aten.baddbmm}
LINEARS = {aten.linear, aten.addmm, aten.mm, aten.matmul}
PRODUCTS = LINEARS | {
    aten.bmm, aten.baddbmm, aten.scaled_dot_product_attention, aten.convolution, aten.conv1d, aten.conv2d,
    aten._grouped_mm, aten.dot, aten.mv, aten.bilinear, torch.ops.higher_order.scan,
}  # fmt: skip

# Pointwise, though torch does not tag all of their overloads so.
UNTAGGED = {aten.masked_fill, aten.hardswish, aten.log_sigmoid, aten._prelu_kernel}
# What these do, torch says with other operators: a captured graph holds those in their place, and they need no rules.
COMPOSITES = (
    aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist, aten.swapaxes.default,
    aten.swapdims.default, aten.mT.default, aten.adjoint.default, aten.narrow.default, aten.reshape_as.default,
    aten.view_as.default, aten.expand_as.default, aten.ravel.default, aten.repeat_interleave.self_int,
    aten.broadcast_tensors.default, aten.concatenate.default, aten.concat.default, aten.hstack.default,
    aten.einsum.default, aten.inner.default, aten.linalg_matmul.default, aten.glu.default, aten.prelu.default,
    aten.multiply.Tensor, aten.multiply.Scalar, aten.subtract.Tensor, aten.subtract.Scalar, aten.divide.Tensor,
    aten.divide.Scalar, aten.true_divide.Scalar, aten.absolute.default, aten.negative.default,
    aten.special_expit.default,
)  # fmt: skip

RULES: dict[Any, Rule] = {
    **dict.fromkeys(UNTAGGED, _pointwise),
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(PASSING - {aten.slice}, _same),
    aten.transpose: _transpose,
    aten.t: _t,
    aten.numpy_T: _t,
    aten.permute: _permute,
    aten.unsqueeze: _unsqueeze,
    aten.squeeze: _squeeze,
    **dict.fromkeys(EXPANDS, _expand),
    **dict.fromkeys(FACTORIES, _like),
    aten.view_as_complex: _complex,
    aten.view_as_real: _complex,
    aten.slice_scatter: _slice_scatter,
    aten.index: _constant_index,
    aten.slice: _slice,
    aten.select: _select,
    operator.getitem: _getitem,
    aten.cat: _cat,
    aten.stack: _stack,
    aten.mean: _reduce,
    aten.sum: _reduce,
    aten.amax: _reduce,
    aten.amin: _reduce,
    aten.logsumexp: _reduce,
    aten.var: _reduce,
    aten.linalg_vector_norm: _reduce,
    aten.layer_norm: _normalise,
    aten.rms_norm: _normalise,
    aten.softmax: _softmax,
    aten._softmax: _softmax,
    aten.linear: _linear,
    aten.addmm: _linear,
    aten.mm: _linear,
    **dict.fromkeys(BATCHED_PRODUCTS, _matmul),
    aten.scaled_dot_product_attention: _attention,
}
