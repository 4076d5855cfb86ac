"""Timing models against one another: variants in turns, first calls, what the machine is, tables and files."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tabulate import tabulate
from torch.utils.benchmark.utils.timer import timer as synchronised_seconds
from tqdm import tqdm

from ppgraph.inspect.rates import Rates
from ppgraph.inspect.report import Report

CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "asimd", "sve", "bf16")
WARM_UP_ROUNDS = 2


@dataclasses.dataclass(frozen=True)
class Timing:
    """Wall times of one variant, in the order they were taken."""

    times_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The median."""
        return statistics.median(self.times_ms)

    @property
    def spread_ms(self) -> float:
        """The interquartile range."""
        if len(self.times_ms) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.times_ms, n=4, method="inclusive")
        return high - low


def time_ms(call: Callable[[], object]) -> float:
    """Run `call` once and return its wall time, the accelerator's work included."""
    start = synchronised_seconds()
    call()
    return (synchronised_seconds() - start) * 1000


def alternate(
    variants: Mapping[str, Callable[[], object]],
    rounds: Iterable[int],
    prepare: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, Timing]:
    """Time all variants once a round, so that what else the machine does meets all of them alike.

    Each round starts with another variant, because a call finds the caches as the one before left them.
    Warming up is left to the caller.

    Args:
        variants: Calls by name.
        rounds: Yields one number a round; wrap it in a progress bar.
        prepare: By name, what to call before each call of a variant, untimed.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for number in rounds:
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if prepare:
                prepare[name]()
            times[name].append(time_ms(variants[name]))
    return {name: Timing(tuple(values)) for name, values in times.items()}


def compile_and_time(
    calls: Mapping[str, Callable[[], object]], repeats: int
) -> tuple[dict[str, float], dict[str, Timing]]:
    """First calls in ms, each compiling with an empty cache, then the timings of `repeats` rounds in turns.

    Progress goes to stderr.
    """
    with tempfile.TemporaryDirectory(prefix="ppgraph-bench-", ignore_cleanup_errors=True) as caches:
        first_ms = first_calls(calls, Path(caches))
        alternate(calls, range(WARM_UP_ROUNDS))
        return first_ms, alternate(calls, tqdm(range(repeats), desc="rounds", file=sys.stderr))


def first_calls(calls: Mapping[str, Callable[[], object]], caches: Path) -> dict[str, float]:
    """Milliseconds of each variant's first call, compilation included, each with an empty cache."""
    torch.compile(lambda x: x.sin())(torch.ones(8))  # what loads once a process must not count as dense's
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    first_ms = {}
    try:
        for name, call in calls.items():
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(caches / name)
            first_ms[name] = time_ms(call)
    finally:
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
        if before is not None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = before
    return first_ms


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a variant's call cannot do without: FLOPs, and bytes of weights that it reads and writes."""

    flops: float
    nbytes: float


def costs_of(report: Report) -> dict[str, Cost]:
    """Of the last batch of a pruned model, as `"dense"` would run it and as `"ppgraph"` does.

    Gathered weights are read, written and read again.
    """
    cost = report.cost
    assert cost is not None
    pruned_bytes = cost.weights.pruned + 2 * cost.gathered_bytes
    return {
        "dense": Cost(cost.flops.dense, cost.weights.dense),
        "ppgraph": Cost(cost.flops.probe + cost.flops.pruned, pruned_bytes),
    }


def timing_table(
    timings: Mapping[str, Timing],
    first_ms: Mapping[str, float],
    costs: Mapping[str, Cost],
    rates: Rates,
    tokens: int,
) -> str:
    """One row a variant of one batch of `tokens`; speedups are over the variant `"dense"`.

    "floor ms" is the roofline: what the FLOPs and the weights' bytes take at the device's measured rates.
    """
    rows = [
        {
            "variant": name,
            "median ms": timing.median_ms,
            "spread ms": timing.spread_ms,
            "tokens/s": tokens / timing.median_ms * 1000,
            "speedup": timings["dense"].median_ms / timing.median_ms,
            "first call s": first_ms[name] / 1000,
            "GFLOP": costs[name].flops / 1e9,
            "weights MB": costs[name].nbytes / 1e6,
            "floor ms": rates.floor_ms(costs[name].flops, costs[name].nbytes),
        }
        for name, timing in timings.items()
    ]
    return str(tabulate(rows, headers="keys", floatfmt=("", ".2f", ".2f", ".0f", ".3f", ".1f", ".1f", ".0f", ".1f")))


def timings_to_dict(timings: Mapping[str, Timing], first_ms: Mapping[str, float] | None = None) -> dict[str, Any]:
    """All times in ms by variant, as JSON-ready values; with those of first calls where they were taken."""
    return {
        name: {
            "median_ms": timing.median_ms,
            "spread_ms": timing.spread_ms,
            **({"first_call_ms": first_ms[name]} if first_ms else {}),
            "times_ms": list(timing.times_ms),
        }
        for name, timing in timings.items()
    }


def machine() -> dict[str, Any]:
    """Describe what the numbers were taken on, as JSON-ready values."""
    found = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_flags": _cpu_flags(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_bf16_kernels": has_cpu_bf16_kernels(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties()
        found["gpu"] = properties.name
        found["gpu_memory_bytes"] = properties.total_memory
        found["gpu_capability"] = f"{properties.major}.{properties.minor}"
        found["cuda"] = torch.version.cuda
    return found


def header(described: Mapping[str, Any], device: str, dtype: torch.dtype) -> str:
    """Put `machine()` into a few lines, with a warning where its numbers would mislead."""
    lines = [
        f"{described['cpu']}, {described['cores']} cores, {described['threads']} threads, "
        f"{' '.join(described['cpu_flags'])}; load {described['load_average']}",
        f"Python {described['python']}, torch {described['torch']} ({described['torch_cpu_capability']}), "
        f"transformers {described['transformers']}",
    ]
    if "gpu" in described:
        memory = described["gpu_memory_bytes"] / 2**30
        lines.append(f"{described['gpu']}, {memory:.0f} GiB, CUDA {described['cuda']}")
    if device == "cpu" and dtype == torch.bfloat16 and not described["cpu_bf16_kernels"]:
        lines.append("NOTE: this CPU has no bf16 kernels: bf16 products run several times slower than float32 ones")
    return "\n".join(lines)


def has_cpu_bf16_kernels() -> bool:
    """Whether oneDNN has bf16 products of its own for this CPU (it wants AVX-512 or better)."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def write_json(path: Path, results: Mapping[str, Any]) -> None:
    """Write results for later comparison, making the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _cpu_info() -> Sequence[tuple[str, str]]:
    """The fields of the first core in /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    fields = [line.partition(":") for line in text.partition("\n\n")[0].splitlines()]
    return [(name.strip(), value.strip()) for name, _, value in fields]


def _cpu_model() -> str:
    return dict(_cpu_info()).get("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    info = dict(_cpu_info())
    flags = (info.get("flags") or info.get("Features") or "").split()
    return [flag for flag in CPU_FLAGS if flag in flags]
