"""`ppgraph eval`: methods beside each other on one text, as a table, JSON and a plot."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from ppgraph.commands import add_batch, add_examples, add_json, add_model, as_json, load, positive
from ppgraph.config import METHODS, PruneConfig
from ppgraph.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ppgraph eval`."""
    add_model(parser)
    parser.add_argument(
        "--text", type=Path, nargs="+", required=True, metavar="FILE", help="what to score; of several, batches mix all"
    )
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE", help="what fills the history")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="NAME", help="which (all)")
    parser.add_argument(
        "--history-below", type=int, default=0, metavar="N", help="batches of fewer tokens go by the history alone (0)"
    )
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.4], metavar="X", help="removed (0.2 0.4)")
    add_batch(parser, samples=20, tokens=1024)
    parser.add_argument("--batches", type=positive, metavar="N", help="batches to score (the whole text)")
    parser.add_argument("--calibration-batches", type=positive, default=8, metavar="N", help="to calibrate on (8)")
    parser.add_argument("--seed", type=int, metavar="N", help="take windows in a random order (in the text's own)")
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, default=True, help="also choose from halves")
    parser.add_argument("--repeats", type=int, default=0, metavar="N", help="timed calls, 0 for no timing (0)")
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="inductor", help="of pruned models")
    parser.add_argument("--tasks", type=Path, nargs="+", default=[], metavar="FILE", help="zero-shot tasks, JSON lines")
    parser.add_argument("--task-limit", type=positive, metavar="N", help="questions of each task (all)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results; a later run continues from them")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw perplexity against what is saved")
    add_json(parser)
    add_examples(
        parser,
        "eval ./my-model --text wiki.txt --calibration c4.txt --batches 3 --out results.json",
        "eval ./my-model --text wiki.txt --calibration c4.txt --repeats 20 --plot results.png",
        "eval ./my-model --text wiki.txt --calibration c4.txt --tasks piqa.jsonl --task-limit 200",
    )


def run(args: argparse.Namespace) -> str:
    """Measure the dense model and each method at each ratio, and save.

    Raises:
        InputError: a model or text can't be used, a results file is of another run, or nothing draws plots.
    """
    from ppgraph.evaluate import Settings, compare, require_matplotlib

    if args.plot:
        require_matplotlib()  # not after hours
    configs = dict(_configs(args.methods, args.ratios, args.history_below))
    texts, calibration = [_read(path) for path in args.text], _read(args.calibration)
    model, tokenizer = load(args)
    if tokenizer is None:
        raise InputError(f"{args.model} has no tokenizer to read a text with; name a model that comes with one")

    settings = Settings(
        length=args.length,
        batch=args.batch,
        batches=args.batches,
        calibration_batches=args.calibration_batches,
        seed=args.seed,
        causal=args.causal,
        repeats=args.repeats,
        lowering=args.lowering,
        tasks=tuple(map(str, args.tasks)),
        task_limit=args.task_limit,
    )
    found = compare(model, tokenizer, configs, texts=texts, calibration=calibration, settings=settings, output=args.out)
    if args.plot:
        found.plot(args.plot)
    return as_json(found.to_dict()) if args.json else str(found)


def _configs(methods: Sequence[str], ratios: Sequence[float], history_below: int) -> Iterator[tuple[str, PruneConfig]]:
    suffix = f" history_below={history_below}" if history_below else ""
    for method in methods:
        for ratio in ratios:
            config = PruneConfig(method=method, ratio=ratio, history_below=history_below)
            yield f"{method} {ratio:g}{suffix}", config


def _read(path: Path) -> str:
    """A text without the header lines that corpora of Wikipedia have between articles."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}; expected a UTF-8 text") from None
    return "\n".join(line for line in text.split("\n") if not line.startswith(("<doc ", "</doc>")))
