"""What all benchmarks share: timing variants in turns, describing the machine, writing results."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.benchmark.utils.timer import timer as synchronised_seconds

CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "asimd", "sve", "bf16")


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
