"""How long the passes take, by number of layers: of a random LLaMA of tiny width, for a prefill with a mask.

The graph grows with the layers and not with their width, and so does the work of the passes. "first call" is all of
them, after Dynamo's capture and before one run of the rewritten graph; nothing is lowered.

    python benchmarks/analysis.py --layers 8 32 80
"""

from __future__ import annotations

import argparse
import logging
import sys
import time

import torch
from tabulate import tabulate
from transformers import LlamaConfig, LlamaForCausalLM

import ppgraph
from ppgraph.inspect.timing import header, machine


class PassTimes(logging.Handler):
    """Collects what the pass manager logs: {pass: milliseconds}."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        name, *_, elapsed_ms = record.args  # type: ignore[misc]
        if isinstance(elapsed_ms, float):
            self.of[str(name)] = elapsed_ms


def main(arguments: list[str]) -> None:
    """Rewrite one model after the other and print a table of seconds."""
    parser = argparse.ArgumentParser(description="Time the passes by number of layers.")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32, 80], help="decoder layers of each model")
    layers = parser.parse_args(arguments).layers
    print(header(machine(), "cpu", torch.float32))
    rows = {count: seconds_of(count) for count in layers}
    table = [[f"{count} layers", *(round(value, 2) for value in row.values())] for count, row in rows.items()]
    print(tabulate(table, headers=["seconds", *rows[layers[0]]], tablefmt="github"))


def seconds_of(layers: int) -> dict[str, float]:
    """Seconds of each pass, and of the whole first call."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = ppgraph.transform(LlamaForCausalLM(config).eval(), skip_layers=0, width_multiple=8, lowering="eager")
    ids = torch.randint(64, (4, 16))
    times = PassTimes()
    log = logging.getLogger("ppgraph.passes")
    log.addHandler(times)
    log.setLevel(logging.INFO)
    log.propagate = False
    start = time.perf_counter()
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    first_call = time.perf_counter() - start
    log.removeHandler(times)
    return {name: elapsed / 1e3 for name, elapsed in times.of.items()} | {"first call": first_call}


if __name__ == "__main__":
    main(sys.argv[1:])
