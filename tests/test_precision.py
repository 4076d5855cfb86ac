"""bf16 and fp16 on a trained model: nearly the same channels as in fp32."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import pytest
import torch

import ppgraph
from ppgraph import loading

SAMPLES, TOKENS = 4, 128
# Share of the channels that fp32 keeps, too. Where half of the tokens are probed, bf16 also ranks those otherwise
# (benchmarks/precision.py), which costs some; with all of them probed, what is computed of them decides.
LEAST = {
    "full-batch": {torch.bfloat16: 0.97, torch.float16: 0.97},
    "pp": {torch.bfloat16: 0.9, torch.float16: 0.97},
}


def cached_smollm2() -> Path | None:
    """SmolLM2-135M where it lies in the cache already; tests download nothing."""
    path = loading._cache_folder() / loading.SMOLLM2_FILE
    return path if path.exists() else None


def selected(dtype: torch.dtype, path: Path, method: str) -> list[dict[str, torch.Tensor]]:
    model, tokenizer = loading.load_model(path, dtype=dtype)
    assert tokenizer is not None
    ids = torch.tensor(tokenizer("\n".join(pydoc_data.topics.topics.values())[:20000])["input_ids"])
    batches = ids[: 2 * SAMPLES * TOKENS].view(2, SAMPLES, TOKENS)
    pruned = ppgraph.transform(model, ratio=0.4, method=method, lowering="eager")
    if pruned.ppgraph.config.needs_history:
        ppgraph.calibrate(pruned, [batches[0]], progress=False)
        assert {pruned.ppgraph.history[name].dtype for name in pruned.ppgraph.history} == {torch.float32}
    found = []
    for batch in batches:
        assert bool(torch.isfinite(pruned(batch, use_cache=False).logits).all())
        found.append(pruned.ppgraph.selection())
    return found


@pytest.mark.skipif(cached_smollm2() is None, reason="SmolLM2-135M is not in the cache; the demo downloads it")
@pytest.mark.thorough
@pytest.mark.parametrize("method", LEAST)
def test_half_precision_keeps_the_channels_of_fp32(method: str) -> None:
    path = cached_smollm2()
    assert path is not None
    exact = selected(torch.float32, path, method)
    for dtype, least in LEAST[method].items():
        pairs = [
            (found[name], kept)
            for expected, found in zip(exact, selected(dtype, path, method), strict=True)
            for name, kept in expected.items()
        ]
        common = sum(int(torch.isin(found, kept).sum()) for found, kept in pairs)
        share = common / sum(len(kept) for _, kept in pairs)
        assert share >= least, f"{dtype}: {share:.4f}"
