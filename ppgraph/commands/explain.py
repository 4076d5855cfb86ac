"""`ppgraph explain`: what pruning would do to a model."""

from __future__ import annotations

import argparse
import os
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
    random_batch,
    say,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ppgraph explain`."""
    add_model(parser)
    add_batch(parser, samples=8, tokens=256)
    add_json(parser)
    parser.add_argument("--dump", type=Path, metavar="FOLDER", help="write each graph there, and a page to look at it")
    add_config(parser)
    add_examples(
        parser,
        "explain config:llama",
        "explain config:mixtral --json",
        "explain ./my-model --ratio 0.2 --batch 20 --length 1024 --dump graphs",
    )


def run(args: argparse.Namespace) -> str:
    """Explain."""
    config = config_of(args)
    if args.dump is not None:
        os.environ["PPGRAPH_DUMP"] = str(args.dump)
    model, _ = load(args)

    from ppgraph.inspect.explain import explain

    say("capturing and rewriting the graph")
    explanation = explain(model, **random_batch(model, args), config=config)
    if args.dump is not None:
        say(f"graphs: {args.dump / 'index.html'}")
    return as_json(explanation.to_dict()) if args.json else str(explanation)
