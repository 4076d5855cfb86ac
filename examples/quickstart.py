"""Quickstart: prune a real model, batch by batch, and see what that gains and what it costs.

    python examples/quickstart.py                       # SmolLM2-135M, downloaded once (93 MB)
    python examples/quickstart.py MODEL --text FILE     # a folder, .gguf file or hub name; a text of your own

The dense and the pruned models run on the CPU over the same text in turns. A batch chooses its heads and
channels from all of its tokens, so the perplexity shown is that of whole batches, not of generated text.
"""

from __future__ import annotations

import argparse
import math
import pydoc_data.topics
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from tqdm import tqdm

import ppgraph
from ppgraph.loading import load_model, smollm2_path

RATIOS = (0.2, 0.4)
SAMPLES, TOKENS = 8, 256  # of a batch
CALIBRATION_BATCHES, EVALUATION_BATCHES = 4, 6


def main() -> None:
    """Load, calibrate, compile, measure, print."""
    args = parse()
    say("loading the model")
    model, tokenizer = load_model(args.model or smollm2_path(say))
    if tokenizer is None:
        sys.exit(f"quickstart: {args.model} has no tokenizer; name a model that comes with one")
    calibration, evaluation = split(args.text, tokenizer)

    models: dict[str, Any] = {"dense": torch.compile(model)}
    pruned = {f"pruned {ratio:.0%}": ppgraph.transform(model, ratio=ratio) for ratio in RATIOS}
    models.update(pruned)
    calibrate(model, pruned, calibration)
    for name in models:
        say(f"compiling {name} (a minute or two)")
        logits(models[name], calibration[0])

    times_ms, losses = measure(models, evaluation)
    rows = [
        {"model": name, "perplexity": math.exp(statistics.mean(losses[name]))}
        | speed(times_ms[name], times_ms["dense"])
        | (cost(pruned[name]) if name in pruned else {})
        for name in models
    ]
    print(f"\n{EVALUATION_BATCHES} batches of {SAMPLES} x {TOKENS} tokens, {model.dtype}, CPU\n")
    print(tabulate(rows, headers="keys", floatfmt=".2f", missingval="-"))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Compare a dense model with pruned ones, both compiled.")
    parser.add_argument("model", nargs="?", help="folder, .gguf file or hub name; SmolLM2-135M if absent")
    parser.add_argument("--text", type=Path, help="text to run on; Python's own help topics if absent")
    return parser.parse_args()


def say(message: str) -> None:
    """Show progress; the table alone goes to stdout."""
    print(message, file=sys.stderr, flush=True)


def split(path: Path | None, tokenizer: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Batches of token ids `[SAMPLES, TOKENS]`: to calibrate on, from the text's first half, and to evaluate on."""
    text = path.read_text(encoding="utf-8") if path else "\n".join(pydoc_data.topics.topics.values())
    ids = torch.tensor(tokenizer(text)["input_ids"])
    middle, batch = len(ids) // 2, SAMPLES * TOKENS
    needed = 2 * batch * max(CALIBRATION_BATCHES, EVALUATION_BATCHES)
    if len(ids) < needed:
        sys.exit(f"quickstart: the text has {len(ids)} tokens, {needed} are needed; name a longer one by --text")
    calibration = ids[: batch * CALIBRATION_BATCHES].view(-1, SAMPLES, TOKENS)
    evaluation = ids[middle : middle + batch * EVALUATION_BATCHES].view(-1, SAMPLES, TOKENS)
    return list(calibration), list(evaluation)


def calibrate(model: Any, pruned: dict[str, Any], calibration: list[torch.Tensor]) -> None:
    """Give all pruned models the history of one run over the calibration batches."""
    # A few batches don't pay for compiling, and what they teach is the same for every ratio.
    scratch = ppgraph.transform(model, lowering="eager")
    ppgraph.calibrate(scratch, calibration)
    with tempfile.TemporaryDirectory() as folder:
        scratch.ppgraph.history.save(folder)
        for each in pruned.values():
            each.ppgraph.history.load(folder)


def logits(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """Logits `[SAMPLES, TOKENS, vocabulary]` of one batch."""
    with torch.no_grad():
        result: torch.Tensor = model(batch, use_cache=False).logits
    return result


def measure(models: dict[str, Any], batches: list[torch.Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run all models on each batch in turns; return lists of times in ms and of losses, by model."""
    times_ms: dict[str, Any] = {name: [] for name in models}
    losses: dict[str, Any] = {name: [] for name in models}
    for batch in tqdm(batches, desc="measuring", unit="batch"):
        for name, model in models.items():
            start = time.perf_counter()
            predicted = logits(model, batch)
            times_ms[name].append((time.perf_counter() - start) * 1000)
            loss = F.cross_entropy(predicted[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
            losses[name].append(loss.item())
    return times_ms, losses


def speed(times_ms: list[float], dense_ms: list[float]) -> dict[str, Any]:
    """Median and spread (interquartile range) of a model's times, and what they mean."""
    median = statistics.median(times_ms)
    low, _, high = statistics.quantiles(times_ms, method="inclusive")
    return {
        "ms a batch": median,
        "spread": high - low,
        "tokens/s": SAMPLES * TOKENS / median * 1000,
        "speedup": statistics.median(dense_ms) / median,
    }


def cost(model: Any) -> dict[str, str]:
    """What a pruned model spends and what its pruned layers keep, from its report."""
    report = model.ppgraph.report().to_dict()
    flops = report["flops"]
    site = {site["kind"]: site for site in report["sites"] if site["status"] == "pruned"}
    heads, attention, mlp = model.config.num_attention_heads, site["attention"], site["mlp"]
    return {
        "probe FLOPs": f"{flops['probe'] / flops['dense']:.1%}",
        "heads": f"{attention['kept'] * heads // attention['width']} of {heads}",
        "channels": f"{mlp['kept']} of {mlp['width']}",
        "history MiB": f"{report['history_bytes'] / 2**20:.1f}",
    }


if __name__ == "__main__":
    try:
        main()
    except ppgraph.PPGraphError as error:
        sys.exit(f"quickstart: {error}")
