"""Zero-shot multiple choice by lm-eval, dense beside pruned, on tasks from local JSON lines; no hub is asked.

    pip install '.[eval]'
    python examples/zero_shot.py MODEL --calibration c4.txt --tasks piqa.jsonl arc_easy.jsonl --limit 200

What a line of a task holds is said in `ppgraph/zero_shot.py`. `ppgraph eval --tasks` does so for many methods.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tabulate import tabulate

import ppgraph
from ppgraph.evaluate import windows
from ppgraph.loading import load_model
from ppgraph.zero_shot import zero_shot


def main(arguments: list[str]) -> None:
    """Load, calibrate, ask both models."""
    args = parse(arguments)
    model, tokenizer = load_model(args.model)
    if tokenizer is None:
        raise ppgraph.PPGraphError(f"{args.model} has no tokenizer; name a model that comes with one")
    text = args.calibration.read_text(encoding="utf-8")
    pruned = ppgraph.transform(model, ratio=args.ratio, lowering="eager")  # batches are few and of many lengths
    ppgraph.calibrate(pruned, windows(tokenizer, [text], 256)[:80].split(args.batch))
    found = {
        name: zero_shot(each, tokenizer, args.tasks, batch=args.batch, limit=args.limit)
        for name, each in (("dense", model), (f"pruned {args.ratio:.0%}", pruned))
    }
    rows = [{"model": name, **{task: scores["acc"] for task, scores in tasks.items()}} for name, tasks in found.items()]
    print(tabulate(rows, headers="keys", floatfmt=".3f"))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Ask a dense and a pruned model multiple-choice questions.")
    parser.add_argument("model", help="folder, .gguf file or hub name, with a tokenizer")
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--tasks", type=Path, nargs="+", required=True, help="files of JSON lines")
    parser.add_argument("--ratio", type=float, default=0.2, help="share of heads and channels removed")
    parser.add_argument("--batch", type=int, default=20, help="requests a batch")
    parser.add_argument("--limit", type=int, help="only the first so many questions of each task")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ppgraph.PPGraphError as error:
        sys.exit(f"zero_shot: {error}")
