"""What pruning costs in quality and what it saves, one method beside the other on one text.

Every number says what it was measured on: windows of `length` tokens taken one after the other from the text, without
special tokens or padding, `batch` of them at a time, in order. A pruned model chooses from the very batch it is scored
on, later tokens included. The *causal* perplexity doesn't: channels are chosen from the first half of each window and
only the second half is scored.

    ppgraph eval MODEL --text wiki.txt --calibration c4.txt --ratios 0.2 0.4 --out results.json --plot results.png
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ppgraph import _torch
from ppgraph.calibrate import calibrate
from ppgraph.config import PruneConfig
from ppgraph.errors import InputError
from ppgraph.inspect.timing import WARM_UP_ROUNDS, Timing, alternate
from ppgraph.runtime import Call, cache_of
from ppgraph.transform import Pruning, transform
from ppgraph.zero_shot import zero_shot


@dataclass(frozen=True)
class Settings:
    """What is measured, for the dense model and every method alike.

    Attributes:
        length: Tokens of a window.
        batch: Windows a batch.
        batches: Batches that perplexity is measured on; None for the whole text.
        calibration_batches: Batches of the calibration text, of the same shape.
        seed: Takes windows in a random order; None in the text's own.
        causal: Also measure the causal perplexity.
        repeats: Timed calls of each compiled model; 0 measures no time.
        lowering: How pruned models run. Time is measured with `"inductor"` only.
        tasks: Files of zero-shot tasks.
        task_limit: Questions of each task; None for all.
    """

    length: int = 1024
    batch: int = 20
    batches: int | None = None
    calibration_batches: int = 8
    seed: int | None = None
    causal: bool = True
    repeats: int = 0
    lowering: str = "inductor"
    tasks: tuple[str, ...] = ()
    task_limit: int | None = None

    def __post_init__(self) -> None:
        least = {"length": 2, "batch": 1, "batches": 1, "calibration_batches": 0, "repeats": 0, "task_limit": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise InputError(f"{name} must be at least {low}, found {value}")
        if self.repeats and self.lowering != "inductor":
            raise InputError("time is measured against the compiled dense model; use lowering='inductor', or repeats=0")


@dataclass(frozen=True)
class Perplexity:
    """Perplexity and what it comes from: summed negative log-likelihood in nats over `tokens` predictions."""

    nll: float
    tokens: int

    @property
    def value(self) -> float:
        """exp(nll / tokens)."""
        return math.exp(self.nll / self.tokens)


def windows(tokenizer: Any, texts: Sequence[str], length: int, *, seed: int | None = None) -> Tensor:
    """Cut texts into windows of tokens, [N, length] int64; what is left over at a text's end is dropped.

    With several texts their windows alternate, so that each batch holds all of them; the shortest ends the matter.

    Raises:
        InputError: a text has not enough tokens for one window.
    """
    cut = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
        count = len(ids) // length
        if not count:
            raise InputError(f"expected a text of at least {length} tokens, found {len(ids)}; use a smaller length")
        cut.append(ids[: count * length].view(count, length))
    fewest = min(map(len, cut))
    mixed = torch.stack([part[:fewest] for part in cut], dim=1).flatten(0, 1) if len(cut) > 1 else cut[0]
    if seed is not None:
        mixed = mixed[torch.randperm(len(mixed), generator=torch.Generator().manual_seed(seed))]
    return mixed


def perplexity(
    model: nn.Module, batches: Sequence[Tensor], *, causal: bool = False, progress: bool = True
) -> Perplexity:
    """Score windows of tokens [B, S]; the first token of a window is never predicted.

    Args:
        model: Dense, or from `transform`, whose history moves on from batch to batch.
        batches: Token ids.
        causal: Score the second half of each window alone, with heads and channels chosen from the first.
        progress: Show a progress bar on stderr.

    Raises:
        InputError: no batches, or windows too short to score.
    """
    if not batches or any(ids.shape[1] < (4 if causal else 2) for ids in batches):
        raise InputError("expected at least one batch of windows of 2 tokens or more (4 where halves are scored)")
    nll, tokens = 0.0, 0
    device = next(model.parameters()).device
    name = "causal perplexity" if causal else "perplexity"
    for ids in tqdm(batches, desc=name, unit="batch", disable=not progress):
        ids = ids.to(device)
        first = ids.shape[1] // 2 if causal else 1
        logits = _logits_of_second_half(model, ids, first) if causal else _logits(model, ids)
        for sample, targets in zip(logits, ids[:, first:], strict=True):  # one at a time: logits in fp32 are large
            nll += float(functional.cross_entropy(sample.float(), targets, reduction="sum"))
        tokens += ids[:, first:].numel()
    return Perplexity(nll, tokens)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[:, :-1]


def _logits_of_second_half(model: nn.Module, ids: Tensor, half: int) -> Tensor:
    pruning = getattr(model, "ppgraph", None)
    if not isinstance(pruning, Pruning) or not any(site.status == "pruned" for site in pruning.sites):
        return _logits(model, ids)[:, half - 1 :]
    with torch.no_grad():
        begun = model(input_ids=ids[:, :half], use_cache=True)
        call = Call(start=half, selection=pruning.runtime.selection)
        cache = cache_of(begun.values())
        name = next(name for name, value in begun.items() if value is cache)  # it differs between releases
        logits: Tensor = pruning.run("reuse", {"input_ids": ids[:, half:], name: cache, "use_cache": True}, call).logits
    return torch.cat([begun.logits[:, -1:], logits[:, :-1]], dim=1)


def dense_flops(model: nn.Module, batch: Tensor) -> int:
    """FLOPs of one batch as `torch.utils.flop_counter` counts them, attention on CPUs included."""
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_torch.ATTENTION_FLOPS_ON_CPU) as counter:
        model(input_ids=batch.to(next(model.parameters()).device), use_cache=False)
    return int(counter.get_total_flops())


@dataclass
class Row:
    """What was found of one model: the dense one (`config` is None) or a pruned one.

    `found` holds perplexity, causal_perplexity, flops, probe_flops and tasks, as measured, and of a batch time_ms and
    dense_time_ms (medians), time_spread_ms and dense_time_spread_ms (interquartile ranges).
    """

    name: str
    config: dict[str, Any] | None
    found: dict[str, Any] = field(default_factory=dict)

    def saved(self, dense: Row) -> dict[str, float]:
        """Shares of FLOPs and time saved, and PRR: perplexity points lost per percent of time (or FLOPs) saved."""
        result = {}
        lost = self.found.get("perplexity", math.nan) - dense.found.get("perplexity", math.nan)
        if "flops" in self.found and "flops" in dense.found:
            result["flops_saved"] = 1 - self.found["flops"] / dense.found["flops"]
            result["prr_flops"] = _ratio(lost, 100 * result["flops_saved"])
        if "time_ms" in self.found:
            result["time_saved"] = 1 - self.found["time_ms"] / self.found["dense_time_ms"]
            result["prr"] = _ratio(lost, 100 * result["time_saved"])
        return result


def _ratio(lost: float, saved: float) -> float:
    return lost / saved if saved > 0 else math.nan


@dataclass
class Comparison:
    """The dense model and methods beside it, measured alike."""

    settings: dict[str, Any]
    rows: list[Row]

    @property
    def dense(self) -> Row:
        """The dense model's row."""
        return self.rows[0]

    def to_dict(self) -> dict[str, Any]:
        """Settings and rows, with what each saves, as JSON-ready values; a ratio to nothing saved is None."""
        return {"settings": self.settings, "rows": [self._described(row) for row in self.rows]}

    def _described(self, row: Row) -> dict[str, Any]:
        saved = row.saved(self.dense) if row.config is not None else {}
        ready = {key: None if math.isnan(value) else value for key, value in saved.items()}
        return {"name": row.name, "config": row.config, **row.found, **ready}

    def __str__(self) -> str:
        tasks = sorted({task for row in self.rows for task in row.found.get("tasks", {})})
        table = []
        for row in self.rows:
            saved = row.saved(self.dense) if row.config is not None else {}
            cells: dict[str, Any] = {"model": row.name}
            cells["perplexity"] = row.found.get("perplexity")
            cells["causal"] = row.found.get("causal_perplexity")
            cells["FLOPs saved %"] = _percent(saved.get("flops_saved"))
            cells["probe %"] = _percent(
                _ratio(row.found.get("probe_flops", math.nan), self.dense.found.get("flops", 0))
            )
            cells["PRR (FLOPs)"] = saved.get("prr_flops")
            cells["time saved %"] = _percent(saved.get("time_saved"))
            cells["PRR"] = saved.get("prr")
            cells |= {task: row.found.get("tasks", {}).get(task, {}).get("acc") for task in tasks}
            table.append(
                {key: None if isinstance(cell, float) and math.isnan(cell) else cell for key, cell in cells.items()}
            )
        filled = [key for key in table[0] if any(line[key] is not None for line in table)]
        shown = [{key: line[key] for key in filled} for line in table]
        described = ", ".join(f"{name} {value}" for name, value in self.settings.items() if value not in (None, (), []))
        return f"{described}\n\n{tabulate(shown, headers='keys', floatfmt='.3f')}"

    def plot(self, path: Path) -> None:
        """Draw perplexity against the time saved (FLOPs saved where no time was measured), a curve a method.

        Raises:
            InputError: matplotlib is not installed.
        """
        require_matplotlib()
        from matplotlib.figure import Figure

        needed = {"perplexity", "flops"}
        whole = [(row.config, row) for row in self.rows if row.config and needed <= row.found.keys()]
        timed = all("time_ms" in row.found for _, row in whole)
        figure = Figure(figsize=(7, 5), layout="constrained")
        axes = figure.subplots()
        curves: dict[str, list[tuple[float, float]]] = {}
        for config, row in sorted(whole, key=lambda known: known[0]["ratio"]):
            saved = row.saved(self.dense)["time_saved" if timed else "flops_saved"]
            curves.setdefault(_variant(config), []).append((100 * saved, row.found["perplexity"]))
        for method, points in curves.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=method)
        axes.axhline(self.dense.found["perplexity"], linestyle="--", color="grey", label="dense")
        axes.set(xlabel=f"{'time' if timed else 'FLOPs'} saved, %", ylabel="perplexity", yscale="log")
        axes.legend()
        figure.savefig(path)


def _variant(config: Mapping[str, Any]) -> str:
    """What all ratios of a curve have in common."""
    return str(config["method"]) + (f" history_below={config['history_below']}" if config.get("history_below") else "")


def require_matplotlib() -> None:
    """Raise an `InputError` where nothing can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("plots need matplotlib; run: pip install 'ppgraph[plot]'")


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def compare(
    model: nn.Module,
    tokenizer: Any,
    configs: Mapping[str, PruneConfig],
    *,
    texts: Sequence[str],
    calibration: str,
    settings: Settings,
    output: Path | None = None,
    progress: bool = True,
) -> Comparison:
    """Measure a dense model and pruned twins of it.

    Each measurement of a pruned model starts from the history that calibration left.

    Args:
        model: The dense model.
        tokenizer: Its tokenizer.
        configs: What to prune, by the name that the results carry.
        texts: What perplexity is measured on; of several, each batch holds windows of all.
        calibration: The text that fills the history.
        settings: What to measure.
        output: A JSON file, written after each measurement. What it holds already is not measured again, and stays:
            a later call with other configs adds to it, and gives the rows of both.
        progress: Show progress bars on stderr.

    Raises:
        InputError: the texts are too short, or `output` holds results of other settings, of another dtype or text, or
            of another config under one of these names.
    """
    described = json.loads(json.dumps(dataclasses.asdict(settings)))
    given = windows(tokenizer, texts, settings.length, seed=settings.seed)
    wanted = None if settings.batches is None else settings.batches * settings.batch
    if wanted is not None and len(given) < wanted:
        raise InputError(f"{settings.batches} batches need {wanted} windows, but the text has {len(given)}")
    batches = given[:wanted].split(settings.batch)
    calibrating = windows(tokenizer, [calibration], settings.length)[: settings.calibration_batches * settings.batch]
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    described |= {"windows": sum(map(len, batches)), "model": type(model).__name__, "dtype": dtype}
    described |= {"text": _digest(given[:wanted]), "calibration": _digest(calibrating)}
    comparison = Comparison(described, _known_rows(output, described, configs))
    calibration_batches = calibrating.split(settings.batch) if len(calibrating) else ()
    bench = _Bench(model, tokenizer, settings, batches, calibration_batches, progress)
    with tempfile.TemporaryDirectory(prefix="ppgraph-eval-") as folder:
        untimed: list[tuple[Row, Callable[[], Any]]] = []
        for row in comparison.rows:
            if row.config is None:
                measured = bench.dense()
            elif row.name not in configs:
                continue
            else:
                twin = bench.twin(configs[row.name], Path(folder))
                measured = bench.pruned(twin)
                if settings.repeats and "time_ms" not in row.found:
                    untimed.append((row, twin))
            for key, measure in measured.items():
                if key not in row.found:
                    if progress:
                        tqdm.write(f"{row.name}: {key}", file=sys.stderr)
                    row.found |= measure()
                    _write(output, comparison)
        if untimed:
            _time(bench, untimed)
            _write(output, comparison)
    return comparison


def _digest(ids: Tensor) -> str:
    """What tells windows of tokens from others, whatever files they were read from."""
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]


def _time(bench: _Bench, untimed: Sequence[tuple[Row, Callable[[], Any]]]) -> None:
    """Add the times of pruned twins to their rows."""
    dense, *times = bench.times([twin for _, twin in untimed])
    for (row, _), timing in zip(untimed, times, strict=True):
        row.found |= {"time_ms": timing.median_ms, "time_spread_ms": timing.spread_ms}
        row.found |= {"dense_time_ms": dense.median_ms, "dense_time_spread_ms": dense.spread_ms}


@dataclass
class _Bench:
    """Everything that a row is measured on."""

    model: nn.Module
    tokenizer: Any
    settings: Settings
    batches: Sequence[Tensor]
    calibration: Sequence[Tensor]
    progress: bool

    def dense(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """The dense model's measurements, by the key that says whether they are done."""
        measured: dict[str, Callable[[], dict[str, Any]]] = {
            "flops": lambda: {"flops": dense_flops(self.model, self.batches[0])}
        }
        return measured | self._quality(lambda: self.model)

    def twin(self, config: PruneConfig, folder: Path) -> Callable[[], Any]:
        """Gives a pruned twin with the history that calibration left; made when it is first asked for."""

        @functools.cache
        def made() -> Any:
            return transform(self.model, config, lowering=self.settings.lowering)  # type: ignore[arg-type]

        def afresh() -> Any:
            twin = made()
            if config.needs_history and self.calibration:
                twin.ppgraph.history.load(self._calibrated(twin, folder))
            return twin

        return afresh

    def pruned(self, twin: Callable[[], Any]) -> dict[str, Callable[[], dict[str, Any]]]:
        """A pruned twin's measurements, its times left out."""
        return self._quality(twin) | {"flops": lambda: self._flops(twin())}

    def _calibrated(self, twin: Any, folder: Path) -> Path:
        """Where the history of a calibrated twin lies. Calibration is dense: configs that observe the same share it.

        What an allocation decides from it is each config's own.
        """
        config, sites = twin.ppgraph.config, twin.ppgraph.history.keys()
        observed = {"observed": config.observed, "sites": sites}
        own = {} if config.allocation == "uniform" else config.to_dict()
        saved = folder / hashlib.sha256(json.dumps(observed | own).encode()).hexdigest()
        if not saved.exists():
            calibrate(twin, self.calibration, progress=self.progress)
            twin.ppgraph.history.save(saved)
        return saved

    def _quality(self, model: Callable[[], nn.Module]) -> dict[str, Callable[[], dict[str, Any]]]:
        def score(key: str, causal: bool) -> dict[str, Any]:
            return {key: perplexity(model(), self.batches, causal=causal, progress=self.progress).value}

        measured: dict[str, Callable[[], dict[str, Any]]] = {"perplexity": lambda: score("perplexity", causal=False)}
        if self.settings.causal:
            measured["causal_perplexity"] = lambda: score("causal_perplexity", causal=True)
        if self.settings.tasks:
            tasks = [Path(task) for task in self.settings.tasks]
            batch, limit = self.settings.batch, self.settings.task_limit
            measured["tasks"] = lambda: {"tasks": zero_shot(model(), self.tokenizer, tasks, batch=batch, limit=limit)}
        return measured

    def _flops(self, twin: Any) -> dict[str, Any]:
        if twin.ppgraph.runtime.last_shape != tuple(self.batches[0].shape):
            perplexity(twin, self.batches[:1], progress=False)
        cost = twin.ppgraph.report().cost.flops
        return {"flops": cost.probe + cost.pruned, "probe_flops": cost.probe}

    def times(self, twins: Sequence[Callable[[], Any]]) -> list[Timing]:
        """Times of a batch, of the compiled dense model first and of the pruned twins; all in turns."""
        ids = self.batches[0].to(next(self.model.parameters()).device)
        models = enumerate([torch.compile(self.model), *(twin() for twin in twins)])
        calls = {str(place): functools.partial(model, input_ids=ids, use_cache=False) for place, model in models}
        with torch.no_grad():
            alternate(calls, tqdm(range(WARM_UP_ROUNDS), desc="warming up", disable=not self.progress))
            timings = alternate(calls, tqdm(range(self.settings.repeats), desc="timing", disable=not self.progress))
        return list(timings.values())


def _known_rows(output: Path | None, settings: Mapping[str, Any], configs: Mapping[str, PruneConfig]) -> list[Row]:
    """One row for the dense model and each config, and each other one that an earlier run has left in `output`."""
    rows = {"dense": Row("dense", None)}
    rows |= {name: Row(name, config.to_dict()) for name, config in configs.items()}
    if output is None or not output.exists():
        return [*rows.values()]
    try:
        known = json.loads(output.read_text(encoding="utf-8"))
        earlier = [
            Row(row["name"], row["config"], {key: value for key, value in row.items() if key in _FOUND})
            for row in known["rows"]
        ]
        other = {name for name in settings if known["settings"].get(name) != settings[name]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{output} holds no results of this command ({error}); name another file") from None
    if other:
        raise InputError(f"{output} holds results of other settings ({', '.join(sorted(other))}); name another file")
    changed = [row.name for row in earlier if row.config != rows.get(row.name, row).config]
    if changed:
        raise InputError(f"{output} holds results of other configs ({', '.join(changed)}); name another file")
    return [*(rows | {row.name: row for row in earlier}).values()]


_FOUND = (
    "perplexity",
    "causal_perplexity",
    "flops",
    "probe_flops",
    "time_ms",
    "time_spread_ms",
    "dense_time_ms",
    "dense_time_spread_ms",
    "tasks",
)


def _write(output: Path | None, comparison: Comparison) -> None:
    """Replace the results file in one step, so that an interruption leaves the old one or the new one."""
    if output is None:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f"{output.name}.part{os.getpid()}")
    part.write_text(json.dumps(comparison.to_dict(), indent=2) + "\n", encoding="utf-8")
    part.replace(output)
