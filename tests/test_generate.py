"""Decoding through a KV cache: the tokens are those of the dense model masked with the prompt's selection."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import ppgraph
from ppgraph.errors import DecodeError
from ppgraph.runtime import cache_of
from tests.reference import masked_dense_logits

NEW_TOKENS = 8
OPTIONS = {"ratio": 0.4, "skip_layers": 1, "width_multiple": 8, "lowering": "eager"}


def model(kv_heads: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
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


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_equals_the_masked_dense_model_token_by_token(kv_heads: int, cache: str) -> None:
    dense = model(kv_heads)
    pruned = ppgraph.transform(dense, **OPTIONS)
    chosen = {} if cache == "dynamic" else {"cache_implementation": cache}
    for samples, length, padded in ((4, 11, True), (3, 6, False), (1, 9, False)):
        inputs = prompts(samples, length, padded=padded)
        tokens = pruned.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **chosen)
        selection = pruned.ppgraph.selection()
        assert set(selection) == {site.name for site in pruned.ppgraph.sites if site.status == "pruned"}
        assert torch.equal(tokens, greedy_without_cache(dense, selection, inputs))


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
        dense.model.layers[2].mlp.up_proj.weight.mul_(1.5)
    found = pruned(input_ids=token, **cached(copy.deepcopy(cache_in(output)))).logits
    expected = masked_dense_logits(dense, selection, token, **cached(cache_in(output)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 5}],
    ids=["beams", "sampling"],
)
def test_other_ways_to_generate_finish(settings: dict[str, object]) -> None:
    pruned = ppgraph.transform(model(2), **OPTIONS)
    tokens = pruned.generate(**prompts(3, 9, padded=True), max_new_tokens=5, **settings)
    assert tokens.shape == (3, 14)


def test_arguments_pass_through_as_on_the_dense_model() -> None:
    dense = model(4)
    pruned = ppgraph.transform(dense, **{**OPTIONS, "ratio": 0.0})
    ids = prompts(3, 9, padded=False)["input_ids"]
    arguments = {"labels": ids, "output_hidden_states": True, "use_cache": False}
    with torch.no_grad():
        expected = dense(inputs_embeds=dense.get_input_embeddings()(ids), **arguments)
        found = pruned(inputs_embeds=dense.get_input_embeddings()(ids), **arguments)
    assert torch.equal(found.loss, expected.loss)
    assert len(found.hidden_states) == len(expected.hidden_states)
    assert all(map(torch.equal, found.hidden_states, expected.hidden_states))
    assert pruned(ids, logits_to_keep=2, use_cache=False).logits.shape == (3, 2, 97)
