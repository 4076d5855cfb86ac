"""A batch's rows (a token of a sample each) in two parts: what acts on rows alone runs on some apart from others."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ppgraph.passes.base import Builder, Program, Refusal, Site, same_size, shape_of
from ppgraph.passes.find_sites import Block
from ppgraph.passes.operators import is_linear, is_pointwise, is_product, is_reshape, is_slice, linear_activations

aten = torch.ops.aten


@dataclass(frozen=True)
class RowOrder:
    """The batch's rows, some of them behind all others.

    `others`: which the others are, ascending; None where there are none. `places`: their samples and tokens. `slots`
    [B·S]: where each row lies. `samples`, `tokens`: the batch's sizes B and S.
    """

    others: Node | None
    places: list[Node]
    slots: Node
    samples: Any
    tokens: Any


def rows_last(build: Builder, stream: Node, rows: Node, probed_count: Any, *, are_all: bool = False) -> RowOrder:
    """The order of a batch's rows in which `rows` [probed_count], all different, come last."""
    samples, tokens = build.size(stream, 0), build.size(stream, 1)
    count = build(operator.mul, samples, tokens)
    other_count = build(operator.sub, count, probed_count)
    device = rows.meta["val"].device
    every = build(aten.arange.default, count, device=device)
    none = build(aten.zeros_like.default, every)
    probed = build(aten.index_fill.int_Scalar, none, 0, rows, 1)
    before = build.sub(build(aten.cumsum.default, build(aten.rsub.Scalar, probed, 1), 0), 1)
    last = build.add(build(aten.arange.default, probed_count, device=device), other_count)
    slots = build(aten.index_copy.default, before, 0, rows, last)
    others, places = None, []
    if not (are_all or other_count == 0):
        inverse = build(aten.index_copy.default, none, 0, slots, every)
        pieces = build(aten.split_with_sizes.default, inverse, [other_count, probed_count])
        others = build(operator.getitem, pieces, 0)
        places = [build(aten.floor_divide.default, others, tokens), build(aten.remainder.Scalar, others, tokens)]
    return RowOrder(others, places, slots, samples, tokens)


def by_row(build: Builder, node: Node) -> Node:
    """[..., channels] -> [rows, channels]."""
    return build(aten.reshape.default, node, [-1, shape_of(node)[-1]])  # type: ignore[no-any-return]


@dataclass(frozen=True)
class RowPieces:
    """A block's kept channels [rows, C'] in two: of the other rows, if any, and of those behind them."""

    pieces: list[Node]
    slots: Node

    def in_order(self, build: Builder) -> Node:
        """All rows in the batch's order [B·S, C'], read from where they are: joined they would be copied first."""
        if len(self.pieces) == 1:
            return build.select(self.pieces[0], 0, self.slots)
        others, probed = self.pieces
        count = build.size(others, 0)
        # Where there are no other rows none can be read: padding is what is read instead.
        padded = build(aten.constant_pad_nd.default, others, [0, 0, 0, build.size(probed, 0)])
        place = build(aten.clamp.default, build.sub(self.slots, count), 0)
        is_other = build(aten.unsqueeze.default, build(aten.lt.Scalar, self.slots, count), 1)
        return build.where(is_other, build.select(padded, 0, self.slots), build.select(probed, 0, place))


class RowWalk:
    """Checks that what leads from a residual stream to a node acts on each row of the batch alone."""

    def __init__(self, stream: Node) -> None:
        self.stream = stream
        self.walked: set[Node] = set()
        self.after_product: dict[Node, bool] = {}

    def check(self, node: Node) -> None:
        """Walk from a node back to what can be gathered row by row.

        Raises:
            Refusal: something that it is made of doesn't act on each row alone.
        """
        self.walked = set()
        self._walk(node)

    def require_no_other_users(self, end: Node) -> None:
        """Check that all that was walked through serves `end` alone, so that nothing is computed twice.

        Raises:
            Refusal: something else uses a node.
        """
        for node in self.walked:
            other = next((user for user in node.users if user is not end and user not in self.walked), None)
            if other is not None:
                raise Refusal(other, f"it uses {node.name} too")

    def _leading(self, node: Node) -> int:
        """How many dimensions count rows: samples and tokens side by side, or flattened.

        Raises:
            Refusal: neither.
        """
        shape, batch = shape_of(node), shape_of(self.stream)[:2]
        if len(shape) >= 3 and all(same_size(size, own) for size, own in zip(shape, batch, strict=False)):
            return 2
        if len(shape) >= 2 and same_size(shape[0], batch[0] * batch[1]):
            return 1
        raise Refusal(node, f"{list(shape)} doesn't begin with samples and tokens")

    def _walk(self, node: Node) -> None:
        """Check all that a node is made of, back to what is gathered."""
        if node in self.walked:
            return
        if not self._is_after_product(node):
            self._leading(node)
            return
        self.walked.add(node)
        for operand in self._operands(node):
            self._walk(operand)

    def _operands(self, node: Node) -> list[Node]:
        """What a node reads row by row.

        Raises:
            Refusal: it doesn't act on each row alone.
        """
        leading = self._leading(node)
        if is_linear(node):
            return [linear_activations(node)]
        source = node.all_input_nodes[0]
        if is_reshape(node):
            before, after = shape_of(source)[self._leading(source) :], shape_of(node)[leading:]
            if len(before) == len(after) and all(map(same_size, before, after)):
                return [source]
            raise Refusal(node, f"it changes channels {list(before)} to {list(after)}")
        if is_slice(node, len(shape_of(node)) - 1):
            return [source]
        if is_pointwise(node):
            return [operand for operand in node.all_input_nodes if self._has_rows(node, operand)]
        raise Refusal(node, "it doesn't act on each row alone")

    def _has_rows(self, node: Node, operand: Node) -> bool:
        """Whether an operand of a pointwise `node` has its rows, or is the same for all of them.

        Raises:
            Refusal: it broadcasts over samples or tokens alone.
        """
        missing = len(shape_of(node)) - len(shape_of(operand))
        if 0 < missing < self._leading(node):
            raise Refusal(operand, f"{list(shape_of(operand))} broadcasts over a part of {list(shape_of(node))}")
        return missing == 0

    def _is_after_product(self, node: Node) -> bool:
        """Whether a matrix product lies between the residual stream and this node, or is it."""
        if node is self.stream or node.op != "call_function" or node < self.stream:
            return False
        if node not in self.after_product:
            self.after_product[node] = is_product(node) or any(map(self._is_after_product, node.all_input_nodes))
        return self.after_product[node]


class OtherRows(RowWalk):
    """Emits nodes again on an order's other rows, flattened: [B, S, C] or [B·S, C] -> [others, C].

    What depends on the residual stream by no matrix product (the norm) is gathered.
    """

    def __init__(self, build: Builder, stream: Node, order: RowOrder) -> None:
        super().__init__(stream)
        self.build, self.order = build, order
        self.emitted: dict[Node, Node] = {}

    def of(self, node: Node) -> Node | None:
        """`node` on the other rows; None where there are none.

        Raises:
            Refusal: something that it is made of doesn't act on each row alone.
        """
        self.check(node)
        return None if self.order.others is None else self._emit(node)

    def pieces(self, others: Node | None, probed: Node, channels: Node | None) -> list[Node]:
        """The other rows, if any, and the probe's, of which `channels` are taken (all when None)."""
        probed = by_row(self.build, probed)
        if channels is not None:
            probed = self.build.select(probed, 1, channels)
        return [probed] if others is None else [others, probed]

    def in_order(self, pieces: list[Node], like: Node) -> Node:
        """Rows in the batch's order, with the leading dimensions of `like`."""
        joined = pieces[0] if len(pieces) == 1 else self.build(aten.cat.default, pieces)
        rows = self.build.select(joined, 0, self.order.slots)
        leading = [self.order.samples, self.order.tokens] if self._leading(like) == 2 else [-1]
        return self.build(aten.reshape.default, rows, [*leading, shape_of(joined)[-1]])  # type: ignore[no-any-return]

    def _emit(self, node: Node) -> Node:
        if node not in self.emitted:
            self.emitted[node] = self._again(node) if node in self.walked else self._gathered(node)
        return self.emitted[node]

    def _gathered(self, node: Node) -> Node:
        if self._leading(node) == 2:
            # Flattened, Inductor would divide each element's place by sizes that it does not know to be the same.
            return self.build(aten.index.Tensor, node, self.order.places)  # type: ignore[no-any-return]
        assert self.order.others is not None
        return self.build.select(node, 0, self.order.others)

    def _again(self, node: Node) -> Node:
        rows = {operand: self._emit(operand) for operand in self._operands(node)}
        if is_reshape(node):  # the same rows, flattened already
            return rows[node.all_input_nodes[0]]
        if is_slice(node, len(shape_of(node)) - 1):
            return self.build(aten.slice.Tensor, rows[node.all_input_nodes[0]], -1, *node.args[2:])  # type: ignore[no-any-return]
        return self.build.copy(node, rows)


def require_by_rows(block: Block) -> None:
    """Check that a block, its exit linear left out, acts on each row of the batch alone, and serves nothing else.

    Raises:
        Refusal: it doesn't.
    """
    rows = RowWalk(block.stream)
    rows.check(block.exit_input)
    rows.require_no_other_users(block.exit_linear)


def replace_exit(program: Program, site: Site, rows: OtherRows, products: list[Node], pieces: list[Node]) -> None:
    """Put an exit linear's results on parts of the batch, those of the other rows first, in the place of the whole.

    `pieces`: the kept channels [rows, C'] of the other rows, if any, and of those behind them.

    Leaves in `program.shared`, in the place of what was there, `("exit", name)` and `("narrowed", name)`, and
    `("rows", name)`: a `RowPieces`.
    """
    exit_linear = program.shared["exit", site.name]
    result = rows.in_order(products, exit_linear)
    exit_linear.replace_all_uses_with(result)
    program.shared["exit", site.name] = result
    program.shared["narrowed", site.name] = pieces[0]
    program.shared["rows", site.name] = RowPieces(pieces, rows.order.slots)
    erase_unused(program, exit_linear)


def erase_unused(program: Program, node: Node) -> None:
    """Erase a call that nothing uses any more, and what only it used; what writes somewhere stays."""
    left, erased = [node], set()
    while left:
        node = left.pop()
        if node in erased or node.users or node.op != "call_function" or node.is_impure():
            continue
        left += node.all_input_nodes
        program.graph.erase_node(node)
        erased.add(node)
