"""Decode speed of Probe Pruning on a LLaMA of any shape: single-token steps through a KV cache, `decode="reuse"`.

Three variants of one random model run in turns, each with its decoding compiled and its cache filled by the same
prompt:

- dense: the model as it is;
- static: a model whose layers have the kept widths from the start: the limit, but for attention, which on CPUs is
  torch's kernel in it and in dense, and a loop of Inductor's in ppgraph;
- ppgraph: the dense model, transformed: a step reads the weights that the prompt's selection packed. Keys and values
  stay whole in its cache, so that a later prompt may choose otherwise; those of static are as narrow as its layers.

A round fills the cache anew, untimed, and then times `--steps` greedy steps. As in `generate`, dense and static run
their prompt as it is, so theirs is not compiled; first calls of prompt and steps stand apart.

    python benchmarks/decode.py --batch 4 --cache dynamic --json benchmarks/results/decode.json
"""

from __future__ import annotations

import argparse
import inspect
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, LlamaForCausalLM, StaticCache
from variants import DTYPES, add_arguments, dense_model, prune_config, pruned_model, results, static_model

from ppgraph.inspect.timing import WARM_UP_ROUNDS, Timing, alternate, first_calls, header, machine, write_json

# The name of the model's argument has changed with transformers 5.24.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; the defaults are the shape that the project's speed is stated for."""
    parser = argparse.ArgumentParser(
        description="Time compiled dense, static and pruned decoding of a random LLaMA, in turns.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_arguments(parser, batch=1, repeats=15)
    parser.add_argument("--steps", type=int, default=32, help="tokens a sample and round")
    parser.add_argument("--cuda-graphs", action="store_true", help="compile all with CUDA graphs")
    parser.add_argument("--cache", choices=("static", "dynamic"), default="static", help="kind of KV cache")
    return parser.parse_args(arguments)


class Decoding:
    """Greedy decoding of one model: `fill` runs the prompt, each call then decodes `steps` tokens a sample."""

    def __init__(self, args: argparse.Namespace, prefill: Any, decode: Callable[..., Any], prompt: Tensor) -> None:
        self.args, self.prefill, self.decode, self.prompt = args, prefill, decode, prompt
        self.cache: Any = None
        self.token = prompt[:, :1]

    @torch.no_grad()
    def fill(self) -> None:
        """A cache that holds the prompt and nothing else."""
        if self.args.cache == "dynamic":
            self.cache = DynamicCache()
        elif self.cache is None:
            self.cache = StaticCache(self.prefill.config, max_cache_len=self.args.length + self.args.steps)
        else:  # as `generate` does: the same memory again
            self.cache.reset()
        output = self.prefill(self.prompt, logits_to_keep=1, **{CACHE: self.cache})
        self.token = output.logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def __call__(self) -> None:
        for _ in range(self.args.steps):
            self.token = self.decode(self.token, **{CACHE: self.cache}).logits[:, -1:].argmax(-1)


def main(arguments: list[str]) -> None:
    """Build the variants, time them, print the table."""
    args = parse(arguments)
    described = machine()
    print(header(described, args.device, DTYPES[args.dtype]))

    decodings = all_decodings(args)
    with tempfile.TemporaryDirectory(prefix="ppgraph-bench-", ignore_cleanup_errors=True) as caches:
        first_prompts = first_calls({name: each.fill for name, each in decodings.items()}, Path(caches) / "prompts")
        first_ms = first_calls(decodings, Path(caches) / "steps")
        prepare = {name: each.fill for name, each in decodings.items()}
        alternate(decodings, range(WARM_UP_ROUNDS), prepare)
        timings = alternate(decodings, tqdm(range(args.repeats), desc="rounds", file=sys.stderr), prepare)
    print(table(timings, first_prompts, first_ms, args))
    print(f"efficiency (static / ppgraph): {timings['static'].median_ms / timings['ppgraph'].median_ms:.3f}")
    if args.json:
        write_json(args.json, results(args, described, timings, first_ms, first_prompt_ms=first_prompts))


def all_decodings(args: argparse.Namespace) -> dict[str, Decoding]:
    """The three variants with one prompt of random tokens, not compiled yet."""
    dense = dense_model(args, args.device, "sdpa")
    config = prune_config(args)
    options = {"triton.cudagraphs": args.cuda_graphs}
    static, pruned = static_model(dense, config), pruned_model(args, dense, lowering=options)
    prompt = torch.randint(args.vocab, (args.batch, args.length), device=args.device)
    return {
        "dense": Decoding(args, dense, torch.compile(dense, options=options), prompt),
        "static": Decoding(args, static, torch.compile(static, options=options), prompt),
        "ppgraph": Decoding(args, pruned, pruned, prompt),
    }


def table(
    timings: dict[str, Timing], first_prompts: dict[str, float], first_ms: dict[str, float], args: argparse.Namespace
) -> str:
    """One row a variant."""
    steps, tokens = args.steps, args.batch * args.steps
    rows = [
        {
            "variant": name,
            "ms a step": timing.median_ms / steps,
            "spread ms": timing.spread_ms / steps,
            "tokens/s": tokens / timing.median_ms * 1000,
            "speedup": timings["dense"].median_ms / timing.median_ms,
            "first prompt s": first_prompts[name] / 1000,
            "first steps s": first_ms[name] / 1000,
        }
        for name, timing in timings.items()
    ]
    return tabulate(rows, headers="keys", floatfmt=("", ".3f", ".3f", ".1f", ".3f", ".1f", ".1f"))


if __name__ == "__main__":
    main(sys.argv[1:])
