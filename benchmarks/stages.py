"""Where prefill's time goes, by differences: variants that each do one thing more than the one before, in turns.

- static: the kept widths from the start;
- select: units chosen by an empty history, which is neither probed nor updated: scores, top-k, gathered weights;
- probe: chosen by the probe instead;
- fuse: by probe and history;
- ppgraph: and the history is updated.

    python benchmarks/stages.py --batch 20 --json benchmarks/results/stages.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from tabulate import tabulate
from variants import DTYPES, add_arguments, dense_model, prefill_call, prune_config, results, static_model

import ppgraph
from ppgraph.inspect.timing import Timing, compile_and_time, header, machine, write_json

STAGES: dict[str, dict[str, Any]] = {
    "select": {"statistics": "history", "history_momentum": 1.0},
    "probe": {"statistics": "probe"},
    "fuse": {"history_momentum": 1.0},
    "ppgraph": {},
}


def main(arguments: list[str]) -> None:
    """Build the variants, time them, print what each adds."""
    parser = argparse.ArgumentParser(
        description="Time the stages of pruned prefill of a random LLaMA by differences.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_arguments(parser, batch=8, repeats=20)
    args = parser.parse_args(arguments)
    described = machine()
    print(header(described, args.device, DTYPES[args.dtype]))

    first_ms, timings = compile_and_time(compiled_calls(args), args.repeats)
    print(table(timings))
    if args.json:
        write_json(args.json, results(args, described, timings, first_ms))


def compiled_calls(args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """All variants on one batch of random tokens, not compiled yet."""
    dense, config = dense_model(args, args.device, "sdpa"), prune_config(args)
    tokens = torch.randint(args.vocab, (args.batch, args.length), device=args.device)
    models = {"static": torch.compile(static_model(dense, config))}
    models |= {name: ppgraph.transform(dense, config, **fields) for name, fields in STAGES.items()}
    return {name: prefill_call(model, tokens) for name, model in models.items()}


def table(timings: Mapping[str, Timing]) -> str:
    """One row a variant, with what it adds to the one before: the median over rounds of the difference."""
    rows: list[dict[str, Any]] = [{"variant": name, "median ms": timing.median_ms} for name, timing in timings.items()]
    for row, (before, after) in zip(rows[1:], pairwise(timings.values()), strict=True):
        added = [late - early for early, late in zip(before.times_ms, after.times_ms, strict=True)]
        row["added ms"] = statistics.median(added)
        row["of static"] = row["added ms"] / timings["static"].median_ms
    return str(tabulate(rows, headers="keys", floatfmt=("", ".1f", ".1f", ".2%"), tablefmt="github"))


if __name__ == "__main__":
    main(sys.argv[1:])
