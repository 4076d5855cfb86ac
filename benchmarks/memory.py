"""Peak memory of one prefill: compiled dense, static and pruned, on a LLaMA of any shape.

What a call takes beyond what lay in memory before it, after two calls to compile and warm up: the peak of the resident
set on CPUs (Linux; reset before the call), the allocator's on GPUs.

    python benchmarks/memory.py --dtype float32 --batch 20 --json benchmarks/results/memory.json
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tabulate import tabulate
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
    measured = {name: peak_bytes(prefill_call(model, tokens), args) for name, model in models.items()}
    print(table(measured, weights))
    if args.json:
        found = {"weight_bytes": weights, "peak_bytes": measured}
        write_json(args.json, {"machine": described, "arguments": options(args), **found})


def peak_bytes(call: Callable[[], object], args: argparse.Namespace) -> list[int]:
    """Bytes beyond those before the call, for each repetition."""
    for _ in range(2):
        call()
    on_cpu = torch.device(args.device).type == "cpu"
    return [peak_on_cpu(call) if on_cpu else peak_on_gpu(call) for _ in range(args.repeats)]


def peak_on_gpu(call: Callable[[], object]) -> int:
    """The allocator's peak."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def peak_on_cpu(call: Callable[[], object]) -> int:
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


def table(measured: dict[str, list[int]], weights: int) -> str:
    """One row a variant; what it takes beyond dense, as a share of the weights."""
    peaks = {name: statistics.median(values) for name, values in measured.items()}
    rows = [
        {
            "variant": name,
            "peak MB": peak / 1e6,
            "spread MB": (max(measured[name]) - min(measured[name])) / 1e6,
            "beyond dense, of weights": (peak - peaks["dense"]) / weights,
        }
        for name, peak in peaks.items()
    ]
    return str(tabulate(rows, headers="keys", floatfmt=("", ".1f", ".1f", ".1%"), tablefmt="github"))


if __name__ == "__main__":
    main(sys.argv[1:])
