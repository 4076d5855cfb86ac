"""bf16 and fp16 on a trained model: nearly the same channels as in fp32."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import pytest
import torch

import ppgraph
from ppgraph import loading

SAMPLES, TOKENS = 4, 128
LEAST = 0.97  # share of the channels that fp32 keeps, too


def cached_smollm2() -> Path | None:
    """SmolLM2-135M where it lies in the cache already; tests download nothing."""
    path = loading._cache_folder() / loading.SMOLLM2_FILE
    return path if path.exists() else None


def selected(dtype: torch.dtype, path: Path) -> list[dict[str, torch.Tensor]]:
    model, tokenizer = loading.load_model(path, dtype=dtype)
    assert tokenizer is not None
    ids = torch.tensor(tokenizer("\n".join(pydoc_data.topics.topics.values())[:20000])["input_ids"])
    batches = ids[: 2 * SAMPLES * TOKENS].view(2, SAMPLES, TOKENS)
    pruned = ppgraph.transform(model, ratio=0.4, lowering="eager")
    ppgraph.calibrate(pruned, [batches[0]], progress=False)
    assert {values.dtype for values in map(pruned.ppgraph.history.__getitem__, pruned.ppgraph.history)} == {
        torch.float32
    }
    found = []
    for batch in batches:
        assert bool(torch.isfinite(pruned(batch, use_cache=False).logits).all())
        found.append(pruned.ppgraph.selection())
    return found


@pytest.mark.skipif(cached_smollm2() is None, reason="SmolLM2-135M is not in the cache; the demo downloads it")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_keeps_the_channels_of_fp32(dtype: torch.dtype) -> None:
    path = cached_smollm2()
    assert path is not None
    exact, half = selected(torch.float32, path), selected(dtype, path)
    common = total = 0
    for expected, found in zip(exact, half, strict=True):
        for name, kept in expected.items():
            common += int(torch.isin(found[name], kept).sum())
            total += len(kept)
    assert common / total >= LEAST, f"{common / total:.4f}"
