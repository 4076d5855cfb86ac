"""`torch.compile(model, backend="ppgraph")`, and `torch.compile` around a transformed model."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref

import pytest
import torch
from transformers import LlamaForCausalLM

import ppgraph
from ppgraph import _torch
from ppgraph.errors import ConfigError
from tests.reference import masked_dense_logits
from tests.test_generate import cache_in, cached, model

OPTIONS = {"ratio": 0.4, "skip_layers": 1, "width_multiple": 8}


@pytest.fixture(autouse=True)
def _no_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs run as rewritten: what Inductor makes of them is test_inductor's matter."""
    torch._dynamo.reset()  # past 8 models of one class Dynamo would leave them uncompiled
    monkeypatch.setattr(_torch, "lower_with_inductor", lambda module, options: module)


def ids(samples: int = 3, length: int = 9) -> torch.Tensor:
    torch.manual_seed(length)
    return torch.randint(3, 97, (samples, length))


def require_pruned(dense: LlamaForCausalLM, compiled: object, batch: torch.Tensor) -> None:
    logits = compiled(batch, use_cache=False).logits
    selection = compiled.ppgraph.selection()
    assert selection
    torch.testing.assert_close(logits, masked_dense_logits(dense, selection, batch), rtol=1e-5, atol=1e-5)


def test_the_backend_is_found_by_name_without_an_import() -> None:
    script = "import sys, torch; print('ppgraph' in sys.modules, 'ppgraph' in torch._dynamo.list_backends())"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "True"]


@torch.no_grad()
def test_a_compiled_model_is_pruned() -> None:
    dense = model(4)
    compiled = torch.compile(dense, backend="ppgraph", options=OPTIONS, fullgraph=True)
    require_pruned(dense, compiled, ids())
    assert compiled.ppgraph.config.ratio == 0.4


@torch.no_grad()
def test_compile_in_place() -> None:
    dense = model(4)
    untouched = copy.deepcopy(dense)
    dense.compile(backend="ppgraph", options=OPTIONS)
    require_pruned(untouched, dense, ids())


@torch.no_grad()
def test_calibration_before_the_first_call() -> None:
    dense = model(4)
    compiled = torch.compile(dense, backend="ppgraph", options=OPTIONS)
    ppgraph.calibrate(compiled, [ids()], progress=False)
    assert float(compiled.ppgraph.history.seen[0]) == 3
    require_pruned(dense, compiled, ids())


@torch.no_grad()
def test_generate_through_the_backend_keeps_to_the_prompts_selection() -> None:
    dense = model(4)
    compiled = torch.compile(dense, backend="ppgraph", options=OPTIONS)
    output = compiled(ids(), use_cache=True)
    selection = compiled.ppgraph.selection()
    compiled(ids(2, 7), use_cache=True)  # another generation in between
    token = output.logits[:, -1:].argmax(-1)
    before = copy.deepcopy(cache_in(output))
    found = compiled(token, **cached(cache_in(output))).logits
    expected = masked_dense_logits(dense, selection, token, **cached(before))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert {graph.phase for graph in compiled.ppgraph.graphs} == {"prefill", "reuse"}


@torch.no_grad()
def test_two_models_keep_their_own_state() -> None:
    first, second = model(4), model(2)
    compiled = [torch.compile(each, backend="ppgraph", options=OPTIONS) for each in (first, second)]
    for each in compiled:
        each(ids(), use_cache=False)
    assert compiled[0].ppgraph is not compiled[1].ppgraph
    require_pruned(first, compiled[0], ids(4, 7))


@torch.no_grad()
def test_a_deep_copy_is_pruned_with_its_own_state() -> None:
    pruned = ppgraph.transform(model(4), lowering="eager", **OPTIONS)
    pruned(ids(), use_cache=False)
    copied = copy.deepcopy(pruned)
    assert copied.ppgraph is not pruned.ppgraph
    name = pruned.ppgraph.history.keys()[0]
    assert torch.equal(copied.ppgraph.history[name], pruned.ppgraph.history[name])
    before = pruned.ppgraph.history[name].clone()
    require_pruned(copy.deepcopy(model(4)), copied, ids(4, 7))
    assert torch.equal(pruned.ppgraph.history[name], before)


def test_a_pruned_model_is_collected() -> None:
    dense = model(4)
    pruned = ppgraph.transform(dense, lowering="eager", **OPTIONS)
    pruned(ids(), use_cache=False)
    gone = weakref.ref(pruned)
    del pruned
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [({"ratoi": 0.4}, "unknown options: ratoi"), ({"ratio": 1.5}, "ratio"), ({"max_autotune": False, "x": 1}, "x")],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    compiled = torch.compile(model(4), backend="ppgraph", options=options)
    with torch.no_grad(), pytest.raises(ConfigError, match=message):
        compiled(ids(), use_cache=False)


@torch.no_grad()
def test_an_outer_compile_does_not_lose_the_pruning() -> None:
    dense = model(4)
    pruned = ppgraph.transform(dense, lowering="eager", **OPTIONS)
    for settings in ({}, {"fullgraph": True}, {"dynamic": False}):
        require_pruned(dense, torch.compile(pruned, backend="eager", **settings), ids())


@torch.no_grad()
def test_an_outer_compile_of_a_caller_does_not_lose_the_pruning() -> None:
    dense = model(4)
    pruned = ppgraph.transform(dense, lowering="eager", **OPTIONS)
    batch = ids()
    compiled = torch.compile(lambda batch: pruned(batch, use_cache=False).logits * 1, backend="eager")
    logits = compiled(batch)
    expected = masked_dense_logits(dense, pruned.ppgraph.selection(), batch)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    whole = torch.compile(lambda batch: pruned(batch, use_cache=False).logits, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"ppgraph.transform compiles itself"):
        whole(batch)
