"""`history_below`: small prompts keep what the history alone says, on weights that are packed once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import ppgraph
from ppgraph import _torch
from tests.fuzzing import Batch, Case, check
from tests.test_dense_below import LARGE, SMALL, phases
from tests.test_exactness import SIZES, batch, llama
from tests.test_replay import Recorder

CONFIG = {**SIZES, "ratio": 0.4, "history_below": 32}
CALIBRATION = (Batch(samples=4, length=12), Batch(samples=3, length=9, padding="left", seed=1))


def calibrated(model: LlamaForCausalLM, **config: Any) -> Any:
    pruned = ppgraph.transform(model, **{**CONFIG, "lowering": "eager", **config})
    ppgraph.calibrate(pruned, [batch(4, 16), batch(2, 20, "left")], progress=False)
    pruned.ppgraph.runtime.graphs.clear()
    return pruned


def packed_memory(pruned: Any) -> set[int]:
    """Where the packed weights lie, and how often they were written."""
    held = pruned.ppgraph.runtime._packed.values()
    return {(tensor.data_ptr(), tensor._version) for *_, tensor in held if tensor.is_floating_point()}


@pytest.mark.parametrize(
    "config",
    [
        {"statistics": "history", "score": "wanda-sp", "history_momentum": 1.0},
        {"method": "flap"},
        {"probe_choice": "spread", "dense_tokens": 0.25},
        {"dense_below": 20},
    ],
    ids=["wanda-sp", "flap", "tokens-differ", "dense-below"],
)
def test_prompts_equal_the_reference(config: dict[str, Any]) -> None:
    # On both sides of the limit, so that the history of the one decides about the other.
    shapes = ((2, 9), (4, 11), (2, 7), (3, 8), (1, 5))
    batches = tuple(Batch(samples=b, length=s, padding="left", seed=b) for b, s in shapes)
    assert check(Case("llama", batches, CONFIG | config, calibration=CALIBRATION)) == len(shapes)


@pytest.mark.parametrize(
    ("decode", "cache"),
    [
        ("reuse", "static"),
        *(
            pytest.param(decode, cache, marks=pytest.mark.thorough)
            for decode, cache in (
                ("reuse", "dynamic"),
                ("probe", "static"),
                ("probe", "dynamic"),
                ("dense", "dynamic"),
                ("dense", "static"),
            )
        ),
    ],
)
def test_conversations_equal_the_masked_dense_model(decode: str, cache: str) -> None:
    turns = Batch(samples=2, length=7, padding="left", turns=(1, 1, 3, 1))
    config = {**SIZES, "ratio": 0.4, "decode": decode, "history_below": 100}
    assert check(Case("llama", (turns,), config, calibration=CALIBRATION, cache=cache)) == 5


def test_exit_weights_make_up_for_lost_channels_in_small_prompts_too() -> None:
    config = {"method": "spread", "ratio": 0.4, "skip_layers": 0, "width_multiple": 8, "history_below": 100}
    prompt = Batch(samples=2, length=7, turns=(1, 1))
    assert check(Case("llama", (prompt,), config, calibration=CALIBRATION, cache="dynamic")) == 3


def test_compiled_conversations_equal_the_masked_dense_model() -> None:
    prompt = Batch(samples=2, length=7, padding="left", turns=(1, 1))
    config = CONFIG | {"history_below": 100}
    case = Case("llama", (prompt,), config, calibration=CALIBRATION, cache="dynamic", lowering="inductor")
    assert check(case) == 3


def test_weights_are_packed_once_until_the_history_moves() -> None:
    pruned = calibrated(llama(2))
    pruned(**SMALL)
    first = packed_memory(pruned)
    pruned.generate(**batch(3, 9, "left"), max_new_tokens=3, do_sample=False)
    assert "reuse" in phases(pruned)
    assert packed_memory(pruned) == first
    pruned(**LARGE)
    pruned(**SMALL)
    assert packed_memory(pruned) != first


def test_prompts_of_one_shape_are_replayed_and_read_what_is_packed_anew(recorder: Recorder) -> None:
    model = llama(2)
    recorded, expected = calibrated(model, lowering="inductor"), calibrated(model)
    for inputs, replays in ((SMALL, 0), (SMALL, 1), (LARGE, 1), (SMALL, 2), (batch(3, 9), 2), (SMALL, 2)):
        found, wanted = (each(**inputs, use_cache=False).logits for each in (recorded, expected))
        torch.testing.assert_close(found, wanted)
        assert recorder.replayed == replays


def test_a_changed_weight_or_history_is_chosen_by_anew(tmp_path: Path) -> None:
    model = llama(2)
    pruned = calibrated(model)
    history, site = pruned.ppgraph.history, "model.layers.0.mlp"
    history.save(tmp_path)
    pruned(**SMALL, use_cache=False)
    before = pruned.ppgraph.selection()[site]
    lost = next(channel for channel in range(model.config.intermediate_size) if channel not in before)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, lost] *= 1000
    pruned(**SMALL, use_cache=False)
    assert lost in pruned.ppgraph.selection()[site]
    by_weights = pruned.ppgraph.runtime.selection
    ppgraph.calibrate(pruned, [batch(4, 30)], progress=False)
    pruned(**SMALL, use_cache=False)
    moved = pruned.ppgraph.runtime.selection
    assert moved is not by_weights
    history.load(tmp_path)
    pruned(**SMALL, use_cache=False)
    assert pruned.ppgraph.runtime.selection is not moved


@pytest.mark.parametrize("emptied", [False, True], ids=["never-calibrated", "reset"])
def test_without_a_history_there_is_an_error(emptied: bool) -> None:
    model = llama(2)
    pruned = calibrated(model) if emptied else ppgraph.transform(model, lowering="eager", **CONFIG)
    if emptied:
        pruned(**SMALL, use_cache=False)
        pruned.ppgraph.history.reset()
    with pytest.raises(ppgraph.PPGraphError, match=r"below history_below; found none: call ppgraph\.calibrate"):
        pruned(**SMALL, use_cache=False)
    pruned(**LARGE, use_cache=False)  # whose probe is a start
    pruned(**SMALL, use_cache=False)
    assert pruned.ppgraph.report().cost.flops.probe == 0


def test_nothing_removed_needs_no_history() -> None:
    model = llama(2)
    pruned = ppgraph.transform(model, lowering="eager", **{**CONFIG, "ratio": 0.0})
    with torch.no_grad():
        found, expected = (each(**SMALL, use_cache=False).logits for each in (pruned, model))
    assert torch.equal(found, expected)


def test_through_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch, "lower_with_inductor", lambda module, options: module)
    model = llama(2)
    compiled = torch.compile(model, backend="ppgraph", options={**CONFIG, "blocks": ("mlp",)}, dynamic=True)
    twin = calibrated(model, blocks=("mlp",))
    ppgraph.calibrate(compiled, [batch(4, 16), batch(2, 20, "left")], progress=False)
    with torch.no_grad():
        found, expected = (each(**SMALL, use_cache=False).logits for each in (compiled, twin))
    torch.testing.assert_close(found, expected)
    assert "history" in phases(compiled)


def test_each_side_of_the_limit_has_one_graph_and_its_report() -> None:
    pruned = calibrated(llama(2))
    for inputs, is_probed in ((SMALL, False), (LARGE, True), (batch(3, 10), False), (batch(2, 16), True)):
        pruned(**inputs, use_cache=False)
        report = pruned.ppgraph.report()
        assert report.cost.batch == tuple(inputs["input_ids"].shape)
        assert report.cost.flops.pruned < report.cost.flops.dense
        assert (report.cost.flops.probe > 0) is is_probed
        assert (report.cost.gathered_bytes > 0) is is_probed
    assert phases(pruned) == ["history", "prefill"]
    assert pruned.ppgraph.full_batch_overlap(SMALL).keys() == pruned.ppgraph.selection().keys()
