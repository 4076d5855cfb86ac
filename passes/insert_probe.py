"""Insert the probe: some samples and tokens run ahead through each block, by default those with the largest residuals.

Paper symbols (Probe Pruning, section 4.1): R is the residual stream, n its norms, S' and B' the numbers of probed
tokens and samples, y the probe's channels. Tokens are chosen first, over all samples; then samples, over those tokens.

With `probe_choice="spread"` MLPs, for which no token needs its neighbours, are probed by single rows (a token of a
sample) that are spread evenly over the batch: a share of probe_batch times probe_tokens of them, whatever its shape.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch.fx import Node

from ppgraph.config import PruneConfig
from ppgraph.passes.base import Builder, PassResult, Program, Site, same_size, shape_of
from ppgraph.passes.find_sites import Block
from ppgraph.passes.token_axes import Prober, Sampling

aten = torch.ops.aten

# With so few probed tokens the first token, where attention gathers, is always one of them (method, step 1).
FEW_TOKENS = 10


@dataclass(frozen=True)
class Padding:
    """Where the real tokens lie when an attention mask was given; rows are aligned at their first real token.

    `columns` [B, S]: the column of each sample's j-th place, each column once. `real` [B, S]: whether a real token is
    there. `by_column` [B, S]: the same of each column. `places` [S]: at which any sample has a token. `length` []: how
    many those are.
    """

    columns: Node
    real: Node
    by_column: Node
    places: Node
    length: Node


@dataclass(frozen=True)
class Probe:
    """The probed channels `y` [B', S', C] of a site and the samples and tokens they belong to.

    `linears`: what the probe has in the place of each linear, [B', S', channels] or flattened.
    """

    y: Node
    sampling: Sampling
    linears: dict[Node, Node]


class InsertProbe:
    """Adds, ahead of every pruned block, that block on the chosen samples and tokens with its dense weights."""

    name = "insert_probe"
    requires: tuple[str, ...] = ("find_sites",)

    def __call__(self, program: Program) -> PassResult:
        inserted = 0
        if program.config.statistics == "history":
            return PassResult()
        for site in program.scored_sites:
            block: Block = program.analysis[site.name]
            build = Builder(program, block.exit_linear, self.name)
            by_row = is_probed_by_row(program.config, site)
            sampling = (rows_of if by_row else sampling_of)(program, build, block.stream)
            gathered = program.shared.setdefault(("gathered", block.stream, sampling.rows), {})
            prober = Prober(block.probe, build, sampling, gathered)
            y = prober.run()
            sizes = [sampling.sample_count, sampling.token_count, site.width]
            if len(shape_of(y)) == 2 or by_row:  # rows of a single sample come as its tokens
                y = build(aten.reshape.default, y, sizes)
            program.shared["probe", site.name] = Probe(y, sampling, prober.linears())
            inserted += build.inserted
        return PassResult(inserted)


def is_probed_by_row(config: PruneConfig, site: Site) -> bool:
    """Whether a site is probed by single rows: those of no two samples need have a position in common."""
    return config.probe_choice == "spread" and site.kind == "mlp"


def padding_of(program: Program, build: Builder, stream: Node) -> Padding | None:
    """Alignment of the batch, computed once a graph; None when there is no attention mask."""
    if program.token_mask is None:
        return None
    if "padding" not in program.shared:
        # Ahead of everything: what all layers read must not make the first of them unlike the others.
        ahead = Builder(program, program.first_call(), build.author)
        program.shared["padding"] = _padding(program.token_mask, ahead, stream)
    padding: Padding = program.shared["padding"]
    return padding


def _padding(mask: Node, build: Builder, stream: Node) -> Padding:
    length = build.size(stream, 1)
    real = _real_by_query(mask, build, stream) if len(shape_of(mask)) == 4 else _real_by_token(mask, build, length)
    start = build(aten.argmax.default, build(aten.to.dtype, real, torch.int32), 1, True)
    columns = build.add(start, build(aten.arange.default, length, device=mask.meta["val"].device))
    # Past its end a sample goes round to the padding ahead of its first token: each column has one place.
    columns = build.where(build(aten.lt.Scalar, columns, length), columns, build(aten.sub.Scalar, columns, length))
    aligned = build(aten.gather.default, real, 1, columns)
    places = build(aten.any.dim, aligned, 0)
    return Padding(columns, aligned, real, places, build(aten.sum.default, places))


def _real_by_token(mask: Node, build: Builder, length: Any) -> Node:
    """Which of the batch's tokens are real [B, S], by a mask [B, cached + S]."""
    total = build.size(mask, 1)
    if total is not length:
        # Two pieces, for a slice from a symbolic start would have a size that nothing else has.
        pieces = build(aten.split_with_sizes.default, mask, [build(operator.sub, total, length), length], 1)
        mask = build(operator.getitem, pieces, 1)
    return build(aten.ne.Scalar, mask, 0)  # type: ignore[no-any-return]


def _real_by_query(mask: Node, build: Builder, stream: Node) -> Node:
    """The same by a mask [B, H, S, keys], boolean or added to scores: padding is what doesn't see itself.

    Where keys of a cache come first, or its slots, it is what sees no key: padding at the left, as `generate` has it.
    """
    value = mask.meta["val"]
    visible = mask
    if value.dtype != torch.bool:
        visible = build(aten.gt.Scalar, mask, torch.finfo(value.dtype).min / 2)
    if same_size(shape_of(mask)[2], shape_of(mask)[3]):
        seen = build(aten.diagonal.default, visible, 0, 2, 3)
    else:
        seen = build(aten.any.dim, visible, 3)
    real = build(aten.any.dim, seen, 1)
    return build(aten.expand.default, real, [build.size(stream, 0), build.size(stream, 1)])  # type: ignore[no-any-return]


def sampling_of(program: Program, build: Builder, stream: Node) -> Sampling:
    """The samples and tokens to probe for a residual stream, chosen once for all blocks that read it."""
    key = ("sampling", stream)
    if key not in program.shared:
        program.shared[key] = _sampling(program, build, stream)
    sampling: Sampling = program.shared[key]
    return sampling


def _sampling(program: Program, build: Builder, stream: Node) -> Sampling:
    config = program.config
    samples, length = build.size(stream, 0), build.size(stream, 1)
    sample_count = build.share_of(samples, config.probe_batch)
    token_count = build(torch.sym_max, build.share_of(length, config.probe_tokens), 2)
    if isinstance(length, int):  # a symbolic length is at least 2
        token_count = min(token_count, length)
    norms = build(aten.linalg_vector_norm.default, build(aten.to.dtype, stream, torch.float32), 2, [-1])
    padding = padding_of(program, build, stream)
    if padding is not None:
        norms = build.where(padding.real, build(aten.gather.default, norms, 1, padding.columns), 0.0)
    importance = build(aten.linalg_vector_norm.default, norms, 2, [0])
    used: Node | None = None
    if padding is None:
        tokens = _most_important_tokens(build, importance, token_count)
    else:
        tokens, used = _most_important_real_tokens(build, importance, token_count, padding, config.probe_tokens, length)
    chosen = build.select(norms, 1, tokens)
    if used is not None:
        chosen = build.where(used, chosen, 0.0)
    by_sample = build(aten.linalg_vector_norm.default, chosen, 2, [1])
    best = build.highest_in_order(by_sample, sample_count)
    return placed(build, best, tokens, used, padding, (sample_count, token_count, length))


def rows_of(program: Program, build: Builder, stream: Node) -> Sampling:
    """The rows to probe of blocks without attention, each a sample of one token: the same for all layers."""
    if "rows" not in program.shared:
        padding = padding_of(program, build, stream)
        anchor = program.first_call() if padding is None else padding.length.next
        ahead = Builder(program, anchor, build.author)
        program.shared["rows"] = _evenly_spaced(ahead, program.config, stream, padding)
    rows: Sampling = program.shared["rows"]
    return rows


def share_of_rows(config: PruneConfig) -> Fraction:
    """Which share of a batch's rows is probed where rows are chosen by themselves."""
    if config.dense_tokens:
        return Fraction(str(config.dense_tokens)) / 3
    return Fraction(str(config.probe_batch)) * Fraction(str(config.probe_tokens))


def _evenly_spaced(build: Builder, config: PruneConfig, stream: Node, padding: Padding | None) -> Sampling:
    """Of n rows, sample after sample, each at which the share of them fills another whole one."""
    samples, length = build.size(stream, 0), build.size(stream, 1)
    total = build(operator.mul, samples, length)
    share = share_of_rows(config)
    count = build.share_of(total, share)
    real = None
    if padding is None:
        filled = build.mul(build.add(_arange(build, count, stream), 1), total)
        picked = build.sub(_divided(build, build.add(filled, build(operator.sub, count, 1)), count), 1)
    else:
        chosen = _every_so_many(build, build(aten.reshape.default, padding.real, [-1]), share)
        picked = build.highest(build(aten.to.dtype, chosen, torch.int32), count)
        real = build(aten.unsqueeze.default, build.select(chosen, 0, picked), 1)
    sample, place = _divided(build, picked, length), build(aten.remainder.Scalar, picked, length)
    column = place if padding is None else build(aten.index.Tensor, padding.columns, [sample, place])
    rows = build.add(build.mul(sample, length), column)
    return single_rows(build, samples, (sample, column), rows, count, real)


def single_rows(
    build: Builder, samples: Any, at: tuple[Node, Node], rows: Node, count: Any, real: Node | None = None
) -> Sampling:
    """`count` single rows of a batch of so many `samples`, `at` these samples and columns [count] each."""
    sample, column = at
    columns = column if samples == 1 else build(aten.unsqueeze.default, column, 1)
    return Sampling(sample, None, columns, rows, count, 1, real)


def _every_so_many(build: Builder, real: Node, share: Fraction) -> Node:
    """Of the rows [N] that are real, a share, as `_evenly_spaced` takes them: [N] bool."""
    upto = build(aten.cumsum.default, real, 0)
    count = build(aten.sum.default, real)
    wanted, count = _share_of(build, count, share), build(aten.clamp.default, count, 1)
    before, after = (_divided(build, build.mul(rank, wanted), count) for rank in (build.sub(upto, 1), upto))
    return build(aten.logical_and.default, real, build(aten.ne.Tensor, before, after))  # type: ignore[no-any-return]


def _share_of(build: Builder, count: Node, share: Fraction) -> Node:
    """`ceil(count * share)` of a number that only running tells, []; `Builder.share_of` is of sizes."""
    scaled = build.add(build.mul(count, share.numerator), share.denominator - 1)
    return _divided(build, scaled, share.denominator)


def _divided(build: Builder, number: Node, by: Any) -> Node:
    return build(aten.floor_divide.default, number, by)  # type: ignore[no-any-return]


def _most_important_tokens(build: Builder, importance: Node, count: Any) -> Node:
    """Step 1 for a batch without padding: [S] -> [S'] ascending."""
    tokens = build.highest_in_order(importance, count)
    if isinstance(count, int) and count > FEW_TOKENS:
        return tokens
    number = build(aten.scalar_tensor.default, count, device=tokens.meta["val"].device)
    return _with_sink(build, tokens, build(aten.le.Scalar, number, FEW_TOKENS))


def _most_important_real_tokens(
    build: Builder, importance: Node, count: Any, padding: Padding, share: float, length: Any
) -> tuple[Node, Node]:
    """Step 1 under padding: `count` places sized by the batch's shape, of which its real length decides how many count.

    Returns tokens [S'], all different, and used [S'], False at fillers, which stand last.
    """
    exact = Fraction(str(share))
    wanted = build(aten.clamp.default, _share_of(build, padding.length, exact), 2)
    wanted = build(aten.minimum.default, wanted, padding.length)
    best = build.highest(importance, count)
    rank = _arange(build, count, best)
    last = build(aten.add.Scalar, best, length)
    ordered = build.ascending(build.where(build(aten.lt.Tensor, rank, wanted), best, last))
    used = build(aten.lt.Scalar, ordered, length)
    tokens = build.where(used, ordered, build(aten.sub.Scalar, ordered, length))
    return _with_sink(build, tokens, build(aten.le.Scalar, wanted, FEW_TOKENS)), used


def _with_sink(build: Builder, tokens: Node, few: Node) -> Node:
    """The first token takes the place of the first of `tokens` [S'] where `few` holds, and that one its place."""
    first = build(aten.slice.Tensor, tokens, 0, 0, 1)
    sink = build(aten.eq.Scalar, _arange(build, build.size(tokens, 0), tokens), 0)
    swapped = build.where(build(aten.eq.Scalar, tokens, 0), first, tokens)
    return build.where(few, build(aten.masked_fill.Scalar, swapped, sink, 0), tokens)


def placed(
    build: Builder,
    samples: Node,
    tokens: Node,
    used: Node | None,
    padding: Padding | None,
    counts: tuple[Any, Any, Any],
) -> Sampling:
    """Where the chosen tokens lie in the batch."""
    sample_count, token_count, length = counts
    rows = build(aten.unsqueeze.default, samples, 1)
    columns, real = tokens, None
    if padding is not None and used is not None:
        columns = build(aten.index.Tensor, padding.columns, [rows, tokens])
        real = build(aten.logical_and.default, build(aten.index.Tensor, padding.real, [rows, tokens]), used)
    flat = build(aten.reshape.default, build.add(build.mul(rows, length), columns), [-1])
    if real is not None and isinstance(sample_count, int) and sample_count == 1:
        columns = build(aten.reshape.default, columns, [-1])
    return Sampling(samples, tokens, columns, flat, sample_count, token_count, real, used)


def _arange(build: Builder, count: Any, like: Node) -> Node:
    return build(aten.arange.default, count, device=like.meta["val"].device)  # type: ignore[no-any-return]
