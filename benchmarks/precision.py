"""How many of the channels that a model keeps in fp32 it also keeps in half precision, by what it is probed with.

Every model calibrates itself, in its own dtype, on a text's first batches, and chooses for batches from its middle on.
Nothing is lowered: the rewritten graphs run as they are.

    python benchmarks/precision.py                       # SmolLM2-135M on Python's help topics
    python benchmarks/precision.py MODEL --text FILE
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

import ppgraph
from ppgraph.evaluate import windows
from ppgraph.inspect.timing import header, machine
from ppgraph.loading import load_model, smollm2_path

# What decides, and the fields of the config that say so.
PROBES: dict[str, dict[str, Any]] = {
    "half of the tokens of one sample in 20": {},
    "all tokens of one sample in 20": {"probe_tokens": 1.0},
    "all tokens of all samples": {"probe_tokens": 1.0, "probe_batch": 1.0},
    "no probe, the history": {"statistics": "history"},
}
Selections = list[dict[str, Tensor]]


def main(arguments: list[str]) -> None:
    """Choose in each dtype, print a table of shares."""
    args = parse(arguments)
    print(header(machine(), "cpu", torch.float32))
    exact, bf16, fp16 = (selections(args, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16))
    rows = [
        {"chosen by": probe, "bf16": agreement(exact[probe], bf16[probe]), "fp16": agreement(exact[probe], fp16[probe])}
        for probe in PROBES
    ]
    print(f"ratio {args.ratio}, {args.batches} batches of {args.batch} x {args.length} tokens\n")
    print(tabulate(rows, headers="keys", floatfmt=".4f", tablefmt="github"))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Compare what half precision keeps with what fp32 keeps.")
    parser.add_argument("model", nargs="?", help="folder, .gguf file or hub name; SmolLM2-135M if absent")
    parser.add_argument("--text", type=Path, help="text to run on; Python's help topics if absent")
    parser.add_argument("--ratio", type=float, default=0.4, help="share of heads and channels removed")
    parser.add_argument("--batch", type=int, default=8, help="samples a batch")
    parser.add_argument("--length", type=int, default=256, help="tokens a sample")
    parser.add_argument("--batches", type=int, default=2, help="batches to choose for")
    parser.add_argument("--calibration", type=int, default=4, help="batches to calibrate on")
    return parser.parse_args(arguments)


def selections(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, Selections]:
    """What the model chooses in this dtype: for each probe, {site name: kept channels} of every batch."""
    path = args.model or smollm2_path(lambda line: print(line, file=sys.stderr))
    model, tokenizer = load_model(path, dtype=dtype)
    text = args.text.read_text(encoding="utf-8") if args.text else "\n".join(pydoc_data.topics.topics.values())
    batches = windows(tokenizer, [text], args.length).split(args.batch)
    calibration, middle = batches[: args.calibration], len(batches) // 2
    found: dict[str, Selections] = {}
    with tempfile.TemporaryDirectory(prefix="ppgraph-precision-") as folder:
        for probe, fields in PROBES.items():
            pruned = ppgraph.transform(model, ratio=args.ratio, lowering="eager", **fields)
            if found:
                pruned.ppgraph.history.load(folder)
            else:
                ppgraph.calibrate(pruned, calibration)
                pruned.ppgraph.history.save(folder)
            found[probe] = []
            for batch in batches[middle : middle + args.batches]:
                pruned(batch, use_cache=False)
                found[probe].append(pruned.ppgraph.selection())
    return found


def agreement(exact: Selections, others: Selections) -> float:
    """The share of the channels of `exact` that `others` keep, over all sites and batches."""
    pairs = [(kept, other[name]) for one, other in zip(exact, others, strict=True) for name, kept in one.items()]
    common = sum(int(torch.isin(other, kept).sum()) for kept, other in pairs)
    return common / sum(len(kept) for kept, _ in pairs)


if __name__ == "__main__":
    main(sys.argv[1:])
