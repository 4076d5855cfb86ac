"""`report()` and `explain()`: the numbers agree with torch's own counter, and the tables fit a terminal."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

import ppgraph
from ppgraph.commands.demo import _cost
from ppgraph.inspect.explain import Explanation, explain
from ppgraph.inspect.rates import Rates
from tests.test_exactness import batch, llama

SIZES: dict[str, Any] = {"width_multiple": 8, "skip_layers": 1}
OPTIONS: dict[str, Any] = {"ratio": 0.4, "lowering": "eager", **SIZES}
INPUTS = {"samples": 20, "length": 24}


@pytest.fixture(scope="module", params=[4, 2], ids=["mha", "gqa"])
def pruned(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    model = ppgraph.transform(llama(request.param, layers=3), **OPTIONS)
    ppgraph.calibrate(model, [batch(2, 8)], progress=False)
    model(**batch(**INPUTS), use_cache=False)
    return model


def dense_flops(model: LlamaForCausalLM, samples: int, length: int) -> int:
    """Counted by torch while the dense model runs eagerly."""
    dense = LlamaForCausalLM(deepcopy(model.config)).eval()  # the pruned model is captured again where its own changes
    dense.set_attn_implementation("eager")  # of fused attention on CPUs torch counts nothing
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        dense(**batch(samples, length), use_cache=False)
    return counter.get_total_flops()


def test_dense_flops_are_those_of_torchs_counter(pruned: LlamaForCausalLM) -> None:
    assert pruned.ppgraph.report().to_dict()["flops"]["dense"] == dense_flops(pruned, **INPUTS)


def test_flops_are_of_the_last_batch(pruned: LlamaForCausalLM) -> None:
    pruned(**batch(5, 7), use_cache=False)
    found = pruned.ppgraph.report().to_dict()
    assert found["batch"] == [5, 7]
    assert found["flops"]["dense"] == dense_flops(pruned, 5, 7)
    pruned(**batch(**INPUTS), use_cache=False)


@pytest.mark.parametrize(("samples", "reuses"), [(9, True), (20, False)])
def test_probe_and_pruned_flops_add_up_from_the_widths(pruned: LlamaForCausalLM, samples: int, reuses: bool) -> None:
    """Against a closed form: every product of the two pruned layers, at its kept width, but for the probe's rows.

    They are left out in a graph whose first batch probes more than a twentieth of its rows.
    """
    if reuses:
        pruned = ppgraph.transform(llama(pruned.config.num_key_value_heads, layers=3), **OPTIONS)
        pruned(**batch(samples, INPUTS["length"]), use_cache=False)
    found, tokens = pruned.ppgraph.report().to_dict(), INPUTS["length"]
    sites = [site for site in pruned.ppgraph.sites if site.status == "pruned"]
    kv = 2 * 16 * pruned.config.num_key_value_heads  # channels of keys and values together
    is_mha = pruned.config.num_key_value_heads == 4

    def saved(width: int, kept: int, kind: str) -> int:
        lost = width - kept
        rows = 2 * samples * tokens * lost
        if kind == "mlp":
            return rows * 64 * 3  # gate, up, down
        products = rows * 64 * (4 if is_mha else 2)  # q, o, and with MHA k, v
        return products + rows * tokens * 2  # scores and values

    probe_tokens = tokens // 2  # of one sample

    def reused(kept: int, kind: str) -> int:
        outputs = 2 * kept if kind == "mlp" else 3 * kept if is_mha else kept + kv
        return 2 * probe_tokens * 64 * outputs  # gate and up, or q, k and v

    expected = found["flops"]["dense"] - sum(saved(site.width, site.kept, site.kind) for site in sites)
    assert found["flops"]["pruned"] == expected - reuses * sum(reused(site.kept, site.kind) for site in sites)
    layer = 2 * probe_tokens * 64 * (64 + kv + 2 * 128) + 4 * probe_tokens * probe_tokens * 64
    assert found["flops"]["probe"] == len(sites) // 2 * layer
    share = found["flops"]["probe"] / found["flops"]["dense"]
    assert f"({share:.2%} of dense)" in str(pruned.ppgraph.report())


def test_memory_and_graphs(pruned: LlamaForCausalLM) -> None:
    report, history = pruned.ppgraph.report(), pruned.ppgraph.history
    found = report.to_dict()
    assert (
        found["history_bytes"] == history.nbytes == sum(history[name].nbytes for name in history) + history.seen.nbytes
    )
    assert found["history_positions"] == history.positions
    phases = [graph["phase"] for graph in found["graphs"]]
    assert phases[:2] == ["calibrate", "prefill"]
    assert found["recompiles"] == report.recompiles == len(phases) - 2  # other tests may reset Dynamo in between
    shapes = [tuple(shape) for shape in found["graphs"][1]["shapes"].values()]
    assert any(len(shape) == 2 and not any(size.isdigit() for size in shape) for shape in shapes), "ids are symbolic"


@pytest.mark.parametrize(("blocks", "heads"), [(("attention", "mlp"), "2 of 4"), (("mlp",), "4 of 4")])
def test_the_demo_tells_what_is_kept_where_no_head_goes_too(blocks: tuple[str, ...], heads: str) -> None:
    pruned = ppgraph.transform(
        llama(2, layers=2), ratio=0.5, lowering="eager", blocks=blocks, **SIZES | {"skip_layers": 0}
    )
    pruned(**batch(4, 14), use_cache=False)
    found = _cost(pruned)
    assert (found["heads"], found["channels"]) == (heads, "64 of 128")


def test_gathered_bytes_are_those_of_the_kept_weights(pruned: LlamaForCausalLM) -> None:
    sites = [site for site in pruned.ppgraph.sites if site.status == "pruned"]
    linears = {"mlp": 3, "attention": 4 if pruned.config.num_key_value_heads == 4 else 2}
    weights = sum(4 * 64 * site.kept * linears[site.kind] for site in sites)
    assert pruned.ppgraph.report().to_dict()["gathered_bytes"] == weights


def test_sites_and_json(pruned: LlamaForCausalLM) -> None:
    found = json.loads(json.dumps(pruned.ppgraph.report().to_dict()))
    assert found["config"] == pruned.ppgraph.config.to_dict()
    assert [site["name"] for site in found["sites"]] == [site.name for site in pruned.ppgraph.sites]
    last = found["sites"][-1]
    assert last["exit"] == ["model.layers.2.mlp.down_proj.weight"]
    assert set(last["entry"]) == {f"model.layers.2.mlp.{name}_proj.weight" for name in ("gate", "up")}
    assert (last["kind"], last["layer"], last["width"], last["status"]) == ("mlp", 2, 128, "pruned")
    assert found["sites"][0]["reason"] == "one of the first 1 layers (skip_layers)"


def test_the_table_fits_a_terminal(pruned: LlamaForCausalLM) -> None:
    text = str(pruned.ppgraph.report())
    assert max(map(len, text.splitlines())) <= 100
    for expected in ("4 of 6 blocks pruned", "20 samples of 24 tokens", "FLOPs probe", "history", "recompiles"):
        assert expected in text


def test_where_tokens_differ_the_report_tells_how_many_keep_what() -> None:
    config = {**OPTIONS, "ratio": 0.2, "width_multiple": 1, "probe_choice": "spread", "dense_tokens": 0.25}
    model = ppgraph.transform(llama(4, layers=2), **config)
    assert "dense tokens" not in str(model.ppgraph.report())
    model(**batch(4, 9), use_cache=False)
    report, (*_, site) = model.ppgraph.report(), model.ppgraph.sites
    assert (site.name, site.status) == ("model.layers.1.mlp", "pruned")
    tokens, others = model.ppgraph.dense_tokens()[site.name]
    assert report.to_dict()["dense_tokens"] == {site.name: {"tokens": 9, "kept_by_others": len(others)}}
    assert int(tokens.sum()) == 9
    assert len(others) < site.kept
    assert f"9 tokens of the last prompt kept all channels of 1 blocks, the others {len(others)};" in " ".join(
        str(report).split()
    )


def test_a_report_before_the_first_batch() -> None:
    report = ppgraph.transform(llama(2, layers=2), **OPTIONS).ppgraph.report()
    found = json.loads(json.dumps(report.to_dict()))
    assert (found["batch"], found["graphs"], found["history_bytes"]) == (None, [], 0)
    assert found["flops"] == {"dense": None, "probe": None, "pruned": None}
    assert len(found["sites"]) == 4
    assert "none yet" in str(report)


# explain


@pytest.fixture(scope="module")
def told(pruned: LlamaForCausalLM) -> Explanation:
    """What is told beforehand of the same model and batch."""
    dense = llama(pruned.config.num_key_value_heads, layers=3)
    return explain(dense, ppgraph.PruneConfig(ratio=0.4, **SIZES), **batch(**INPUTS), use_cache=False)


def test_explain_predicts_what_the_report_then_shows(told: Explanation, pruned: LlamaForCausalLM) -> None:
    report = pruned.ppgraph.report().to_dict()
    found = json.loads(json.dumps(told.to_dict()))
    assert found["flops"] == report["flops"]
    assert found["gathered_bytes"] == report["gathered_bytes"]
    assert [site["kept"] for site in found["sites"]] == [site["kept"] for site in report["sites"]]
    assert found["speedup_limit"] == pytest.approx(
        report["flops"]["dense"] / (report["flops"]["probe"] + report["flops"]["pruned"])
    )
    assert max(map(len, str(told).splitlines())) <= 100


def test_predictions_follow_from_the_rates(told: Explanation) -> None:
    """A device so slow at copying that the gather takes as long as all of the dense products, in closed form."""
    assert told.rates is not None
    work, gathered = told.flops, told.gathered_bytes
    slow = replace(told, rates=Rates(flops_per_second=1.0, bytes_per_second=2 * gathered / work.dense))
    assert slow.predicted_speedup == pytest.approx(work.dense / (work.probe + work.pruned + work.dense))
    assert told.predicted_speedup < told.speedup_limit
    samples = slow.break_even_samples
    assert samples is not None
    saved = [count * (work.dense - work.pruned) / 20 - -(-count // 20) * work.probe for count in (samples - 1, samples)]
    assert saved[0] <= work.dense < saved[1]
    free = replace(told, rates=Rates(1.0, float("inf")))
    assert free.predicted_speedup == pytest.approx(told.speedup_limit)
    never = replace(told, rates=Rates(1.0, 1e-12))
    assert never.break_even_samples is None
    assert "at no batch of this length" in str(never)
    unknown = replace(told, rates=None)
    assert (unknown.break_even_samples, unknown.predicted_speedup) == (None, told.speedup_limit)
    assert "at most" in str(unknown)


def test_measuring_rates_leaves_the_random_numbers_of_others_alone() -> None:
    before = torch.get_rng_state()
    assert Rates.measured(torch.device("cpu"), torch.float32) is not None
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_below_break_even_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def warnings_of(rates: Rates, *shapes: tuple[int, int]) -> list[str]:
        monkeypatch.setattr("ppgraph.inspect.rates.once_measured", lambda device, dtype: rates)
        caplog.clear()
        for samples, length in shapes:
            model(**batch(samples, length), use_cache=False)
        return [record.getMessage() for record in caplog.records if record.name == "ppgraph"]

    model = ppgraph.transform(llama(2, layers=2), **OPTIONS)
    assert warnings_of(Rates(1.0, float("inf")), (20, 24)) == []
    slow_at_copying = Rates(1.0, 1e-12)
    assert warnings_of(slow_at_copying, (20, 24), (3, 200)) == []  # no smaller batch than one that was looked at
    found = warnings_of(slow_at_copying, (2, 8), (2, 4), (3, 5))
    assert len(found) == 1
    assert "2 x 8 tokens" in found[0]


def test_explain_leaves_the_model_alone() -> None:
    model = llama(2, layers=2)
    attributes = dict(model.__dict__)
    explain(model, ppgraph.PruneConfig(ratio=0.4, **SIZES), **batch(3, 9))
    assert model.__dict__ == attributes
