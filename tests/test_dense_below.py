"""`dense_below`: prompts that are too small to be pruned run dense, and choose what steps of decoding keep."""

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import ppgraph
from tests.fuzzing import Batch, Case, check
from tests.test_exactness import SIZES, batch, llama

SMALL, LARGE = batch(2, 8), batch(4, 12)
CONFIG = {**SIZES, "ratio": 0.4, "dense_below": 32}


def transformed(model: LlamaForCausalLM, **config: Any) -> Any:
    return ppgraph.transform(model, lowering="eager", **{**CONFIG, **config})


def phases(pruned: Any) -> list[str]:
    return [graph.phase for graph in pruned.ppgraph.graphs]


def test_each_side_of_the_limit_has_one_graph() -> None:
    model = llama(2)
    pruned = transformed(model)
    for inputs in (SMALL, LARGE, SMALL, LARGE, batch(3, 10), batch(2, 16)):
        pruned(**inputs, use_cache=False)
    assert phases(pruned) == ["choose", "prefill"]


def test_small_prompts_are_dense_bit_for_bit() -> None:
    model = llama(2)
    pruned = transformed(model)
    with torch.no_grad():
        for inputs in (SMALL, batch(3, 9, "left")):
            found, expected = (each(**inputs, use_cache=False).logits for each in (pruned, model))
            assert torch.equal(found, expected)


@pytest.mark.parametrize("inputs", [SMALL, batch(3, 9, "right")], ids=["whole", "padded"])
def test_all_of_a_small_prompt_chooses(inputs: dict[str, torch.Tensor]) -> None:
    model = llama(2, layers=2)
    everything = ppgraph.transform(model, lowering="eager", **{**CONFIG, "dense_below": 0, "method": "full-batch"})
    # Blocks behind the first see what pruned ones gave: only where none is pruned before do both choose from the same.
    first = "model.layers.0.self_attn"
    everything(**inputs, use_cache=False)
    pruned = transformed(model, statistics="probe")
    pruned(**inputs, use_cache=False)
    assert torch.equal(pruned.ppgraph.selection()[first], everything.ppgraph.selection()[first])
    assert set(pruned.ppgraph.selection()) == set(everything.ppgraph.selection())


@pytest.mark.parametrize(
    ("decode", "cache"),
    [
        ("reuse", "dynamic"),
        ("probe", "static"),
        ("dense", "dynamic"),
        *(
            pytest.param(decode, cache, marks=pytest.mark.thorough)
            for decode, cache in (("reuse", "static"), ("probe", "dynamic"), ("dense", "static"))
        ),
    ],
)
def test_conversations_equal_the_masked_dense_model(decode: str, cache: str) -> None:
    turns = Batch(samples=2, length=7, padding="left", turns=(1, 1, 3, 1))
    config = {**SIZES, "ratio": 0.4, "decode": decode, "dense_below": 10}
    assert check(Case("llama", (turns, Batch(samples=2, length=4, turns=(1,))), config, cache=cache)) == 7


def test_a_prompt_of_one_token_into_a_static_cache_is_no_step() -> None:
    config = {**SIZES, "ratio": 0.4, "decode": "probe", "dense_below": 100}
    assert check(Case("llama", (Batch(samples=2, length=1, turns=(3, 1)),), config, cache="static")) == 3


def test_what_makes_up_for_lost_channels_does_so_in_steps_alone() -> None:
    config = {"method": "spread", "ratio": 0.4, "skip_layers": 0, "width_multiple": 8, "dense_below": 100}
    prompt = Batch(samples=2, length=7, turns=(1, 1))
    assert check(Case("llama", (prompt,), config, calibration=(Batch(samples=4, length=12),), cache="dynamic")) == 3


def test_compiled_conversations_equal_the_masked_dense_model() -> None:
    config = {**SIZES, "ratio": 0.4, "dense_below": 100}
    case = Case("llama", (Batch(samples=2, length=7, turns=(1, 1)),), config, cache="dynamic", lowering="inductor")
    assert check(case) == 3


def test_steps_that_probe_still_do() -> None:
    pruned = transformed(llama(2), decode="probe")
    pruned.generate(SMALL["input_ids"], max_new_tokens=3, do_sample=False)
    assert phases(pruned) == ["choose", "prefill"]


def test_through_torch_compile() -> None:
    model = llama(2)
    compiled = torch.compile(model, backend="ppgraph", options={**CONFIG, "blocks": ("mlp",)}, dynamic=True)
    with torch.no_grad():
        found, expected = (each(**SMALL, use_cache=False).logits for each in (compiled, model))
    torch.testing.assert_close(found, expected)
    assert phases(compiled) == ["choose"]
    assert {len(kept) for kept in compiled.ppgraph.selection().values()} == {
        site.kept for site in compiled.ppgraph.sites if site.status == "pruned"
    }


def test_the_report_counts_what_ran() -> None:
    pruned = transformed(llama(2))
    for inputs, is_pruned in ((SMALL, False), (LARGE, True), (SMALL, False)):
        pruned(**inputs, use_cache=False)
        cost = pruned.ppgraph.report().cost
        assert cost.batch == tuple(inputs["input_ids"].shape)
        assert (cost.flops.pruned < cost.flops.dense) is is_pruned
        assert (cost.gathered_bytes > 0) is is_pruned


def test_a_batch_that_is_not_finite_leaves_all_as_it_was() -> None:
    model = llama(2, layers=2)
    pruned = transformed(model)
    pruned(**SMALL, use_cache=False)
    before = {name: pruned.ppgraph.history[name].clone() for name in pruned.ppgraph.selection()}
    with torch.no_grad():
        model.model.embed_tokens.weight[SMALL["input_ids"][0, 0]] = torch.inf
    with pytest.raises(ppgraph.PPGraphError, match="gave NaN or infinity"):
        pruned(**SMALL, use_cache=False)
    for name, held in before.items():
        assert torch.equal(pruned.ppgraph.history[name], held)
