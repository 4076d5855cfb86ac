"""Decoding through a KV cache: the tokens are those of the dense model masked with the prompt's selection."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CompileConfig, DynamicCache, LlamaConfig, LlamaForCausalLM

import ppgraph
from ppgraph.errors import DecodeError
from ppgraph.runtime import cache_of
from tests.reference import find_exit, masked_dense_logits
from tests.test_replay import Recorder

NEW_TOKENS = 8
OPTIONS = {"ratio": 0.4, "skip_layers": 0, "width_multiple": 8, "lowering": "eager"}


def model(kv_heads: int, layers: int = 1) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        vocab_size=97,
        pad_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def cached(cache: object) -> dict[str, object]:
    """A cache as an argument, under the name that this version of transformers has for it."""
    return {CACHE: cache}


def cache_in(output: Mapping[str, object]) -> object:
    return cache_of(output.values())


def prompts(samples: int, length: int, *, padded: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(samples * 100 + length)
    ids = torch.randint(3, 97, (samples, length))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :3] = 0
        ids[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def greedy_without_cache(
    dense: nn.Module, selection: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]
) -> torch.Tensor:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(NEW_TOKENS):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = masked_dense_logits(dense, selection, ids, mask, position_ids=positions)
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids


@pytest.mark.parametrize(
    ("kv_heads", "cache"),
    [
        pytest.param(4, "dynamic", id="mha-dynamic"),
        pytest.param(2, "static", id="gqa-static"),
        pytest.param(4, "static", id="mha-static", marks=pytest.mark.thorough),
        pytest.param(2, "dynamic", id="gqa-dynamic", marks=pytest.mark.thorough),
    ],
)
def test_generate_equals_the_masked_dense_model_token_by_token(kv_heads: int, cache: str) -> None:
    dense = model(kv_heads, layers=2 if cache == "dynamic" else 1)
    pruned = ppgraph.transform(dense, **OPTIONS)
    chosen = {} if cache == "dynamic" else {"cache_implementation": cache}
    for samples, length, padded in ((4, 11, True), (3, 6, False), (1, 9, False)):
        inputs = prompts(samples, length, padded=padded)
        tokens = pruned.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **chosen)
        selection = pruned.ppgraph.selection()
        assert set(selection) == {site.name for site in pruned.ppgraph.sites if site.status == "pruned"}
        assert torch.equal(tokens, greedy_without_cache(dense, selection, inputs))


def test_a_config_that_removes_nothing_decodes_as_the_dense_model() -> None:
    dense, inputs = model(2), prompts(3, 9, padded=True)
    pruned = ppgraph.transform(dense, **{**OPTIONS, "ratio": 0.1, "width_multiple": 64})
    tokens = pruned.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert {site.reason for site in pruned.ppgraph.sites} == {
        "ratio=0.1 removes nothing of 64 channels",
        "ratio=0.1 removes nothing of 128 channels",
    }
    assert torch.equal(tokens, dense.generate(**inputs, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize(("cache", "replays"), [("static", 10), ("dynamic", 0)])
def test_steps_into_memory_that_stays_are_replayed(cache: str, replays: int, recorder: Recorder) -> None:
    dense = model(2)
    pruned = ppgraph.transform(dense, **{**OPTIONS, "lowering": "inductor"})
    wanted = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    for padded in (True, False):
        inputs, before = prompts(3, 11, padded=padded), recorder.replayed
        tokens = pruned.generate(**inputs, **wanted)
        assert recorder.replayed == before + replays  # all steps but the first
        assert torch.equal(tokens, MaskedTwin(dense, pruned.ppgraph.selection()).model.generate(**inputs, **wanted))


def test_a_prefill_chooses_the_same_with_and_without_a_cache() -> None:
    dense = model(4)
    inputs = prompts(4, 11, padded=True)
    chosen = []
    for use_cache in (False, True):
        pruned = ppgraph.transform(dense, **OPTIONS)
        pruned(**inputs, use_cache=use_cache)
        chosen.append(pruned.ppgraph.selection())
    assert all(torch.equal(chosen[0][name], chosen[1][name]) for name in chosen[0])


def test_two_graphs_serve_all_prompt_lengths_and_batch_sizes() -> None:
    pruned = ppgraph.transform(model(2), **OPTIONS)
    for samples, length in ((3, 11), (2, 7), (5, 20)):
        pruned.generate(**prompts(samples, length, padded=True), max_new_tokens=4, do_sample=False)
    assert [graph.phase for graph in pruned.ppgraph.graphs] == ["prefill", "reuse"]


def test_the_decode_graph_reads_packed_weights_and_has_no_probe_score_or_history() -> None:
    pruned = ppgraph.transform(model(4), **OPTIONS)
    pruned.generate(**prompts(3, 11, padded=False), max_new_tokens=3, do_sample=False)
    graph = pruned.ppgraph.graphs[-1].rewritten.graph
    authors = {node.meta.get("ppgraph_pass") for node in graph.nodes}
    assert not authors & {"insert_probe", "insert_score", "update_history"}
    parameters = {id(parameter) for parameter in pruned.parameters()}
    assert parameters
    selected = [node for node in graph.nodes if node.target is torch.ops.aten.index_select.default]
    assert all(node.meta["val"].dim() == 4 for node in selected), "only keys and values are indexed at a step"


@pytest.mark.parametrize("decode", ["dense", "probe"])
def test_other_decode_policies(decode: str) -> None:
    dense = model(4)
    pruned = ppgraph.transform(dense, decode=decode, **OPTIONS)
    inputs = prompts(3, 11, padded=True)
    cache = DynamicCache(config=dense.config)
    logits = pruned(**inputs, **cached(cache)).logits[:, -1]
    before = copy.deepcopy(cache)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
    step = {"input_ids": logits.argmax(-1, keepdim=True), "attention_mask": mask}
    first = pruned.ppgraph.selection()
    found = pruned(**step, **cached(cache)).logits
    if decode == "dense":
        with torch.no_grad():
            expected = dense(**step, **cached(before)).logits
    else:
        assert any(not torch.equal(first[name], kept) for name, kept in pruned.ppgraph.selection().items())
        expected = masked_dense_logits(dense, pruned.ppgraph.selection(), **step, **cached(before))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_interleaved_generations_each_keep_their_own_selection() -> None:
    dense = model(4)
    pruned = ppgraph.transform(dense, **OPTIONS)
    runs = [prompts(3, 11, padded=False), prompts(2, 7, padded=False)]
    states = []
    for inputs in runs:
        output = pruned(**inputs, use_cache=True)
        states.append((cache_in(output), output.logits[:, -1:].argmax(-1), pruned.ppgraph.selection()))
    for turn in (0, 1, 0):
        cache, token, selection = states[turn]
        before = copy.deepcopy(cache)
        found = pruned(input_ids=token, **cached(cache)).logits
        expected = masked_dense_logits(dense, selection, token, **cached(before))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_copied_cache_decodes_with_its_prompts_selection() -> None:
    pruned = ppgraph.transform(model(4), **OPTIONS)
    output = pruned(**prompts(3, 11, padded=False), use_cache=True)
    token = output.logits[:, -1:].argmax(-1)
    copied = copy.deepcopy(cache_in(output))
    first = pruned(input_ids=token, **cached(cache_in(output))).logits
    torch.testing.assert_close(pruned(input_ids=token, **cached(copied)).logits, first)


def test_decoding_a_cache_that_another_model_filled_is_refused() -> None:
    dense = model(4)
    pruned, other = (ppgraph.transform(dense, **OPTIONS) for _ in range(2))
    inputs = prompts(3, 11, padded=False)
    with torch.no_grad():
        cache = dense(**inputs, use_cache=True).past_key_values
    with pytest.raises(DecodeError, match="was not filled by this pruned model"):
        pruned(input_ids=inputs["input_ids"][:, :1], **cached(cache))
    cache = other(**inputs, use_cache=True).past_key_values
    with pytest.raises(DecodeError, match="another pruned model"):
        pruned(input_ids=inputs["input_ids"][:, :1], **cached(cache))


def test_a_changed_weight_is_packed_again() -> None:
    dense = model(4)
    pruned = ppgraph.transform(dense, **OPTIONS)
    output = pruned(**prompts(3, 11, padded=False), use_cache=True)
    token, selection = output.logits[:, -1:].argmax(-1), pruned.ppgraph.selection()
    pruned(input_ids=token, **cached(copy.deepcopy(cache_in(output))))
    with torch.no_grad():
        dense.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    found = pruned(input_ids=token, **cached(copy.deepcopy(cache_in(output)))).logits
    expected = masked_dense_logits(dense, selection, token, **cached(cache_in(output)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class MaskedTwin:
    """The dense model with what a selection drops masked, as something that generates."""

    def __init__(self, dense: nn.Module, selection: dict[str, torch.Tensor]) -> None:
        self.model = copy.deepcopy(dense)
        for site, kept in selection.items():
            find_exit(self.model, site).register_forward_pre_hook(self._keep_only(kept))

    @staticmethod
    def _keep_only(kept: torch.Tensor) -> object:
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            dropped = torch.ones(arguments[0].shape[-1], dtype=torch.bool).index_fill(0, kept, False)
            return (arguments[0].masked_fill(dropped, 0),)

        return hook


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True, "top_k": 5},
        {"do_sample": False, "prompt_lookup_num_tokens": 3},
        {"do_sample": False, "cache_implementation": "static", "compile_config": "everywhere"},
    ],
    ids=["beams", "sampling", "lookup", "compiled"],
)
def test_other_ways_to_generate_equal_those_of_the_masked_dense_model(settings: dict[str, object]) -> None:
    dense = model(2)
    pruned = ppgraph.transform(dense, **OPTIONS)
    lookup = "prompt_lookup_num_tokens" in settings
    inputs = prompts(1 if lookup else 3, 12, padded=not lookup)
    if lookup:
        inputs["input_ids"][:, 6:] = inputs["input_ids"][:, :6]
    expected_settings = {name: value for name, value in settings.items() if name != "compile_config"}
    if "compile_config" in settings:
        everywhere = CompileConfig()
        everywhere._compile_all_devices = True
        settings = {**settings, "compile_config": everywhere}
    torch.manual_seed(1)
    tokens = pruned.generate(**inputs, max_new_tokens=NEW_TOKENS, **settings)
    twin = MaskedTwin(dense, pruned.ppgraph.selection())
    torch.manual_seed(1)
    assert torch.equal(tokens, twin.model.generate(**inputs, max_new_tokens=NEW_TOKENS, **expected_settings))
    assert {graph.phase for graph in pruned.ppgraph.graphs} == {"prefill", "reuse"}


def test_an_assistant_drafts_and_the_pruned_model_keeps_to_its_prompts_selection() -> None:
    dense, assistant = model(2), model(4)
    pruned = ppgraph.transform(dense, **OPTIONS)
    inputs = prompts(1, 12, padded=False)
    tokens = pruned.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, assistant_model=assistant)
    assert torch.equal(tokens, greedy_without_cache(dense, pruned.ppgraph.selection(), inputs))


def test_a_prompt_in_chunks_equals_the_dense_model_masked_chunk_by_chunk() -> None:
    dense = model(4)
    pruned = ppgraph.transform(dense, **OPTIONS)
    inputs = prompts(3, 11, padded=False)
    found = pruned.generate(
        **inputs,
        max_new_tokens=2,
        do_sample=False,
        prefill_chunk_size=4,
        output_logits=True,
        return_dict_in_generate=True,
    )
    other = ppgraph.transform(dense, **OPTIONS)
    mine, cache = DynamicCache(config=dense.config), DynamicCache(config=dense.config)
    for chunk in inputs["input_ids"].split(4, 1):
        other(input_ids=chunk, **cached(mine))
        expected = masked_dense_logits(dense, other.ppgraph.selection(), chunk, **cached(cache))
    torch.testing.assert_close(found.logits[0], expected[:, -1], rtol=1e-4, atol=1e-5)
    # The second chunk is as long as the cache, which is no reason to leave a block dense.
    assert not any(site.refused for each in (pruned, other) for graph in each.ppgraph.graphs for site in graph.sites)


def test_what_a_model_was_compiled_to_before_does_not_run_in_place_of_the_pruned_forward() -> None:
    dense = model(4)
    dense._compiled_call = dense._compiled_call_impl = dense.__call__
    pruned = ppgraph.transform(dense, **OPTIONS)
    inputs = prompts(3, 9, padded=False)
    found = pruned(**inputs, use_cache=False).logits
    expected = masked_dense_logits(model(4), pruned.ppgraph.selection(), **inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    again = pruned.get_compiled_call(None)(**inputs, use_cache=False).logits
    expected = masked_dense_logits(model(4), pruned.ppgraph.selection(), **inputs)
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)


GIVEN = ("ids", "mask", "embeds", "positions", "last_logits", "some_logits", "loss", "tuple")


@pytest.mark.parametrize("ratio", [0.4, pytest.param(0.0, marks=pytest.mark.thorough)])
@pytest.mark.parametrize(
    ("given", "attention"),
    [
        *((given, "sdpa") for given in (*GIVEN, "mask_4d", "hidden_states")),
        ("mask_4d", "eager"),
        ("hidden_states", "eager"),  # with weights of attention, which sdpa does not give
        *(pytest.param(given, "eager", marks=pytest.mark.thorough) for given in GIVEN),
    ],
)
def test_arguments_pass_through_as_on_the_masked_dense_model(given: str, attention: str, ratio: float) -> None:
    dense = model(4)
    dense.set_attn_implementation(attention)
    ids = prompts(3, 9, padded=False)["input_ids"]
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, None].expand(3, 1, 9, 9)
    arguments: dict[str, dict[str, object]] = {
        "mask": {"attention_mask": prompts(3, 9, padded=True)["attention_mask"]},
        "mask_4d": {"attention_mask": torch.zeros(3, 1, 9, 9).masked_fill(~causal, torch.finfo(torch.float).min)},
        "positions": {"position_ids": torch.arange(5, 14)[None].expand(3, 9)},
        "last_logits": {"logits_to_keep": 2},
        "some_logits": {"logits_to_keep": torch.tensor([0, 4, 7])},
        "hidden_states": {"output_hidden_states": True},
        "loss": {"labels": ids},
        "tuple": {"return_dict": False},
    }
    batch = {"inputs_embeds": dense.get_input_embeddings()(ids).detach()} if given == "embeds" else {"input_ids": ids}
    if given == "hidden_states" and attention == "eager":
        arguments[given]["output_attentions"] = True
    inputs = {**batch, **arguments.get(given, {}), "use_cache": False}
    pruned = ppgraph.transform(dense, **{**OPTIONS, "ratio": ratio})
    found = pruned(**inputs)
    twin = MaskedTwin(dense, pruned.ppgraph.selection()).model
    with torch.no_grad():
        expected = twin(**inputs)
    assert type(found) is type(expected)
    torch.testing.assert_close(_tensors(found), _tensors(expected), rtol=1e-4, atol=1e-5)


def _tensors(output: Any) -> list[torch.Tensor]:
    values = output.values() if isinstance(output, Mapping) else output
    return [tensor for value in values for tensor in (value if isinstance(value, tuple) else (value,))]
