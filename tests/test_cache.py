"""Calls that go on from a KV cache of any kind: each equals the dense model masked with the selection of that call."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    StaticCache,
)

import ppgraph
from ppgraph.passes import token_axes
from ppgraph.runtime import LENGTH, cached_length
from tests.reference import masked_dense_logits
from tests.test_exactness import contents
from tests.test_families import Family, exits
from tests.test_generate import OPTIONS, cache_in, cached, model, prompts

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "pad_token_id": 0,
    "eos_token_id": None,
    "max_position_embeddings": 64,
}
WINDOW = 6
CAPACITY = 32
PROMPT, TURN = 11, 7


def built(family: str) -> nn.Module:
    if family in ("mha", "gqa"):
        return model(4 if family == "mha" else 2)
    torch.manual_seed(0)
    if family == "mistral":
        return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=WINDOW)).eval()
    if family == "fused":
        return Phi3ForCausalLM(Phi3Config(**SIZES)).eval()
    if family == "fused-sliding":
        return Phi3ForCausalLM(Phi3Config(**SIZES, sliding_window=WINDOW)).eval()
    types = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW, "num_hidden_layers": 2}
    if family == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**SIZES | types)).eval()
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES | types)).eval()


def empty_cache(kind: str, dense: nn.Module) -> Any:
    if kind == "static":
        return StaticCache(config=dense.config, max_cache_len=CAPACITY)
    return DynamicCache(config=dense.config)


def turns(samples: int, *, padded: bool) -> Iterator[dict[str, torch.Tensor]]:
    """A prompt, two steps, another turn of a conversation, a step: inputs of each call, with the mask of all so far."""
    first = prompts(samples, PROMPT, padded=padded)
    mask = first["attention_mask"]
    yield first
    for number, length in enumerate((1, 1, TURN, 1)):
        torch.manual_seed(number)
        mask = torch.cat([mask, torch.ones(samples, length, dtype=torch.long)], 1)
        yield {"input_ids": torch.randint(3, 97, (samples, length)), "attention_mask": mask}


def with_positions(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As `generate` calls a model: real tokens are numbered."""
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return {**inputs, "position_ids": positions[:, -inputs["input_ids"].shape[1] :]}


def selections_of_right_calls(
    dense: nn.Module, pruned: nn.Module, kind: str, samples: int, *, padded: bool
) -> list[dict[str, torch.Tensor]]:
    mine, other = empty_cache(kind, dense), empty_cache(kind, dense)
    chosen = []
    for inputs in turns(samples, padded=padded):
        arguments = with_positions(inputs)
        found = pruned(**arguments, **cached(mine)).logits
        chosen.append(pruned.ppgraph.selection())
        expected = masked_dense_logits(dense, chosen[-1], **arguments, **cached(other))
        real = inputs["attention_mask"][:, -inputs["input_ids"].shape[1] :].bool()
        torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)
    return chosen


def require_conversation(dense: nn.Module, pruned: nn.Module, kind: str, samples: int, *, padded: bool) -> None:
    chosen = selections_of_right_calls(dense, pruned, kind, samples, padded=padded)
    assert_same(chosen[0], chosen[1])
    assert_same(chosen[0], chosen[2])
    assert_same(chosen[3], chosen[4])
    assert any(not torch.equal(chosen[0][name], chosen[3][name]) for name in chosen[0]), "both turns chose alike"


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


CONVERSATIONS = [
    ("gqa", "static", "sdpa"),
    ("fused", "static", "sdpa"),  # one projection gives queries, and keys that the probe reads before it chooses those
    ("mistral", "static", "eager"),
    ("gemma2", "dynamic", "eager"),
    ("gemma3", "static", "sdpa"),
]
LIKE_THOSE = [
    ("mha", "static", "sdpa"),
    ("gqa", "dynamic", "eager"),
    ("mha", "dynamic", "sdpa"),
    ("gqa", "dynamic", "sdpa"),
    ("gqa", "static", "eager"),
    ("mistral", "dynamic", "sdpa"),
    ("mistral", "dynamic", "eager"),
    ("mistral", "static", "sdpa"),
    ("gemma2", "static", "eager"),
    ("gemma3", "dynamic", "sdpa"),
]


@pytest.mark.parametrize(
    ("family", "kind", "attention"),
    [*CONVERSATIONS, *(pytest.param(*case, marks=pytest.mark.thorough) for case in LIKE_THOSE)],
)
def test_a_conversation_equals_the_dense_model_masked_call_by_call(family: str, kind: str, attention: str) -> None:
    dense = built(family)
    dense.set_attn_implementation(attention)
    pruned = ppgraph.transform(dense, **OPTIONS)
    require_conversation(dense, pruned, kind, 3, padded=True)
    assert {site.status for site in pruned.ppgraph.sites} == {"pruned"}


def test_a_model_that_looks_up_in_a_static_cache_how_many_tokens_it_has_seen() -> None:
    """OPT cuts its positions there: a step's one token is a symbolic size that is known to be 1."""
    dense = Family("opt").model("sdpa")
    pruned = ppgraph.transform(dense, **OPTIONS)
    mine, other = empty_cache("static", dense), empty_cache("static", dense)
    for inputs in turns(3, padded=True):
        found = pruned(**inputs, **cached(mine)).logits
        chosen = pruned.ppgraph.selection()
        expected = masked_dense_logits(dense, chosen, exits=exits(pruned), **inputs, **cached(other))
        real = inputs["attention_mask"][:, -inputs["input_ids"].shape[1] :].bool()
        torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)


def test_a_probe_of_everything_stands_for_products_alone_and_not_for_attention() -> None:
    """Its attention reads a sliding cache's slots, full inference the whole prompt, which is longer."""
    dense = built("gemma3")
    require_conversation(dense, ppgraph.transform(dense, **OPTIONS, method="full-batch"), "static", 3, padded=True)


def test_a_step_that_is_probed_reads_its_own_key_in_a_full_window() -> None:
    """The window makes room first, and one projection gives queries, and keys that the probe reads before choosing."""
    dense = built("fused-sliding")
    selections_of_right_calls(dense, ppgraph.transform(dense, **OPTIONS, decode="probe"), "static", 3, padded=True)


def test_a_prefill_chooses_the_same_from_any_cache_as_without_one() -> None:
    dense, inputs = model(2), prompts(4, 11, padded=True)
    chosen = []
    for given in ({"use_cache": False}, *(cached(empty_cache(kind, dense)) for kind in ("dynamic", "static"))):
        pruned = ppgraph.transform(dense, **OPTIONS)
        pruned(**inputs, **given)
        chosen.append(pruned.ppgraph.selection())
    without, *others = chosen
    for other in others:
        assert_same(without, other)


def test_a_turn_into_a_full_window_chooses_as_with_a_cache_that_grows() -> None:
    """The model overwrites its window ahead of where the probe, which goes through the block again, reads old keys."""
    dense, chosen = built("gemma3"), []
    for kind in ("dynamic", "static"):
        pruned, cache = ppgraph.transform(dense, **OPTIONS), empty_cache(kind, dense)
        for length in (PROMPT, TURN):
            pruned(prompts(3, length, padded=False)["input_ids"], **cached(cache))
        chosen.append(pruned.ppgraph.selection())
    assert_same(*chosen)


def test_a_cache_that_is_reset_takes_a_new_prompt() -> None:
    dense = model(4)
    pruned = ppgraph.transform(dense, **OPTIONS)
    cache, other = empty_cache("static", dense), empty_cache("static", dense)
    for length in (11, 6):
        cache.reset()
        other.reset()
        for inputs in (prompts(3, length, padded=False), {"input_ids": torch.tensor([[4], [5], [6]])}):
            found = pruned(input_ids=inputs["input_ids"], **cached(cache)).logits
            expected = masked_dense_logits(dense, pruned.ppgraph.selection(), inputs["input_ids"], **cached(other))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_prompts_whose_graphs_prune_other_blocks_are_decoded_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that must leave a block dense is reported, and steps from its cache leave it dense too."""
    dense = model(4)
    pruned = ppgraph.transform(dense, **OPTIONS)
    ids = prompts(3, 11, padded=False)["input_ids"]
    step = ids[:, :1]
    whole = pruned(input_ids=ids, use_cache=True)
    pruned(input_ids=step, **cached(copy.deepcopy(cache_in(whole))))
    with monkeypatch.context() as patch:
        patch.setattr(token_axes, "slot_write", lambda node: None)
        cache, other = empty_cache("static", dense), empty_cache("static", dense)
        mask = torch.ones_like(ids)
        mask[0, 0] = 0
        pruned(input_ids=ids, attention_mask=mask, **cached(cache))
    selection = pruned.ppgraph.selection()
    masked_dense_logits(dense, selection, ids, mask, **cached(other))
    assert not any("attn" in name for name in selection)
    assert any(site.refused for site in pruned.ppgraph.graphs[-1].sites)
    mask = torch.cat([mask, mask[:, -1:]], 1)
    found = pruned(input_ids=step, attention_mask=mask, **cached(cache)).logits
    expected = masked_dense_logits(dense, selection, step, mask, **cached(other))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gqa", "gemma3"])
def test_padding_never_counts_whatever_masks_generate_makes(family: str) -> None:
    """For a static cache `generate` makes masks by query and key, a dict of them where layers differ."""
    dense, inputs = built(family), prompts(4, PROMPT, padded=True)
    chosen, histories = [], []
    for implementation in ("dynamic", "static"):
        pruned = ppgraph.transform(dense, **OPTIONS)
        pruned.generate(**inputs, max_new_tokens=1, do_sample=False, cache_implementation=implementation)
        chosen.append(pruned.ppgraph.selection())
        history = pruned.ppgraph.history
        histories.append({name: history[name][:PROMPT] for name in history})
    assert_same(*chosen)
    torch.testing.assert_close(histories[1], histories[0], rtol=1e-4, atol=1e-6)


def by_query(mask: torch.Tensor, length: int) -> torch.Tensor:
    """A mask by token [B, keys] as one by query and key [B, 1, length, keys], of the last `length` tokens."""
    keys = mask.shape[1]
    return torch.ones(keys, keys, dtype=torch.bool).tril()[-length:] & mask.bool()[:, None, None]


def test_a_later_turn_has_the_same_positions_by_either_kind_of_mask() -> None:
    """Columns that are padding in every sample don't count; once they did where the mask was one by query and key."""
    dense, histories = model(2), []
    ids = prompts(3, PROMPT + TURN, padded=False)["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, :2] = 0
    pruned = ppgraph.transform(dense, **OPTIONS)
    for is_4d in (False, True):
        pruned.ppgraph.history.reset()
        cache = empty_cache("dynamic", dense)
        for start, end in ((0, PROMPT), (PROMPT, PROMPT + TURN)):
            seen = by_query(mask[:, :end], end - start) if is_4d and start else mask[:, :end]
            pruned(ids[:, start:end], attention_mask=seen, **cached(cache))
        histories.append(contents(pruned.ppgraph.history))
    torch.testing.assert_close(histories[1], histories[0], rtol=1e-4, atol=1e-6)
    assert not any(values[PROMPT + TURN - 2 :].any() for values in histories[0].values())


def test_a_static_cache_that_others_count_in_is_counted_again() -> None:
    dense = model(2)
    pruned = ppgraph.transform(dense, **OPTIONS)
    cache = empty_cache("static", dense)
    prompt = prompts(3, PROMPT, padded=False)["input_ids"]
    pruned(prompt, **cached(cache))
    assert cached_length(cache) == PROMPT
    setattr(cache, LENGTH, (*getattr(cache, LENGTH)[:2], 99))
    assert cached_length(cache) == 99, "it was read from the device"
    cache.get_seq_length().add_(0)  # as by somebody else: what is known no longer counts
    assert cached_length(cache) == PROMPT
    with torch.no_grad():
        dense(prompt[:, :TURN], **cached(cache))
    assert cached_length(cache) == PROMPT + TURN
    cache.reset()
    assert cached_length(cache) == 0
