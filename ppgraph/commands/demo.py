"""`ppgraph demo`: prune a real model, batch by batch, and see what that gains and what it costs.

The dense and the pruned models run over the same text in turns. A batch chooses its heads and channels from all of its
tokens, so the perplexity shown is that of whole batches, not of generated text.
"""

from __future__ import annotations

import argparse
import math
import pydoc_data.topics
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppgraph.commands import DTYPES, add_batch, add_examples, add_json, as_json, load, say, text_batches
from ppgraph.errors import InputError

if TYPE_CHECKING:
    import torch

# The paper's method, and once the one that costs less quality: calibration decides its widths for one ratio.
CHOICES = (("pp", 0.2), ("pp", 0.4), ("spread", 0.4))
CALIBRATION_BATCHES, EVALUATION_BATCHES = 4, 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ppgraph demo`."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="SmolLM2-135M if absent (93 MB, downloaded once)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="text to run on; Python's help topics if absent")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (float32)")
    parser.add_argument("--device", help="where to run (cuda if there is one, else cpu)")
    add_batch(parser, samples=8, tokens=256)
    add_json(parser)
    add_examples(parser, "demo", "demo ./my-model --text wikitext.txt --batch 20")


def run(args: argparse.Namespace) -> str:
    """Load, calibrate, compile, measure."""
    import torch
    from tabulate import tabulate

    from ppgraph.loading import smollm2_path
    from ppgraph.transform import transform

    args.model = args.model or str(smollm2_path(say))
    model, tokenizer = load(args)
    calibration, evaluation = _split(tokenizer, args)
    calibration, evaluation = ([batch.to(model.device) for batch in part] for part in (calibration, evaluation))

    models: dict[str, Any] = {"dense": torch.compile(model)}
    pruned = {f"{method} {ratio:.0%}": transform(model, ratio=ratio, method=method) for method, ratio in CHOICES}
    models.update(pruned)
    for method in dict(CHOICES):
        _calibrate(model, [each for each in pruned.values() if each.ppgraph.config.method == method], calibration)
    for name in models:
        say(f"compiling {name} (a minute or two)")
        _logits(models[name], calibration[0])

    times_ms, losses = _measure(models, evaluation)
    rows = [
        {"model": name, "perplexity": math.exp(statistics.mean(losses[name]))}
        | _speed(times_ms[name], times_ms["dense"], args.batch * args.length)
        | (_cost(pruned[name]) if name in pruned else {})
        for name in models
    ]
    if args.json:
        return as_json({"model": args.model, "batches": len(evaluation), "rows": rows})
    size = f"{len(evaluation)} batches of {args.batch} x {args.length} tokens"
    table = tabulate(rows, headers="keys", floatfmt=".2f", missingval="-")
    return f"{size}, {model.dtype}, {model.device}\n\n{table}"


def _split(tokenizer: Any, args: argparse.Namespace) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Batches of token ids [B, S]: to calibrate on, from the text's first half, and to evaluate on."""
    with tempfile.TemporaryDirectory() as folder:
        path = args.text
        if path is None:
            path = Path(folder, "topics.txt")
            path.write_text("\n".join(pydoc_data.topics.topics.values()), encoding="utf-8")
        batches = list(text_batches(tokenizer, path, args))
    middle, needed = len(batches) // 2, max(CALIBRATION_BATCHES, EVALUATION_BATCHES)
    if middle < needed:
        raise InputError(
            f"the text has {len(batches)} batches of {args.batch} x {args.length} tokens, {2 * needed} are needed; "
            "name a longer one by --text, or a smaller batch"
        )
    return batches[:CALIBRATION_BATCHES], batches[middle : middle + EVALUATION_BATCHES]


def _calibrate(model: Any, pruned: Sequence[Any], calibration: list[torch.Tensor]) -> None:
    """Give pruned models of one method the history of one run over the calibration batches."""
    from ppgraph.calibrate import calibrate
    from ppgraph.transform import transform

    # A few batches don't pay for compiling, and what they teach is the same for every ratio.
    scratch = transform(model, pruned[0].ppgraph.config, lowering="eager")
    calibrate(scratch, calibration)
    with tempfile.TemporaryDirectory() as folder:
        scratch.ppgraph.history.save(folder)
        for each in pruned:
            each.ppgraph.history.load(folder)


def _logits(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """Logits [B, S, vocabulary] of one batch."""
    import torch

    with torch.no_grad():
        result: torch.Tensor = model(batch, use_cache=False).logits
    return result


def _measure(models: dict[str, Any], batches: list[torch.Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run all models on each batch in turns; return lists of times in ms and of losses, by model."""
    import torch.nn.functional as F
    from tqdm import tqdm

    from ppgraph.inspect.timing import alternate

    times_ms: dict[str, Any] = {name: [] for name in models}
    losses: dict[str, Any] = {name: [] for name in models}
    predicted: dict[str, torch.Tensor] = {}

    def call(name: str, batch: torch.Tensor) -> None:
        predicted[name] = _logits(models[name], batch)

    for number, batch in enumerate(tqdm(batches, desc="measuring", unit="batch")):
        calls = {name: (lambda name=name, batch=batch: call(name, batch)) for name in models}
        for name, timing in alternate(calls, [number]).items():
            times_ms[name] += timing.times_ms
            loss = F.cross_entropy(predicted[name][:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
            losses[name].append(loss.item())
    return times_ms, losses


def _speed(times_ms: list[float], dense_ms: list[float], tokens: int) -> dict[str, Any]:
    """Median and spread (interquartile range) of a model's times, and what they mean."""
    from ppgraph.inspect.timing import Timing

    timing, dense = Timing(tuple(times_ms)), Timing(tuple(dense_ms))
    return {
        "ms a batch": timing.median_ms,
        "spread": timing.spread_ms,
        "tokens/s": tokens / timing.median_ms * 1000,
        "speedup": dense.median_ms / timing.median_ms,
    }


def _cost(model: Any) -> dict[str, str]:
    """What a pruned model spends and what its pruned layers keep, from its report."""
    report = model.ppgraph.report().to_dict()
    flops = report["flops"]
    site = {site["kind"]: site for site in report["sites"] if site["status"] == "pruned"}
    heads, attention, mlp = model.config.num_attention_heads, site.get("attention"), site["mlp"]
    kept = attention["kept"] * heads // attention["width"] if attention else heads
    return {
        "probe FLOPs": f"{flops['probe'] / flops['dense']:.1%}",
        "heads": f"{kept} of {heads}",
        "channels": f"{mlp['kept']} of {mlp['width']}",
        "history MiB": f"{report['history_bytes'] / 2**20:.1f}",
    }
