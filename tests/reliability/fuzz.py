"""Fuzz: random models and configs, each call compared with the masked dense model, in chunks that can be resumed.

    python -m tests.reliability.fuzz --calls 10000 --seed 0
    python -m tests.reliability.fuzz --calls 300 --seed 0 --lowering inductor

A chunk draws some random cases (a model, a config, and a few prompts with what follows them in a cache); every call of
a case is compared. What fails is shrunk and printed as a program of a few lines. Started again with the same seed, it
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, reject, seed, settings

from tests.fuzzing import Case, Discarded, cases, check, repro
from tests.reliability import record

CASES_A_CHUNK = 4


class Chunk:
    """Some cases drawn from one seed, and what came of them."""

    def __init__(self, number: int, lowering: str, most_batches: int, shrink: bool) -> None:
        self.counts: Counter[str] = Counter()
        self.families: Counter[str] = Counter()
        self.failing: Case | None = None
        self.error = ""
        phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]

        @seed(number)
        @settings(
            max_examples=CASES_A_CHUNK,
            database=None,
            deadline=None,
            phases=phases,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=cases(most_batches=most_batches, lowering=lowering))
        def run(case: Case) -> None:
            self._run(case)

        self._program = run

    def _run(self, case: Case) -> None:
        try:
            calls = check(case)
        except Discarded:
            self.counts["discarded"] += 1
            reject()
        except Exception as error:
            self.failing, self.error = case, f"{type(error).__name__}: {error}"
            raise
        if self.failing is None:  # what shrinking tries does not count
            self.counts["cases"] += 1
            self.counts["calls"] += calls
            self.families[case.family] += calls

    def run(self) -> str | None:
        """Returns the program that shows a failure; None where all calls were right."""
        try:
            self._program()
        except Exception as error:
            if self.failing is None:
                raise
            return f"# {self.error.splitlines()[0][:300] or error}\n{repro(replace(self.failing))}"
        return None


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Chunks until there are enough calls or the time is over."""
    name = f"fuzz-{options.lowering}-seed{options.seed}"
    known = record.read(name)
    counts, families = Counter(known.get("counts", {})), Counter(known.get("calls_by_family", {}))
    failures, seconds = list(known.get("failures", [])), float(known.get("seconds", 0))
    number, start, result = int(known.get("chunks", 0)), time.monotonic(), known
    while counts["calls"] < options.calls and time.monotonic() - start < options.minutes * 60:
        begun = time.monotonic()
        chunk = Chunk(options.seed * 1_000_000 + number, options.lowering, options.batches, not options.no_shrink)
        failure = chunk.run()
        number += 1
        counts += chunk.counts
        families += chunk.families
        seconds += time.monotonic() - begun
        if failure:
            failures.append(failure)
            print(failure, flush=True)
        result = {
            "program": "tests/reliability/fuzz.py",
            "seed": options.seed,
            "lowering": options.lowering,
            "chunks": number,
            "counts": dict(counts),
            "failures": failures,
            "seconds": round(seconds),
            "calls_by_family": dict(sorted(families.items())),
        }
        record.write(name, result)
        print(f"chunk {number}: {dict(counts)}, {len(failures)} failures, {seconds:.0f} s", flush=True)
    return result


def main() -> None:
    """Read the arguments, run, and end with 1 where a call was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--calls", type=int, default=10_000, help="stop after so many compared calls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lowering", choices=("eager", "inductor"), default="eager")
    parser.add_argument("--batches", type=int, default=24, help="the most prompts a case")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--no-shrink", action="store_true", help="print failing cases as they were drawn")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    raise SystemExit(bool(run(options)["failures"]))


if __name__ == "__main__":
    main()
