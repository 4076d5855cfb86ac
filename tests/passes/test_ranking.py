"""The highest of a vector, by sorting and by comparing each with each."""

from __future__ import annotations

import pytest
import torch

from ppgraph.passes import PassResult, Program
from ppgraph.passes.base import Builder, shape_of
from tests.passes.graphs import HIDDEN, Mlp, Residual, captured

aten = torch.ops.aten


class Rank:
    """Ranks the first channel of the first sample's tokens in both ways."""

    name = "rank"
    requires: tuple[str, ...] = ()

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, program: Program) -> PassResult:
        build = Builder(program, program.output(), self.name)
        stream = next(node for node in program.placeholders() if len(shape_of(node)) == 3)
        scores = build(aten.select.int, build(aten.select.int, stream, 2, 0), 0, 0)
        program.results["sorted"] = build.highest_in_order(scores, self.count)
        program.results["compared"] = build.in_order_by_rank(scores, self.count)
        return PassResult(build.inserted)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.0, 3.0, 1.0, 2.0, -1.0], [1, 2, 3]),
        ([1.0, 1.0, 1.0, 1.0, 1.0], [0, 1, 2]),
        ([2.0, 1.0, 2.0, 1.0, 1.0], [0, 1, 2]),
        ([0.0, torch.inf, -torch.inf, 1.0, 1.0], [1, 3, 4]),
    ],
)
def test_both_ways_choose_the_same_and_the_first_of_equals(scores: list[float], expected: list[int]) -> None:
    stream = torch.zeros(2, len(scores), HIDDEN)
    stream[0, :, 0] = torch.tensor(scores)
    graph = captured(Residual(Mlp()), stream)
    graph.apply(Rank(3))
    found = graph.results(stream)
    assert found["sorted"].tolist() == found["compared"].tolist() == expected


def test_nan_gives_indices_that_can_be_read() -> None:
    stream = torch.full((2, 5, HIDDEN), torch.nan)
    graph = captured(Residual(Mlp()), stream)
    graph.apply(Rank(3))
    assert all(0 <= index < 5 for index in graph.results(stream)["compared"].tolist())
