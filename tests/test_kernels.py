"""The operators of ppgraph's own."""

import math

import pytest
import torch

from ppgraph import kernels
from ppgraph.kernels import ATTENTION_BY_BLOCKS, COLUMNS, HIGHEST, KEYS_BY_BLOCK


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


def hidden(*seen: tuple[int, int, int]) -> torch.Tensor:
    """[2, 1, 12, 12], -inf but for a key from `first` to `last` of query `row`: (row, first, last)."""
    mask = torch.full((2, 1, 12, 12), -math.inf)
    for row, first, last in seen:
        mask[row % 2, 0, row, first : last + 1] = 0.0
    return mask


def test_of_each_block_of_queries_all_keys_are_seen_that_any_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "QUERIES", 4)
    mask = hidden((0, 0, 1), (3, 2, 3), (5, 4, 4), (6, 3, 3))
    assert KEYS_BY_BLOCK(mask).tolist() == [[0, 4, 1], [3, 5, 1], [0, 1, 1]]
    assert KEYS_BY_BLOCK(mask[:, :, :2]).tolist() == [[0, 2, 1]]  # few queries, many slots of a cache
    mask[0, 0, 9, 7] = math.nan
    mask[1, 0, 11, 11] = -1e30
    assert KEYS_BY_BLOCK(mask).tolist() == [[0, 4, 1], [3, 5, 1], [7, 12, 1]]
    torch.library.opcheck(KEYS_BY_BLOCK, (mask,))


def test_of_each_block_of_queries_it_is_told_whether_one_sees_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "QUERIES", 4)
    mask = torch.zeros(2, 1, 12, 12)
    mask[1, 0, 6] = -math.inf
    mask[:, 0, 8:, :11] = -math.inf
    assert KEYS_BY_BLOCK(mask).tolist() == [[0, 12, 0], [0, 12, 1], [11, 12, 0]]


@pytest.mark.parametrize("queries", [5, 8, 11])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("heads_at_once", [0, 1, 3, 5, 8, 12])
def test_attention_by_blocks_is_attention(
    queries: int, groups: int, heads_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "QUERIES", 4)
    of_a_head = 4 * min(queries, 6) * 4  # queries, the keys that a block of them sees, bytes
    monkeypatch.setattr(kernels, "SCORES", (heads_at_once * of_a_head + 2) // torch.get_num_threads())
    torch.manual_seed(queries)
    query = torch.randn(3, queries, 4, 8).transpose(1, 2)
    key, value = (torch.randn(3, 4 // groups, queries, 8) for _ in range(2))
    places = torch.arange(queries)
    sees = (places <= places[:, None]) & (places > places[:, None] - 3)  # a window
    mask = torch.zeros(3, 1, queries, queries).masked_fill(~sees, -math.inf)
    mask[0, :, :, 0] = -math.inf  # padding: the first query of that sample sees nothing
    given = (query, key, value, mask, KEYS_BY_BLOCK(mask), 0.3, groups > 1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, scale=0.3, enable_gqa=groups > 1
    )
    found = ATTENTION_BY_BLOCKS(*given)
    assert found.stride() == query.stride()
    torch.testing.assert_close(found, expected)
    torch.library.opcheck(ATTENTION_BY_BLOCKS, given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capability", ["AVX512", "AVX2"])
def test_attention_by_blocks_of_half_precision_is_attention(
    dtype: torch.dtype, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "QUERIES", 4)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 9, 8) for _ in range(3))
    mask = torch.zeros(2, 1, 9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    given = (tensor.to(dtype) for tensor in (query, key, value, mask))
    found = ATTENTION_BY_BLOCKS(*given, KEYS_BY_BLOCK(mask), None, False)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
    assert found.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(("few", "is_torchs"), [(3 * 4 * 9 * 9, True), (3 * 4 * 9 * 9 - 1, False)])
def test_attention_of_few_scores_is_torchs(few: int, is_torchs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "FEW_SCORES", few)
    called: list[int] = []
    attend = kernels._attend
    monkeypatch.setattr(kernels, "_attend", lambda *given: called.append(1) or attend(*given))
    query, key, value = torch.randn(3, 9, 4, 8).transpose(1, 2), torch.randn(3, 2, 9, 8), torch.randn(3, 2, 9, 8)
    mask = torch.zeros(3, 1, 9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
    mask[0, :, :, 0] = -math.inf
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    found = ATTENTION_BY_BLOCKS(query, key, value, mask, KEYS_BY_BLOCK(mask), None, True)
    torch.testing.assert_close(found, expected)
    assert found.stride() == query.stride()
    assert (not called) is is_torchs


def test_attention_by_blocks_takes_keys_that_all_samples_and_heads_share() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 4, 9, 8), torch.randn(1, 1, 9, 8), torch.randn(1, 1, 9, 8)
    mask = torch.zeros(1, 1, 9, 9)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(ATTENTION_BY_BLOCKS(query, key, value, mask, KEYS_BY_BLOCK(mask), None, False), expected)
