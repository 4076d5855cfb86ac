"""Operators of ppgraph's own on CPUs, for what torch has no fast kernel: `ppgraph::columns` and `ppgraph::highest`.

Compiled or not, a graph calls them; Inductor takes them as they are.
"""

from __future__ import annotations

import numpy as np
import torch


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


# `custom_op` would put Python of its own around each call, as long as the gather of a small history.
torch.library.define("ppgraph::columns", "(Tensor matrix, Tensor index) -> Tensor")
torch.library.impl("ppgraph::columns", "cpu", columns)
torch.library.register_fake("ppgraph::columns", fake_columns)
torch.library.define("ppgraph::highest", "(Tensor scores, SymInt count) -> Tensor")
torch.library.impl("ppgraph::highest", "cpu", highest)
torch.library.register_fake("ppgraph::highest", fake_highest)

COLUMNS = torch.ops.ppgraph.columns.default
HIGHEST = torch.ops.ppgraph.highest.default
