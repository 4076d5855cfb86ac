"""Prefill speed of Probe Pruning on a LLaMA of any shape.

Three variants of one random model run in turns, each compiled, without a KV cache, giving the logits of the last token
as a prefill of `generate` does:

- dense: the model as it is;
- static: a model whose layers have the kept widths from the start; no probe, no selection: the limit;
- ppgraph: the dense model, transformed; each batch is probed and selects its own heads and channels.

The history is left empty, which costs the same as a full one. FLOPs, attention in full (causal or not), are those of
the model's report, and torch's own count for static. "floor ms" is the roofline: no less than the FLOPs take, or the
weights' bytes, at rates measured in the same run with one product and one gather.

    python benchmarks/prefill.py --dtype float32 --ratio 0.2 --json benchmarks/results/prefill.json
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from variants import (
    DTYPES,
    add_arguments,
    compiled_models,
    dense_model,
    prefill_call,
    prune_config,
    results,
    static_model,
)

from ppgraph.inspect.rates import Rates
from ppgraph.inspect.timing import Cost, compile_and_time, costs_of, header, machine, timing_table, write_json


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

    models = compiled_models(args)
    tokens = torch.randint(args.vocab, (args.batch, args.length), device=args.device)
    calls = {name: prefill_call(each, tokens) for name, each in models.items()}
    first_ms, timings = compile_and_time(calls, args.repeats)
    report = models["ppgraph"].ppgraph.report()
    costs = costs_of(report) | {"static": static_cost(args)}
    rates = Rates.measured(tokens.device, DTYPES[args.dtype])
    assert report.cost is not None
    assert rates is not None
    print(timing_table(timings, first_ms, costs, rates, tokens=tokens.numel()))
    print(f"efficiency (static / ppgraph): {timings['static'].median_ms / timings['ppgraph'].median_ms:.3f}")
    print(f"probe: {report.cost.flops.probe_share:.2%} of the dense FLOPs")
    if args.json:
        flops = {name: cost.flops for name, cost in costs.items()}
        write_json(args.json, results(args, described, timings, first_ms, flops=flops, rates=rates.to_dict()))


def static_cost(args: argparse.Namespace) -> Cost:
    """FLOPs and weights of the static model.

    The meta device computes nothing, and eager attention shows the counter its products, which sdpa hides.
    """
    model = static_model(dense_model(args, "meta", "eager"), prune_config(args))
    mask = torch.zeros(1, 1, args.length, args.length, device="meta", dtype=model.dtype)
    ids = torch.zeros(args.batch, args.length, device="meta", dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return Cost(counter.get_total_flops(), sum(linear.weight.nbytes for linear in linears))


if __name__ == "__main__":
    main(sys.argv[1:])
