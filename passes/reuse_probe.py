"""Reuse the probe: what it computed for its rows need not be computed a second time.

The products before a block's exit act on each row (one token of one sample) alone. What the probe has for its rows
holds in full inference too, for the channels that are kept; so the full products run on the other rows, and the
probe's rows are put behind them. Where all up to the exit acts on rows alone (an MLP), so does the exit, and the rows
go back into the batch's order after it; elsewhere (attention) after each linear.

Putting rows in order costs the more, the more of them were not probed, and the saving grows with those that were: where
few were, all rows are computed again.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch.fx import Node

from ppgraph._torch import hint
from ppgraph.passes.base import Builder, PassResult, Program, Refusal, Site, same_size, shape_of, value_of
from ppgraph.passes.find_sites import Block
from ppgraph.passes.insert_probe import Probe, share_of_rows
from ppgraph.passes.operators import is_linear, is_pointwise, is_product, is_reshape, is_slice, linear_activations
from ppgraph.passes.select_weights import sort_topologically
from ppgraph.passes.token_axes import Sampling

aten = torch.ops.aten

# Of a batch's rows; measured on CPUs and an H100 (benchmarks/NOTES.md).
WORTHWHILE_SHARE = Fraction(1, 20)


class ReuseProbe:
    """Makes the linears of each probed block run on the rows that were not probed.

    Where no more than `WORTHWHILE_SHARE` of the rows are probed in the batch that the graph is captured from, nothing
    is changed. Either graph serves batches of all shapes. What cannot be followed row by row is left as it is: the
    result is the same, only the saving differs. The exit is copied with the weight that it has, so `compensate_exit`
    runs before.

    Leaves in `program.shared`, for each site whose exit runs by rows, `("rows", name)`: a `RowPieces`.
    """

    name = "reuse_probe"
    requires: tuple[str, ...] = ("insert_probe", "select_weights")

    def __call__(self, program: Program) -> PassResult:
        outcome = PassResult()
        for site in program.scored_sites:
            probe: Probe | None = program.shared.get(("probe", site.name))
            if probe is not None and _is_worthwhile(program, probe.sampling, program.analysis[site.name].stream):
                build = Builder(program, program.shared["exit", site.name], self.name)
                _reuse(program, build, site, probe, outcome)
                outcome.inserted += build.inserted
        sort_topologically(program.graph)
        return outcome


def _is_worthwhile(program: Program, sampling: Sampling, stream: Node) -> bool:
    """Whether enough rows are probed, by the batch's samples: tokens are about the configured share of a sample's.

    Single rows are about their configured share of the batch's.
    """
    if sampling.tokens is None:
        return share_of_rows(program.config) > WORTHWHILE_SHARE
    probed, samples = (hint(value_of(size)) for size in (sampling.sample_count, shape_of(stream)[0]))
    if probed is None or samples is None:
        return True
    return probed * Fraction(str(program.config.probe_tokens)) > samples * WORTHWHILE_SHARE


def _reuse(program: Program, build: Builder, site: Site, probe: Probe, outcome: PassResult) -> None:
    block: Block = program.analysis[site.name]
    rows = OtherRows(build, block.stream, row_order(program, build, block.stream, probe.sampling))
    try:
        _reuse_at_exit(program, rows, site, probe)
    except Refusal:
        _reuse_at_linears(program, rows, site, probe, outcome)


def _reuse_at_exit(program: Program, rows: OtherRows, site: Site, probe: Probe) -> None:
    """The whole block by rows.

    Raises:
        Refusal: something before the exit mixes rows, or is used elsewhere too.
    """
    exit_linear, narrowed = program.shared["exit", site.name], program.shared["narrowed", site.name]
    others = rows.of(narrowed)
    rows.require_no_other_users(exit_linear)
    build, (_, channels) = rows.build, program.shared["kept", site.name]
    # Two products, as joining their inputs would copy the widest tensors of the block.
    pieces = rows.pieces(others, probe.y, channels)
    products = [build.copy(exit_linear, {narrowed: piece}) for piece in pieces]
    result = rows.in_order(products, exit_linear)
    exit_linear.replace_all_uses_with(result)
    program.shared["exit", site.name] = result
    program.shared["narrowed", site.name] = pieces[0]
    program.shared["rows", site.name] = RowPieces(pieces, rows.order.slots)
    erase_unused(program, exit_linear)


def _reuse_at_linears(program: Program, rows: OtherRows, site: Site, probe: Probe, outcome: PassResult) -> None:
    """The linears by rows, each on its own: the narrowed ones, and those that stay whole."""
    narrowed = program.shared["products", site.name]
    replaced = {linear for _, linear, _ in narrowed}
    whole = [(linear, linear, None) for linear in reversed(probe.linears) if linear not in replaced]
    for product, linear, channels in [*narrowed, *whole]:
        if linear not in probe.linears or not product.users:
            continue
        try:
            others = rows.of(product)
        except Refusal as refusal:
            outcome.refused.append(f"{site.name}: {refusal}")
            continue
        pieces = rows.pieces(others, probe.linears[linear], channels)
        product.replace_all_uses_with(rows.in_order(pieces, product))
        erase_unused(program, product)


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


@dataclass(frozen=True)
class RowOrder:
    """The batch's rows, those that were not probed first.

    `others` [B·S - B'·S']: which rows those are, ascending; None where all rows are probed. `slots` [B·S]: where each
    row lies. `samples`, `tokens`: the batch's sizes B and S.
    """

    others: Node | None
    slots: Node
    samples: Any
    tokens: Any


def row_order(program: Program, build: Builder, stream: Node, sampling: Sampling) -> RowOrder:
    """The order of rows for all blocks that probe the same ones."""
    key = ("row order", sampling.rows)
    if key not in program.shared:
        program.shared[key] = _row_order(program, build, stream, sampling)
    order: RowOrder = program.shared[key]
    return order


def _row_order(program: Program, build: Builder, stream: Node, sampling: Sampling) -> RowOrder:
    samples, tokens = build.size(stream, 0), build.size(stream, 1)
    count = build(operator.mul, samples, tokens)
    probed_count = build(operator.mul, sampling.sample_count, sampling.token_count)
    other_count = build(operator.sub, count, probed_count)
    device = sampling.rows.meta["val"].device
    every = build(aten.arange.default, count, device=device)
    none = build(aten.zeros_like.default, every)
    probed = build(aten.index_fill.int_Scalar, none, 0, sampling.rows, 1)
    before = build.sub(build(aten.cumsum.default, build(aten.rsub.Scalar, probed, 1), 0), 1)
    last = build.add(build(aten.arange.default, probed_count, device=device), other_count)
    slots = build(aten.index_copy.default, before, 0, sampling.rows, last)
    others = None
    # A symbolic count is one that only running tells; two shares of 1 tell it ahead.
    all_probed = program.config.probe_batch == program.config.probe_tokens == 1 or other_count == 0
    if not all_probed:
        inverse = build(aten.index_copy.default, none, 0, slots, every)
        pieces = build(aten.split_with_sizes.default, inverse, [other_count, probed_count])
        others = build(operator.getitem, pieces, 0)
    return RowOrder(others, slots, samples, tokens)


@dataclass(frozen=True)
class RowPieces:
    """A block's kept channels [rows, C'] in two: of the rows that were not probed, if any, and of the probe's."""

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


class OtherRows:
    """Emits nodes again on the rows that were not probed, flattened: [B, S, C] or [B·S, C] -> [B·S - B'·S', C].

    What depends on the residual stream by no matrix product (the norm) is gathered.
    """

    def __init__(self, build: Builder, stream: Node, order: RowOrder) -> None:
        self.build, self.stream, self.order = build, stream, order
        self.emitted: dict[Node, Node] = {}
        self.walked: set[Node] = set()
        self.after_product: dict[Node, bool] = {}

    def of(self, node: Node) -> Node | None:
        """`node` on the other rows; None where there are none.

        Raises:
            Refusal: something that it is made of doesn't act on each row alone.
        """
        self.walked = set()
        self._walk(node)
        return None if self.order.others is None else self._emit(node)

    def require_no_other_users(self, end: Node) -> None:
        """Check that all that `of` walked through serves `end` alone, so that nothing is computed twice.

        Raises:
            Refusal: something else uses a node.
        """
        for node in self.walked:
            other = next((user for user in node.users if user is not end and user not in self.walked), None)
            if other is not None:
                raise Refusal(other, f"it uses {node.name} too")

    def pieces(self, others: Node | None, probed: Node, channels: Node | None) -> list[Node]:
        """The other rows, if any, and the probe's, of which `channels` are taken (all when None)."""
        probed = self.build(aten.reshape.default, probed, [-1, shape_of(probed)[-1]])
        if channels is not None:
            probed = self.build.select(probed, 1, channels)
        return [probed] if others is None else [others, probed]

    def in_order(self, pieces: list[Node], like: Node) -> Node:
        """Rows in the batch's order, with the leading dimensions of `like`."""
        joined = pieces[0] if len(pieces) == 1 else self.build(aten.cat.default, pieces)
        rows = self.build.select(joined, 0, self.order.slots)
        leading = [self.order.samples, self.order.tokens] if self._leading(like) == 2 else [-1]
        return self.build(aten.reshape.default, rows, [*leading, shape_of(joined)[-1]])  # type: ignore[no-any-return]

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

    def _emit(self, node: Node) -> Node:
        if node not in self.emitted:
            self.emitted[node] = self._again(node) if node in self.walked else self._gathered(node)
        return self.emitted[node]

    def _gathered(self, node: Node) -> Node:
        assert self.order.others is not None
        channels = shape_of(node)[self._leading(node) :]
        flat = self.build(aten.reshape.default, node, [-1, *channels])
        return self.build.select(flat, 0, self.order.others)

    def _again(self, node: Node) -> Node:
        rows = {operand: self._emit(operand) for operand in self._operands(node)}
        if is_reshape(node):  # the same rows, flattened already
            return rows[node.all_input_nodes[0]]
        if is_slice(node, len(shape_of(node)) - 1):
            return self.build(aten.slice.Tensor, rows[node.all_input_nodes[0]], -1, *node.args[2:])  # type: ignore[no-any-return]
        return self.build.copy(node, rows)

    def _is_after_product(self, node: Node) -> bool:
        """Whether a matrix product lies between the residual stream and this node, or is it."""
        if node is self.stream or node.op != "call_function" or node < self.stream:
            return False
        if node not in self.after_product:
            self.after_product[node] = is_product(node) or any(map(self._is_after_product, node.all_input_nodes))
        return self.after_product[node]
