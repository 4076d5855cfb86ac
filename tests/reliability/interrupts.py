"""Interrupts: Ctrl-C at each line of a forward and of a calibration, and at random moments of compiling.

    python -m tests.reliability.interrupts --compiles 20 --seed 0

After each the history must be that before the batch or that after it, whole in all sites, and the next call must equal
the masked dense model.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

import ppgraph
from tests.reference import masked_dense_logits
from tests.reliability import record
from tests.test_exactness import SIZES, batch, llama, relative

OPTIONS: dict[str, Any] = {"ratio": 0.4, "lowering": "eager", "history_momentum": 0.5, **SIZES}
# What a call runs beside torch: the graphs' own code, and ppgraph's around it.
TRACED = ("<eval_with_key>", "ppgraph/runtime.py", "ppgraph/state.py", "ppgraph/transform.py", "ppgraph/calibrate.py")


class Calls:
    """Counts the calls that come through."""

    def __init__(self) -> None:
        self.model = llama(2)
        self.pruned: Any = ppgraph.transform(self.model, **OPTIONS)
        self.inputs = batch(3, 9, "left")

    def forward(self) -> None:
        """One batch."""
        self.pruned(**self.inputs, use_cache=False)

    def calibrate(self) -> None:
        """One batch of calibration."""
        ppgraph.calibrate(self.pruned, [self.inputs], progress=False)

    def history(self) -> dict[str, Tensor]:
        """A copy of what is held."""
        held = self.pruned.ppgraph.history
        return {name: held[name].clone() for name in held} | {"seen": held.seen.clone()}

    def set_history(self, values: dict[str, Tensor]) -> None:
        """Put it back."""
        held = self.pruned.ppgraph.history
        held.reset()
        held.reserve(len(values["seen"]))
        for name in held:
            held[name].copy_(values[name])
        held.seen.copy_(values["seen"])

    def require_usable(self) -> None:
        """The next call equals the masked dense model."""
        logits = self.pruned(**self.inputs, use_cache=False).logits
        expected = masked_dense_logits(self.model, self.pruned.ppgraph.selection(), **self.inputs)
        real = self.inputs["attention_mask"].bool()
        if relative(logits[real], expected[real]) > 1e-5:
            raise AssertionError("the call after an interrupt is wrong")


@contextlib.contextmanager
def interrupts_taken() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also in a process that a shell runs in the background and has ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two histories are equal to the last bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def interrupted_at(line: int, action: Callable[[], None]) -> bool | None:
    """Ctrl-C at the n-th line that is traced. Returns whether it came through; None when there is no such line."""
    left, tracer = [line], sys.gettrace()  # that of a coverage run

    def trace(frame: Any, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if not any(part in name for part in TRACED):
            return None
        left[0] -= event == "line"
        if left[0] == 0 and event == "line":
            signal.raise_signal(signal.SIGINT)
        return trace

    try:
        sys.settrace(trace)
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(tracer)
    return None if left[0] > 0 else False


def at_lines(action: str, lines: Iterable[int]) -> Counter[str]:
    """Interrupt a warm model's forward or calibration at these lines, as long as it has so many."""
    calls = Calls()
    run = getattr(calls, action)
    run()
    before = calls.history()
    run()
    after = calls.history()
    found: Counter[str] = Counter()
    for line in lines:
        calls.set_history(before)
        with interrupts_taken():
            interrupted = interrupted_at(line, run)
        now = calls.history()
        if interrupted is None:
            break
        if not interrupted:
            raise AssertionError(f"{action}: Ctrl-C at line {line} was lost")
        old, new = same(now, before), same(now, after)
        if not old and not new:
            raise AssertionError(f"{action}: a mixture of histories after Ctrl-C at line {line}")
        found["old" if old else "new"] += 1
        calls.require_usable()
    return found


def in_compilation(count: int, numbers: random.Random) -> Counter[str]:
    """Interrupt first calls at random moments, then call again."""
    found: Counter[str] = Counter()
    start = time.perf_counter()
    torch._dynamo.reset()
    Calls().forward()
    whole = time.perf_counter() - start
    for _ in range(count):
        torch._dynamo.reset()
        calls = Calls()
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, numbers.uniform(0.01, 0.9) * whole)
        try:
            with interrupts_taken():
                calls.forward()
            found["came too late"] += 1
        except KeyboardInterrupt:
            found["interrupted"] += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        calls.require_usable()
    return found


def main() -> None:
    """Run all; the first mixture raises."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--compiles", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    result: dict[str, Any] = {"program": "tests/reliability/interrupts.py", "seed": options.seed}
    for action in ("forward", "calibrate"):
        result[action] = dict(at_lines(action, itertools.count(1)))
        print(action, result[action], flush=True)
    result["compile"] = dict(in_compilation(options.compiles, random.Random(options.seed)))  # noqa: S311
    result["seconds"] = round(time.monotonic() - start)
    print(result)
    record.write("interrupts", result)


if __name__ == "__main__":
    main()
