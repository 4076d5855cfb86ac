"""Peak memory of one prefill: compiled dense, static and pruned, on a LLaMA of any shape.

What a call takes beyond what lay in memory before it, after two calls to compile and warm up: the peak of what tensors
held ("allocated"), and on CPUs that of the resident set too (Linux; reset before the call), which counts what glibc
keeps of freed memory as well.

    python benchmarks/memory.py --dtype float32 --batch 20 --json benchmarks/results/memory.json
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile
from variants import DTYPES, add_arguments, compiled_models, options, prefill_call

from ppgraph.inspect.timing import header, machine, write_json


def main(arguments: list[str]) -> None:
    """Build the variants one after the other, measure, print the table."""
    parser = argparse.ArgumentParser(
        description="Peak memory of compiled dense, static and pruned prefill of a random LLaMA.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_arguments(parser, batch=8, repeats=5)
    args = parser.parse_args(arguments)
    described = machine()
    print(header(described, args.device, DTYPES[args.dtype]))

    models = compiled_models(args)
    weights = sum(parameter.nbytes for parameter in models["dense"].parameters())
    tokens = torch.randint(args.vocab, (args.batch, args.length), device=args.device)
    by_model = {name: peaks_of(prefill_call(model, tokens), args) for name, model in models.items()}
    measured = {kind: {name: peaks[kind] for name, peaks in by_model.items()} for kind in by_model["dense"]}
    print(table(measured, weights))
    if args.json:
        found = {"weight_bytes": weights} | {f"{kind}_bytes": peaks for kind, peaks in measured.items()}
        write_json(args.json, {"machine": described, "arguments": options(args), **found})


def peaks_of(call: Callable[[], object], args: argparse.Namespace) -> dict[str, list[int]]:
    """Bytes beyond those before the call, by kind of memory, for each repetition."""
    for _ in range(2):
        call()
    if torch.device(args.device).type != "cpu":
        return {"allocated": [peak_on_gpu(call) for _ in range(args.repeats)]}
    return {"allocated": [allocated_on_cpu(call)], "resident": [resident_on_cpu(call) for _ in range(args.repeats)]}


def peak_on_gpu(call: Callable[[], object]) -> int:
    """The allocator's peak."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def allocated_on_cpu(call: Callable[[], object]) -> int:
    """The peak of what torch's allocator gave out, as the profiler tells it; the same in each call."""
    with tempfile.TemporaryDirectory(prefix="ppgraph-memory-") as folder:
        trace = Path(folder) / "trace.json"
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    changes: Iterator[int] = (event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"]))
    return max(itertools.accumulate(changes))


def resident_on_cpu(call: Callable[[], object]) -> int:
    """The resident set's peak: 5 in clear_refs resets it (proc(5)).

    What glibc keeps of memory that was freed goes back first, or a call that finds it there seems to take nothing.
    """
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    call()
    return status_bytes("VmHWM") - before


def status_bytes(name: str) -> int:
    """A number of /proc/self/status."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def table(measured: dict[str, dict[str, list[int]]], weights: int) -> str:
    """One row a variant and kind of memory; what it takes beyond dense, as a share of the weights."""
    rows = []
    for kind, variants in measured.items():
        peaks = {name: statistics.median(values) for name, values in variants.items()}
        for name, peak in peaks.items():
            spread = max(variants[name]) - min(variants[name])
            beyond = (peak - peaks["dense"]) / weights
            rows.append([f"{name}, {kind}", peak / 1e6, spread / 1e6, beyond])
    headers = ["variant", "peak MB", "spread MB", "beyond dense, of weights"]
    return str(tabulate(rows, headers, floatfmt=("", ".1f", ".1f", ".1%"), tablefmt="github"))


if __name__ == "__main__":
    main(sys.argv[1:])
