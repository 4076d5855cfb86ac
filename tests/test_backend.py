"""`torch.compile(model, backend="ppgraph")`, and `torch.compile` around a transformed model."""

from __future__ import annotations

import copy
import gc
import inspect
import subprocess
import sys
import weakref
from collections.abc import Mapping

import pytest
import torch
from transformers import LlamaForCausalLM

import ppgraph
from ppgraph import _torch
from ppgraph.backend import split_options
from ppgraph.errors import CaptureError, ConfigError, DecodeError, InputError
from tests.reference import masked_dense_logits
from tests.test_families import FAMILIES
from tests.test_generate import MaskedTwin, cache_in, cached, model, prompts

OPTIONS = {"ratio": 0.4, "skip_layers": 0, "width_multiple": 8}


@pytest.fixture(autouse=True)
def _no_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs run as rewritten: what Inductor makes of them is test_inductor's matter."""
    torch._dynamo.reset()  # past 8 models of one class Dynamo would leave them uncompiled
    monkeypatch.setattr(_torch, "lower_with_inductor", lambda module, options: module)


def ids(samples: int = 3, length: int = 9) -> torch.Tensor:
    torch.manual_seed(length)
    return torch.randint(3, 97, (samples, length))


def require_pruned(dense: LlamaForCausalLM, compiled: object, batch: torch.Tensor, *, use_cache: bool = False) -> None:
    logits = compiled(batch, use_cache=use_cache).logits
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
def test_samples_and_tokens_of_a_square_batch_are_told_apart() -> None:
    dense = model(4)
    compiled = torch.compile(dense, backend="ppgraph", options=OPTIONS, fullgraph=True, dynamic=True)
    for samples, length in ((6, 6), (3, 9)):
        require_pruned(dense, compiled, ids(samples, length))
    assert len(compiled.ppgraph.graphs) == 1
    assert torch.fx.experimental._config.use_duck_shape


@torch.no_grad()
def test_a_chunk_as_long_as_the_cache_is_pruned() -> None:
    dense = model(4)
    compiled = torch.compile(dense, backend="ppgraph", options=OPTIONS, fullgraph=True, dynamic=True)
    first, second = ids(3, 10).split(5, 1)
    output = compiled(first, use_cache=True)
    before = copy.deepcopy(cache_in(output))
    found = compiled(second, **cached(cache_in(output))).logits
    assert [site.reason for graph in compiled.ppgraph.graphs for site in graph.sites if site.refused] == []
    expected = masked_dense_logits(dense, compiled.ppgraph.selection(), second, **cached(before))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


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


@torch.no_grad()
def test_two_wrappers_of_one_model_each_keep_their_own_state() -> None:
    dense = model(4)
    wrappers = [torch.compile(dense, backend="ppgraph", options={**OPTIONS, "ratio": ratio}) for ratio in (0.2, 0.6)]
    for wrapper in wrappers:
        ppgraph.calibrate(wrapper, [ids()], progress=False)
    states = [wrapper.ppgraph for wrapper in wrappers]
    for wrapper, state, ratio in zip(wrappers, states, (0.2, 0.6), strict=True):
        require_pruned(dense, wrapper, ids(4, 7), use_cache=True)
        assert wrapper.ppgraph is state
        assert state.config.ratio == ratio
        assert float(state.history.seen[0]) == 3
    kept = [sum(len(channels) for channels in state.selection().values()) for state in states]
    assert kept[0] > kept[1]
    # A graph that is compiled later finds the state of its own wrapper.
    output = wrappers[0](ids(4, 7), use_cache=True)
    wrappers[1](ids(4, 7), use_cache=True)
    token = output.logits[:, -1:].argmax(-1)
    before = copy.deepcopy(cache_in(output))
    found = wrappers[0](token, **cached(cache_in(output))).logits
    expected = masked_dense_logits(dense, states[0].selection(), token, **cached(before))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert wrappers[0].ppgraph is states[0]


@torch.no_grad()
def test_more_models_than_dynamo_recompiles_for_are_pruned() -> None:
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(3):
            dense = model(4)
            require_pruned(dense, torch.compile(dense, backend="ppgraph", options=OPTIONS), ids())


@torch.no_grad()
def test_the_last_graph_that_dynamo_would_compile_raises_instead_of_leaving_later_ones_dense() -> None:
    with torch._dynamo.config.patch(accumulated_recompile_limit=1):
        compiled = torch.compile(model(4), backend="ppgraph", options=OPTIONS)
        with pytest.raises(CaptureError, match="accumulated_recompile_limit"):
            compiled(ids(), use_cache=False)


def test_a_graph_of_no_model_is_refused() -> None:
    with pytest.raises(CaptureError, match="reads no parameters of one"):
        torch.compile(lambda x: x * 2, backend="ppgraph")(torch.ones(3))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_mask_given_by_position_is_one(family: str) -> None:
    """Decorators of forward take the model in their `*args`, or beside them."""
    dense = FAMILIES[family].model("eager")
    inputs = prompts(3, 11, padded=True)
    order = list(inspect.signature(type(dense).forward).parameters)[1:]
    given = [inputs.get(name) for name in order[: order.index("attention_mask") + 1]]
    compiled = torch.compile(dense, backend="ppgraph", options=OPTIONS)
    found = compiled(*given, use_cache=False).logits
    pruned = ppgraph.transform(dense, **OPTIONS, lowering="eager")
    torch.testing.assert_close(found, pruned(**inputs, use_cache=False).logits, rtol=0, atol=0)
    states = compiled.ppgraph, pruned.ppgraph
    for site in states[0].history:
        torch.testing.assert_close(*(state.history[site] for state in states), rtol=0, atol=0)


@torch.no_grad()
def test_a_function_around_a_model_names_its_tensors_as_the_model_does() -> None:
    dense, inputs = model(4), prompts(3, 11, padded=True)

    def named(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return dense(input_ids, attention_mask, use_cache=False).logits

    def renamed(input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return dense(input_ids, mask, use_cache=False).logits

    found = torch.compile(named, backend="ppgraph", options=OPTIONS)(*inputs.values())
    expected = masked_dense_logits(dense, dense.ppgraph.selection(), **inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(CaptureError, match=r"under the names that LlamaForCausalLM\.forward gives.*found 'mask'"):
        torch.compile(renamed, backend="ppgraph", options=OPTIONS)(*inputs.values())


def test_embeddings_that_require_a_gradient_are_refused_where_there_would_be_one() -> None:
    dense = model(4)
    compiled = torch.compile(dense, backend="ppgraph", options=OPTIONS)
    embedded = dense.get_input_embeddings()(ids()).detach().requires_grad_()
    with pytest.raises(InputError, match="inputs_embeds requires a gradient, but a pruned forward has none"):
        compiled(inputs_embeds=embedded, use_cache=False)
    with torch.no_grad():
        found = compiled(inputs_embeds=embedded, use_cache=False).logits
        expected = masked_dense_logits(dense, compiled.ppgraph.selection(), ids())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_model_compiled_by_the_backend_is_collected() -> None:
    dense = model(4)
    compiled = torch.compile(dense, backend="ppgraph", options=OPTIONS)
    compiled(ids(), use_cache=False)
    gone = weakref.ref(dense)
    del dense, compiled
    gc.collect()
    assert gone() is None


@torch.no_grad()
def test_a_deep_copy_of_a_compiled_model_keeps_its_state() -> None:
    dense = model(4)
    dense.compile(backend="ppgraph", options=OPTIONS)
    ppgraph.calibrate(dense, [ids()], progress=False)
    copied = copy.deepcopy(dense)
    assert copied.ppgraph is not dense.ppgraph
    copied.compile(backend="ppgraph", options=OPTIONS)
    require_pruned(model(4), copied, ids())
    assert float(copied.ppgraph.history.seen[0]) == 3


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_beams_through_model_compile_equal_those_of_the_masked_dense_model(kind: str) -> None:
    dense = model(2)
    untouched = copy.deepcopy(dense)
    dense.compile(backend="ppgraph", options=OPTIONS, dynamic=True)
    inputs = prompts(2, 9, padded=True)
    settings = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    tokens = dense.generate(**inputs, **settings, **({"cache_implementation": "static"} if kind == "static" else {}))
    twin = MaskedTwin(untouched, dense.ppgraph.selection())
    assert torch.equal(tokens, twin.model.generate(**inputs, **settings))


@torch.no_grad()
def test_a_step_from_a_cache_that_another_model_filled_is_refused() -> None:
    dense = model(4)
    cache = cache_in(dense(ids(), use_cache=True))
    compiled = torch.compile(dense, backend="ppgraph", options=OPTIONS)
    with pytest.raises(DecodeError, match="before any prefill"):
        compiled(ids()[:, :1], **cached(copy.deepcopy(cache)))
    compiled(ids(), use_cache=True)
    with pytest.raises(DecodeError, match="carries no selection"):
        compiled(ids()[:, :1], **cached(cache))


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
@torch.no_grad()
def test_a_mode_of_torch_compile_reaches_inductor(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Mapping[str, object]] = []

    def lower(module: torch.fx.GraphModule, options: Mapping[str, object]) -> torch.fx.GraphModule:
        given.append(options)
        return module

    monkeypatch.setattr(_torch, "lower_with_inductor", lower)
    # A mode excludes options in torch.compile: the model must be deep enough for the default skip_layers and ratio.
    dense = model(4, layers=6)
    compiled = torch.compile(dense, backend="ppgraph", mode=mode)
    compiled(ids(), use_cache=False)
    assert compiled.ppgraph.selection()
    assert given
    wanted = {**torch._inductor.list_mode_options(mode), "triton.cudagraphs": False}  # steps alone, by ppgraph.replay
    assert all(options == wanted for options in given)


def test_options_of_inductor_are_told_from_those_of_pruning() -> None:
    config, options = split_options({"ratio": 0.2, "max_autotune": True}, None)
    assert (config.ratio, options) == (0.2, {"max_autotune": True})


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown mode 'fastest'"):
        split_options({}, "fastest")
