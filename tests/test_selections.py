"""How selections behave (report, plot) and what `print(pruned)` says."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import ppgraph
from ppgraph.inspect.tables import TEXT_WIDTH, block_lines
from ppgraph.passes import Site
from ppgraph.selections import SelectionStatistics, jaccard
from tests.reference import Reference
from tests.test_exactness import batch, llama

SIZES: dict[str, Any] = {"width_multiple": 8, "skip_layers": 1}
BATCHES = [batch(3, 16), batch(4, 9), batch(5, 20)]


@pytest.fixture(scope="module")
def run() -> tuple[LlamaForCausalLM, Any, list[dict[str, set[int]]]]:
    """A pruned model after three batches, and what each of them chose."""
    model = llama(2, layers=2)
    pruned = ppgraph.transform(model, lowering="eager", ratio=0.4, **SIZES)
    chosen = []
    for inputs in BATCHES:
        pruned(**inputs, use_cache=False)
        chosen.append({name: set(kept.tolist()) for name, kept in pruned.ppgraph.selection().items()})
    return model, pruned, chosen


def test_kept_shares_and_overlaps_are_those_of_the_selections(run: Any) -> None:
    _, pruned, chosen = run
    summaries = {summary.site.name: summary for summary in pruned.ppgraph.report().selections}
    assert list(summaries) == ["model.layers.1.self_attn", "model.layers.1.mlp"]
    for name, summary in summaries.items():
        block = summary.site.block
        sets = [{channel // block for channel in selection[name]} for selection in chosen]
        expected = [sum(unit in kept for kept in sets) / 3 for unit in range(summary.site.units)]
        assert summary.kept_share.tolist() == pytest.approx(expected)
        pairs = [len(left & right) / len(left | right) for left, right in itertools.pairwise(sets)]
        assert summary.overlap == pytest.approx(sum(pairs) / 2)
        assert summary.always == pytest.approx(len(set.intersection(*sets)) / summary.site.units)
        assert summary.never == pytest.approx(1 - len(set.union(*sets)) / summary.site.units)


def test_report_shows_selections_within_the_width(run: Any) -> None:
    report = run[1].ppgraph.report()
    assert "overlap" in str(report)
    assert "of 3 batches" in str(report)
    assert max(map(len, str(report).splitlines())) <= TEXT_WIDTH
    assert [entry["site"] for entry in report.to_dict()["selections"]] == [
        "model.layers.1.self_attn",
        "model.layers.1.mlp",
    ]


def test_full_batch_choice_is_the_reference_method(run: Any) -> None:
    model, pruned, chosen = run
    before = {name: pruned.ppgraph.history[name].clone() for name in pruned.ppgraph.history}
    report = pruned.ppgraph.report(full_batch=BATCHES[0])
    full = Reference(model, ratio=0.4, statistics="probe", probe_batch=1.0, probe_tokens=1.0, **SIZES)(**BATCHES[0])
    own = Reference(model, ratio=0.4, **SIZES)
    for inputs in BATCHES:
        own(**inputs)
    selection = own(**BATCHES[0]).selection
    expected = {name: jaccard(kept, full.selection[name]) for name, kept in selection.items()}
    assert report.full_batch_overlap == pytest.approx(expected)
    for name, value in before.items():
        assert torch.equal(pruned.ppgraph.history[name], value)
    assert pruned.ppgraph.report().selections[0].batches == 3
    assert {name: set(kept.tolist()) for name, kept in pruned.ppgraph.selection().items()} == chosen[-1]


def test_a_config_that_probes_everything_agrees_with_the_full_batch() -> None:
    pruned = ppgraph.transform(llama(2, layers=2), lowering="eager", method="full-batch", **SIZES)
    report = pruned.ppgraph.report(full_batch=BATCHES[0])
    assert set(report.full_batch_overlap.values()) == {1.0}
    assert report.selections == ()


def test_the_full_batch_is_probed_with_all_pieces_of_the_method() -> None:
    pieces = {"observed": "fluctuation", "score": "flap", "allocation": "global", "compensation": "mean"}
    everything = {"statistics": "probe", "probe_batch": 1.0, "probe_tokens": 1.0}
    model = llama(2, layers=2, bias=True)
    torch.nn.init.normal_(model.model.layers[1].mlp.up_proj.bias)  # channels far from 0: squares are no variances
    flap, full = (
        ppgraph.transform(model, lowering="eager", ratio=0.4, **config, **SIZES)
        for config in ({"method": "flap"}, pieces | everything)
    )
    for pruned in (flap, full):
        ppgraph.calibrate(pruned, [inputs["input_ids"] for inputs in BATCHES], progress=False)
        pruned(**BATCHES[0])
    overlap = flap.ppgraph.report(full_batch=BATCHES[0]).full_batch_overlap
    chosen = full.ppgraph.selection()
    expected = {name: jaccard(kept, chosen[name]) for name, kept in flap.ppgraph.selection().items()}
    assert overlap == pytest.approx(expected)


def test_the_full_batch_is_probed_whole_beside_dense_tokens() -> None:
    some = {"probe_choice": "spread", "blocks": ("mlp",), "lowering": "eager", "ratio": 0.4, **SIZES}
    everything = {"statistics": "probe", "probe_batch": 1.0, "probe_tokens": 1.0}
    configs = {"dense_tokens": 0.3}, everything
    pruned, full = (ppgraph.transform(llama(2, layers=2), **some, **config) for config in configs)
    for model in (pruned, full):
        model(**BATCHES[0])
    (own,), (whole,) = (model.ppgraph.selection().values() for model in (pruned, full))
    overlap = pruned.ppgraph.report(full_batch=BATCHES[0]).full_batch_overlap
    assert list(overlap.values()) == pytest.approx([jaccard(own, whole)])
    assert 0 < jaccard(own, whole) < 1


def test_plot_draws_heads_channels_and_overlaps(run: Any) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra ppgraph[plot]")
    figure = run[1].ppgraph.report(full_batch=BATCHES[0]).plot()
    heads, channels, overlaps = figure.axes[:3]
    assert heads.images[0].get_array().shape == (1, 4)
    assert len(channels.lines) == 1
    assert len(overlaps.lines) == 6
    figure.canvas.draw()


def test_plot_without_a_batch_says_so() -> None:
    pytest.importorskip("matplotlib", reason="needs the extra ppgraph[plot]")
    with pytest.raises(ppgraph.PPGraphError, match="no batch has been pruned yet"):
        ppgraph.transform(llama(2, layers=2), lowering="eager", **SIZES).ppgraph.report().plot()


def test_other_sites_start_the_statistics_over() -> None:
    sites = [Site("a", "mlp", 0, width=4, kept=2, units=4), Site("b", "mlp", 1, width=6, kept=3, units=6)]
    statistics = SelectionStatistics()
    statistics.add({"a": torch.tensor([0, 1])}, sites)
    statistics.add({"a": torch.tensor([1, 2])}, sites)
    assert statistics.summaries()[0].overlap == pytest.approx(1 / 3)
    statistics.add({"b": torch.tensor([3, 4, 5])}, sites)
    (summary,) = statistics.summaries()
    assert (summary.site.name, summary.batches, summary.overlap) == ("b", 1, None)
    assert summary.kept_share.tolist() == [0, 0, 0, 1, 1, 1]


def test_jaccard_of_nothing_and_of_parts() -> None:
    assert jaccard(torch.tensor([], dtype=torch.long), torch.tensor([], dtype=torch.long)) == 1
    assert jaccard(torch.tensor([0, 1, 2]), torch.tensor([2, 3])) == 0.25


def test_printing_shows_what_each_block_keeps_and_captures_nothing(run: Any) -> None:
    model, pruned, _ = run
    shown = str(pruned)
    assert shown.startswith("LlamaForCausalLM(\n  pruned by ppgraph: method='pp', ratio=0.4\n")
    assert "model.layers.1.self_attn: keeps 1 of 4 heads" in shown
    assert "model.layers.0.mlp: dense, one of the first 1 layers (skip_layers)" in shown
    assert "ppgraph" not in str(model)
    fresh = ppgraph.transform(model, lowering="eager", **SIZES)
    assert "not captured yet" in str(fresh)
    assert fresh.ppgraph.runtime.sites is None
    assert "keeps 1 of 4 heads" in str(copy.deepcopy(pruned))


def test_blocks_that_are_alike_share_a_line() -> None:
    def site(layer: int, kept: int, status: Any = "pruned", reason: str = "") -> Site:
        return Site(f"model.layers.{layer}.mlp", "mlp", layer, 8, kept, 8, (), (), status, reason)

    sites = [site(0, 8, "dense", "skipped"), *(site(layer, 4) for layer in (1, 2, 3, 5)), site(4, 6)]
    assert block_lines(sites) == [
        "model.layers.0.mlp: dense, skipped",
        "model.layers.1-3,5.mlp: keeps 4 of 8 channels",
        "model.layers.4.mlp: keeps 6 of 8 channels",
    ]
