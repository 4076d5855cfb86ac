"""When a step of decoding is recorded, and what a replay reads, writes and gives; the recorder here runs the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ppgraph.replay import Replayed, Step

WEIGHT, CACHE, TOKEN = torch.arange(1.0, 4.0), torch.zeros(3), torch.ones(3)


class Recorder:
    """As a CUDA graph: a replay reads the inputs it was recorded with, and writes the same results again."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, step: Step, inputs: Sequence[Any]) -> tuple[Callable[[], None], Sequence[Any]]:
        self.recorded += 1
        copies = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
        given = {id(copied): value for copied, value in zip(copies, inputs, strict=True)}
        results = [given.get(id(result), result) for result in step(*copies)]

        def replay() -> None:
            self.replayed += 1
            for known, result in zip(results, step(*inputs), strict=True):
                if isinstance(known, Tensor) and known is not result:
                    known.copy_(result)

        return replay, results


def step(token: Tensor, weight: Tensor, cache: Tensor, number: int) -> tuple[Tensor, Tensor, int]:
    cache.add_(token)
    return cache * weight + number, cache, number


def replayed() -> tuple[Replayed, Recorder]:
    recorder = Recorder()
    return Replayed(step, frozenset({2}), recorder), recorder


def test_a_step_is_recorded_at_its_second_call_and_reads_each_calls_token() -> None:
    run, recorder = replayed()
    cache, expected = CACHE.clone(), CACHE.clone()
    kept = []
    for number in range(5):
        token = TOKEN * number
        results = run(token, WEIGHT, cache, 7)
        wanted = step(token, WEIGHT, expected, 7)
        kept.append((results[0], wanted[0]))
        assert results[1] is cache
        assert results[2] == 7
        torch.testing.assert_close(cache, expected)
    assert (recorder.recorded, recorder.replayed) == (1, 4)
    for found, wanted in kept:  # a later replay leaves earlier results alone
        torch.testing.assert_close(found, wanted)


def test_each_replay_counts_as_a_write_to_what_the_step_writes_to() -> None:
    run, _ = replayed()
    cache = CACHE.clone()
    for number in range(4):
        before = cache._version
        run(TOKEN * number, WEIGHT, cache, 7)
        assert cache._version > before


@pytest.mark.parametrize("change", ["number", "cache", "weight"])
def test_what_lies_elsewhere_is_recorded_anew_and_never_read_where_it_was(change: str) -> None:
    run, recorder = replayed()
    given = {"token": TOKEN, "weight": WEIGHT, "cache": CACHE.clone(), "number": 7}
    for _ in range(3):
        run(*given.values())
    old = {"cache": given["cache"].clone(), "weight": WEIGHT.clone()}
    previous = given["cache"]
    given |= {"number": 8} if change == "number" else {change: given[change] * 2 + 1}
    expected = given["cache"].clone()
    for _ in range(3):
        results = run(*given.values())
        wanted = step(given["token"], given["weight"], expected, given["number"])
        torch.testing.assert_close(results[0], wanted[0])
    torch.testing.assert_close(given["cache"], expected)
    if change == "cache":
        torch.testing.assert_close(previous, old["cache"])
    assert recorder.recorded == 2


def test_a_cache_that_moves_with_each_step_is_never_recorded() -> None:
    run, recorder = replayed()
    caches = [CACHE.clone() for _ in range(4)]
    for cache in caches:
        run(TOKEN, WEIGHT, cache, 7)
        torch.testing.assert_close(cache, TOKEN)
    assert recorder.recorded == 0


def test_steps_with_tensors_in_two_places_are_never_recorded() -> None:
    recorder, elsewhere = Recorder(), torch.empty(2, device="meta")
    run = Replayed(lambda token, other: (token + 1,), frozenset(), recorder)
    for _ in range(3):
        run(TOKEN, elsewhere)
    assert recorder.recorded == 0
