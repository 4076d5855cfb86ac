"""The operator rules: each is held against what really happens when a part of its operands is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import Graph, Node

from ppgraph.passes import Refusal
from ppgraph.passes.operators import Axis, operand_axes, reshaped_axis, slot_write

aten = torch.ops.aten


def node_of(target: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Node, dict[Node, torch.Tensor]]:
    """A call on placeholders that stand for the tensors among its arguments, and those tensors."""
    graph = Graph()
    tensors: dict[Node, torch.Tensor] = {}

    def placeholder(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(placeholder(item) for item in value)
        if not isinstance(value, torch.Tensor):
            return value
        node = graph.placeholder(f"tensor{len(tensors)}")
        node.meta["val"] = tensors[node] = value
        return node

    places = [placeholder(value) for value in args]
    node = graph.call_function(target, tuple(places), kwargs)
    node.meta["val"] = target(*args, **kwargs)
    return node, tensors


def require_right(node: Node, tensors: dict[Node, torch.Tensor], axis: Axis, units: list[int]) -> None:
    """Those units of the operands give those units of the result."""
    narrowed = dict(tensors)
    for operand, found in operand_axes(node, axis):
        narrowed[operand] = narrowed[operand].index_select(found.dim, indices(units, found, tensors[operand]))
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda used: narrowed[used])
    whole: torch.Tensor = node.meta["val"]
    expected = whole.index_select(axis.dim, indices(units, axis, whole))
    torch.testing.assert_close(node.target(*args, **kwargs), expected)  # type: ignore[operator]


def indices(units: list[int], axis: Axis, tensor: torch.Tensor) -> torch.Tensor:
    """Places of the units along an axis that is [outer, units, block]."""
    places = torch.arange(tensor.shape[axis.dim]).view(int(axis.outer), -1, axis.block)
    return places[:, units].flatten()


def values(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


CASES: list[tuple[Any, tuple[Any, ...], int]] = [
    (aten.add.Tensor, (values(2, 4, 6), values(6)), 2),
    (aten.add.Tensor, (values(2, 4, 6), values(2, 1, 6)), 1),
    (aten.mul.Tensor, (values(4, 1), values(2, 4, 6)), 1),
    (aten.silu.default, (values(2, 6),), 1),
    (aten.to.dtype, (values(2, 6), torch.float64), 1),
    (aten.transpose.int, (values(2, 4, 6), 1, 2), 1),
    (aten.transpose.int, (values(2, 4, 6), -1, 0), 1),
    (aten.t.default, (values(4, 6),), 0),
    (aten.t.default, (values(4, 6),), 1),
    (aten.permute.default, (values(2, 4, 6), [2, 0, 1]), 0),
    (aten.unsqueeze.default, (values(2, 4), 1), 2),
    (aten.unsqueeze.default, (values(2, 4), 2), 1),
    (aten.squeeze.dim, (values(2, 1, 4), 1), 1),
    (aten.squeeze.default, (values(1, 2, 1, 4),), 1),
    (aten.select.int, (values(2, 3, 4), 1, 0), 1),
    (aten.slice.Tensor, (values(2, 6, 4), 1, 1, 3), 2),
    (aten.cat.default, ([values(2, 4), values(3, 4)], 0), 1),
    (aten.stack.default, ([values(4, 2), values(4, 2)], 1), 0),
    (aten.stack.default, ([values(4, 2), values(4, 2)], 0), 1),
    (aten.sum.dim_IntList, (values(2, 3, 4), [1]), 1),
    (aten.mean.dim, (values(2, 3, 4), [-1], True), 1),
    (aten.layer_norm.default, (values(2, 4, 3), [3]), 1),
    (aten.softmax.int, (values(2, 4, 3), -1), 1),
    (aten.linear.default, (values(2, 4, 3), values(5, 3)), 1),
    (aten.addmm.default, (values(5), values(4, 3), values(3, 5)), 0),
    (aten.matmul.default, (values(2, 4, 3, 5), values(4, 5, 6)), 1),
    (aten.matmul.default, (values(2, 4, 5), values(2, 5, 6)), 2),
    (aten.bmm.default, (values(4, 2, 5), values(4, 5, 3)), 0),
    (aten.baddbmm.default, (values(1, 2, 3), values(4, 2, 5), values(4, 5, 3)), 0),
    (aten.scaled_dot_product_attention.default, (values(2, 4, 3, 5), values(2, 4, 6, 5), values(2, 4, 6, 7)), 1),
    (aten.scaled_dot_product_attention.default, (values(2, 4, 3, 5), values(2, 4, 6, 5), values(2, 4, 6, 7)), 2),
    (aten.scaled_dot_product_attention.default, (values(2, 4, 3, 5), values(2, 4, 6, 5), values(2, 4, 6, 7)), 3),
    (
        aten.scaled_dot_product_attention.default,
        (values(2, 4, 3, 5), values(2, 4, 6, 5), values(2, 4, 6, 7), values(2, 1, 3, 6)),
        0,
    ),
    (aten.view_as_complex.default, (values(4, 3, 2),), 0),
    (aten.index.Tensor, (values(4, 6), [None, torch.tensor([1])]), 0),
]


@pytest.mark.parametrize(("target", "args", "dim"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_part_of_the_operands_gives_that_part_of_the_result(target: Any, args: tuple[Any, ...], dim: int) -> None:
    node, tensors = node_of(target, *args)
    if target is aten.index.Tensor:
        constant = node.args[1][1]  # type: ignore[index]
        constant.op = "get_attr"
    require_right(node, tensors, Axis(dim), [0, 1] if node.meta["val"].shape[dim] > 2 else [1])


@pytest.mark.parametrize(
    ("source", "result", "axis"),
    [
        ((2, 3, 8), (2, 3, 4, 2), Axis(2)),  # heads come from channels
        ((2, 3, 4, 2), (2, 3, 8), Axis(2, 2)),  # and become channels again
        ((2, 4, 3, 5), (8, 3, 5), Axis(0, 1, 2)),  # heads folded with samples
        ((8, 3, 5), (2, 4, 3, 5), Axis(1)),
        ((6, 8), (2, 3, 8), Axis(2)),
    ],
)
def test_reshapes_follow_units_through_splits_and_folds(
    source: tuple[int, ...], result: tuple[int, ...], axis: Axis
) -> None:
    node, tensors = node_of(aten.reshape.default, values(*source), list(result))
    require_units(node, tensors, axis, list(result))


def require_units(node: Node, tensors: dict[Node, torch.Tensor], axis: Axis, shape: list[int]) -> None:
    """As `require_right`, for a call that names its result's sizes."""
    ((operand, found),) = operand_axes(node, axis)
    units = [0, 2]
    part = tensors[operand].index_select(found.dim, indices(units, found, tensors[operand]))
    count = shape[axis.dim] // (axis.block * int(axis.outer))
    shape[axis.dim] = shape[axis.dim] * len(units) // count
    whole: torch.Tensor = node.meta["val"]
    assert torch.equal(part.reshape(shape), whole.index_select(axis.dim, indices(units, axis, whole)))


def test_a_dimension_that_is_cut_through_has_no_source() -> None:
    assert reshaped_axis((4, 6), (3, 8), Axis(0)) is None
    node, _ = node_of(aten.reshape.default, values(3, 8), [4, 6])
    with pytest.raises(Refusal, match=r"its input \[3, 8\] has no dimension of its own for dimension 0 of \[4, 6\]"):
        operand_axes(node, Axis(0))


MIXING: list[tuple[Any, tuple[Any, ...], int]] = [
    (aten.softmax.int, (values(2, 4), -1), 1),
    (aten.layer_norm.default, (values(2, 4), [4]), 1),
    (aten.linear.default, (values(2, 3), values(5, 3)), 1),
    (aten.cat.default, ([values(2, 4), values(3, 4)], 0), 0),
    (aten.stack.default, ([values(4), values(4)], 0), 0),
    (aten.sum.dim_IntList, (values(2, 4), [1], True), 1),
    (aten.slice.Tensor, (values(2, 6), 1, 1, 3), 1),
    (aten.slice_scatter.default, (values(6), values(2), 0, 1, 3), 0),
]


@pytest.mark.parametrize(("target", "args", "dim"), MIXING, ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_mixed_is_refused(target: Any, args: tuple[Any, ...], dim: int) -> None:
    node, _ = node_of(target, *args)
    name = f"aten.{target.overloadpacket.__name__}"
    with pytest.raises(Refusal, match=rf"\({name}\): it mixes dimension {dim}, so that a part of it takes all"):
        operand_axes(node, Axis(dim))


def test_an_operator_without_a_rule_says_where_one_would_go() -> None:
    node, _ = node_of(aten.flip.default, values(2, 4), [1])
    with pytest.raises(Refusal, match=r"\(aten.flip\): no operator rule .* dimension 0 .* passes/operators.py"):
        operand_axes(node, Axis(0))


def test_grouped_heads_are_left_to_the_channel_analysis() -> None:
    node, _ = node_of(
        aten.scaled_dot_product_attention.default,
        values(1, 4, 3, 2),
        values(1, 2, 3, 2),
        values(1, 2, 3, 2),
        enable_gqa=True,
    )
    with pytest.raises(Refusal, match="query heads share key heads"):
        operand_axes(node, Axis(1))


def test_operands_of_size_one_are_needed_whole() -> None:
    node, tensors = node_of(aten.mul.Tensor, values(2, 4), values(2, 1))
    left, _ = tensors
    assert operand_axes(node, Axis(1)) == [(left, Axis(1))]


@pytest.mark.parametrize(
    ("shape", "dim", "is_slots"),
    [
        ((2, 3, 6, 4), 2, True),
        ((2, 3, 6, 4), -2, True),
        ((2, 6, 3, 4), 1, False),
        ((2, 6, 4), 1, False),
        ((2, 1, 3, 6, 4), 3, False),
    ],
)
def test_slots_of_a_cache_are_written_along_the_third_of_four_dimensions(
    shape: tuple[int, ...], dim: int, is_slots: bool
) -> None:
    new = list(shape)
    new[dim] = 2
    node, _ = node_of(aten.index_copy.default, torch.zeros(shape), dim, torch.tensor([1, 4]), torch.ones(new))
    assert slot_write(node) == (node if is_slots else None)
    seen = node.graph.call_function(aten.slice.Tensor, (node, 0, 0, 1))
    assert slot_write(seen) == (node if is_slots else None)
