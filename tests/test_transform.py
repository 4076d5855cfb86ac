"""`transform`: the twin it gives, the original it leaves alone, and the input that a pruned forward refuses."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import ppgraph
from ppgraph.errors import (
    ConfigError,
    InputError,
    NonFiniteError,
    NothingToPruneError,
    PPGraphError,
    UnsupportedModelError,
)
from ppgraph.transform import _reason
from tests.reference import Reference, masked_dense_logits
from tests.test_exactness import SIZES, batch, llama, relative

OPTIONS: dict[str, Any] = {"ratio": 0.4, "lowering": "eager", **SIZES}


def require_pruned(model: LlamaForCausalLM, pruned: LlamaForCausalLM, inputs: dict[str, torch.Tensor]) -> None:
    logits = pruned(**inputs, use_cache=False).logits
    expected = masked_dense_logits(model, pruned.ppgraph.selection(), **inputs)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    assert relative(logits[real], expected[real]) < 1e-5


# The twin and the original


def test_the_twin_has_the_same_class_parameters_and_state_dict() -> None:
    model = llama(2)
    pruned = ppgraph.transform(model, **OPTIONS)
    assert type(pruned) is type(model)
    assert pruned is not model
    assert all(mine is theirs for mine, theirs in zip(pruned.parameters(), model.parameters(), strict=True))
    mine, theirs = pruned.state_dict(), model.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert pruned.ppgraph.config == ppgraph.PruneConfig(ratio=0.4, **SIZES)


def test_the_original_stays_dense_and_untouched() -> None:
    model, inputs = llama(2), batch(3, 16)
    attributes = dict(model.__dict__)
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
    pruned = ppgraph.transform(model, **OPTIONS)
    pruned(**inputs, use_cache=False)
    assert model.__dict__.keys() == attributes.keys()
    assert all(model.__dict__[name] is value for name, value in attributes.items())
    assert not any("ppgraph" in module.__dict__ for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(**inputs, use_cache=False).logits, expected)
        assert not torch.equal(pruned(**inputs, use_cache=False).logits, expected)


def test_the_twins_structure_is_its_own() -> None:
    model = llama(2)
    pruned = ppgraph.transform(model, **OPTIONS)
    pruned.extra = nn.Linear(2, 2)
    pruned.register_buffer("counter", torch.zeros(1))
    assert not hasattr(model, "extra")
    assert "counter" not in dict(model.named_buffers())


def test_config_and_keywords_may_be_mixed() -> None:
    config = ppgraph.PruneConfig(ratio=0.2, **SIZES)
    pruned = ppgraph.transform(llama(2), config, ratio=0.6, lowering="eager")
    assert pruned.ppgraph.config == config.replace(ratio=0.6)
    assert config.ratio == 0.2


def test_copies_with_other_configs_live_side_by_side() -> None:
    model = llama(2)
    inputs = batch(3, 16, "right")
    configs = [{"ratio": 0.2}, {"ratio": 0.6}, {"ratio": 0.4, "blocks": ("mlp",)}]
    copies = [ppgraph.transform(model, **(OPTIONS | config)) for config in configs]
    references = [Reference(model, **({"ratio": 0.4} | SIZES | config)) for config in configs]
    for one in (inputs, batch(4, 9, "left")):
        for pruned, reference in zip(copies, references, strict=True):
            logits, expected = pruned(**one, use_cache=False).logits, reference(**one)
            selection = pruned.ppgraph.selection()
            assert selection.keys() == expected.selection.keys()
            assert all(torch.equal(selection[name], kept) for name, kept in expected.selection.items())
            real = one.get("attention_mask", torch.ones_like(one["input_ids"])).bool()
            assert relative(logits[real], expected.logits[real]) < 1e-5
    assert len({id(pruned.ppgraph.history) for pruned in copies}) == 3


def test_a_deep_copy_has_parameters_and_state_of_its_own() -> None:
    model, inputs = llama(2), batch(3, 16)
    pruned = ppgraph.transform(model, **OPTIONS)
    pruned(**inputs, use_cache=False)
    copied = copy.deepcopy(pruned)
    name = "model.layers.0.mlp"
    before = pruned.ppgraph.history[name].clone()
    with torch.no_grad():
        copied.model.layers[0].mlp.down_proj.weight.mul_(2)
    require_pruned(copy.deepcopy(model), pruned, inputs)
    after = pruned.ppgraph.history[name].clone()
    assert not torch.equal(after, before)
    assert torch.equal(copied.ppgraph.history[name], before)
    copied(**inputs, use_cache=False)
    assert torch.equal(pruned.ppgraph.history[name], after)


@pytest.mark.parametrize("through", ["parent", "twin"])
def test_a_change_of_dtype_is_followed(through: str) -> None:
    """Parameters are shared: whichever of the two is converted, both are, and the history stays fp32."""
    model, inputs = llama(2), batch(3, 16)
    pruned = ppgraph.transform(model, **OPTIONS)
    pruned(**inputs, use_cache=False)
    held = pruned.ppgraph.history["model.layers.0.mlp"].clone()
    (model if through == "parent" else pruned).to(torch.float64)
    assert model.dtype == pruned.dtype == torch.float64
    logits = pruned(**inputs, use_cache=False).logits
    assert logits.dtype == torch.float64
    expected = masked_dense_logits(model, pruned.ppgraph.selection(), **inputs)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    moved = pruned.ppgraph.history["model.layers.0.mlp"]
    assert moved.dtype == torch.float32
    assert not torch.equal(moved, held)
    assert [graph.phase for graph in pruned.ppgraph.graphs] == ["prefill", "prefill"]


def test_changed_weights_count_from_the_next_batch_on() -> None:
    model, inputs = llama(2), batch(3, 16)
    pruned = ppgraph.transform(model, statistics="probe", **OPTIONS)
    pruned(**inputs, use_cache=False)
    before = pruned.ppgraph.selection()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, before["model.layers.0.mlp"]] *= 1e-3
    require_pruned(model, pruned, inputs)
    kept = set(pruned.ppgraph.selection()["model.layers.0.mlp"].tolist())
    assert kept != set(before["model.layers.0.mlp"].tolist())
    assert len(pruned.ppgraph.graphs) == 1
    expected = Reference(model, ratio=0.4, statistics="probe", **SIZES)(**inputs).selection
    assert kept == set(expected["model.layers.0.mlp"].tolist())


def test_loading_other_weights_into_the_twin_is_seen() -> None:
    model, other = llama(2), llama(2, seed=1)
    pruned = ppgraph.transform(model, **OPTIONS)
    pruned(**batch(3, 16), use_cache=False)
    pruned.load_state_dict(other.state_dict())
    require_pruned(other, pruned, batch(3, 16))


def test_a_saved_pruned_model_is_the_dense_one(tmp_path: Any) -> None:
    model = llama(2)
    pruned = ppgraph.transform(model, **OPTIONS)
    pruned(**batch(3, 16), use_cache=False)
    pruned.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


# Graphs


def test_one_graph_and_no_recompilation_for_five_shapes_a_phase() -> None:
    torch._dynamo.reset()
    counters.clear()
    pruned = ppgraph.transform(llama(2), **OPTIONS)
    shapes = [(3, 16), (2, 9), (30, 20), (21, 64), (5, 3)]
    for samples, length in shapes:
        ppgraph.calibrate(pruned, [batch(samples, length)], progress=False)
    for samples, length in shapes:
        require_pruned(llama(2), pruned, batch(samples, length))
    assert [graph.phase for graph in pruned.ppgraph.graphs] == ["calibrate", "prefill"]
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert not counters["recompiles"]
    assert pruned.ppgraph.report().recompiles == 0


def test_batch_one_and_length_one_work_beside_others() -> None:
    model = llama(2)
    pruned = ppgraph.transform(model, **OPTIONS)
    for samples, length in ((3, 16), (1, 16), (3, 1), (1, 1), (2, 2)):
        require_pruned(model, pruned, batch(samples, length))


def test_more_kinds_of_calls_than_dynamo_allows_recompiles() -> None:
    model = llama(2)
    pruned = ppgraph.transform(model, **OPTIONS)
    inputs = batch(3, 9)
    masked = inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])}
    kinds = [inputs, masked, batch(1, 9)]
    with torch._dynamo.config.patch(recompile_limit=2):
        for kind in kinds:
            require_pruned(model, pruned, kind)
    assert len(pruned.ppgraph.graphs) == len(kinds)


@pytest.mark.parametrize("wrapped", [torch.inference_mode, torch.enable_grad, torch.no_grad])
def test_a_pruned_forward_has_no_gradients_in_any_mode(wrapped: Any) -> None:
    model = llama(2)
    pruned = ppgraph.transform(model, **OPTIONS)
    with wrapped():
        for _ in range(2):
            logits = pruned(**batch(3, 16), use_cache=False).logits
    assert not logits.requires_grad
    assert torch.equal(pruned(**batch(3, 16), use_cache=False).logits.argmax(-1), logits.argmax(-1))


# Masks


@pytest.mark.parametrize(
    "dtypes", [(torch.bool, torch.float32), pytest.param((torch.int32,), marks=pytest.mark.thorough)]
)
def test_masks_of_any_dtype_mean_the_same(dtypes: Sequence[torch.dtype]) -> None:
    inputs = batch(4, 13, "left")
    real = inputs["attention_mask"].bool()
    found = []
    for dtype in (inputs["attention_mask"].dtype, *dtypes):
        mask = inputs["attention_mask"].to(dtype)
        pruned = ppgraph.transform(llama(2), **OPTIONS)
        logits = pruned(inputs["input_ids"], attention_mask=mask, use_cache=False).logits[real]
        found.append((logits, pruned.ppgraph.selection()))
    (logits, selection), *others = found
    for other_logits, other_selection in others:
        assert torch.equal(logits, other_logits)
        assert all(torch.equal(kept, other_selection[name]) for name, kept in selection.items())


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_by_query_and_key_is_kept_to(dtype: torch.dtype) -> None:
    """Two texts in one row that must not see each other."""
    apart = torch.block_diag(torch.ones(6, 6), torch.ones(7, 7)).tril().bool()[None, None].expand(3, 1, 13, 13)
    mask = apart if dtype == torch.bool else torch.zeros(3, 1, 13, 13).masked_fill(~apart, torch.finfo(dtype).min)
    model, inputs = llama(2), {"input_ids": batch(3, 13)["input_ids"], "attention_mask": mask}
    pruned = ppgraph.transform(model, **OPTIONS)
    logits = pruned(**inputs, use_cache=False).logits
    assert relative(logits, masked_dense_logits(model, pruned.ppgraph.selection(), **inputs)) < 1e-5


# Bad models and configs


def encoder_decoder() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    return T5ForConditionalGeneration(T5Config(**sizes)).eval()


def part_in_training() -> nn.Module:
    model = llama(2)
    model.model.layers[0].train()
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 2).eval(), "Linear is no causal language model of transformers"),
        (lambda: llama(2).model, "LlamaModel is no causal language model of transformers"),
        (lambda: "llama", "expected a transformers causal language model, found str"),
        (lambda: None, "found NoneType"),
        (encoder_decoder, "T5ForConditionalGeneration is an encoder-decoder"),
        (lambda: llama(2).train(), r"LlamaForCausalLM is in training mode; call .eval\(\)"),
        (part_in_training, r"model.layers.0 of LlamaForCausalLM is in training mode"),
        (lambda: ppgraph.transform(llama(2), **OPTIONS), "this model is pruned already; transform the dense model"),
    ],
    ids=["module", "no head", "text", "none", "encoder-decoder", "training", "partly training", "pruned"],
)
def test_models_that_cannot_be_pruned_are_refused(make: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        ppgraph.transform(make(), **OPTIONS)
    assert isinstance(caught.value, PPGraphError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 1.0}, r"ratio must be in \[0, 1\), found 1.0"),
        ({"ratio": -0.1}, "found -0.1"),
        ({"ratoi": 0.4}, "PruneConfig has no field 'ratoi'; did you mean 'ratio'"),
        ({"lowering": "fast"}, "expected lowering 'inductor', 'eager' or a dict of Inductor options, found 'fast'"),
        ({"lowering": {"max_autotun": True}}, "options that Inductor does not know: max_autotun"),
    ],
)
def test_bad_settings_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    model = llama(2)
    with pytest.raises(ConfigError, match=message):
        ppgraph.transform(model, **settings)


def test_a_ratio_that_the_other_layers_cannot_carry_is_an_error_with_both_numbers() -> None:
    pruned = ppgraph.transform(llama(2, layers=2), **(OPTIONS | {"ratio": 0.6, "skip_layers": 1}))
    with pytest.raises(ConfigError, match=r"ratio=0.6 over 2 layers with skip_layers=1 .* ratio of 1.2") as caught:
        pruned(**batch(2, 5))
    assert not shows_dynamo(caught)
    with torch._dynamo.config.patch(verbose=True), pytest.raises(ConfigError) as caught:
        pruned(**batch(2, 5))
    assert shows_dynamo(caught)


def shows_dynamo(caught: pytest.ExceptionInfo[Exception]) -> bool:
    """Whether a user is shown how Dynamo came to where the error was raised."""
    return any("convert_frame" in str(entry.path) for entry in caught.traceback)


def test_a_model_without_blocks_raises_and_can_be_asked_again() -> None:
    model = llama(2)
    for layer in model.model.layers:
        layer.self_attn.o_proj, layer.mlp = nn.Identity().eval(), nn.Identity().eval()
    pruned = ppgraph.transform(model, **OPTIONS)
    for _ in range(2):
        with pytest.raises(NothingToPruneError, match=r"none of which can be rewritten:\n  model.layers.0"):
            pruned.ppgraph.sites  # noqa: B018
    assert pruned.ppgraph.graphs == []


# Bad batches: each its own message, and nothing lost

IDS = batch(3, 16)["input_ids"]


def ids_with(value: int) -> torch.Tensor:
    changed = IDS.clone()
    changed[1, 3] = value
    return changed


def hidden_rows() -> torch.Tensor:
    mask = torch.ones(3, 16, dtype=torch.long)
    mask[2] = 0
    return mask


BAD_BATCHES: list[tuple[dict[str, Any], str]] = [
    ({}, "expected either input_ids or inputs_embeds, found neither"),
    (
        {"input_ids": IDS, "inputs_embeds": torch.ones(3, 16, 64)},
        "expected either input_ids or inputs_embeds, found input_ids and inputs_embeds",
    ),
    ({"input_ids": IDS[:0]}, r"a batch without tokens: input_ids has shape \[0, 16\]"),
    ({"input_ids": IDS[:, :0]}, r"a batch without tokens: input_ids has shape \[3, 0\]"),
    ({"inputs_embeds": torch.ones(3, 0, 64)}, r"a batch without tokens: inputs_embeds has shape \[3, 0, 64\]"),
    (
        {"input_ids": IDS[0]},
        r"input_ids as a tensor of whole numbers \[samples, tokens\] \(int64 or int32\), found torch.int64 \[16\]",
    ),
    ({"input_ids": IDS.float()}, r"found torch.float32 \[3, 16\]"),
    ({"input_ids": IDS.tolist()}, "found list"),
    ({"inputs_embeds": IDS}, r"inputs_embeds as a tensor of numbers \[samples, tokens, hidden\], found torch.int64"),
    ({"input_ids": ids_with(97)}, r"token id 97 \(sample 1, token 3\) is outside of the vocabulary of 97"),
    ({"input_ids": ids_with(-1)}, r"token id -1 \(sample 1, token 3\) is outside"),
    ({"input_ids": IDS.to("meta")}, "input_ids is on meta, but the model on cpu: move one to the other"),
    ({"input_ids": IDS, "attention_mask": torch.ones(3, 16, device="meta")}, "attention_mask is on meta"),
    ({"input_ids": IDS, "attention_mask": hidden_rows()}, "attention_mask hides every token of sample 2"),
    ({"input_ids": IDS, "attention_mask": torch.ones(3, 9)}, r"3 samples of 16 tokens .* found \[3, 9\]"),
    ({"input_ids": IDS, "attention_mask": torch.ones(2, 16)}, r"found \[2, 16\]"),
    ({"input_ids": IDS, "attention_mask": torch.ones(3, 16, 16)}, r"found \[3, 16, 16\]"),
    ({"inputs_embeds": torch.ones(3, 16, 64, requires_grad=True)}, "inputs_embeds requires a gradient"),
]


@pytest.fixture(scope="module")
def warm() -> LlamaForCausalLM:
    pruned = ppgraph.transform(llama(2), **OPTIONS)
    pruned(IDS, use_cache=False)
    return pruned


@pytest.mark.parametrize(("inputs", "message"), BAD_BATCHES)
def test_a_bad_batch_is_refused_and_leaves_everything_as_it_was(
    warm: LlamaForCausalLM, inputs: dict[str, Any], message: str
) -> None:
    state = warm.ppgraph
    before = {name: state.history[name].clone() for name in state.history}
    selection = state.selection()
    with pytest.raises(InputError, match=message):
        warm(**inputs, use_cache=False)
    assert all(torch.equal(state.history[name], values) for name, values in before.items())
    assert all(torch.equal(state.selection()[name], kept) for name, kept in selection.items())
    assert len(state.graphs) == 1, "nothing was compiled for it"


@pytest.mark.gpu
def test_all_padding_and_unknown_ids_are_found_on_a_gpu() -> None:
    pruned = ppgraph.transform(llama(2).cuda(), **OPTIONS)
    with pytest.raises(InputError, match="hides every token of sample 2"):
        pruned(IDS.cuda(), attention_mask=hidden_rows().cuda())
    with pytest.raises(InputError, match="outside of the vocabulary"):
        pruned(ids_with(97).cuda())
    with pytest.raises(InputError, match="input_ids is on cpu, but the model on cuda:0"):
        pruned(IDS)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_reported_by_site(warm: LlamaForCausalLM, bad: float) -> None:
    state = warm.ppgraph
    before = {name: state.history[name].clone() for name in state.history}
    selection = state.selection()
    weight = warm.model.layers[0].mlp.up_proj.weight
    kept = int(selection["model.layers.0.mlp"][0])
    old = weight[kept, 0].item()
    with torch.no_grad():
        weight[kept, 0] = bad
    with pytest.raises(NonFiniteError, match=r"NaN or infinity at model.layers.0.mlp \(1 of 2 sites\).*stay as they"):
        warm(IDS, use_cache=False)
    with torch.no_grad():
        weight[kept, 0] = old
    assert all(torch.equal(state.history[name], values) for name, values in before.items())
    assert all(torch.equal(state.selection()[name], kept) for name, kept in selection.items())
    warm(IDS, use_cache=False)  # and it goes on


def test_training_mode_is_refused_however_it_came_about(warm: LlamaForCausalLM) -> None:
    warm.train()
    with pytest.raises(
        InputError, match=r"the model is in training mode, but pruning is for inference: call .eval\(\)"
    ):
        warm(IDS)
    warm.eval()
    warm(IDS, use_cache=False)


def test_training_the_parent_is_seen_where_it_would_change_the_result() -> None:
    model = llama(2)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    pruned = ppgraph.transform(model, **OPTIONS)
    pruned(IDS, use_cache=False)
    model.train()
    with pytest.raises(UnsupportedModelError, match=r"model.* of LlamaForCausalLM is in training mode; call .eval\(\)"):
        pruned(IDS, use_cache=False)
    model.eval()
    require_pruned(model, pruned, {"input_ids": IDS})


def test_what_a_backend_failed_of_is_told() -> None:
    error = RuntimeError("backend='backend' raised:\nValueError: no such size\nand more")
    error.inner_exception = ValueError("no such size\nand more")  # type: ignore[attr-defined]
    assert _reason(error) == "ValueError: no such size"
    assert _reason(RuntimeError("first line\nsecond line")) == "first line"
