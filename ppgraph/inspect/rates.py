"""What a device does in a second, measured, and what that makes of FLOPs and gathered weights."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

from ppgraph.inspect.flops import Work

# A product and a gather large enough to be limited by arithmetic and by memory.
PRODUCT_SIZES = {"cpu": (1024, 1024), "cuda": (4096, 4096)}
GATHERED_ROWS = {"cpu": 8192, "cuda": 65536}
LEAST_SECONDS = 0.05
# No batch beyond this is looked at for the one from which on pruning pays.
MOST_SAMPLES = 4096


@dataclass(frozen=True)
class Rates:
    """FLOPs a second of a large product, and bytes a second of a row gather (those read plus those written)."""

    flops_per_second: float
    bytes_per_second: float

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype) -> Rates | None:
        """The rates of `device` with `dtype`, measured in some tenths of a second; None where nothing can run."""
        if device.type == "meta":
            return None
        rows, width = PRODUCT_SIZES.get(device.type, PRODUCT_SIZES["cuda"])
        # Random, as GPUs multiply ones and zeros faster than numbers; by a generator of its own, as models sample too.
        generator = torch.Generator(device).manual_seed(0)
        gathered_rows = GATHERED_ROWS.get(device.type, GATHERED_ROWS["cuda"])
        left = torch.rand(rows, width, device=device, generator=generator).to(dtype)
        weight = torch.rand(gathered_rows, width, device=device, generator=generator).to(dtype)
        index = torch.arange(0, len(weight), 2, device=device)
        with torch.no_grad():
            product_s = _seconds("linear(x, w)", linear=F.linear, x=left, w=weight[:width])
            gather_s = _seconds("w.index_select(0, i)", w=weight, i=index)
        return cls(2 * rows * width * width / product_s, weight.nbytes / gather_s)

    def seconds(self, flops: float, gathered_bytes: float = 0) -> float:
        """Time for these FLOPs and for gathering these bytes, which are read once and written once."""
        return flops / self.flops_per_second + 2 * gathered_bytes / self.bytes_per_second

    def floor_ms(self, flops: float, nbytes: float) -> float:
        """The roofline: no less time than all FLOPs take, or reading and writing all these bytes once."""
        return 1000 * max(flops / self.flops_per_second, nbytes / self.bytes_per_second)

    def to_dict(self) -> dict[str, float]:
        """Both rates."""
        return {"flops_per_second": self.flops_per_second, "bytes_per_second": self.bytes_per_second}


@functools.cache
def once_measured(device: torch.device, dtype: torch.dtype) -> Rates | None:
    """`Rates.measured`, once a process."""
    return Rates.measured(device, dtype)


def _seconds(statement: str, **names: object) -> float:
    timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=LEAST_SECONDS).times)


def predicted_speedup(work: Work, gathered_bytes: int, rates: Rates) -> float:
    """Dense time over that of probe, gather and pruned model, all products running at the same rate."""
    pruned_s = rates.seconds(work.probe + work.pruned, gathered_bytes)
    return rates.seconds(work.dense) / pruned_s if pruned_s else 1.0


def break_even_samples(work: Work, samples: int, probe_batch: float, gathered_bytes: int, rates: Rates) -> int | None:
    """The least number of samples, each as long as those of `work`, at which pruning saves time; None if none does.

    FLOPs grow with the samples, but for the probe's, which grow with `ceil(samples * probe_batch)`; the gather is the
    same for every batch.
    """
    share = Fraction(str(probe_batch))
    saved_a_sample = (work.dense - work.pruned) / samples
    probe_a_sample = work.probe / math.ceil(samples * share)

    def saves(count: int) -> bool:
        saved = saved_a_sample * count - probe_a_sample * math.ceil(count * share)
        return rates.seconds(saved) > rates.seconds(0, gathered_bytes)

    return next(filter(saves, itertools.islice(itertools.count(1), MOST_SAMPLES)), None)
