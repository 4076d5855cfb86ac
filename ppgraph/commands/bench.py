"""`ppgraph bench`: a model's prefill, compiled, dense and pruned in turns."""

from __future__ import annotations

import argparse

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
    random_batch,
    say,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ppgraph bench`."""
    add_model(parser)
    add_batch(parser, samples=8, tokens=256)
    parser.add_argument("--repeats", type=positive, default=20, metavar="N", help="measured rounds (20)")
    add_json(parser)
    add_config(parser)
    add_examples(
        parser,
        "bench ./my-model --dtype bfloat16 --batch 20 --length 1024",
        "bench config:llama --ratio 0.2 --repeats 50 --json > bench.json",
    )


def run(args: argparse.Namespace) -> str:
    """Compile both and time them in turns."""
    config = config_of(args)
    model, _ = load(args)

    import torch

    from ppgraph.inspect.rates import once_measured
    from ppgraph.inspect.timing import compile_and_time, costs_of, header, machine, timing_table, timings_to_dict
    from ppgraph.transform import transform

    inputs = random_batch(model, args)
    pruned = transform(model, config)
    models = {"dense": torch.compile(model), "ppgraph": pruned}
    calls = {name: torch.no_grad()(lambda each=each: each(**inputs, use_cache=False)) for name, each in models.items()}
    say("compiling both (a minute or two)")
    first_ms, timings = compile_and_time(calls, args.repeats)
    report = pruned.ppgraph.report()
    if args.json:
        results = {
            "machine": machine(),
            "model": args.model,
            "dtype": args.dtype,
            "report": report.to_dict(),
            "variants": timings_to_dict(timings, first_ms),
        }
        return as_json(results)
    rates = once_measured(model.device, model.dtype)
    assert report.cost is not None
    assert rates is not None
    return "\n".join(
        [
            header(machine(), model.device.type, model.dtype),
            f"{args.model}, {args.batch} samples of {args.length} tokens, {config.method} at {config.ratio:g}\n",
            timing_table(timings, first_ms, costs_of(report), rates, tokens=args.batch * args.length),
            f"\nprobe: {report.cost.flops.probe_share:.2%} of the dense FLOPs",
        ]
    )
