"""Where pruning pays: the speedup over compiled dense prefill for each number of samples and of tokens.

Both models are compiled once (batch size 1 once more) and run in turns on every shape. A random LLaMA; the same options
as prefill.py, but for the shapes.

    python benchmarks/break_even.py --samples 1 4 20 --tokens 32 256 --json benchmarks/results/break_even.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm
from variants import DTYPES, add_arguments, dense_model, options, prefill_call, pruned_model

from ppgraph.inspect.timing import WARM_UP_ROUNDS, Timing, alternate, header, machine, timings_to_dict, write_json


def main(arguments: list[str]) -> None:
    """Build both models, time all shapes, print the table."""
    parser = argparse.ArgumentParser(
        description="Speedup of pruned over compiled dense prefill of a random LLaMA, by samples and tokens.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_arguments(parser, repeats=10)
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 2, 4, 8, 20], help="samples a batch")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 128, 256], help="tokens a sample")
    args = parser.parse_args(arguments)
    args.length = max(args.tokens)  # which the model's context must hold
    described = machine()
    print(header(described, args.device, DTYPES[args.dtype]))

    dense = dense_model(args, args.device, "sdpa")
    models = {"dense": torch.compile(dense), "ppgraph": pruned_model(args, dense)}
    shapes = [(samples, tokens) for tokens in args.tokens for samples in args.samples]
    found: dict[tuple[int, int], dict[str, Timing]] = {}
    for shape in tqdm(shapes, desc="shapes", file=sys.stderr):
        found[shape] = timed(models, args, shape)
        if args.json:  # after each, as all take minutes
            write_json(args.json, results(args, described, found))
    print(table(found, args))


def timed(
    models: Mapping[str, Callable[..., Any]], args: argparse.Namespace, shape: tuple[int, int]
) -> dict[str, Timing]:
    """Both models in turns on random tokens [samples, tokens]."""
    tokens = torch.randint(args.vocab, shape, device=args.device)
    calls = {name: prefill_call(model, tokens) for name, model in models.items()}
    alternate(calls, range(WARM_UP_ROUNDS))
    return alternate(calls, range(args.repeats))


def speedup(timings: Mapping[str, Timing]) -> float:
    """Dense time over ours."""
    return timings["dense"].median_ms / timings["ppgraph"].median_ms


def table(found: Mapping[tuple[int, int], Mapping[str, Timing]], args: argparse.Namespace) -> str:
    """One row a length, one column a number of samples."""
    rows = [[tokens, *(speedup(found[samples, tokens]) for samples in args.samples)] for tokens in args.tokens]
    headers = ["tokens", *(f"{samples} samples" for samples in args.samples)]
    return str(tabulate(rows, headers=headers, floatfmt=".2f", tablefmt="github"))


def results(
    args: argparse.Namespace, described: Mapping[str, Any], found: Mapping[tuple[int, int], Mapping[str, Timing]]
) -> dict[str, Any]:
    """Everything that was measured and on what, for the JSON file."""
    shapes = [
        {"samples": samples, "tokens": tokens, "speedup": speedup(timings), "variants": timings_to_dict(timings)}
        for (samples, tokens), timings in found.items()
    ]
    return {"machine": described, "arguments": options(args), "shapes": shapes}


if __name__ == "__main__":
    main(sys.argv[1:])
