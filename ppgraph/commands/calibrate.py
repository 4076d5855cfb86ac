"""`ppgraph calibrate`: fill a history from a text and save it."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from ppgraph.commands import (
    add_batch,
    add_config,
    add_examples,
    add_json,
    add_model,
    as_json,
    config_of,
    load,
    positive,
    text_batches,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ppgraph calibrate`."""
    add_model(parser)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="what to calibrate on")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to save the history")
    add_batch(parser, samples=8, tokens=512)
    parser.add_argument("--batches", type=positive, default=16, metavar="N", help="batches to read at most (16)")
    add_json(parser)
    add_config(parser)
    add_examples(
        parser,
        "calibrate ./my-model --text c4.txt --out history",
        "calibrate model.gguf --text c4.txt --out history --batch 20 --length 1024 --skip-layers 3",
    )


def run(args: argparse.Namespace) -> str:
    """Calibrate on the dense graph as it is (few batches don't pay for compiling it) and save."""
    config = config_of(args)
    model, tokenizer = load(args)
    batches = list(itertools.islice(text_batches(tokenizer, args.text, args), args.batches))

    from ppgraph.calibrate import calibrate
    from ppgraph.transform import transform

    pruned = transform(model, config, lowering="eager")
    calibrate(pruned, [batch.to(model.device) for batch in batches])
    history = pruned.ppgraph.history
    history.save(args.out)
    result = {
        "folder": str(args.out),
        "batches": len(batches),
        "samples": len(batches) * args.batch,
        "positions": history.positions,
        "sites": len(history),
        "bytes": history.nbytes,
    }
    return as_json(result) if args.json else f"{args.out}: {history!r} from {result['samples']} samples"
