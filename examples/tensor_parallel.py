"""One model over several ranks: what a batch takes dense and pruned, in turns, both compiled.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py                    # a random LLaMA; needs no GPU
    torchrun --nproc-per-node 8 examples/tensor_parallel.py MODEL --dtype bfloat16 --batch 16 --length 1024

transformers spreads the model by the plan that its family comes with. Each rank keeps the same share of the heads and
channels that it holds, so all have the same load; the sums over ranks stay as they are. Rank 0 tells how it goes.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

import ppgraph
from ppgraph.inspect.rates import once_measured
from ppgraph.inspect.timing import WARM_UP_ROUNDS, alternate, costs_of, header, machine, time_ms, timing_table

# A rank that waits this long for another ends with an error, and torchrun ends the others.
TIMEOUT = timedelta(minutes=10)


def main(arguments: list[str]) -> None:
    """Load, compile both, time them in turns, print on rank 0."""
    args = parse(arguments)
    if "RANK" not in os.environ:
        sys.exit("tensor_parallel: needs ranks, start it with: torchrun --nproc-per-node 2 examples/tensor_parallel.py")
    distributed.init_process_group(timeout=TIMEOUT)
    is_first = distributed.get_rank() == 0
    model = load(args)
    pruned = ppgraph.transform(model, ratio=args.ratio, skip_layers=args.skip_layers)
    torch.manual_seed(0)  # all ranks take the same batch
    ids = torch.randint(model.config.vocab_size, (args.batch, args.length)).to(model.device)
    models = {"dense": torch.compile(model), "ppgraph": pruned}
    calls = {name: torch.no_grad()(lambda each=each: each(ids, use_cache=False)) for name, each in models.items()}

    first_ms = {name: time_ms(calls[name]) for name in tqdm(calls, desc="compiling", disable=not is_first)}
    alternate(calls, range(WARM_UP_ROUNDS))
    timings = alternate(calls, tqdm(range(args.repeats), desc="rounds", disable=not is_first))
    kept = kept_by_rank(pruned)
    if is_first:
        costs = costs_of(pruned.ppgraph.report())
        rates = once_measured(model.device, model.dtype)
        assert rates is not None
        print(header(machine(), model.device.type, model.dtype))
        print(f"{len(kept)} ranks, {args.batch} samples of {args.length} tokens; times and FLOPs of rank 0\n")
        print(timing_table(timings, first_ms, costs, rates, tokens=ids.numel()))
        print(f"\nchannels kept by rank: {', '.join(map(str, kept))}")
    distributed.destroy_process_group()


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Time a model over several ranks, dense and pruned in turns.")
    parser.add_argument("model", nargs="?", help="folder or hub name; a random LLaMA if absent")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--ratio", type=float, default=0.4, help="share of heads and channels removed")
    parser.add_argument("--skip-layers", type=int, default=0, help="first layers left dense")
    parser.add_argument("--batch", type=int, default=8, help="samples")
    parser.add_argument("--length", type=int, default=256, help="tokens a sample")
    parser.add_argument("--repeats", type=int, default=12, help="measured rounds")
    return parser.parse_args(arguments)


def load(args: argparse.Namespace) -> Any:
    """The model over all ranks; a random one is saved by rank 0, and each reads the part that it keeps."""
    with tempfile.TemporaryDirectory(prefix="ppgraph-") as own:
        folder = [args.model or own]
        distributed.broadcast_object_list(folder)
        if not args.model and distributed.get_rank() == 0:
            save_random(own)
        distributed.barrier()
        config = DistributedConfig(tp_plan="auto")
        model = AutoModelForCausalLM.from_pretrained(folder[0], dtype=args.dtype, distributed_config=config)
        distributed.barrier()
    return model.eval()


def save_random(folder: str) -> None:
    """A LLaMA of 4 layers with random weights."""
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=4096,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def kept_by_rank(pruned: Any) -> list[int]:
    """How many channels each rank keeps, over all blocks."""
    kept: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(kept, sum(len(channels) for channels in pruned.ppgraph.selection().values()))
    return kept


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ppgraph.PPGraphError as error:
        sys.exit(f"tensor_parallel: {error}")
