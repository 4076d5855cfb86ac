"""Emitting a node a second time on other operands, with its sizes where the operator names them."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from ppgraph.passes.base import Builder, shape_of
from ppgraph.passes.operators import is_reshape, is_sized

aten = torch.ops.aten


def rebuild(build: Builder, node: Node, operands: Mapping[Node, Node], sizes: Mapping[int, Any]) -> Node:
    """`node` on `operands`; `sizes` gives the dimensions of the result that change (ints or SymInt nodes)."""
    if is_sized(node):
        source = node.args[0]
        assert isinstance(source, Node) and callable(node.target)
        target, rest = (aten.reshape.default, ()) if is_reshape(node) else (node.target, node.args[2:])
        shape = _shape(build, node, sizes)
        return build(target, operands.get(source, source), shape, *rest, **node.kwargs)  # type: ignore[no-any-return]
    if node.target is operator.getitem:
        pieces = node.args[0]
        assert isinstance(pieces, Node)
        return build(operator.getitem, build.copy(pieces, operands), node.args[1])  # type: ignore[no-any-return]
    return build.copy(node, operands)


def _shape(build: Builder, node: Node, sizes: Mapping[int, Any]) -> list[Any]:
    return [
        sizes[dim] if dim in sizes else size if isinstance(size, int) else build.size(node, dim)
        for dim, size in enumerate(shape_of(node))
    ]


def unit_indices(build: Builder, units: Node, block: int) -> Node:
    """Indices of all channels of the given units: [units] -> [units * block], ascending when the units are."""
    if block == 1:
        return units
    inside = build(aten.arange.default, block, device=units.meta["val"].device, pin_memory=False)
    first = build.mul(build(aten.unsqueeze.default, units, 1), block)
    return build(aten.reshape.default, build.add(first, inside), [-1])  # type: ignore[no-any-return]
