"""A first call: prune a model and see what happened.

    python examples/first_call.py [MODEL]     # a folder, .gguf file, hub name or config:FAMILY (config:llama)

`examples/quickstart.py` does the same with a real model, and measures perplexity and time.
"""

from __future__ import annotations

import sys

import torch

import ppgraph
from ppgraph.loading import load_model


def main(name: str = "config:llama") -> None:
    """Transform, calibrate, run, report."""
    model, _ = load_model(name)
    batches = torch.randint(500, (4, 8, 64))

    pruned = ppgraph.transform(model, ratio=0.4, lowering="eager")  # leave lowering out for speed: Inductor compiles
    ppgraph.calibrate(pruned, batches[:3])
    logits = pruned(batches[3], use_cache=False).logits

    print(pruned.ppgraph.report())
    print(f"logits {list(logits.shape)}; kept in {len(pruned.ppgraph.selection())} blocks, chosen by this batch")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:2])
    except ppgraph.PPGraphError as error:
        sys.exit(f"first_call: {error}")
