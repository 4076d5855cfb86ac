"""Prefill speed of Probe Pruning on a LLaMA of any shape.

Three variants of one random model run in turns, each compiled, without a KV cache, giving the logits of the last token
as a prefill of `generate` does:

- dense: the model as it is;
- static: a model whose layers have the kept widths from the start; no probe, no selection: the limit;
- ppgraph: the dense model, transformed; each batch is probed and selects its own heads and channels.

The history is left empty, which costs the same as a full one. FLOPs are counted by torch on the eager models,
attention in full (causal or not), so that what the table says of them does not rest on ppgraph's own report.

    python benchmarks/prefill.py --dtype float32 --ratio 0.2 --json benchmarks/results/prefill.json
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM
from variants import DTYPES, add_arguments, dense_model, prefill_call, prune_config, results, static_model

import ppgraph
from ppgraph.inspect.timing import compile_and_time, header, machine, timing_table, write_json


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; the defaults are the shape that the project's speed is stated for."""
    parser = argparse.ArgumentParser(
        description="Time compiled dense, static and pruned prefill of a random LLaMA, in turns.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_arguments(parser, batch=8, repeats=20)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Build the variants, time them, print the table."""
    args = parse(arguments)
    described = machine()
    print(header(described, args.device, DTYPES[args.dtype]))

    config = prune_config(args)
    flops = count_flops(args, config)
    calls = compiled_calls(args, config)
    first_ms, timings = compile_and_time(calls, args.repeats)
    print(timing_table(timings, first_ms, flops, tokens=args.batch * args.length))
    print(f"efficiency (static / ppgraph): {timings['static'].median_ms / timings['ppgraph'].median_ms:.3f}")
    print(f"probe: {flops['probe'] / flops['dense']:.2%} of the dense FLOPs")
    if args.json:
        write_json(args.json, results(args, described, timings, first_ms, flops=flops))


def compiled_calls(args: argparse.Namespace, config: ppgraph.PruneConfig) -> dict[str, Callable[[], object]]:
    """The three variants on one batch of random tokens, not compiled yet."""
    dense = dense_model(args, args.device, "sdpa")
    tokens = torch.randint(args.vocab, (args.batch, args.length), device=args.device)

    models = {
        "dense": torch.compile(dense),
        "static": torch.compile(static_model(dense, config)),
        "ppgraph": ppgraph.transform(dense, config),
    }
    return {name: prefill_call(model, tokens) for name, model in models.items()}


def count_flops(args: argparse.Namespace, config: ppgraph.PruneConfig) -> dict[str, int]:
    """FLOPs of one batch: dense, static, the probe, and static with the probe ("ppgraph").

    The meta device computes nothing, and eager attention shows the counter its products, which sdpa hides.
    """
    dense = dense_model(args, "meta", "eager")
    samples = math.ceil(args.batch * config.probe_batch)
    tokens = min(max(math.ceil(args.length * config.probe_tokens), 2), args.length)
    static_flops = module_flops(static_model(dense, config), args.batch, args.length)[""]
    by_module = module_flops(dense, samples, tokens)
    probe = sum(
        by_module[f"layers.{layer}.{block}"] - by_module[f"layers.{layer}.{block}.{exit_linear}"]
        for layer in range(config.skip_layers, args.layers)
        for block, exit_linear in (("self_attn", "o_proj"), ("mlp", "down_proj"))
    )
    return {
        "dense": module_flops(dense, args.batch, args.length)[""],
        "static": static_flops,
        "probe": probe,
        "ppgraph": static_flops + probe,
    }


def module_flops(model: LlamaForCausalLM, samples: int, tokens: int) -> dict[str, int]:
    """FLOPs by module path inside the decoder, and of the whole model as `""`."""
    mask = torch.zeros(1, 1, tokens, tokens, device="meta", dtype=model.dtype)
    ids = torch.zeros(samples, tokens, device="meta", dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    prefix = f"{type(model).__name__}.model."
    counts = {name: sum(by_operator.values()) for name, by_operator in counter.get_flop_counts().items()}
    return {name.removeprefix(prefix): total for name, total in counts.items()} | {"": counter.get_total_flops()}


if __name__ == "__main__":
    main(sys.argv[1:])
