"""The operators of ppgraph's own."""

import math

import pytest
import torch

from ppgraph.kernels import COLUMNS, HIGHEST


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_columns_are_gathered_as_they_are(dtype: torch.dtype) -> None:
    matrix = torch.randn(5, 7).to(dtype)
    for given in (matrix, matrix.t().contiguous().t()):
        index = torch.tensor([1, 4, 6])
        torch.testing.assert_close(COLUMNS(given, index), given[:, index], rtol=0, atol=0)
        torch.library.opcheck(COLUMNS, (given, index))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int32])
@pytest.mark.parametrize("count", [0, 1, 4, 9])
def test_the_highest_are_those_that_sorting_finds(dtype: torch.dtype, count: int) -> None:
    torch.manual_seed(count)
    for scores in (torch.rand(9) * 100, torch.tensor([1.0, 3, 2, 3, 3, 0, 2, -0.0, 2]), torch.zeros(9)):
        given = scores.to(dtype)
        expected = given.sort(stable=True, descending=True).indices[:count].sort().values
        assert torch.equal(HIGHEST(given, count), expected)
        torch.library.opcheck(HIGHEST, (given, count))


def test_what_is_no_number_counts_as_the_highest_and_infinities_are_numbers() -> None:
    assert HIGHEST(torch.tensor([1.0, math.nan, 2, math.nan, 3]), 3).tolist() == [1, 3, 4]
    assert HIGHEST(torch.tensor([-math.inf, 1.0, math.inf, -math.inf]), 3).tolist() == [0, 1, 2]
