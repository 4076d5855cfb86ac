"""A pruning method of one's own: a score, registered in a few lines, compiled on whatever model is at hand.

It ranks channels by the largest weight they meet instead of the norm of their weights, on what calibration saw alone,
and is set beside Probe Pruning by what each changes in the model's output.

    python examples/own_method.py config:qwen3
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

import ppgraph
from ppgraph.loading import load_model
from ppgraph.methods import register_score

register_score(
    "peak",
    channels=lambda f, weight_term: f.sqrt() * weight_term,  # f [C]: squares of the channel, summed over positions
    weight_term=lambda weight: weight.abs().amax(0),  # exit weight [D, C] -> [C], computed once
    units=lambda channels: channels.amax(1),  # [heads, head size] -> [heads]
)

METHODS = {
    "pp": ppgraph.PruneConfig(ratio=0.3),
    "peak": ppgraph.PruneConfig(ratio=0.3, score="peak", statistics="history"),
}


def main(name: str) -> None:
    """Prune the model with both methods and print how far its logits move."""
    model, _ = load_model(name)
    ids = torch.randint(model.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = model(ids, use_cache=False).logits
    for method, config in METHODS.items():
        print(f"{method}: logits differ by {distance(model, config, ids, dense):.1%}")


def distance(model: nn.Module, config: ppgraph.PruneConfig, ids: Tensor, dense: Tensor) -> float:
    """Relative distance of the pruned model's logits from the dense ones."""
    pruned = ppgraph.transform(model, config, lowering="eager")
    ppgraph.calibrate(pruned, [ids], progress=False)
    logits = pruned(ids, use_cache=False).logits
    return float((logits - dense).norm() / dense.norm())


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "config:llama")
