"""Pruned models against the eager reference and against the masked dense model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ppgraph
from ppgraph.state import History
from tests.reference import Reference, masked_dense_logits

SIZES = {"width_multiple": 8, "skip_layers": 0}


def llama(kv_heads: int = 4, *, layers: int = 1, bias: bool = False, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        vocab_size=97,
        attention_bias=bias,
        mlp_bias=bias,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def batch(samples: int, length: int, padding: str = "none") -> dict[str, torch.Tensor]:
    torch.manual_seed(1000 * samples + length)
    ids = torch.randint(0, 97, (samples, length))
    mask = torch.ones_like(ids)
    for sample in range(1, samples):
        gap = sample % 4 + 1
        if padding == "left":
            mask[sample, :gap] = 0
        elif padding == "right":
            mask[sample, -gap:] = 0
    return {"input_ids": ids} if padding == "none" else {"input_ids": ids, "attention_mask": mask}


def contents(history: History) -> dict[str, torch.Tensor]:
    """What a history holds now."""
    return {name: history[name].clone() for name in history} | {"seen": history.seen.clone()}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def compare(
    model: LlamaForCausalLM, batches: list[dict[str, torch.Tensor]], lowering: str = "eager", **config: Any
) -> None:
    """Calibrate both, run both over the batches, and require the same logits, selections and histories."""
    pruned = ppgraph.transform(model, lowering=lowering, **config)
    reference = Reference(model, **config)
    calibration = [batch(4, 12, "left"), batch(3, 9, "right")]
    if config.get("statistics") != "probe":
        ppgraph.calibrate(pruned, calibration, progress=False)
        reference.calibrate(calibration)
    for inputs in batches:
        logits = pruned(**inputs, use_cache=False).logits
        expected = reference(**inputs)
        selection = pruned.ppgraph.selection()
        assert set(selection) == set(expected.selection)
        for name, kept in expected.selection.items():
            assert torch.equal(selection[name], kept), name
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        dense = pruned.ppgraph.dense_tokens()
        assert set(dense) == set(expected.dense)
        for name, (tokens, others) in expected.dense.items():
            assert torch.equal(dense[name][0] & real, tokens), name
            assert torch.equal(dense[name][1], others), name
        assert relative(logits[real], expected.logits[real]) < 1e-5
        runs_dense = inputs["input_ids"].numel() < config.get("dense_below", 0)
        masked = masked_dense_logits(model, {} if runs_dense else selection, dense=dense, **inputs)
        assert relative(logits[real], masked[real]) < 1e-5
    for name, history in reference.history.items():
        held = pruned.ppgraph.history[name][: len(history)]
        torch.testing.assert_close(held, history, rtol=1e-4, atol=1e-6)


FOUR = [batch(3, 16), batch(4, 9, "left"), batch(25, 11), batch(5, 20, "right")]


@pytest.mark.parametrize(
    ("kv_heads", "bias", "ratio"),
    [
        pytest.param(4, False, 0.2, marks=pytest.mark.thorough),
        pytest.param(2, False, 0.2, marks=pytest.mark.thorough),
        pytest.param(4, False, 0.4, marks=pytest.mark.thorough),
        (2, True, 0.4),
        (4, True, 0.6),
        pytest.param(2, False, 0.6, marks=pytest.mark.thorough),
    ],
)
def test_four_stateful_batches_equal_the_reference(kv_heads: int, bias: bool, ratio: float) -> None:
    compare(llama(kv_heads, layers=3, bias=bias), FOUR, ratio=ratio, **{**SIZES, "skip_layers": 1})


@pytest.mark.parametrize(
    "config",
    [
        {"statistics": "probe"},
        {"statistics": "history"},
        pytest.param({"statistics": "history", "score": "wanda-sp"}, marks=pytest.mark.thorough),
        {"blocks": ("mlp",)},
        {"blocks": ("attention",)},
        {"probe_batch": 0.5, "probe_tokens": 0.3},
        {"probe_batch": 1.0, "probe_tokens": 1.0},
        {"probe_choice": "spread", "probe_batch": 1.0, "probe_tokens": 0.2},
        {"probe_choice": "spread", "statistics": "probe", "probe_tokens": 0.9},
        {"probe_choice": "spread", "probe_tokens": 0.9},
        {"probe_choice": "spread", "dense_tokens": 0.3},
        {"probe_choice": "spread", "dense_tokens": 0.8, "statistics": "probe", "width_multiple": 1},
        {"history_momentum": 1.0},
        {"dense_below": 50},
        {"dense_below": 1000, "statistics": "history"},
        {"dense_below": 67, "probe_choice": "spread", "dense_tokens": 0.3},
        pytest.param({"dense_below": 1000, "statistics": "probe"}, marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_other_configs_equal_the_reference(config: dict[str, Any]) -> None:
    compare(llama(2), [*FOUR[:2], batch(6, 11)], ratio=0.4, **{**SIZES, **config})


def test_the_ratio_as_given_equals_the_reference() -> None:
    config = {**SIZES, "skip_layers": 1}
    compare(llama(2, layers=2), FOUR[:2], ratio=0.4, rescale_ratio=False, statistics="probe", **config)


def twice(*shapes: tuple[int, int]) -> list[dict[str, torch.Tensor]]:
    """Two batches of each shape in a row: the second finds what the first has left in the history."""
    return [batch(*shape) for shape in shapes for _ in range(2)]


@pytest.mark.parametrize("shapes", [((1, 1), (3, 2)), pytest.param(((1, 2), (3, 1)), marks=pytest.mark.thorough)])
def test_tiny_batches_equal_the_reference(shapes: Sequence[tuple[int, int]]) -> None:
    compare(llama(4), twice(*shapes), ratio=0.4, **SIZES)


def test_rows_of_one_sample_or_one_token_equal_the_reference() -> None:
    config = {**SIZES, "probe_batch": 1.0, "probe_tokens": 0.7}
    compare(llama(4), twice((1, 9), (3, 1)), ratio=0.4, probe_choice="spread", **config)


def test_dense_tokens_of_tiny_batches_equal_the_reference() -> None:
    batches = twice((1, 1), (1, 9), (3, 1))
    compare(llama(4), batches, ratio=0.4, probe_choice="spread", dense_tokens=0.5, **SIZES)


def test_where_most_of_a_batch_is_padding_all_its_tokens_may_keep_all_channels() -> None:
    inputs = batch(4, 12)
    inputs["attention_mask"] = torch.zeros(4, 12, dtype=torch.long)
    inputs["attention_mask"][:, 9:] = 1
    model, config = llama(4), {**SIZES, "probe_choice": "spread", "dense_tokens": 0.6}
    compare(model, [inputs], ratio=0.4, **config)
    pruned = ppgraph.transform(model, ratio=0.4, lowering="eager", blocks=("mlp",), statistics="probe", **config)
    with torch.no_grad():
        found, expected = pruned(**inputs, use_cache=False).logits, model(**inputs, use_cache=False).logits
    assert bool((pruned.ppgraph.dense_tokens()["model.layers.0.mlp"][0] >= inputs["attention_mask"].bool()).all())
    assert relative(found[:, 9:], expected[:, 9:]) < 1e-5


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_ratio_zero_is_the_dense_model_bit_for_bit(kv_heads: int) -> None:
    model = llama(kv_heads)
    pruned = ppgraph.transform(model, ratio=0.0, lowering="eager")
    inputs = batch(3, 16, "left")
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
    assert torch.equal(pruned(**inputs, use_cache=False).logits, expected)


def shifted(inputs: dict[str, torch.Tensor], left: int, right: int, filler: int) -> dict[str, torch.Tensor]:
    """The same texts with columns of padding added on both sides."""
    pad = torch.nn.functional.pad
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    return {
        "input_ids": pad(inputs["input_ids"], (left, right), value=filler),
        "attention_mask": pad(mask, (left, right)),
    }


@pytest.mark.parametrize(
    ("left", "right"), [(3, 4), *(pytest.param(*case, marks=pytest.mark.thorough) for case in ((0, 7), (7, 0)))]
)
def test_padding_never_changes_a_result(left: int, right: int) -> None:
    pruned = ppgraph.transform(llama(2), ratio=0.4, lowering="eager", **SIZES)
    found = []
    for places in ((0, 0), (left, right)):
        pruned.ppgraph.history.reset()
        for inputs in (batch(4, 24, "right"), batch(4, 13, "right")):
            padded = shifted(inputs, *places, filler=5)
            logits = pruned(**padded, use_cache=False).logits[padded["attention_mask"].bool()]
        found.append((logits, pruned.ppgraph.selection(), contents(pruned.ppgraph.history)))
    (logits, selection, history), (other_logits, other_selection, other_history) = found
    assert all(torch.equal(selection[name], other_selection[name]) for name in selection)
    assert relative(other_logits, logits) < 1e-5
    torch.testing.assert_close(other_history, history, rtol=1e-4, atol=1e-6)


def test_what_stands_at_the_padding_does_not_matter() -> None:
    pruned, results = ppgraph.transform(llama(4), ratio=0.4, lowering="eager", **SIZES), []
    for filler in (5, 60):
        pruned.ppgraph.history.reset()
        inputs = shifted(batch(4, 13), 5, 2, filler)
        logits = pruned(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]
        results.append({"logits": logits, **contents(pruned.ppgraph.history)})
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_fp32_statistics(dtype: torch.dtype) -> None:
    inputs = batch(4, 24)
    half = ppgraph.transform(llama(2).to(dtype), ratio=0.4, lowering="eager", **SIZES)
    logits = half(**inputs, use_cache=False).logits
    assert logits.dtype == dtype
    assert bool(torch.isfinite(logits).all())
    history = half.ppgraph.history
    assert {history[name].dtype for name in history} == {torch.float32}
    assert set(half.ppgraph.selection()) == {"model.layers.0.self_attn", "model.layers.0.mlp"}


@pytest.mark.parametrize(("first", "reuses"), [((9, 5), True), ((10, 5), False)])
def test_one_graph_serves_all_shapes_whether_it_reuses_the_probe(first: tuple[int, int], reuses: bool) -> None:
    model = llama(2)
    pruned = ppgraph.transform(model, ratio=0.4, lowering="eager", **SIZES)
    for samples, length in (first, (3, 16), (2, 9), (30, 20), (50, 3), (21, 64)):
        inputs = batch(samples, length)
        logits = pruned(**inputs, use_cache=False).logits
        assert relative(logits, masked_dense_logits(model, pruned.ppgraph.selection(), **inputs)) < 1e-5
    (graph,) = pruned.ppgraph.graphs
    assert ("reuse_probe" in {node.meta.get("ppgraph_pass") for node in graph.rewritten.graph.nodes}) == reuses


@pytest.mark.parametrize("first", [(6, 6), (3, 9)])
def test_samples_and_tokens_of_a_square_batch_are_told_apart(first: tuple[int, int]) -> None:
    model = llama(2)
    pruned = ppgraph.transform(model, ratio=0.4, lowering="eager", **SIZES)
    for samples, length in (first, (7, 7), (4, 12)):
        inputs = batch(samples, length, "left")
        logits = pruned(**inputs, use_cache=False).logits
        real = inputs["attention_mask"].bool()
        expected = masked_dense_logits(model, pruned.ppgraph.selection(), **inputs)
        assert relative(logits[real], expected[real]) < 1e-5
    assert len(pruned.ppgraph.graphs) == 1
