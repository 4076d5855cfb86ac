"""Operators of ppgraph's own on CPUs, for what torch has no fast kernel; Inductor takes them as they are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

# Queries of one product with the keys that any of them sees, and bytes of its scores for each thread, about what a
# core's cache holds (`benchmarks/NOTES.md`).
QUERIES = 64
SCORES = 1 << 20
# So few scores torch's own kernel is done with sooner than several operators are called.
FEW_SCORES = 1 << 18


def columns(matrix: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The columns `index` [C'] int64 of `matrix` [D, C] on a CPU, [D, C'].

    By torch's kernel of `gather`; Inductor's own loop over single elements takes more than twice as long in float32 and
    four times in bfloat16 (AVX2; `benchmarks/NOTES.md`).
    """
    # Of two bytes whole numbers are gathered faster than bfloat16.
    items = matrix.view(torch.int16) if matrix.itemsize == 2 else matrix
    return items.gather(1, index.expand(matrix.shape[0], -1)).view(matrix.dtype)


def fake_columns(matrix: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """What `columns` gives, without its values."""
    return matrix.new_empty((matrix.shape[0], index.shape[0]))


def highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices [count] int64 of the highest `scores` [N] on a CPU, ascending; of equal ones the lower index wins.

    numpy finds the last of them without sorting: a tenth of the time that sorting the scores and then the indices
    takes (2816 scores, `benchmarks/NOTES.md`).
    """
    values = (scores.float() if scores.dtype == torch.bfloat16 else scores).numpy()
    rest = len(values) - count
    if count:
        kept = np.flatnonzero(values >= np.partition(values, rest)[rest])
        if len(kept) == count:
            return torch.from_numpy(kept)
    # More are as high as the last one, or some are NaN (which stand for the highest).
    return highest_by_sorting(scores, count)


def highest_by_sorting(scores: torch.Tensor, count: int) -> torch.Tensor:
    """What `highest` gives, on any device."""
    best = torch.sort(scores, stable=True, descending=True).indices[:count]
    return torch.sort(best).values


def fake_highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """What `highest` gives, without its values."""
    return scores.new_empty((count,), dtype=torch.int64)


def keys_by_block(mask: torch.Tensor) -> torch.Tensor:
    """Which keys queries see, by a mask [B, H, S, K] on a CPU that is added to scores: [blocks, 3] int64.

    For each block of `QUERIES` queries the first key that any sample's see, the one behind the last, and 1 where some
    sample's query sees none, else 0.
    """
    highest_of_all, sees_none = mask.amax((0, 1)), _hides_all(mask).flatten(0, 1).any(0)
    bounds = []
    for rows, nothing in zip(highest_of_all.split(QUERIES), sees_none.split(QUERIES), strict=True):
        places = (rows != -math.inf).any(0).nonzero()
        # Where no query sees anything, one key stands for all.
        first, last = (int(places[0]), int(places[-1])) if len(places) else (0, 0)
        bounds.append((first, last + 1, int(nothing.any())))
    return torch.tensor(bounds)


def fake_keys_by_block(mask: torch.Tensor) -> torch.Tensor:
    """What `keys_by_block` gives, without its values."""
    return mask.new_empty((_blocks(mask.shape[-2]), 3), dtype=torch.int64)


def _blocks(queries: int) -> int:
    return (queries + QUERIES - 1) // QUERIES


def attention_by_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    bounds: torch.Tensor,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """`scaled_dot_product_attention` [B, H, S, D] on a CPU, of each block of queries with the keys that it sees.

    `bounds` are what `keys_by_block` makes of the mask. Torch's kernel goes through all keys of a mask that hides the
    future, in products too small to be fast. Here those of some samples and heads are one, as many as have scores that
    stay in cache. Scores are rounded to the query's dtype, as in attention written out; torch's kernel keeps them in
    fp32. Of `FEW_SCORES` or fewer it is torch's kernel.
    """
    scores = query.shape[:-1].numel() * key.shape[2]
    if scores <= FEW_SCORES or not _has_fast_products(query.dtype):
        attended = scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=enable_gqa)
        return attended.transpose(1, 2).contiguous().transpose(1, 2)
    samples, heads, queries, _ = query.shape
    attended = query.new_empty((samples, queries, heads, value.shape[-1])).transpose(1, 2)
    blocks, sharing = bounds.tolist(), heads // key.shape[1]
    added = mask.expand(samples, heads, -1, -1)
    key, value = (given.expand(samples, -1, -1, -1).contiguous() for given in (key, value))
    most_keys = max(last - first for first, last, _ in blocks)
    of_a_key_head = sharing * min(queries, QUERIES) * most_keys * query.element_size()
    for some, key_heads in _parts(samples, key.shape[1], SCORES * torch.get_num_threads() // of_a_key_head):
        of = slice(key_heads.start * sharing, key_heads.stop * sharing)
        for block, (first, last, _) in enumerate(blocks):
            rows, keys = slice(block * QUERIES, (block + 1) * QUERIES), slice(first, last)
            read = key[some, key_heads, keys], value[some, key_heads, keys], added[some, of, rows, keys]
            attended[some, of, rows] = _attend(query[some, of, rows], *read, scale)
    if any(sees_none for *_, sees_none in blocks):
        attended.masked_fill_(_hides_all(mask), 0.0)
    return attended


def _parts(samples: int, heads: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Which samples and which heads go together: `most` heads, or all of some samples, but never less than one head."""
    some, of_each = max(1, most // heads), max(1, min(most, heads))
    starts = itertools.product(range(0, samples, some), range(0, heads, of_each))
    return ((slice(first, first + some), slice(head, min(head + of_each, heads))) for first, head in starts)


def _hides_all(mask: torch.Tensor) -> torch.Tensor:
    return mask.amax(-1, keepdim=True) == -math.inf


def _has_fast_products(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies numbers of this type; what torch does otherwise is many times slower."""
    if dtype == torch.bfloat16:
        return torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return dtype != torch.float16


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """What queries attend to; those of all heads that share keys are one product."""
    samples, heads, queries, size = query.shape
    products = samples * key.shape[1]
    scores = query.new_empty((samples, heads, queries, key.shape[2])).copy_(mask).view(products, -1, key.shape[2])
    scale = size**-0.5 if scale is None else scale
    scores.baddbmm_(query.reshape(products, -1, size), key.flatten(0, 1).transpose(1, 2), alpha=scale)
    return (scores.softmax(-1) @ value.flatten(0, 1)).view(samples, heads, queries, -1)


def fake_attention_by_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: object
) -> torch.Tensor:
    """What `attention_by_blocks` gives, without its values: heads are the inner dimension, as in torch's own kernel."""
    samples, heads, queries, _ = query.shape
    return query.new_empty((samples, queries, heads, value.shape[-1])).transpose(1, 2)


# `custom_op` would put Python of its own around each call, as long as the gather of a small history.
# Inductor's cache on disk knows operators by name: one that gives another shape than before needs another name.
for _name, _schema, _kernel, _fake in (
    ("columns", "(Tensor matrix, Tensor index) -> Tensor", columns, fake_columns),
    ("highest", "(Tensor scores, SymInt count) -> Tensor", highest, fake_highest),
    ("keys_by_block", "(Tensor mask) -> Tensor", keys_by_block, fake_keys_by_block),
    (
        "attention_by_blocks",
        "(Tensor query, Tensor key, Tensor value, Tensor mask, Tensor bounds, float? scale, bool enable_gqa) -> Tensor",
        attention_by_blocks,
        fake_attention_by_blocks,
    ),
):
    torch.library.define(f"ppgraph::{_name}", _schema)
    torch.library.impl(f"ppgraph::{_name}", "cpu", _kernel)
    torch.library.register_fake(f"ppgraph::{_name}", _fake)

COLUMNS = torch.ops.ppgraph.columns.default
HIGHEST = torch.ops.ppgraph.highest.default
KEYS_BY_BLOCK = torch.ops.ppgraph.keys_by_block.default
ATTENTION_BY_BLOCKS = torch.ops.ppgraph.attention_by_blocks.default
