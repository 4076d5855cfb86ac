"""Operators of ppgraph's own on CPUs, for what torch has no fast kernel; Inductor takes them as they are."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

# Queries of one product with the keys that any of them sees, and from how many queries or keys on: fewer gain less or
# nothing (`benchmarks/NOTES.md`).
QUERIES = 256
WORTHWHILE = 512


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
    best = torch.sort(scores, stable=True, descending=True).indices[:count]
    return torch.sort(best).values


def fake_highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """What `highest` gives, without its values."""
    return scores.new_empty((count,), dtype=torch.int64)


def seen_keys(mask: torch.Tensor) -> torch.Tensor:
    """Which keys queries see, by a mask [B, H, S, K] on a CPU that is added to scores: [blocks, 2] int64.

    For each block of `QUERIES` queries the first key that any sample's see, and the one behind the last. All keys where
    they are few.
    """
    queries, keys = mask.shape[-2:]
    bounds = torch.tensor([0, keys]).repeat(_blocks(queries), 1)
    if _are_few(queries, keys):
        return bounds
    highest_of_all = mask.amax((0, 1))
    for block, rows in enumerate(highest_of_all.split(QUERIES)):
        places = (rows != -math.inf).any(0).nonzero()
        # Where queries see nothing, one key is left to make of that what the kernel does.
        bounds[block] = torch.cat((places[0], places[-1] + 1)) if len(places) else torch.tensor([0, 1])
    return bounds


def fake_seen_keys(mask: torch.Tensor) -> torch.Tensor:
    """What `seen_keys` gives, without its values."""
    return mask.new_empty((_blocks(mask.shape[-2]), 2), dtype=torch.int64)


def _blocks(queries: int) -> int:
    return (queries + QUERIES - 1) // QUERIES


def _are_few(queries: int, keys: int) -> bool:
    return max(queries, keys) < WORTHWHILE


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

    `bounds` are what `seen_keys` makes of the mask. Torch's kernel goes through all keys of a mask that hides the
    future, and leaves out half of the work only where it is told to be causal; which masks of padding, windows or
    packed texts are not.
    """
    if _are_few(query.shape[-2], key.shape[-2]):
        whole = scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=enable_gqa)
        return whole.transpose(1, 2).contiguous().transpose(1, 2)
    pieces = []
    for block, (first, last) in enumerate(bounds.tolist()):
        rows, keys = slice(block * QUERIES, (block + 1) * QUERIES), slice(first, last)
        attended = scaled_dot_product_attention(
            query[:, :, rows],
            key[:, :, keys],
            value[:, :, keys],
            mask[:, :, rows, keys],
            scale=scale,
            enable_gqa=enable_gqa,
        )
        pieces.append(attended.transpose(1, 2))
    return torch.cat(pieces, 1).transpose(1, 2)


def fake_attention_by_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: object
) -> torch.Tensor:
    """What `attention_by_blocks` gives, without its values: heads are the inner dimension, as in torch's own kernel."""
    samples, heads, queries, _ = query.shape
    return query.new_empty((samples, queries, heads, value.shape[-1])).transpose(1, 2)


# `custom_op` would put Python of its own around each call, as long as the gather of a small history.
for _name, _schema, _kernel, _fake in (
    ("columns", "(Tensor matrix, Tensor index) -> Tensor", columns, fake_columns),
    ("highest", "(Tensor scores, SymInt count) -> Tensor", highest, fake_highest),
    ("seen_keys", "(Tensor mask) -> Tensor", seen_keys, fake_seen_keys),
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
SEEN_KEYS = torch.ops.ppgraph.seen_keys.default
ATTENTION_BY_BLOCKS = torch.ops.ppgraph.attention_by_blocks.default
