"""What Inductor makes of the rewritten graphs. Few tests: each compilation takes half a minute."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import ppgraph
from ppgraph import _torch
from tests.fuzzing import Batch, Case, check
from tests.test_exactness import FOUR, SIZES, batch, compare, llama


@pytest.mark.parametrize("kv_heads", [pytest.param(4, marks=pytest.mark.thorough, id="mha"), pytest.param(2, id="gqa")])
def test_compiled_batches_equal_the_reference(kv_heads: int) -> None:
    compare(
        llama(kv_heads, layers=2),
        [FOUR[0], FOUR[2], batch(2, 30)],
        lowering="inductor",
        ratio=0.4,
        **{**SIZES, "skip_layers": 1},
    )


def test_ratio_zero_is_the_compiled_dense_model_bit_for_bit() -> None:
    model = llama(2, layers=2)
    pruned = ppgraph.transform(model, ratio=0.0)
    # Captured alike: with its floats as symbols, Inductor rounds the dense model's norms another way.
    with torch.no_grad(), _torch.dynamo_settings():
        expected = torch.compile(model, dynamic=True)(**batch(3, 16), use_cache=False).logits
    assert torch.equal(pruned(**batch(3, 16), use_cache=False).logits, expected)


def test_a_float_that_inductor_wants_as_a_constant_is_traced_again() -> None:
    """Found by fuzzing: gemma2 in float64 scales its embeddings by a tensor, whose number was a symbol of the graph."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_attention_heads": 2,
        "head_dim": 16,
        "num_hidden_layers": 1,
    }
    config = {"ratio": 0.4, "skip_layers": 0, "decode": "dense", "blocks": ("mlp",)}
    case = Case(
        "gemma2", (Batch(samples=3, length=8),), config, sizes, attention="eager", dtype="float64", mask="packed"
    )
    # A graph that is in its cache is not looked at for such floats.
    with torch._functorch.config.patch(enable_autograd_cache=False):
        check(dataclasses.replace(case, lowering="inductor"))
