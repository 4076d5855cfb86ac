"""Narrowing a block to some of its units: from its exit linear's input back to the linears that make the channels.

The walk starts at the input of the exit linear and follows `operators.operand_axes` backwards, through everything
whose *every* user is narrowed too, down to linears with a weight parameter: those lose rows. Where it can't go on (a
key that a cache also keeps, key heads that several query heads share), the activation itself is indexed, so the result
is always right and only the saving differs.
"""

from __future__ import annotations

import heapq
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.fx import Node

from ppgraph._torch import expression, unset_fake_temporarily
from ppgraph.passes.base import Builder, Program, Refusal, Site, StateInput, ancestors, same_size, shape_of
from ppgraph.passes.operators import (
    Axis,
    argument,
    is_constant,
    is_fused_attention,
    is_linear,
    is_one,
    is_product,
    is_view,
    linear_bias,
    linear_weight,
    operand_axes,
    weight_operand,
)
from ppgraph.passes.rebuild import rebuild, unit_indices

aten = torch.ops.aten
Action = Literal["copy", "select", "leaf", "share_keys"]


@dataclass(frozen=True)
class Layout:
    """How a view of a linear's output is made from its channels.

    `channels` holds, for each unit (rows) and each place inside it, the output channel of the linear: [units, r], or
    [1, r] when the view is kept whole. `row_dims` are the view's dimensions that come from samples and tokens.
    `distinct`: no channel appears twice. `consecutive`: they count up from 0.
    """

    channels: torch.Tensor
    row_dims: tuple[int, ...]
    channel_dims: tuple[int, ...]
    distinct: bool
    consecutive: bool


@dataclass
class EntryLinear:
    """A linear that loses rows: the views of its output that are narrowed, and those that stay whole."""

    narrowed: dict[Node, Layout] = field(default_factory=dict)
    whole: dict[Node, Layout] = field(default_factory=dict)


@dataclass
class Narrowing:
    """The plan: what happens to each node between the entry linears and the exit linear."""

    axes: dict[Node, Axis] = field(default_factory=dict)
    actions: dict[Node, Action] = field(default_factory=dict)
    entries: dict[Node, EntryLinear] = field(default_factory=dict)
    stops: list[Refusal] = field(default_factory=list)


def weight_parameter(program: Program, node: Node) -> Node | None:
    """The weight placeholder of a linear; None when the node is no linear or multiplies two activations."""
    if not is_linear(node):
        return None
    weight, _ = linear_weight(node)
    return weight if weight in program.parameters else None


class NarrowingPlanner:
    """Plans the narrowing of one block.

    `region`: the nodes that depend on the block's residual stream; `position`: each node's place in the graph.
    """

    def __init__(
        self,
        program: Program,
        exit_linear: Node,
        exit_input: Node,
        region: frozenset[Node],
        position: Mapping[Node, int],
    ) -> None:
        self.program, self.exit_linear, self.exit_input = program, exit_linear, exit_input
        self.region, self.position = region, position
        self.plan = Narrowing()
        self.queue: list[tuple[int, str]] = []
        self.by_name: dict[str, Node] = {}
        self.demanders: dict[Node, list[Node]] = {}

    def run(self, block: int) -> Narrowing:
        self._demand(self.exit_input, Axis(len(shape_of(self.exit_input)) - 1, block), self.exit_linear)
        while self.queue:
            node = self.by_name[heapq.heappop(self.queue)[1]]
            self._decide(node)
        for linear in list(self.plan.entries):
            self._complete(linear)
        if not self.plan.entries and not any(is_product(node) for node in self._narrowed()):
            stop = self.plan.stops[0] if self.plan.stops else Refusal(self.exit_input, "no linear makes these channels")
            raise stop
        return self.plan

    def _narrowed(self) -> set[Node]:
        return {node for node, action in self.plan.actions.items() if action != "select"}

    def _demand(self, node: Node, axis: Axis, demander: Node) -> None:
        if node in self.plan.axes:
            if self.plan.axes[node] != axis:
                raise Refusal(
                    node,
                    f"it is wanted by two different dimensions, {self.plan.axes[node].dim} and {axis.dim}",
                )
        else:
            self.plan.axes[node] = axis
            self.by_name[node.name] = node
            heapq.heappush(self.queue, (-self.position[node], node.name))
        self.demanders.setdefault(node, []).append(demander)

    def _decide(self, node: Node) -> None:
        axis = self.plan.axes[node]
        if self._needed_whole(node):
            if node in self.region and is_view(node) and self._split_off(node):
                return
            self._stop(node, Refusal(node, "its value is needed whole elsewhere"))
        elif weight_parameter(self.program, node) is not None and axis.dim == len(shape_of(node)) - 1:
            self._leaf(node, node)
        elif is_fused_attention(node) and self._shares_keys(node, axis):
            self.plan.actions[node] = "share_keys"
            query = node.args[0]
            assert isinstance(query, Node)
            self._demand(query, axis, node)
        else:
            self._push(node, axis)

    def _push(self, node: Node, axis: Axis) -> None:
        try:
            operands = operand_axes(node, axis)
        except Refusal as refusal:
            linear = self._source_linear(node)
            if linear is None:
                self._stop(node, refusal)
            else:
                self._leaf(node, linear)
            return
        if not operands:
            self._stop(node, Refusal(node, "nothing it is made of has these channels"))
            return
        linear = self._source_linear(node)
        if linear is not None and any(axis.outer != self.plan.axes[node].outer for _, axis in operands):
            self._leaf(node, linear)
            return
        self.plan.actions[node] = "copy"
        for operand, operand_axis in operands:
            self._demand(operand, operand_axis, node)

    def _stop(self, node: Node, refusal: Refusal) -> None:
        self.plan.actions[node] = "select"
        self.plan.stops.append(refusal)

    def _leaf(self, node: Node, linear: Node) -> None:
        layout = layout_of(linear, node, self.plan.axes[node])
        if layout is None or not layout.distinct:
            self._stop(node, Refusal(node, f"its units share channels of {linear.name}"))
            return
        self.plan.actions[node] = "leaf"
        self.plan.entries.setdefault(linear, EntryLinear()).narrowed[node] = layout

    def _split_off(self, node: Node) -> bool:
        """A fused projection of which only a part is narrowed: each narrowed part becomes a view of its own."""
        linear = self._source_linear(node)
        demanders = self.demanders[node]
        if linear is None or not all(is_view(demander) for demander in demanders):
            return False
        del self.plan.axes[node]
        for demander in demanders:
            self._leaf(demander, linear)
        return True

    def _needed_whole(self, node: Node) -> bool:
        narrowed = self._narrowed() | {self.exit_linear}
        return node not in self.region or not set(_real_users(node)) <= narrowed

    def _shares_keys(self, node: Node, axis: Axis) -> bool:
        query, key = node.args[0], node.args[1]
        assert isinstance(query, Node) and isinstance(key, Node)
        return axis.dim == len(shape_of(node)) - 3 and not same_size(shape_of(query)[-3], shape_of(key)[-3])

    def _source_linear(self, node: Node) -> Node | None:
        """The linear whose output `node` is a mere view of."""
        while is_view(node):
            source = node.args[0]
            if not isinstance(source, Node):
                return None
            node = source
        return node if node in self.region and weight_parameter(self.program, node) is not None else None

    def _complete(self, linear: Node) -> None:
        """Find the views of a fused projection that stay whole; give up its narrowing when it is used as it is."""
        entry = self.plan.entries[linear]
        try:
            entry.whole = parts_kept_whole(linear, entry.narrowed)
        except Refusal as refusal:
            for node in self.plan.entries.pop(linear).narrowed:
                self._stop(node, refusal)


def parts_kept_whole(linear: Node, narrowed: Iterable[Node]) -> dict[Node, Layout]:
    """The views of a linear's output beside those that are narrowed, each with its layout.

    Raises:
        Refusal: something other than a view uses the output.
    """
    ends = dict.fromkeys(narrowed)
    if linear in ends:
        return {}
    on_path = {linear: None}
    for node in ends:
        while node is not linear:
            on_path[node] = None
            node = node.args[0]  # type: ignore[assignment]
    whole: dict[Node, Layout] = {}
    for node in [node for node in on_path if node not in ends]:
        for user in _real_users(node):
            if user in on_path:
                continue
            layout = layout_of(linear, user, None) if is_view(user) else None
            if layout is None:
                raise Refusal(user, f"it uses the fused output of {linear.name} as a whole")
            whole[user] = layout
    return whole


def share_linears(plans: Sequence[Narrowing]) -> None:
    """Let several plans narrow parts of one linear: the first of them also makes the parts that none narrows."""
    sharing: dict[Node, list[EntryLinear]] = {}
    for plan in plans:
        for linear, entry in plan.entries.items():
            sharing.setdefault(linear, []).append(entry)
    for linear, entries in sharing.items():
        if len(entries) > 1:
            first, *others = entries
            first.whole = parts_kept_whole(linear, [node for entry in entries for node in entry.narrowed])
            for entry in others:
                entry.whole = {}


def _real_users(node: Node) -> list[Node]:
    """Users of a node; `split` and `chunk` stand for the results picked from them."""
    users: list[Node] = []
    for user in node.users:
        users += list(user.users) if isinstance(user.meta.get("val"), (list, tuple)) else [user]
    return users


def layout_of(linear: Node, view: Node, axis: Axis | None) -> Layout | None:
    """Run the views between `linear` and `view` on numbered elements and read off where each channel went.

    Returns None when samples, tokens and channels do not come apart in the view's dimensions.
    """
    with unset_fake_temporarily():
        return _layout(_labels(linear, view), shape_of(linear)[-1], axis)


def _layout(labels: torch.Tensor, width: int, axis: Axis | None) -> Layout | None:
    rows, channels = labels // width, labels % width
    row_dims = tuple(dim for dim in range(labels.dim()) if not rows.select(dim, 0).unsqueeze(dim).eq(rows).all())
    channel_dims = tuple(dim for dim in range(labels.dim()) if dim not in row_dims)
    first = channels
    for dim in row_dims:
        first = first.select(dim, 0).unsqueeze(dim)
    if not first.eq(channels).all() or (axis is not None and axis.dim not in channel_dims):
        return None
    first = first.reshape([labels.shape[dim] for dim in channel_dims])
    if axis is None:
        return _described(first.reshape(1, -1), row_dims, channel_dims)
    first = first.movedim(channel_dims.index(axis.dim), 0)
    units = labels.shape[axis.dim] // axis.block
    rest = tuple(dim for dim in channel_dims if dim != axis.dim)
    return _described(first.reshape(units, -1), row_dims, (axis.dim, *rest))


def _described(channels: torch.Tensor, row_dims: tuple[int, ...], channel_dims: tuple[int, ...]) -> Layout:
    channels = channels.contiguous()
    distinct = len(channels.unique()) == channels.numel()
    consecutive = bool(channels.flatten().eq(torch.arange(channels.numel())).all())
    return Layout(channels, row_dims, channel_dims, distinct, consecutive)


def _labels(linear: Node, view: Node) -> torch.Tensor:
    """The elements of the linear's output, numbered, as `view` arranges them (small sizes for symbolic ones)."""
    chain: list[Node] = []
    node = view
    while node is not linear:
        chain.append(node)
        node = node.args[0]  # type: ignore[assignment]
    small = _SmallSizes()
    shape = [small(size) for size in shape_of(linear)]
    values: dict[Node, Any] = {linear: torch.arange(torch.Size(shape).numel()).view(shape)}

    def value(used: Node) -> Any:
        if used in values:
            return values[used]
        return _constant_value(used) if is_constant(used) else small(used.meta["val"])

    for node in reversed(chain):
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), value)
        assert callable(node.target)
        values[node] = node.target(*args, **kwargs)
    result: torch.Tensor = values[view]
    return result


def _constant_value(node: Node) -> torch.Tensor:
    while node.op != "get_attr":
        node = node.args[0]  # type: ignore[assignment]
    module = node.graph.owning_module
    assert module is not None and isinstance(node.target, str)
    value = getattr(module, node.target)
    assert isinstance(value, torch.Tensor)
    return value


class _SmallSizes:
    """Small numbers that stand for symbolic sizes, another prime for each symbol."""

    def __init__(self) -> None:
        self.stand_ins: dict[Any, int] = {}
        self.primes = iter((2, 3, 5, 7, 11, 13, 17, 19))

    def __call__(self, size: Any) -> int:
        formula = expression(size)
        for symbol in sorted(formula.free_symbols, key=str):
            if symbol not in self.stand_ins:
                self.stand_ins[symbol] = next(self.primes)
        return int(formula.subs(self.stand_ins))


class Narrower:
    """Carries out a plan: rebuilds a block on its kept units."""

    def __init__(
        self, program: Program, site: Site, plan: Narrowing, build: Builder, units: Node, channels: Node
    ) -> None:
        self.program, self.site, self.plan, self.build = program, site, plan, build
        self.units, self.channels = units, channels
        self.kept_units = shape_of(units)[0]
        self.narrowed: dict[Node, Node] = {}
        # Each product that stands for an entry linear, with that and the indices of the outputs that it has.
        self.products: list[tuple[Node, Node, Node]] = []
        # What an earlier block's narrowing has put in the place of a node that this plan may name.
        self.moved: dict[Node, Node] = program.shared.setdefault("moved", {})

    def input_of_exit(self, exit_input: Node) -> Node:
        """The exit linear's input, [..., kept], from the narrowed block."""
        for linear in self.plan.entries:
            self._entry(linear)
        return self._narrow(exit_input)

    def exit(self, exit_linear: Node, exit_input: Node, narrowed_input: Node) -> Node:
        """The exit linear on its kept columns."""
        place, dim = weight_operand(exit_linear)
        weight = exit_linear.args[place]
        assert isinstance(weight, Node)
        columns = self.build.select(weight, dim, self.channels)
        replace = {exit_input: narrowed_input, weight: columns}
        return self.build.copy(exit_linear, replace)

    def _narrow(self, node: Node) -> Node:
        if node not in self.narrowed:
            self.narrowed[node] = self._rebuild(node)
        return self.narrowed[node]

    def _rebuild(self, node: Node) -> Node:
        planned = self.moved.get(node, node)
        action, axis = self.plan.actions[planned], self.plan.axes[planned]
        if action == "select":
            return self.build.select(node, axis.dim, self._index(node, axis))
        if is_fused_attention(node) and self._reads_a_step_from_whole_keys(node, axis):
            by_sums = node.meta["val"].device.type == "cpu" and not argument(node, 5, "is_causal", False)
            return self._attention_by_sums(node) if by_sums else self._attention_on_all_heads(node)
        if action == "share_keys":
            return self._attention_on_own_keys(node)
        operands = {operand: self._narrow(operand) for operand, _ in operand_axes(node, axis)}
        kept = self.kept_units * axis.block
        return rebuild(self.build, node, operands, {axis.dim: self.build(operator.mul, self._outer(node, axis), kept)})

    def _reads_a_step_from_whole_keys(self, node: Node, axis: Axis) -> bool:
        """Whether a single token attends to keys that stay whole, so that selecting those would copy all of a cache."""
        query, key, value = node.args[:3]
        assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)
        if axis.block != 1 or axis.outer != 1 or axis.dim != len(shape_of(node)) - 3 or shape_of(query)[-2] != 1:
            return False
        whole = self.plan.actions[node] == "share_keys"
        return whole or all(self.plan.actions.get(operand) == "select" for operand in (key, value))

    def _attention_on_all_heads(self, node: Node) -> Node:
        """Attention of all heads, the dropped ones having zero queries; its results for the kept ones are selected."""
        query = node.args[0]
        assert isinstance(query, Node)
        dim, narrow = len(shape_of(query)) - 3, self._narrow(query)
        sizes = [self.build.size(query, place) for place in range(len(shape_of(query)))]
        whole = self.build(aten.new_zeros.default, narrow, sizes)
        whole = self.build(aten.index_copy.default, whole, dim, self.units, narrow)
        attended = self.build.copy(node, {query: whole})
        return self.build.select(attended, dim, self.units)

    def _attention_by_sums(self, node: Node) -> Node:
        """Attention of a single token as sums over the kept heads' keys and values, which Inductor reads in place.

        On CPUs torch's kernel, made for many queries, takes up to seven times as long on all heads (bfloat16;
        `benchmarks/NOTES.md`). In fp32 at least.
        """
        build, (query, key, value) = self.build, node.args[:3]
        assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)
        dtype, heads = torch.promote_types(node.meta["val"].dtype, torch.float32), self._key_heads(node)
        keys, values = (
            build(aten.to.dtype, build.select(shared, len(shape_of(shared)) - 3, heads), dtype)
            for shared in (key, value)
        )
        scale = node.kwargs.get("scale")
        scale = shape_of(query)[-1] ** -0.5 if scale is None else scale
        queries = build.mul(build(aten.to.dtype, self._narrow(query), dtype), scale)
        scores = build.sum(build.mul(queries, keys), -1)
        mask = self._kept_mask(node)
        if mask is not None:
            shown = build(aten.squeeze.dim, mask, -2)
            is_bool = mask.meta["val"].dtype == torch.bool
            scores = build.where(shown, scores, -math.inf) if is_bool else build.add(scores, shown)
        weights = build(aten.unsqueeze.default, build(aten._safe_softmax.default, scores, -1), -1)
        attended = build(aten.sum.dim_IntList, build.mul(weights, values), [-2], True)
        return build(aten.to.dtype, attended, node.meta["val"].dtype)  # type: ignore[no-any-return]

    def _attention_on_own_keys(self, node: Node) -> Node:
        """Grouped-query attention: each kept query head reads the key and value head of its group."""
        query, key, value = node.args[:3]
        assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)
        heads, dim = self._key_heads(node), len(shape_of(key)) - 3
        replace = {query: self._narrow(query)} | {
            shared: self.build.select(shared, dim, heads) for shared in dict.fromkeys((key, value))
        }
        mask = self._kept_mask(node)
        if mask is not None:
            replace[argument(node, 3, "attn_mask")] = mask
        copied = self.build.copy(node, replace)
        copied.kwargs = {name: setting for name, setting in copied.kwargs.items() if name != "enable_gqa"}
        return copied

    def _key_heads(self, node: Node) -> Node:
        """The key and value head that each kept query head of an attention reads."""
        query, key = node.args[:2]
        assert isinstance(query, Node) and isinstance(key, Node)
        group = shape_of(query)[-3] // shape_of(key)[-3]
        return self.units if group == 1 else self.build(aten.floor_divide.default, self.units, group)

    def _kept_mask(self, node: Node) -> Node | None:
        """An attention's mask for the kept query heads, if it has one; how many it is for may be a symbol's formula."""
        mask = argument(node, 3, "attn_mask")
        if not isinstance(mask, Node):
            return None
        if len(shape_of(mask)) < 3 or is_one(shape_of(mask)[-3]):
            return mask
        return self.build.select(mask, len(shape_of(mask)) - 3, self.units)

    def _index(self, node: Node, axis: Axis) -> Node:
        """Indices of the kept units along an axis of `node`."""
        index = self._unit_indices(axis.block)
        if axis.outer == 1:
            return index
        starts = self.build(aten.arange.default, self._outer(node, axis), device=index.meta["val"].device)
        starts = self.build(aten.unsqueeze.default, self.build.mul(starts, self.site.units * axis.block), 1)
        return self.build(aten.reshape.default, self.build.add(starts, index), [-1])  # type: ignore[no-any-return]

    def _outer(self, node: Node, axis: Axis) -> Any:
        """How often the units come around in an axis: an int, or the node that computes it."""
        if axis.outer == 1:
            return 1
        return self.build(operator.floordiv, self.build.size(node, axis.dim), self.site.units * axis.block)

    def _unit_indices(self, block: int) -> Node:
        """Indices of the kept units along a dimension of units of `block` indices."""
        if block == 1:
            return self.units
        if block == self.site.block:
            return self.channels
        return unit_indices(self.build, self.units, block)

    def _entry(self, linear: Node) -> None:
        entry = self.plan.entries[linear]
        narrowed = [(view, layout, self._rows(layout)) for view, layout in entry.narrowed.items()]
        whole = [(view, layout, self._whole_rows(layout)) for view, layout in entry.whole.items()]
        # A probe may read keys of the whole batch, from a cache's slots: they must be there before anything is chosen.
        read_first = bool(whole) and not ancestors([self.units]).isdisjoint(entry.whole)
        for pieces in (narrowed, whole) if read_first else (narrowed + whole,):
            self._pieces(linear, entry, pieces)

    def _pieces(self, linear: Node, entry: EntryLinear, pieces: Sequence[tuple[Node, Layout, Node]]) -> None:
        """Put views of one product in the place of those of the fused projection."""
        rows = pieces[0][2] if len(pieces) == 1 else self.build(aten.cat.default, [piece[2] for piece in pieces])
        output = self._linear_on(linear, rows)
        self.products.append((output, linear, rows))
        start = 0
        for view, layout, _ in pieces:
            kept = self.kept_units if view in entry.narrowed else None
            end = start + (kept or 1) * layout.channels.shape[1]
            part = output
            if len(pieces) > 1:
                part = self.build(aten.slice.Tensor, output, len(shape_of(linear)) - 1, start, end)
            rebuilt = part if view is linear else self._arranged(part, view, layout, kept)
            start = end
            if view in entry.narrowed:
                self.narrowed[view] = rebuilt
            else:
                self.moved[rebuilt] = view
                view.replace_all_uses_with(rebuilt)

    def _linear_on(self, linear: Node, rows: Node) -> Node:
        """The linear on some of its output channels."""
        position = 1 if linear.target in (aten.linear.default, aten.matmul.default, aten.mm.default) else 2
        weight = linear.args[position]
        assert isinstance(weight, Node)
        replace = {weight: self.build.select(weight, 0 if linear.target is aten.linear.default else 1, rows)}
        bias = linear_bias(linear)
        if bias is not None:
            replace[bias] = self.build.select(bias, 0, rows)
        return self.build.copy(linear, replace)

    def _rows(self, layout: Layout) -> Node:
        if layout.consecutive:
            return self._unit_indices(layout.channels.shape[1])
        rows = self.build.select(self._constant(layout.channels), 0, self.units)
        return self.build(aten.reshape.default, rows, [-1])  # type: ignore[no-any-return]

    def _whole_rows(self, layout: Layout) -> Node:
        return self.build(aten.reshape.default, self._constant(layout.channels), [-1])  # type: ignore[no-any-return]

    def _constant(self, table: torch.Tensor) -> Node:
        fake = self.channels.meta["val"].new_empty(table.shape)
        return self.program.add_state_input(StateInput("rows", self.site.name, table), fake)

    def _arranged(self, part: Node, view: Node, layout: Layout, kept: int | None) -> Node:
        """Lay the channels of `part` out as `view` has them, all or those of the `kept` units."""
        sizes = [self.build.size(view, dim) for dim in layout.row_dims]
        channel_sizes = [shape_of(view)[dim] for dim in layout.channel_dims]
        if kept is not None:
            channel_sizes[0] = kept * self.plan.axes[view].block
        arranged = self.build(aten.reshape.default, part, sizes + channel_sizes)
        order = [*layout.row_dims, *layout.channel_dims]
        back = [order.index(dim) for dim in range(len(order))]
        return arranged if back == sorted(back) else self.build(aten.permute.default, arranged, back)  # type: ignore[no-any-return]
