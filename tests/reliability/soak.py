"""Soak: thousands of batches of changing shapes on one pruned model.

    python -m tests.reliability.soak --batches 10000 --seed 0

Beside the model a float64 replay moves a history of its own, from what enters the exit linears of the masked dense
model. At the end both are equal, nothing is NaN, memory is flat, and no graph was added or compiled again after the
first batches.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from tests.fuzzing import Batch, Case, Judge, prompt, real_tokens
from tests.reliability import record

WARM_UP = 200
PADDINGS = ("none", "left", "right", "holes")


def resident_bytes() -> int:
    """Memory of this process, after what is free has been given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Soak:
    """One model, and the replay beside it."""

    def __init__(self, seed: int) -> None:
        self.numbers = random.Random(seed)  # noqa: S311
        config = {"skip_layers": 0, "width_multiple": 8, "ratio": 0.4}
        self.case = Case("llama", (Batch(),), config, {"num_hidden_layers": 1, "max_position_embeddings": 512})
        self.judge = Judge(self.case)
        self.worst = 0.0

    def batch(self) -> Batch:
        """Another shape each time, mostly short, some longer than any before."""
        longest = self.numbers.choice((16, 16, 16, 48, 140))
        return Batch(
            self.numbers.randint(2, 6),
            self.numbers.randint(2, longest),
            self.numbers.choice(PADDINGS),
            self.numbers.randrange(1 << 30),
        )

    def run(self) -> None:
        """One batch: logits against the masked dense model, the history against the replay."""
        judge, inputs = self.judge, prompt(self.case, self.batch())
        logits = judge._call(judge.pruned, inputs, None)
        selection = judge.pruned.ppgraph.selection()
        expected, seen = judge._expected(inputs, None, selection)
        judge._require_logits(logits, expected, inputs)
        assert judge.replay is not None
        real = real_tokens(inputs)
        for site, kept in selection.items():
            judge.replay.move(site, seen[site].reshape(*real.shape, -1), real, 0, kept)

    def drift(self) -> float:
        """The largest difference between history and replay, relative to the site's largest number."""
        assert self.judge.replay is not None
        worst = 0.0
        for site, expected in self.judge.replay.values.items():
            found = self.judge.pruned.ppgraph.history[site][: len(expected)].double()
            if not bool(torch.isfinite(found).all()):
                raise AssertionError(f"NaN or infinity in the history of {site}")
            worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
        return worst


def main() -> None:
    """Run; the first batch that is wrong raises, and so does what has grown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batches", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    soak, start, drifts, memory = Soak(options.seed), time.monotonic(), [], []
    graphs = compiled = 0
    for number in range(1, options.batches + 1):
        soak.run()
        if number == WARM_UP:
            graphs, compiled = len(soak.judge.pruned.ppgraph.graphs), counters["stats"]["unique_graphs"]
        if number >= WARM_UP and number % max(options.batches // 50, 1) == 0:
            drifts.append(soak.drift())
            memory.append(resident_bytes())
            print(f"{number} batches, drift {drifts[-1]:.2g}, {memory[-1] / 2**20:.1f} MiB", flush=True)
            write(options, number, soak, start, drifts, memory, graphs, compiled)


def write(
    options: argparse.Namespace,
    number: int,
    soak: Soak,
    start: float,
    drifts: list[float],
    memory: list[int],
    graphs: int,
    compiled: int,
) -> None:
    """Check what may not grow, and write the result so far."""
    pruning: Any = soak.judge.pruned.ppgraph
    growth = memory[-1] / memory[0] - 1
    new_graphs = len(pruning.graphs) - graphs
    recompiled = counters["stats"]["unique_graphs"] - compiled + pruning.report().recompiles
    result = {
        "program": "tests/reliability/soak.py",
        "seed": options.seed,
        "batches": number,
        "largest_drift_of_the_history": max(drifts),
        "last_drift_of_the_history": drifts[-1],
        "memory_growth": round(growth, 4),
        "graphs": len(pruning.graphs),
        "graphs_added_after_warm_up": new_graphs,
        "recompiles_after_warm_up": recompiled,
        "seconds": round(time.monotonic() - start),
    }
    record.write("soak", result)
    if max(drifts) > 1e-4 or growth > 0.02 or new_graphs or recompiled:
        raise AssertionError(f"something has grown or drifted: {result}")


if __name__ == "__main__":
    main()
