"""Threads: eight on one pruned model, on copies, and on two models at once, against the same calls one by one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ppgraph
from ppgraph import state
from tests.reference import masked_dense_logits
from tests.test_exactness import SIZES, batch, llama, relative

THREADS = 8
OPTIONS: dict[str, Any] = {"ratio": 0.4, "lowering": "eager", **SIZES}
BATCHES = [batch(2 + number % 3, 5 + number, "left") for number in range(THREADS)]
ROUNDS = 3


def at_once(actions: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run each in a thread of its own; all begin together."""
    barrier = threading.Barrier(len(actions))

    def begin(action: Callable[[], Any]) -> Any:
        barrier.wait()
        return action()

    with ThreadPoolExecutor(len(actions)) as pool:
        return [future.result() for future in [pool.submit(begin, action) for action in actions]]


def logits_of(pruned: Any, inputs: dict[str, Tensor], rounds: int = ROUNDS) -> list[Tensor]:
    return [pruned(**inputs, use_cache=False).logits for _ in range(rounds)]


def require_close(found: Any, expected: Any) -> None:
    """To rounding: torch's number of threads, which orders its additions, is another in the main thread."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_eight_threads_on_one_model_give_what_each_alone_gives() -> None:
    """Each batch chooses by itself here, so the order of the calls does not matter; they capture at once, too."""
    model = llama(2)
    alone = ppgraph.transform(model, statistics="probe", **OPTIONS)
    expected = [logits_of(alone, inputs) for inputs in BATCHES]
    shared = ppgraph.transform(model, statistics="probe", **OPTIONS)
    found = at_once([lambda inputs=inputs: logits_of(shared, inputs) for inputs in BATCHES])
    require_close(found, expected)
    assert len(shared.ppgraph.graphs) == 1


def test_the_history_moves_in_whole_calls_in_the_order_of_the_calls() -> None:
    """Some order of the batches, one after the other, gives the very history that threads left."""
    model, momentum = llama(2), 0.5
    pruned = ppgraph.transform(model, history_momentum=momentum, **OPTIONS)
    pruned(**BATCHES[0], use_cache=False)
    pruned.ppgraph.history.reset()
    order: list[int] = []
    call = pruned.ppgraph.runtime.keep_selection

    def noting(*chosen: Any) -> None:
        order.append(threading.get_ident())
        call(*chosen)

    pruned.ppgraph.runtime.keep_selection = noting

    def one(inputs: dict[str, Tensor]) -> int:
        logits_of(pruned, inputs)
        return threading.get_ident()

    threads = at_once([lambda inputs=inputs: one(inputs) for inputs in BATCHES])
    assert len(order) == THREADS * ROUNDS
    again = ppgraph.transform(model, history_momentum=momentum, **OPTIONS)
    for thread in order:
        again(**BATCHES[threads.index(thread)], use_cache=False)
    held, expected = pruned.ppgraph.history, again.ppgraph.history
    require_close({name: held[name] for name in held}, {name: expected[name] for name in expected})


def test_threads_that_generate_keep_to_their_own_prompts() -> None:
    pruned = ppgraph.transform(llama(2), statistics="probe", **OPTIONS)

    def tokens(inputs: dict[str, Tensor]) -> Tensor:
        return pruned.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)  # type: ignore[no-any-return]

    expected = [tokens(inputs) for inputs in BATCHES]
    found = at_once([lambda inputs=inputs: tokens(inputs) for inputs in BATCHES])
    assert all(map(torch.equal, found, expected))


def test_copies_and_two_models_at_once() -> None:
    """Each with a history of its own, captured at the same time; square batches, whose sizes must be told apart."""
    square = batch(6, 6, "left")

    def run(dense: Any) -> None:
        pruned = ppgraph.transform(dense, **OPTIONS)
        for inputs in (square, *BATCHES[:3]):
            logits = pruned(**inputs, use_cache=False).logits
            expected = masked_dense_logits(dense, pruned.ppgraph.selection(), **inputs)
            real = inputs["attention_mask"].bool()
            assert relative(logits[real], expected[real]) < 1e-5

    # `masked` hooks the dense model, so each thread has one of its own to compare with.
    models = (llama(2), llama(4, seed=1))
    at_once([lambda dense=dense: run(dense) for dense in models])


@pytest.mark.parametrize("doing", ["save", "deepcopy"])
def test_a_history_is_taken_between_two_calls_and_not_within_one(
    doing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls hold the history's lock, and so do these: a save once took what a running call had moved so far."""
    pruned = ppgraph.transform(llama(2), **OPTIONS)
    pruned(**BATCHES[0], use_cache=False)
    history, held = pruned.ppgraph.history, []
    assert pruned.ppgraph.runtime.lock is history.lock
    place, name = (state, "save_file") if doing == "save" else (state.copy, "deepcopy")
    act = getattr(place, name)

    def noting(*args: Any) -> Any:
        held.append(history.lock._is_owned())
        return act(*args)

    monkeypatch.setattr(place, name, noting)
    if doing == "save":
        history.save(tmp_path)
    else:
        assert history.__deepcopy__({}).lock is not history.lock
    assert held
    assert all(held)
