"""Running a block on some of its samples and tokens: from its exit's input back to the block's input.

The same backward walk as for channels, along the dimensions of samples and tokens. What depends on the residual stream
before any matrix product (the norm) is gathered, and so is whatever else the block reads that is indexed by sample or
token: rotary tables, masks, position biases. Everything between is emitted again on the gathered rows.

Keys may be more than the batch's own tokens: what a cache holds comes before them, attention sinks come behind. Those
stay whole, so that the probed tokens see them as the full batch does. A cache of fixed size has slots, into some of
which the batch's keys are written: the probe reads the slots as full inference fills them (such keys stay whole anyway)
and hides those of tokens that it did not choose.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ppgraph._torch import expression
from ppgraph.passes.base import Builder, Refusal, same_size, shape_of
from ppgraph.passes.operators import (
    Axis,
    argument,
    call_target,
    is_attention_softmax,
    is_fused_attention,
    is_linear,
    is_one,
    is_pointwise,
    is_product,
    is_reshape,
    is_slice,
    joined_operands,
    key_axes,
    operand_axes,
    reduced_axis,
    reshaped_axis,
    sliced_range,
    slot_write,
    softmax_dim,
)
from ppgraph.passes.rebuild import rebuild

aten = torch.ops.aten
NONE = expression(0)


@dataclass(frozen=True)
class Tag:
    """What a dimension counts.

    `counts`: samples, tokens, rows (samples times tokens, flattened), or nothing yet where a broadcast dimension of
    size 1 becomes samples because each sample has its own tokens ("each"). `block`: consecutive indices of one sample,
    where heads are folded with samples. `before` and `after`: how many places around the tokens are none of them
    (`before` is a sympy expression): keys of earlier calls, attention sinks. All of those are kept.
    """

    counts: Literal["sample", "token", "row", "each"]
    block: int = 1
    before: Any = NONE
    after: int = 0

    @property
    def is_sample(self) -> bool:
        return self.counts in ("sample", "each")

    @property
    def has_others(self) -> bool:
        """Whether places that are no tokens lie around the tokens."""
        return self.before != 0 or self.after != 0


SAMPLE, TOKEN, ROW, EACH = Tag("sample"), Tag("token"), Tag("row"), Tag("each")
Tags = tuple[tuple[int, Tag], ...]
Key = tuple[Node, Tags]


@dataclass
class ProbePlan:
    """What is gathered and what is emitted again, with the operands' tags for each, for one residual stream.

    `slots`: for each attention or softmax over the slots of a cache, the operator that writes the new keys into them.
    """

    output: Key
    stream: Node
    gathered: set[Key] = field(default_factory=set)
    operands: dict[Key, dict[Node, Tags]] = field(default_factory=dict)
    slots: dict[Node, Node] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampling:
    """The chosen samples and tokens of one residual stream.

    `samples` [B'] and `tokens` [S'] ascend; `tokens` counts from each sample's first real token, and is None where
    single rows were chosen: then each row is a sample of one token, and B' counts rows. `columns` [S'] or,
    when samples start at different columns, [B', S'] says where those tokens lie, and `rows` [B'·S'] where in flattened
    batches. `real` [B', S'] is False where a
    sample has no token there, `used` [S'] where a token was chosen only to fill up; both None without padding.
    """

    samples: Node
    tokens: Node | None
    columns: Node
    rows: Node
    sample_count: Any
    token_count: Any
    real: Node | None = None
    used: Node | None = None


def plan_probe(stream: Node, exit_input: Node, region: frozenset[Node]) -> ProbePlan:
    """Plan the probe of one block.

    Raises:
        Refusal: an operator in between mixes samples or tokens in a way the probe can't follow.
    """
    return _Planner(stream, exit_input, region).plan


class _Planner:
    def __init__(self, stream: Node, exit_input: Node, region: frozenset[Node]) -> None:
        shape = shape_of(stream)
        if len(shape) != 3:
            raise Refusal(stream, f"the residual stream is [samples, tokens, hidden], not {list(shape)}")
        self.samples, self.tokens = shape[0], shape[1]
        self.known_sizes = {expression(self.tokens): self.tokens}
        self.region = region
        self.early: dict[Node, bool] = {}
        self.stream = stream
        self.plan = ProbePlan((exit_input, self._leading_tags(exit_input)), stream)
        self.written: Node | None = None
        self._visit(*self.plan.output)

    def _leading_tags(self, node: Node) -> Tags:
        shape = shape_of(node)
        if len(shape) == 3:
            return self._active({0: SAMPLE, 1: TOKEN})
        if len(shape) == 2 and same_size(shape[0], self.samples * self.tokens):
            return self._active({0: ROW})
        raise Refusal(node, f"expected [samples, tokens, channels] or flattened tokens, found {list(shape)}")

    def _active(self, tags: dict[int, Tag]) -> Tags:
        """Drop dimensions that are known to be 1: there is nothing to choose from."""
        one_sample, one_token = is_one(self.samples), is_one(self.tokens)
        kept: dict[int, Tag] = {}
        for dim, tag in tags.items():
            if tag == ROW and (one_sample or one_token):
                tag = TOKEN if one_sample else SAMPLE
            if (tag.counts == "sample" and one_sample) or (tag.counts == "token" and one_token):
                continue
            kept[dim] = tag
        return tuple(sorted(kept.items(), key=lambda item: item[0]))

    def _visit(self, node: Node, tags: Tags) -> None:
        key = (node, tags)
        if not tags or key in self.plan.gathered or key in self.plan.operands:
            return
        in_slots = self.written is not None and slot_write(node) is node
        if node not in self.region or self._is_early(node) or in_slots:
            self._check_sizes(node, tags)
            self._check_order(node, tags)
            self.plan.gathered.add(key)
            return
        operands = self._operand_tags(node, dict(tags))
        self.plan.operands[key] = operands
        for operand, operand_tags in operands.items():
            self._visit(operand, operand_tags)

    def _is_early(self, node: Node) -> bool:
        """Whether no matrix product lies between the residual stream, which may be one itself, and this node."""
        if node is self.stream:
            return True
        if node not in self.early:
            self.early[node] = not is_product(node) and all(
                self._is_early(operand)
                for operand in node.all_input_nodes
                if operand in self.region and operand is not self.stream
            )
        return self.early[node]

    def _check_sizes(self, node: Node, tags: Tags) -> None:
        for dim, tag in tags:
            size, expected = shape_of(node)[dim] if dim >= 0 else 1, self._size(tag)
            if tag.counts == "each" or expression(size) - expected == 0 or self._is_known(size, expected):
                continue
            raise Refusal(
                node,
                f"dimension {dim} of {list(shape_of(node))} should count {tag.counts}s ({expected} of them)",
            )

    def _check_order(self, node: Node, tags: Tags) -> None:
        """Rows are gathered as they are counted: one sample's tokens after the other's, as the stream was flattened.

        Raises:
            Refusal: they were flattened in another order.
        """
        for dim, tag in tags:
            if tag == ROW and node in self.region and node is not self.stream:
                for operand, operand_dim, operand_tag in self._operand_dims(node, dim, tag):
                    self._check_order(operand, ((operand_dim, operand_tag),))

    def _size(self, tag: Tag) -> Any:
        """The size of a dimension with this tag, as an expression."""
        if tag.counts == "token":
            return expression(self.tokens) + tag.before + tag.after
        return expression(self.samples * self.tokens if tag.counts == "row" else self.samples) * tag.block

    def _is_known(self, size: Any, expected: Any) -> bool:
        """Whether the model's own guards make two sizes equal that are spelt differently."""
        known = self.known_sizes.get(expected)
        return known is not None and _same_by_guard(size, known)

    def _operand_tags(self, node: Node, tags: dict[int, Tag]) -> dict[Node, Tags]:
        found: dict[Node, dict[int, Tag]] = {}
        for dim, tag in tags.items():
            for operand, operand_dim, operand_tag in self._operand_dims(node, dim, tag):
                found.setdefault(operand, {})[operand_dim] = operand_tag
        keys = key_axes(node)
        if keys:
            self.written = self._slots(keys)
        if is_one(self.tokens):
            pass  # nothing to choose from
        elif self.written is not None and (is_fused_attention(node) or is_attention_softmax(node)):
            self._require_mask(node)
            self.plan.slots[node] = self.written
        elif keys and self.written is None:
            sizes = [shape_of(operand)[axis.dim] for operand, axis in keys]
            for (operand, axis), tag in zip(keys, self._keys(node, sizes), strict=True):
                found.setdefault(operand, {})[axis.dim] = tag
        self._mark_shared(node, tags, found)
        return {operand: self._active(operand_tags) for operand, operand_tags in found.items()}

    def _slots(self, keys: list[tuple[Node, Axis]]) -> Node | None:
        """The operator that writes this batch's keys into slots of a cache, where attention reads all slots."""
        for operand, axis in keys:
            write = slot_write(operand)
            if write is not None and not same_size(shape_of(operand)[axis.dim], self.tokens):
                return write
        return None

    def _require_mask(self, node: Node) -> None:
        if is_fused_attention(node) and not isinstance(argument(node, 3, "attn_mask"), Node):
            raise Refusal(node, "it reads all slots of a cache; expected an attention mask that hides the empty ones")

    def _keys(self, node: Node, sizes: list[Any]) -> list[Tag]:
        """The tags of the dimensions of keys, of these sizes: the batch's own tokens are the last of them.

        The operator wants all sizes alike, but they may be spelt differently: keys and values of a cache each have a
        length of their own, and a sliding cache has one as a number too, by which masks may be sized.
        """
        ahead = next((size for size in sizes if self._is_ahead(size)), None)
        if ahead is None:
            raise Refusal(node, f"it has {sizes[0]} keys; expected those of a cache and {self.tokens} new ones")
        tags = []
        for size in sizes:
            if not self._is_ahead(size) and not _same_by_guard(size, ahead):
                raise Refusal(node, f"it has {ahead} keys, but {size} in another operand")
            known = size if self._is_ahead(size) else ahead
            self.known_sizes[expression(known)] = known
            tags.append(replace(TOKEN, before=expression(known) - expression(self.tokens)))
        if tags[0].before != 0 and is_fused_attention(node) and argument(node, 5, "is_causal", False):
            raise Refusal(node, "is_causal with keys of a cache counts from the first key; expected an attention mask")
        return tags

    def _is_ahead(self, size: Any) -> bool:
        """Whether a size is, by how it is spelt or known bounds, that of some keys and of all tokens after them.

        A cache that holds as many keys as there are tokens shares their symbol: the size is a multiple of theirs.
        """
        tokens = expression(self.tokens)
        others = expression(size) - tokens
        if others.free_symbols & tokens.free_symbols and not (others / tokens).is_Integer:
            return False
        return bool(others.is_nonnegative) or bool(statically_known_true(size >= self.tokens))

    def _operand_dims(self, node: Node, dim: int, tag: Tag) -> list[tuple[Node, int, Tag]]:
        if is_reshape(node):
            return [self._reshaped(node, dim, tag)] if tag != ROW else self._unflattened(node, dim)
        if tag.counts == "token":
            found = self._token_dims(node, dim, tag)
            if found is not None:
                return found
        operands = operand_axes(node, Axis(dim, tag.block))
        return [(operand, axis.dim, tag) for operand, axis in operands]

    def _token_dims(self, node: Node, dim: int, tag: Tag) -> list[tuple[Node, int, Tag]] | None:
        """Operators that mix tokens, but may do so for the probed ones alone; None for all others."""
        if is_attention_softmax(node) and dim == softmax_dim(node):
            return [(node.all_input_nodes[0], dim, tag)]
        reduced = reduced_axis(node, dim)
        if reduced is not None:
            return [(reduced, dim, tag)]
        joined = joined_operands(node, dim)
        if joined:
            return [self._joined(node, dim, tag, joined)]
        if is_slice(node, dim):
            return [self._sliced(node, dim, tag)]
        if is_pointwise(node):
            operands = [(operand, axis.dim, tag) for operand, axis in operand_axes(node, Axis(dim))]
            return operands + _reductions(node, dim, tag)
        return None

    def _joined(self, node: Node, dim: int, tag: Tag, operands: list[Node]) -> tuple[Node, int, Tag]:
        """Of tensors joined along tokens, the one that holds the tokens; the others are kept whole."""
        start = NONE
        for operand in operands:
            end = start + expression(shape_of(operand)[dim])
            before, after = tag.before - start, end - tag.before - expression(self.tokens)
            if before.is_nonnegative and after.is_nonnegative:
                return operand, dim, self._with_others(node, tag, before, after)
            start = end
        raise Refusal(node, f"it joins tokens along dimension {dim}; expected all of them in one of its operands")

    def _sliced(self, node: Node, dim: int, tag: Tag) -> tuple[Node, int, Tag]:
        """A slice that takes all tokens; what it leaves out is kept for it to leave out again."""
        source, (start, _) = node.all_input_nodes[0], sliced_range(node)
        if not isinstance(start, int) or start < 0:
            raise Refusal(node, f"it takes tokens from {start} on; expected a constant counted from the front")
        before = tag.before + start
        after = expression(shape_of(source)[dim]) - before - expression(self.tokens)
        return source, dim, self._with_others(node, tag, before, after)

    def _with_others(self, node: Node, tag: Tag, before: Any, after: Any) -> Tag:
        if not after.is_Integer:
            raise Refusal(node, f"{after} places follow the tokens; expected a number known at compile time")
        return replace(tag, before=before, after=int(after))

    def _reshaped(self, node: Node, dim: int, tag: Tag) -> tuple[Node, int, Tag]:
        source = node.args[0]
        assert isinstance(source, Node)
        result, origin = shape_of(node), shape_of(source)
        axis = reshaped_axis(result, origin, Axis(dim, tag.block))
        if axis is not None and axis.outer == 1 and (axis.block == 1 or tag.is_sample):
            return source, axis.dim, replace(tag, block=axis.block)
        for place, size in enumerate(origin):
            if same_size(size, self.samples * self.tokens):
                return source, place, ROW
        raise Refusal(node, f"dimension {dim} of {list(result)} ({tag.counts}s) is mixed with others in {list(origin)}")

    def _unflattened(self, node: Node, dim: int) -> list[tuple[Node, int, Tag]]:
        """Rows come from rows, or from samples and tokens side by side."""
        source = node.args[0]
        assert isinstance(source, Node)
        origin = shape_of(source)
        axis = reshaped_axis(shape_of(node), origin, Axis(dim))
        if axis is not None and axis == Axis(axis.dim):
            return [(source, axis.dim, ROW)]
        for place in range(len(origin) - 1):
            if same_size(origin[place], self.samples) and same_size(origin[place + 1], self.tokens):
                return [(source, place, SAMPLE), (source, place + 1, TOKEN)]
        raise Refusal(node, f"dimension {dim} of {list(shape_of(node))} (rows) is mixed with others in {list(origin)}")

    def _mark_shared(self, node: Node, tags: dict[int, Tag], found: dict[Node, dict[int, Tag]]) -> None:
        """Operands that broadcast over samples are gathered for each sample, which may have its own tokens."""
        samples = [(dim, tag.block) for dim, tag in tags.items() if tag.is_sample]
        if not samples or not (len(found) > 1 or is_fused_attention(node)):
            return
        dim, block = samples[0]
        from_right = len(shape_of(node)) - dim
        for operand, operand_tags in found.items():
            counted = operand_tags.values()
            if any(tag.counts == "token" for tag in counted) and not any(tag.is_sample for tag in counted):
                operand_tags[len(shape_of(operand)) - from_right] = replace(EACH, block=block)


def _same_by_guard(left: Any, right: Any) -> bool:
    """Whether two sizes are equal, if need be by what the model's own guards say."""
    return same_size(left, right) or bool(statically_known_true(left == right))


def _reductions(node: Node, dim: int, tag: Tag) -> list[tuple[Node, int, Tag]]:
    """Operands that a reduction over keys has left 1 wide (a softmax's own maximum or sum): it sees the probed ones."""
    found: list[tuple[Node, int, Tag]] = []
    for operand in node.all_input_nodes:
        own = dim - len(shape_of(node)) + len(shape_of(operand))
        if own >= 0 and _is_reduced(operand, own):
            found.append((operand, own, tag))
    return found


def _is_reduced(node: Node, dim: int) -> bool:
    if not shape_of(node) or not is_one(shape_of(node)[dim]):
        return False
    if is_pointwise(node):
        return any(_is_reduced(operand, dim) for operand in node.all_input_nodes if len(shape_of(operand)) > dim)
    return reduced_axis(node, dim) is not None


class Prober:
    """Carries out a plan: emits the block on the chosen samples and tokens."""

    def __init__(self, plan: ProbePlan, build: Builder, sampling: Sampling, gathered: dict[Key, Node]) -> None:
        self.plan, self.build, self.sampling = plan, build, sampling
        self.length = build.size(plan.stream, 1)
        self.gathered = gathered
        self.emitted: dict[Key, Node] = {}

    def run(self) -> Node:
        """The exit linear's input on the probed places: [B', S', C], or [B'·S', C] where tokens are flattened."""
        return self._emit(*self.plan.output)

    def linears(self) -> dict[Node, Node]:
        """What stands in the place of each linear of the block, for the probed rows and no others.

        A linear may be emitted a second time: for all tokens of the chosen samples, where something reads all keys.
        """
        rows = ({SAMPLE, TOKEN}, {ROW}, {tag for _, tag in self.plan.output[1]})
        return {
            node: emitted
            for (node, tags), emitted in self.emitted.items()
            if is_linear(node) and {tag for _, tag in tags} in rows
        }

    def _emit(self, node: Node, tags: Tags) -> Node:
        key = (node, tags)
        if not tags:
            return node
        if key in self.plan.gathered:
            if key not in self.gathered:
                self.gathered[key] = gather(self.build, node, tags, self.sampling, self.length)
            return self.gathered[key]
        if key not in self.emitted:
            operands = {operand: self._emit(operand, used) for operand, used in self.plan.operands[key].items()}
            self.emitted[key] = self._again(node, dict(tags), operands)
        return self.emitted[key]

    def _again(self, node: Node, tags: dict[int, Tag], operands: dict[Node, Node]) -> Node:
        if node in self.plan.slots or self.sampling.real is not None:
            if is_fused_attention(node) and any(tag.counts == "token" for tag in tags.values()):
                return self._attention_without_padding(node, tags, operands)
            if is_attention_softmax(node):
                operands = self._scores_without_padding(node, tags, operands)
        sliced = next((dim for dim in tags if is_slice(node, dim)), None)
        if sliced is not None:
            start, _ = sliced_range(node)
            end = self.build(operator.add, start, self._count(node, sliced, tags[sliced]))
            return self.build(aten.slice.Tensor, operands[node.all_input_nodes[0]], sliced, start, end)  # type: ignore[no-any-return]
        return rebuild(self.build, node, operands, {dim: self._count(node, dim, tag) for dim, tag in tags.items()})

    def _count(self, node: Node, dim: int, tag: Tag) -> Any:
        """The size of a tagged dimension of the probe: an int, or the node that computes it."""
        samples, tokens = self.sampling.sample_count, self.sampling.token_count
        if self.sampling.tokens is None and is_one(shape_of(self.plan.stream)[0]):
            samples, tokens = tokens, samples  # single rows of a single sample come as its tokens
        if tag.counts == "row":
            return self.build(operator.mul, samples, tokens)
        if tag.is_sample:
            return self.build(operator.mul, samples, tag.block) if tag.block > 1 else samples
        if not tag.has_others:
            return tokens
        return self.build(operator.add, self.build(operator.sub, self.build.size(node, dim), self.length), tokens)

    def _scores_without_padding(self, node: Node, tags: dict[int, Tag], operands: dict[Node, Node]) -> dict[Node, Node]:
        """Attention scores [B', ..., S', keys] before the softmax, lowest where the key is hidden."""
        source = node.all_input_nodes[0]
        keys = softmax_dim(node)
        if keys not in tags and node not in self.plan.slots:
            return operands
        scores = operands[source]
        lowest = torch.finfo(scores.meta["val"].dtype).min
        block = next((tag.block for tag in tags.values() if tag.is_sample), 1)
        visible = self._visible(node, source, keys, tags.get(keys, TOKEN), block)
        return {**operands, source: self.build.where(visible, scores, lowest)}

    def _attention_without_padding(self, node: Node, tags: dict[int, Tag], operands: dict[Node, Node]) -> Node:
        """Fused attention whose mask also hides keys that are padding, or no chosen token of that sample."""
        key, axis = key_axes(node)[0]
        key_tags = dict(self.plan.operands[node, tuple(tags.items())].get(key, ()))
        visible = self._visible(node, key, axis.dim, key_tags.get(axis.dim, TOKEN), 1)
        mask = argument(node, 3, "attn_mask")
        if isinstance(mask, Node):
            visible = self._masked(operands.get(mask, mask), visible)
        elif argument(node, 5, "is_causal", False):
            order = self.build(aten.arange.default, self.sampling.token_count, device=visible.meta["val"].device)
            earlier = self.build(aten.le.Tensor, order, self.build(aten.unsqueeze.default, order, 1))
            visible = self.build(aten.logical_and.default, visible, earlier)
        inputs = (operands.get(used, used) for used in node.args[:3] if isinstance(used, Node))
        settings = {name: node.kwargs[name] for name in ("scale", "enable_gqa") if name in node.kwargs}
        return self.build(call_target(node), *inputs, visible, 0.0, False, **settings)  # type: ignore[no-any-return]

    def _masked(self, mask: Node, visible: Node) -> Node:
        """An attention mask that hides what is not `visible` as well."""
        dtype = mask.meta["val"].dtype
        if dtype == torch.bool:
            return self.build(aten.logical_and.default, mask, visible)  # type: ignore[no-any-return]
        return self.build.where(visible, mask, torch.finfo(dtype).min)

    def _visible(self, node: Node, operand: Node, dim: int, tag: Tag, block: int) -> Node:
        """Which keys of `node`, an attention, are real tokens, or none of this batch's: [B', 1, ..., 1, keys].

        `dim` of `operand`, whose rank the result has, counts the keys; `block`: heads that are folded with samples, for
        which it is repeated.
        """
        samples = self.sampling.sample_count
        if node in self.plan.slots:
            visible, count = self._visible_slots(self.plan.slots[node])
        else:
            visible, count = self._visible_tokens(operand, dim, tag), self._count(operand, dim, tag)
        if block > 1:
            visible = self.build(aten.unsqueeze.default, visible, 1)
            visible = self.build(aten.expand.default, visible, [samples, block, count])
            samples = self.build(operator.mul, samples, block)
        middle = [1] * (len(shape_of(operand)) - 2)
        return self.build(aten.reshape.default, visible, [samples, *middle, count])  # type: ignore[no-any-return]

    def _visible_tokens(self, node: Node, dim: int, tag: Tag) -> Node:
        """[B', keys], the keys being the chosen tokens and what lies around them."""
        real, samples = self.sampling.real, self.sampling.sample_count
        assert real is not None
        if not tag.has_others:
            return real
        before, after = others(self.build, node, dim, tag, self.length), tag.after
        widths = [width for width in (before, after) if width != 0]
        sides = [self.build(aten.new_ones.default, real, [samples, width]) for width in widths]
        return self.build(aten.cat.default, [*sides[: before != 0], real, *sides[before != 0 :]], 1)  # type: ignore[no-any-return]

    def _visible_slots(self, write: Node) -> tuple[Node, Any]:
        """[B', slots] and the number of slots: those of chosen tokens, and those that this batch did not write."""
        sampling, build = self.sampling, self.build
        _, dim, places, _ = write.args[:4]
        assert isinstance(places, Node) and isinstance(dim, int)
        count, shape = build.size(write, dim), [sampling.sample_count, sampling.token_count]
        older = build(aten.ones.default, [count], dtype=torch.bool, device=places.meta["val"].device)
        older = build(aten.unsqueeze.default, build(aten.index_fill.int_Scalar, older, 0, places, False), 0)
        columns = sampling.columns
        if len(shape_of(columns)) == 1 and sampling.real is None:
            columns = build(aten.expand.default, build(aten.unsqueeze.default, columns, 0), shape)
        chosen = build.select(places, 0, build(aten.reshape.default, columns, [-1]))
        chosen = build(aten.reshape.default, chosen, shape)
        real = sampling.real if sampling.real is not None else build(aten.ones_like.default, chosen, dtype=torch.bool)
        seen = build(aten.new_zeros.default, real, [sampling.sample_count, count])
        seen = build(aten.scatter.src, seen, 1, chosen, real)
        return build(aten.logical_or.default, older, seen), count


def others(build: Builder, node: Node, dim: int, tag: Tag, length: Any) -> Any:
    """How many places lie before the tokens in a dimension: an int, or the node that computes it."""
    if tag.before.is_Integer:
        return int(tag.before)
    return build(operator.sub, build(operator.sub, build.size(node, dim), length), tag.after)


def gather(build: Builder, node: Node, tags: Tags, sampling: Sampling, length: Any) -> Node:
    """The chosen samples and tokens of a tensor, along its tagged dimensions. `length`: tokens in the batch."""
    if len(shape_of(sampling.columns)) == 1:  # what all samples share they still do
        tags = tuple((dim, tag) for dim, tag in tags if tag.counts != "each")
    folded = next((dim for dim, tag in tags if tag.block > 1), None)
    if folded is not None:
        return _gather_folded(build, node, tags, sampling, length, folded)
    rows = [dim for dim, tag in tags if tag == ROW]
    if rows:
        return build.select(node, rows[0], sampling.rows)
    if len(shape_of(sampling.columns)) > 1:
        return _gather_by_sample(build, node, tags, sampling, length)
    for dim, tag in tags:
        if tag.counts == "sample":
            node = build.select(node, dim, sampling.samples)
        elif tag.counts == "token":
            node = build.select(node, dim, _columns(build, node, dim, tag, sampling, length))
    return node


def _gather_folded(build: Builder, node: Node, tags: Tags, sampling: Sampling, length: Any, folded: int) -> Node:
    """As `gather`, where heads are folded with samples: they are taken apart and put together again."""
    tag = dict(tags)[folded]
    own = 1 if tag.counts == "each" else tag.block
    sizes = [build.size(node, dim) for dim in range(len(shape_of(node)))]
    samples = 1 if tag.counts == "each" else build(operator.floordiv, sizes[folded], tag.block)
    node = build(aten.reshape.default, node, [*sizes[:folded], samples, own, *sizes[folded + 1 :]])
    apart = tuple((dim + (dim > folded), replace(other, block=1) if dim == folded else other) for dim, other in tags)
    node = gather(build, node, apart, sampling, length)
    shape = [build.size(node, dim) for dim in range(len(shape_of(node)))]
    if own != tag.block:
        shape[folded + 1] = tag.block
        node = build(aten.expand.default, node, shape)
    shape[folded : folded + 2] = [build(operator.mul, shape[folded], shape[folded + 1])]
    return build(aten.reshape.default, node, shape)  # type: ignore[no-any-return]


def _columns(build: Builder, node: Node, dim: int, tag: Tag, sampling: Sampling, length: Any) -> Node:
    """Where the chosen tokens, and all that is no token, lie in a dimension of `node`: [places] or [B', places]."""
    columns = sampling.columns
    if not tag.has_others:
        return columns
    before = others(build, node, dim, tag, length)
    device = columns.meta["val"].device
    sides = [build(aten.arange.default, before, device=device)]
    if tag.after:
        last = build(operator.sub, build.size(node, dim), tag.after)
        sides.append(build.add(build(aten.arange.default, tag.after, device=device), last))
    if len(shape_of(columns)) > 1:
        sides = [build(aten.expand.default, side, [sampling.sample_count, -1]) for side in sides]
    return build(aten.cat.default, [sides[0], build.add(columns, before), *sides[1:]], -1)  # type: ignore[no-any-return]


def _gather_by_sample(build: Builder, node: Node, tags: Tags, sampling: Sampling, length: Any) -> Node:
    """As `gather`, where each sample has its own columns: one index tensor a dimension, broadcast together."""
    missing = max(0, -min(dim for dim, _ in tags))
    for _ in range(missing):
        node = build(aten.unsqueeze.default, node, 0)
    places = {dim + missing: tag for dim, tag in tags}
    rank = max(places) + 1
    sample_dim = next(dim for dim, tag in places.items() if tag.is_sample)
    indices: list[Node] = []
    for dim in range(rank):
        tag = places.get(dim)
        sizes: dict[int, Any] = {}
        if tag is None:
            size = build.size(node, dim)
            sizes, index = (
                {dim: size},
                build(aten.arange.default, size, device=sampling.samples.meta["val"].device),
            )
        elif tag.counts == "token":
            index = _columns(build, node, dim, tag, sampling, length)
            sizes = {sample_dim: sampling.sample_count, dim: build.size(index, 1)}
        else:
            sizes = {dim: sampling.sample_count}
            index = sampling.samples if tag.counts == "sample" else build(aten.zeros_like.default, sampling.samples)
        indices.append(build(aten.reshape.default, index, [sizes.get(place, 1) for place in range(rank)]))
    return build(aten.index.Tensor, node, indices)  # type: ignore[no-any-return]
