"""Ctrl-C: the model is usable after it, and the history whole. `tests/reliability/interrupts.py` tries every line."""

from __future__ import annotations

import signal
import threading
from unittest import mock

import pytest
from torch.fx.experimental.sym_node import SymNode

from ppgraph.interrupts import interrupts_held_back
from tests.reliability.interrupts import Calls, at_lines, interrupts_taken


@pytest.mark.parametrize("action", ["forward", "calibrate"])
def test_an_interrupt_leaves_the_old_or_the_new_history(action: str) -> None:
    """Among others between the updates of two sites, which once left a mixture."""
    found = at_lines(action, range(3, 10_000, 37))
    assert found["old"]
    assert found["new"]


def test_an_interrupt_that_torch_meets_in_a_capture_is_one() -> None:
    """Its C++ asks sizes in Python, and gives the KeyboardInterrupt of that as an error of its own (torch 2.13)."""
    calls = Calls()
    with mock.patch.object(SymNode, "is_int", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        calls.forward()
    calls.require_usable()


def test_an_interrupt_is_held_back_and_then_taken() -> None:
    done: list[str] = []

    def work() -> None:
        with interrupts_held_back():
            signal.raise_signal(signal.SIGINT)
            done.append("all")

    with interrupts_taken():
        with pytest.raises(KeyboardInterrupt):
            work()
        assert done == ["all"]
        with pytest.raises(KeyboardInterrupt):  # the handler is back
            signal.raise_signal(signal.SIGINT)


def test_other_threads_and_ignored_interrupts_are_left_alone() -> None:
    seen: list[object] = []

    def look() -> None:
        with interrupts_held_back():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        look()
        assert seen[-1] == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, old)
