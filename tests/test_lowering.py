"""Graphs cut at their layers: layers alike are compiled once, whatever their caches hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

import ppgraph
from ppgraph import _torch
from tests.reference import masked_dense_logits
from tests.test_cache import empty_cache
from tests.test_generate import OPTIONS, cached, model, prompts


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[GraphModule]:
    """The parts that were given to Inductor, which run as they are."""
    parts: list[GraphModule] = []

    def keep(module: GraphModule, options: Any) -> Callable[..., Any]:
        parts.append(module)
        return module

    monkeypatch.setattr(_torch, "lower_with_inductor", keep)
    return parts


@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
def test_layers_alike_are_compiled_once(cache: str | None, compiled: list[GraphModule]) -> None:
    counts = []
    for layers in (3, 5):
        dense = model(4, layers)
        pruned = ppgraph.transform(dense, **{**OPTIONS, "lowering": "inductor"})
        inputs = prompts(3, 11, padded=False)
        given = cached(empty_cache(cache, dense)) if cache else {"use_cache": False}
        compiled.clear()
        logits = pruned(**inputs, **given).logits
        counts.append(len(compiled))
        expected = masked_dense_logits(dense, pruned.ppgraph.selection(), **inputs)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert counts[0] == counts[1]
