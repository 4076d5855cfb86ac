"""Score a data set: the mean log-likelihood of every line of a file, in batches that each choose their own channels.

    python examples/score_texts.py MODEL --text FILE [--ratio 0.2] [--batch 16] > scores.jsonl

This is where Probe Pruning pays: long prefills, many samples a batch. Lines are sorted by length, so that a batch holds
little padding (which never counts, neither in the probe nor in the history).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

import ppgraph
from ppgraph.loading import load_model


def main(arguments: list[str]) -> None:
    """Load, calibrate on the first batches, score all of them."""
    args = parse(arguments)
    model, tokenizer = load_model(args.model)
    if tokenizer is None:
        raise ppgraph.PPGraphError(f"{args.model} has no tokenizer; name a model that comes with one")
    lines = [line for line in args.text.read_text(encoding="utf-8").splitlines() if line.strip()]
    longest = args.length or model.config.max_position_embeddings
    batches = list(batched(lines, tokenizer, args.batch, longest))

    pruned = ppgraph.transform(model, ratio=args.ratio, lowering=args.lowering)
    ppgraph.calibrate(pruned, [inputs for _, inputs in batches[: args.calibration]])
    for numbers, inputs in tqdm(batches, desc="scoring", unit="batch", file=sys.stderr):
        for number, score in zip(numbers, scores(pruned, inputs), strict=True):
            print(json.dumps({"line": number, "log_likelihood": score, "text": lines[number][:60]}))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Score every line of a text with a pruned model.")
    parser.add_argument("model", help="folder, .gguf file or hub name")
    parser.add_argument("--text", type=Path, required=True, help="one text a line")
    parser.add_argument("--ratio", type=float, default=0.2, help="share of heads and channels removed")
    parser.add_argument("--batch", type=int, default=16, help="lines a batch")
    parser.add_argument("--length", type=int, help="cut lines to so many tokens (the model's context)")
    parser.add_argument("--calibration", type=int, default=4, help="batches to calibrate on first")
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="inductor", help="eager compiles nothing")
    return parser.parse_args(arguments)


def batched(lines: list[str], tokenizer: Any, size: int, longest: int) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Line numbers and padded inputs [B, S], lines of like length together."""
    encoded = [tokenizer(line, verbose=False)["input_ids"][:longest] for line in lines]
    order = sorted(
        (number for number, ids in enumerate(encoded) if len(ids) > 1), key=lambda number: len(encoded[number])
    )
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        rows = [torch.tensor(encoded[number]) for number in numbers]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        yield numbers, {"input_ids": ids, "attention_mask": mask}


def scores(model: Any, inputs: dict[str, torch.Tensor]) -> list[float]:
    """Mean log-likelihood of each sample's tokens after its first, padding left out."""
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[:, :-1]
    targets, real = inputs["input_ids"][:, 1:], inputs["attention_mask"][:, 1:].bool()
    losses = F.cross_entropy(logits.transpose(1, 2).float(), targets, reduction="none").masked_fill(~real, 0)
    return [float(value) for value in -losses.sum(1) / real.sum(1)]


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ppgraph.PPGraphError as error:
        sys.exit(f"score_texts: {error}")
