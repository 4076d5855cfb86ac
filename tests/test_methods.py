"""Methods as registered pieces: FLAP against the reference, and pieces of a user's own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

import ppgraph
from ppgraph import config as config_module
from ppgraph import methods
from ppgraph.backend import pruning_of
from ppgraph.errors import (
    ConfigError,
    GraphError,
    HistoryError,
    InputError,
    MethodError,
    NonFiniteError,
    PPGraphError,
)
from ppgraph.passes import Site
from ppgraph.sensitivity import LOSS_TOKENS, expected_losses, samples_for_losses
from tests.fuzzing import compensated
from tests.reference import Reference, find_exit, masked, masked_dense_logits, spread_rows
from tests.test_exactness import FOUR, SIZES, batch, llama, relative
from tests.test_generate import cached

# Groups of unequal sizes and lengths: positions count their own samples.
CALIBRATION = [batch(4, 12, "left"), batch(1, 12, "left"), batch(3, 9, "right"), batch(2, 14, "left")]


@pytest.fixture(autouse=True)
def no_piece_outlives_its_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    kinds = ("OBSERVATIONS", "SCORES", "ALLOCATIONS", "COMPENSATIONS")
    before = [(dict(getattr(methods, kind)), set(getattr(config_module, f"KNOWN_{kind}"))) for kind in kinds]
    yield
    for kind, (pieces, known) in zip(kinds, before, strict=True):
        for now, then in ((getattr(methods, kind), pieces), (getattr(config_module, f"KNOWN_{kind}"), known)):
            now.clear()
            now.update(then)


def flap_pair(model: Any, ratio: float, **config: Any) -> tuple[Any, Reference]:
    """A calibrated FLAP model and a calibrated reference."""
    pruned = ppgraph.transform(model, method="flap", ratio=ratio, lowering="eager", **config)
    ppgraph.calibrate(pruned, CALIBRATION, progress=False)
    reference = Reference(model, ratio=ratio, statistics="history", score="flap", flap=True, **config)
    reference.calibrate(CALIBRATION)
    return pruned, reference


def require_same(pruned: Any, reference: Reference, batches: Sequence[Mapping[str, Tensor]]) -> None:
    for inputs in batches:
        logits = pruned(**inputs, use_cache=False).logits
        expected = reference(**inputs)
        selection = pruned.ppgraph.selection()
        assert {name: kept.tolist() for name, kept in selection.items()} == {
            name: kept.tolist() for name, kept in expected.selection.items()
        }
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        assert relative(logits[real], expected.logits[real]) < 1e-5


@pytest.mark.parametrize(
    ("kv_heads", "bias", "ratio"),
    [
        pytest.param(4, False, 0.3, marks=pytest.mark.thorough),
        (2, True, 0.5),
        pytest.param(2, True, 0.2, marks=pytest.mark.thorough),
        pytest.param(2, False, 0.5, marks=pytest.mark.thorough),
    ],
)
def test_flap_equals_the_reference(kv_heads: int, bias: bool, ratio: float) -> None:
    pruned, reference = flap_pair(llama(kv_heads, layers=3, bias=bias), ratio, **{**SIZES, "skip_layers": 1})
    assert pruned.ppgraph.history.allocation == reference.allocated
    for name, known in reference.fluctuation.items():
        held = pruned.ppgraph.history.memory(name)
        torch.testing.assert_close(held["variance"][: len(known.variance)], known.variance, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(held["mean"][: len(known.mean)], known.mean, rtol=1e-4, atol=1e-6)
    require_same(pruned, reference, FOUR[1::2])


@pytest.mark.parametrize(("kv_heads", "bias"), [(2, True), pytest.param(4, False, marks=pytest.mark.thorough)])
def test_a_layer_may_lose_all_its_heads(kv_heads: int, bias: bool) -> None:
    methods.register_allocation(
        "headless",
        lambda candidates, ratio: {c.site.name: 0 if c.site.kind == "attention" else 64 for c in candidates},
    )
    model = llama(kv_heads, bias=bias)
    pruned = ppgraph.transform(model, ratio=0.4, allocation="headless", lowering="eager", **SIZES)
    ppgraph.calibrate(pruned, CALIBRATION, progress=False)
    for inputs in FOUR[1::2]:
        logits = pruned(**inputs, use_cache=False).logits
        selection = pruned.ppgraph.selection()
        assert selection["model.layers.0.self_attn"].tolist() == []
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        masked = masked_dense_logits(model, selection, **inputs)
        assert relative(logits[real], masked[real]) < 1e-5


def test_flap_itself_can_take_all_heads_of_a_layer() -> None:
    pruned, reference = flap_pair(llama(4, layers=3), 0.5, **{**SIZES, "skip_layers": 1})
    assert 0 in [kept for name, kept in reference.allocated.items() if name.endswith("self_attn")]
    require_same(pruned, reference, FOUR[1::2])


def test_a_headless_layer_decodes_with_a_cache() -> None:
    methods.register_allocation("headless", lambda candidates, ratio: {c.site.name: 0 for c in candidates[:1]})
    model = llama(2)
    pruned = ppgraph.transform(model, ratio=0.4, allocation="headless", decode="reuse", lowering="eager", **SIZES)
    ppgraph.calibrate(pruned, CALIBRATION, progress=False)
    inputs = batch(2, 9)
    first = pruned(**inputs, use_cache=True)
    following = torch.full((2, 1), 7)
    step = pruned(input_ids=following, past_key_values=first.past_key_values).logits
    whole = torch.cat([inputs["input_ids"], following], dim=1)
    masked = masked_dense_logits(model, pruned.ppgraph.selection(), whole)
    assert relative(step[:, -1], masked[:, -1]) < 1e-5


def test_compensation_reaches_decoding() -> None:
    model = llama(2)
    pruned, reference = flap_pair(model, 0.4, **SIZES)
    inputs = batch(2, 9)
    first = pruned(**inputs, use_cache=True)
    following = torch.full((2, 1), 7)
    step = pruned(input_ids=following, past_key_values=first.past_key_values).logits
    selection = pruned.ppgraph.selection()
    handles = []
    for name, kept in selection.items():
        exit_linear = find_exit(model, name)
        mean = reference.fluctuation[name].centre.clone()
        mean[kept] = 0
        constant = exit_linear.weight @ mean
        handles.append(exit_linear.register_forward_hook(lambda m, a, out, constant=constant: out + constant))
    whole = torch.cat([inputs["input_ids"], following], dim=1)
    expected = masked_dense_logits(model, selection, whole)
    for handle in handles:
        handle.remove()
    assert relative(step[:, -1], expected[:, -1]) < 1e-5


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_least_squares_comes_closest_to_the_dense_output(kv_heads: int) -> None:
    """The weight on kept channels is that of a regression on the calibration activations themselves."""
    model = llama(kv_heads, bias=True)
    pruned = ppgraph.transform(
        model, ratio=0.4, observed="second-moment", compensation="least-squares", lowering="eager", **SIZES
    )
    ppgraph.calibrate(pruned, CALIBRATION, progress=False)
    inputs = batch(3, 12)
    logits = pruned(**inputs, use_cache=False).logits
    weights: dict[str, Tensor] = {}
    for name, kept in pruned.ppgraph.selection().items():
        y = calibration_inputs(model, name).double()
        exit_linear = find_exit(model, name)
        energy = y[:, kept].square().sum(0)
        damping = 0.01 * energy + 0.0001 * energy.mean()
        rows = torch.cat([y[:, kept], damping.sqrt().diag()])
        wanted = torch.cat([y @ exit_linear.weight.double().T, torch.zeros(len(kept), 64).double()])
        # Damping pulls towards 0 on the kept channels only: the same system as in the graph.
        weights[name] = torch.zeros_like(exit_linear.weight)
        weights[name][:, kept] = torch.linalg.lstsq(rows, wanted).solution.T.float()
    with torch.no_grad():
        for name, weight in weights.items():
            find_exit(model, name).weight.copy_(weight)
        expected = model(**inputs, use_cache=False).logits
    assert relative(logits, expected) < 1e-3


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_low_rank_makes_up_for_what_is_dropped(kv_heads: int) -> None:
    """With no more tokens than it holds directions, it is the regression of dropped channels on kept ones."""
    model = llama(kv_heads, bias=True)
    pruned = ppgraph.transform(
        model, ratio=0.4, observed="low-rank", compensation="low-rank", lowering="eager", **SIZES
    )
    ppgraph.calibrate(pruned, CALIBRATION[:1], progress=False)
    inputs = batch(3, 12)
    logits = pruned(**inputs, use_cache=False).logits
    weights: dict[str, Tensor] = {}
    for name, kept in pruned.ppgraph.selection().items():
        y = calibration_inputs(model, name, CALIBRATION[:1]).double()
        assert len(y) <= methods.RANK
        lost = torch.ones(y.shape[1], dtype=torch.bool).index_fill(0, kept, False)
        energy = y.square().sum(0)
        damping = (0.01 * energy + 0.0001 * energy.mean())[kept]
        rows = torch.cat([y[:, kept], damping.sqrt().diag()])
        weight = find_exit(model, name).weight.detach().clone()
        output = torch.cat([y[:, lost] @ weight[:, lost].double().T, torch.zeros(len(kept), 64).double()])
        weight[:, kept] += torch.linalg.lstsq(rows, output).solution.T.float()
        weight[:, lost] = 0
        weights[name] = weight
    with torch.no_grad():
        for name, weight in weights.items():
            find_exit(model, name).weight.copy_(weight)
        expected = model(**inputs, use_cache=False).logits
    assert relative(logits, expected) < 1e-3


@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.thorough)])
def test_spread_keeps_its_prompts_weights_while_decoding_and_from_a_file(lowering: str, tmp_path: Path) -> None:
    model = llama(2)
    pruned = ppgraph.transform(model, ratio=0.4, method="spread", lowering=lowering, **SIZES)
    ppgraph.calibrate(pruned, CALIBRATION, progress=False)
    pruned.ppgraph.history.save(tmp_path)
    inputs, following = batch(3, 12), torch.full((3, 1), 7)
    first = pruned(**inputs, use_cache=True)
    selection, dense = pruned.ppgraph.selection(), pruned.ppgraph.dense_tokens()
    step = pruned(input_ids=following, past_key_values=first.past_key_values).logits
    # The step itself keeps what the selection says: more channels than the prompt's other tokens.
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        with compensated(model, pruned, selection, dense), masked(model, selection, dense=dense):
            prompt = model(**inputs, **cached(cache), use_cache=True).logits
        with compensated(model, pruned, selection, {}), masked(model, selection):
            expected = torch.cat([prompt, model(input_ids=following, **cached(cache), use_cache=True).logits], dim=1)
    assert relative(first.logits, expected[:, :-1]) < 1e-3
    assert relative(step[:, -1], expected[:, -1]) < 1e-3
    again = ppgraph.transform(model, ratio=0.4, method="spread", lowering=lowering, **SIZES)
    again.ppgraph.history.load(tmp_path)
    assert torch.equal(again(**inputs, use_cache=False).logits, first.logits)


def test_a_batch_that_is_not_finite_leaves_the_factor_as_it_was() -> None:
    model = llama(2)
    pruned = ppgraph.transform(model, ratio=0.4, method="spread", lowering="eager", **SIZES)
    ppgraph.calibrate(pruned, CALIBRATION[:1], progress=False)
    history = pruned.ppgraph.history
    before = {site: history.moment(site, "factor").clone() for site in history}
    with torch.no_grad():
        model.model.embed_tokens.weight[CALIBRATION[1]["input_ids"][0, -1]] = float("inf")
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        ppgraph.calibrate(pruned, CALIBRATION[1:2], progress=False)
    assert all(torch.equal(history.moment(site, "factor"), factor) for site, factor in before.items())


def no_moments(width: int) -> dict[str, Tensor]:
    columns = methods.OBSERVATIONS["low-rank"].moments
    return {name: torch.zeros(width, count) for name, count in columns.items()}


def test_a_low_rank_factor_follows_all_that_calibration_saw() -> None:
    torch.manual_seed(0)
    width, batches = 200, 6
    mixing = torch.randn(width, width) * torch.arange(1.0, width + 1).pow(-0.8)
    memory = {"mean-square": torch.zeros(12, width), **no_moments(width)}
    tokens = []
    for number in range(batches):
        y = torch.randn(8 + number, 12, width) @ mixing.T
        y[:, 0, 7] += 1000  # the first token is an outlier everywhere
        real = torch.rand(y.shape[:2]) < 0.9
        tokens.append(y[real].double())
        seen = torch.full((12,), 8.0 * number)
        memory = dict(methods.OBSERVATIONS["low-rank"].calibrate(memory, y, real, seen))
    moment = sum(y.T @ y for y in tokens) / sum(map(len, tokens))
    factor, rest = memory["factor"].double(), memory["rest"].double()[:, 0]
    assert memory["tokens"].unique().tolist() == [sum(map(len, tokens))]
    torch.testing.assert_close(factor.square().sum(1) + rest, moment.diagonal(), rtol=1e-3, atol=0.0)
    missed = torch.linalg.norm(moment - factor @ factor.T)
    least = torch.linalg.eigvalsh(moment)[: -methods.RANK].norm()
    assert missed < 1.2 * least


@pytest.mark.parametrize("width", [200, 40])  # more and fewer channels than directions
def test_a_probes_rows_move_the_factor_within_its_directions(width: int) -> None:
    torch.manual_seed(0)
    mixing = torch.randn(width, width) * torch.arange(1.0, width + 1).pow(-0.8)
    observation = methods.OBSERVATIONS["low-rank"]
    memory = {"mean-square": torch.zeros(12, width), **no_moments(width)}
    y = torch.randn(40, 12, width) @ mixing.T
    y[:, 0, 7] += 1000
    before = dict(observation.calibrate(memory, y, None, torch.zeros(12)))
    del before["mean-square"]
    rows = torch.randn(150, width) @ torch.randn(width, width) + 3 * torch.randn(150, 20) @ mixing[:, :20].T
    real = torch.rand(150) < 0.7
    moved = observation.probed(before, rows, real)

    held = before["factor"].double() @ before["factor"].double().T
    shown, share = rows[real].double(), int(real.sum()) / (methods.MEMORY + int(real.sum()))
    target = (1 - share) * held + share * shown.T @ shown / len(shown)
    directions = torch.linalg.svd(before["factor"].double(), full_matrices=False)
    basis = directions.U[:, 1e-4 * directions.S[0] < directions.S]
    image = target @ basis
    expected = image @ torch.linalg.solve(basis.T @ image, image.T)
    factor, rest = moved["factor"].double(), moved["rest"].double()[:, 0]
    assert relative(factor @ factor.T, expected) < 5e-3
    energy = target.diagonal() + (1 - share) * before["rest"].double()[:, 0]
    torch.testing.assert_close(rest, (energy - factor.square().sum(1)).clamp(min=0), rtol=1e-3, atol=1e-3)
    assert moved["tokens"].unique().tolist() == [480 + int(real.sum())]

    unmoved = observation.probed(before, rows, torch.zeros(150, dtype=torch.bool))
    assert relative(unmoved["factor"] @ unmoved["factor"].T, before["factor"] @ before["factor"].T) < 5e-3


@pytest.mark.parametrize("padding", ["none", "left"])
def test_a_prompts_probe_moves_the_factors_of_mlps(padding: str) -> None:
    model = llama(2)
    pruned = ppgraph.transform(model, ratio=0.4, method="spread", lowering="eager", **SIZES)
    ppgraph.calibrate(pruned, CALIBRATION, progress=False)
    pruned(**batch(5, 20, padding))
    graphs = len(pruned.ppgraph.graphs)
    history, inputs = pruned.ppgraph.history, batch(3, 12, padding)
    before = moments_of(history)
    pruned(**inputs)
    assert len(pruned.ppgraph.graphs) == graphs, "one graph serves any number of probed rows"
    after = moments_of(history)
    selection, dense = pruned.ppgraph.selection(), pruned.ppgraph.dense_tokens()
    seen: dict[str, Tensor] = {}
    for name in selection:
        find_exit(model, name).register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0].detach()})
        )
    with torch.no_grad(), compensated(model, pruned, selection, dense), masked(model, selection, dense=dense):
        model(**inputs)
    real = inputs.get("attention_mask", torch.ones(3, 12)).bool()
    rows = spread_rows(real, Fraction(1, 12))  # a third of the quarter that keeps all channels
    for name in selection:
        if name.endswith("self_attn"):
            assert same_moments({name: after[name]}, {name: before[name]})
            continue
        y = seen[name][tuple(zip(*rows, strict=True))]
        expected = methods.OBSERVATIONS["low-rank"].probed(before[name], y, None)
        assert relative(second_moment(after[name]), second_moment(expected)) < 1e-4
        assert relative(second_moment(before[name]), second_moment(expected)) > 1e-3
        assert torch.equal(after[name]["tokens"], before[name]["tokens"] + len(rows))


def test_where_the_history_is_frozen_and_in_steps_nothing_moves_the_factors() -> None:
    low_rank = {"observed": "low-rank", "compensation": "low-rank", "probe_choice": "spread", "lowering": "eager"}
    frozen = ppgraph.transform(llama(2), ratio=0.4, history_momentum=1.0, **low_rank, **SIZES)
    ppgraph.calibrate(frozen, CALIBRATION[:1], progress=False)
    before = moments_of(frozen.ppgraph.history)
    frozen(**batch(3, 12))
    assert same_moments(moments_of(frozen.ppgraph.history), before)

    model = llama(2)
    probing = ppgraph.transform(model, ratio=0.4, decode="probe", **low_rank, **SIZES)
    ppgraph.calibrate(probing, CALIBRATION[:1], progress=False)
    before = moments_of(probing.ppgraph.history)
    cache = probing(**batch(3, 12), use_cache=True).past_key_values
    prompted = moments_of(probing.ppgraph.history)
    assert not same_moments(prompted, before)
    probing(input_ids=torch.full((3, 1), 7), past_key_values=cache)
    assert same_moments(moments_of(probing.ppgraph.history), prompted)


def test_a_prompt_that_is_not_finite_leaves_the_factors_as_they_were() -> None:
    model = llama(2)
    pruned = ppgraph.transform(model, ratio=0.4, method="spread", lowering="eager", **SIZES)
    ppgraph.calibrate(pruned, CALIBRATION[:1], progress=False)
    before, inputs = moments_of(pruned.ppgraph.history), batch(3, 12)
    with torch.no_grad():
        model.model.embed_tokens.weight[inputs["input_ids"][0, -1]] = float("inf")
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        pruned(**inputs)
    assert same_moments(moments_of(pruned.ppgraph.history), before)


Moments = dict[str, dict[str, Tensor]]


def moments_of(history: Any) -> Moments:
    names = methods.OBSERVATIONS["low-rank"].moments
    return {site: {name: history.moment(site, name).clone() for name in names} for site in history}


def same_moments(found: Moments, expected: Moments) -> bool:
    return all(torch.equal(found[site][name], expected[site][name]) for site in expected for name in expected[site])


def second_moment(moments: Mapping[str, Tensor]) -> Tensor:
    return moments["factor"] @ moments["factor"].T + moments["rest"].squeeze(1).diag()


def calibration_inputs(model: Any, name: str, batches: Sequence[Mapping[str, Tensor]] = CALIBRATION) -> Tensor:
    """The exit linear's inputs [tokens, C] at real tokens of the calibration."""
    found: list[Tensor] = []
    handle = find_exit(model, name).register_forward_pre_hook(lambda module, args: found.append(args[0]))
    real = []
    with torch.no_grad():
        for inputs in batches:
            model(**inputs, use_cache=False)
            mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
            real.append(found.pop()[mask])
    handle.remove()
    return torch.cat(real)


def test_pieces_that_do_not_fit_each_other_raise() -> None:
    with pytest.raises(ConfigError, match="'least-squares' needs moment, which observed='mean-square' does not hold"):
        ppgraph.transform(llama(2), lowering="eager", compensation="least-squares")


def test_a_probe_alone_is_calibrated_where_its_widths_are() -> None:
    methods.register_allocation(
        "halves", lambda candidates, ratio: {c.site.name: c.site.units // 2 for c in candidates}
    )
    pruned = ppgraph.transform(llama(2), ratio=0.4, statistics="probe", allocation="halves", lowering="eager", **SIZES)
    ppgraph.calibrate(pruned, CALIBRATION[:1], progress=False)
    assert [site.kept for site in pruned.ppgraph.sites] == [32, 64]


def test_without_calibration_the_widths_are_uniform() -> None:
    pruned = ppgraph.transform(llama(2), method="flap", ratio=0.5, lowering="eager", **SIZES)
    pruned(**FOUR[0], use_cache=False)
    assert [site.kept for site in pruned.ppgraph.sites] == [32, 64]


def test_flap_does_not_decide_by_one_batch() -> None:
    pruned = ppgraph.transform(llama(2), method="flap", ratio=0.5, lowering="eager", **SIZES)
    with pytest.raises(InputError, match=r"none that differ.*calibrate on further batches"):
        ppgraph.calibrate(pruned, CALIBRATION[:1], progress=False)
    ppgraph.calibrate(pruned, CALIBRATION[1:], progress=False)
    history = pruned.ppgraph.history
    found, history.allocation = history.allocation, {}
    history.reset()
    ppgraph.calibrate(pruned, CALIBRATION, progress=False)
    assert found == history.allocation != {}


def test_new_widths_are_captured_anew() -> None:
    counts = iter((16, 24))
    methods.register_allocation("counted", lambda candidates, ratio: {candidates[-1].site.name: next(counts)})
    pruned = ppgraph.transform(llama(2), ratio=0.5, allocation="counted", lowering="eager", **SIZES)
    pruned(**FOUR[0], use_cache=False)
    kept = []
    for _ in range(2):
        ppgraph.calibrate(pruned, CALIBRATION[:1], progress=False)
        pruned(**FOUR[0], use_cache=False)
        assert [site.status for site in pruned.ppgraph.sites] == ["dense", "pruned"]
        kept.append(len(pruned.ppgraph.selection()["model.layers.0.mlp"]))
    assert kept == [16, 24]


def test_a_compiled_model_says_that_its_widths_are_old() -> None:
    torch._dynamo.reset()
    model = llama(2)
    compiled = torch.compile(model, backend="ppgraph", options={"ratio": 0.5, "allocation": "global", **SIZES})
    config = ppgraph.PruneConfig(ratio=0.5, allocation="global", **SIZES)
    runtime = pruning_of(model, config, {}).runtime
    runtime.lowering = "eager"
    with torch.no_grad():
        compiled(**FOUR[0], use_cache=False)
        ppgraph.calibrate(compiled, CALIBRATION[:1], progress=False)
        with pytest.raises(GraphError, match=r"captured before that; call torch.compiler.reset\(\)"):
            compiled(**FOUR[0], use_cache=False)
        torch.compiler.reset()
        compiled(**FOUR[0], use_cache=False)


def test_widths_and_all_statistics_are_saved(tmp_path: Path) -> None:
    model = llama(2)
    pruned, _ = flap_pair(model, 0.5, **SIZES)
    expected = pruned(**FOUR[1], use_cache=False).logits
    pruned.ppgraph.history.save(tmp_path)
    other = ppgraph.transform(model, method="flap", ratio=0.5, lowering="eager", **SIZES)
    other(**FOUR[1], use_cache=False)
    other.ppgraph.history.load(tmp_path)
    assert torch.equal(other(**FOUR[1], use_cache=False).logits, expected)
    plain = ppgraph.transform(model, ratio=0.5, lowering="eager", **SIZES)
    with pytest.raises(HistoryError, match="the saved history holds variance, mean, but observed='mean-square' needs"):
        plain.ppgraph.history.load(tmp_path)


def test_a_score_of_ones_own_chooses() -> None:
    methods.register_score(
        "peak",
        lambda f, weight_term: f.sqrt() * weight_term,
        weight_term=lambda weight: weight.abs().amax(0),
        units=lambda channels: channels.amax(1),
    )
    model = llama(2)
    pruned = ppgraph.transform(model, ratio=0.4, score="peak", statistics="history", lowering="eager", **SIZES)
    ppgraph.calibrate(pruned, CALIBRATION[:1], progress=False)
    pruned(**batch(3, 12), use_cache=False)
    for name, kept in pruned.ppgraph.selection().items():
        channel = pruned.ppgraph.history[name][:12].sum(0).sqrt() * find_exit(model, name).weight.abs().amax(0)
        block = 16 if name.endswith("self_attn") else 1
        score = channel.view(-1, block).amax(1)
        best = score.sort(descending=True).indices[: len(kept) // block].sort().values
        assert kept[::block].tolist() == (best * block).tolist()


def test_an_observation_of_ones_own_is_calibrated_and_moved() -> None:
    """The largest magnitude so far, which no mean can stand for."""
    methods.register_observation(
        "peak",
        tensors=("peak",),
        calibrate=lambda memory, y, real, seen: {"peak": torch.maximum(memory["peak"], y.abs().amax(0))},
        batch=lambda y, real: {"peak": y.abs().amax(0)},
    )
    model = llama(2)
    pruned = ppgraph.transform(model, ratio=0.4, observed="peak", history_momentum=0.5, lowering="eager", **SIZES)
    seen: dict[str, Tensor] = {}
    exit_linear = find_exit(model, "model.layers.0.mlp")
    handle = exit_linear.register_forward_pre_hook(lambda module, args: seen.update(y=args[0].abs().amax(0)))
    with torch.no_grad():
        peaks = [seen["y"] for inputs in (batch(3, 12), batch(2, 12)) if model(**inputs, use_cache=False)]
    handle.remove()
    ppgraph.calibrate(pruned, [batch(3, 12), batch(2, 12)], progress=False)
    held = pruned.ppgraph.history["model.layers.0.mlp"][:12].clone()
    torch.testing.assert_close(held, torch.maximum(*peaks))
    pruned(**batch(3, 12), use_cache=False)
    kept = pruned.ppgraph.selection()["model.layers.0.mlp"]
    moved = pruned.ppgraph.history["model.layers.0.mlp"][:12]
    dropped = torch.ones(128, dtype=torch.bool).index_fill(0, kept, False)
    assert torch.equal(moved[:, dropped], held[:, dropped])
    assert not torch.equal(moved[:, kept], held[:, kept])


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (lambda f, term: f.sum(), r"score 'mine': channels must have shape \[64\], found \[\]"),
        (lambda f, term: f * f.sum().item(), "score 'mine' can't be traced into a graph"),
        (lambda f, term: f * torch.tensor([2.0] * len(f)), "score 'mine' brings a tensor of its own"),
    ],
)
def test_a_bad_score_says_what_is_wrong(piece: Any, message: str) -> None:
    methods.register_score("mine", piece)
    pruned = ppgraph.transform(llama(2), ratio=0.4, score="mine", lowering="eager", **SIZES)
    with pytest.raises(MethodError, match=message):
        pruned(**batch(3, 12), use_cache=False)


def test_a_bad_weight_term_says_what_is_wrong() -> None:
    methods.register_score("mine", lambda f, term: f, weight_term=lambda weight: weight.sum(1))
    pruned = ppgraph.transform(llama(2), ratio=0.4, score="mine", blocks=("mlp",), lowering="eager", **SIZES)
    with pytest.raises(MethodError, match=r"weight_term must have shape \[128\], found \[64\]"):
        pruned(**batch(3, 12), use_cache=False)


def test_a_bad_observation_says_what_is_wrong() -> None:
    methods.register_observation(
        "mine",
        tensors=("a", "b"),
        calibrate=lambda memory, y, real, seen: {"a": y.sum(0)},
        batch=lambda y, real: {"a": y.sum(0)},
    )
    pruned = ppgraph.transform(llama(2), ratio=0.4, observed="mine", lowering="eager", **SIZES)
    with pytest.raises(MethodError, match=r"observation 'mine' must give \{'a': .*, 'b': .*\}, found"):
        ppgraph.calibrate(pruned, CALIBRATION[:1], progress=False)


def test_what_a_probe_makes_of_moments_must_fit_them() -> None:
    methods.register_observation(
        "mine",
        tensors=("a",),
        moments={"m": 1},
        calibrate=lambda memory, y, real, seen: {"a": y.mean(0), "m": memory["m"]},
        batch=lambda y, real: {"a": y.mean(0)},
        probed=lambda moments, y, real: {"m": y.sum(0)},
    )
    methods.register_compensation("mine", lambda weight, kept, memory: (weight[:, kept], None), needs=("m",))
    config = {"observed": "mine", "compensation": "mine", "probe_choice": "spread", "blocks": ("mlp",), **SIZES}
    pruned = ppgraph.transform(llama(2), ratio=0.4, lowering="eager", **config)
    with pytest.raises(MethodError, match=r"observation 'mine' must give \{'m': \[128, 1\]\}, found \{'m': \[128\]\}"):
        pruned(**batch(3, 12), use_cache=False)


def test_a_bad_compensation_says_what_is_wrong() -> None:
    methods.register_compensation("mine", lambda weight, kept, memory: (weight[:, kept], weight.sum(0)))
    pruned = ppgraph.transform(llama(2), ratio=0.4, compensation="mine", blocks=("mlp",), lowering="eager", **SIZES)
    with pytest.raises(
        MethodError, match=r"compensation 'mine' must give a weight \[64, 80\] .* found \[\[64, 80\], \[128\]\]"
    ):
        pruned(**batch(3, 12), use_cache=False)


@pytest.mark.parametrize("name", ["ppsp", "", "two words"])
def test_names_are_checked(name: str) -> None:
    with pytest.raises(ConfigError, match=r"registered already|expected a name such as"):
        methods.register_score(name, lambda f, term: f)


def test_expected_losses_are_those_of_gates_on_the_channels() -> None:
    """The same by another way: the gradient at a factor on each channel and token, summed over what goes."""
    model, ids = llama(2), batch(2, 9)["input_ids"]
    pruned = ppgraph.transform(model, ratio=0.4, allocation="least-loss", lowering="eager", **SIZES)
    sites = [site for site in pruned.ppgraph.sites if site.candidate]
    orders = {site.name: (site, torch.arange(site.units), 8 if site.kind == "mlp" else 1) for site in sites}
    samples = [{"input_ids": row[None]} for row in ids]
    found = expected_losses(model, model, orders, samples, progress=False)
    for site in sites:
        expected = torch.zeros(site.units // orders[site.name][2] + 1)
        for row in ids:
            gates = torch.ones(len(row), site.width, requires_grad=True)
            handle = find_exit(model, site.name).register_forward_pre_hook(
                lambda module, args, gates=gates: (args[0] * gates,)
            )
            logits = model(row[None]).logits[0]
            handle.remove()
            functional.cross_entropy(logits[:-1], row[1:], reduction="sum").backward()
            assert gates.grad is not None
            units = gates.grad.view(len(row), site.units, -1).sum(2)
            for level in range(1, len(expected)):
                gone = units[:, : level * orders[site.name][2]].sum(1)
                expected[level] += 0.5 * gone.square().sum() / (2 * 8)
        torch.testing.assert_close(found[site.name], expected, rtol=1e-4, atol=1e-7)
        model.zero_grad()


def candidate(name: str, losses: list[float], macs: int) -> methods.Candidate:
    units = len(losses) - 1
    site = Site(name, "mlp", 0, width=units, units=units, unit_macs=macs)
    return methods.Candidate(site, torch.zeros(units), {"g": torch.zeros(1, units)}, 1, torch.tensor(losses))


@given(
    st.lists(st.lists(st.integers(0, 32).map(lambda n: n / 8), min_size=3, max_size=3), min_size=2, max_size=3),
    st.sampled_from([0.15, 0.25, 0.35, 0.5, 0.65, 0.85]),
)
def test_least_loss_is_the_best_there_is(slopes: list[list[float]], ratio: float) -> None:
    """With convex curves and units of one price the best choice can be found by trying all."""
    curves = [[0.0, *itertools.accumulate(sorted(steps))] for steps in slopes]
    candidates = [candidate(str(number), curve, 10) for number, curve in enumerate(curves)]
    kept = methods.ALLOCATIONS["least-loss"].allocate(candidates, ratio)  # type: ignore[union-attr]
    gone = [3 - kept[str(number)] for number in range(len(curves))]
    most = int(ratio * 3 * len(curves) + 1e-9)
    assert sum(gone) == most
    best = min(
        sum(curve[count] for curve, count in zip(curves, choice, strict=True))
        for choice in itertools.product(range(4), repeat=len(curves))
        if sum(choice) == most
    )
    assert sum(curve[count] for curve, count in zip(curves, gone, strict=True)) == pytest.approx(best, abs=1e-5)


def test_least_loss_takes_whole_steps_where_the_first_units_cost_most() -> None:
    found = methods.ALLOCATIONS["least-loss"].allocate(  # type: ignore[union-attr]
        [candidate("a", [0, 5, 5.1, 5.2, 5.3], 1), candidate("b", [0, 2, 4, 6, 8], 1)], 0.5
    )
    assert found == {"a": 0, "b": 4}


def heads_and_channels(layers: int, positions: int = 1) -> tuple[list[methods.Candidate], list[methods.Candidate]]:
    """Of each layer 32 heads, and 100 channels that cost half of a head."""
    memory = {"g": torch.zeros(positions, 0)}
    heads = [Site(f"heads.{n}", "attention", n, width=128, units=32, unit_macs=100) for n in range(layers)]
    channels = [Site(f"channels.{n}", "mlp", n, width=100, units=100, unit_macs=50) for n in range(layers)]
    first, second = ([methods.Candidate(site, torch.zeros(0), memory) for site in sites] for sites in (heads, channels))
    return first, second


@pytest.mark.parametrize(("ratio", "heads_kept"), [(0.1, 32), (0.3, 32), (0.4, 32 - 4), (0.7, 32 - 12), (0.95, 0)])
def test_spare_heads_takes_as_many_multiply_adds_and_a_third_of_the_heads(ratio: float, heads_kept: int) -> None:
    """Fewer than an eighth of the heads are left; as many as are missing go where channels can lose no more."""
    heads, channels = heads_and_channels(2)
    kept = methods.ALLOCATIONS["spare-heads"].allocate([*heads, *channels], ratio)  # type: ignore[union-attr]
    sites = [each.site for each in (*heads, *channels)]
    saved = sum((site.units - kept[site.name]) * site.unit_macs for site in sites)
    missing = ratio * 2 * (32 * 100 + 100 * 50) - saved
    assert 0 <= missing < 2 * 50, "less than a channel of each layer"
    assert {kept[each.site.name] for each in heads} == {heads_kept}
    assert len({kept[each.site.name] for each in channels}) == 1


def test_spare_heads_of_one_kind_of_block_is_uniform() -> None:
    for number, candidates in enumerate(heads_and_channels(2)):
        kept = methods.ALLOCATIONS["spare-heads"].allocate(candidates, 0.4)  # type: ignore[union-attr]
        assert set(kept.values()) == {(20, 60)[number]}


def test_spare_heads_does_not_depend_on_how_long_calibrations_samples_were() -> None:
    def kept(positions: int) -> Any:
        heads, channels = heads_and_channels(2, positions)
        return methods.ALLOCATIONS["spare-heads"].allocate([*heads, *channels], 0.5)  # type: ignore[union-attr]

    assert kept(1) == kept(2048)


def test_least_loss_decides_what_a_calibrated_model_keeps() -> None:
    model = llama(2, layers=2)
    pruned = ppgraph.transform(model, ratio=0.4, allocation="least-loss", lowering="eager", **SIZES)
    ppgraph.calibrate(pruned, CALIBRATION, progress=False)
    logits = pruned(**FOUR[0], use_cache=False).logits
    sites = {site.name: site for site in pruned.ppgraph.sites if site.candidate}
    macs = {
        name: methods.Candidate(site, torch.zeros(0), {"g": torch.zeros(14, 0)}).unit_macs
        for name, site in sites.items()
    }
    whole = sum(site.units * macs[name] for name, site in sites.items())
    kept = sum(site.kept_units * macs[name] for name, site in sites.items())
    assert 0.55 <= kept / whole <= 0.7  # r' is 0.4
    assert relative(logits, masked_dense_logits(model, pruned.ppgraph.selection(), **FOUR[0])) < 1e-5


def test_losses_are_estimated_on_the_first_samples_one_by_one() -> None:
    ids = torch.arange(2 * 3 * (LOSS_TOKENS // 4)).view(2, 3, -1)
    masked, words = {"input_ids": ids[0], "attention_mask": ids[0] >= 0}, {"inputs_embeds": torch.zeros(1, 2, 4)}
    samples = samples_for_losses([words, masked, {"input_ids": ids[1]}])
    assert [sample["input_ids"].tolist() for sample in samples] == [[row] for row in ids.flatten(0, 1)[:4].tolist()]
    assert [set(sample) for sample in samples] == [{*masked}, {*masked}, {*masked}, {"input_ids"}]


@pytest.mark.parametrize("missing", ["samples", "exit", "embedding"])
def test_losses_that_cannot_be_estimated_are_refused(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(2)
    model.spare = torch.nn.Linear(4, 4)
    exit_linear = "spare.weight" if missing == "exit" else "model.layers.0.mlp.down_proj.weight"
    site = Site("mlp", "mlp", 0, width=4, units=4, exit=(exit_linear,))
    samples = [] if missing == "samples" else [{"input_ids": torch.ones(1, 3, dtype=torch.long)}]
    if missing == "embedding":
        monkeypatch.setattr(type(model), "get_input_embeddings", Mock(side_effect=NotImplementedError))
    reasons = {
        "samples": "needs calibration batches with input_ids, found none",
        "exit": "mlp: its exit linear does not run as a module",
        "embedding": "LlamaForCausalLM doesn't name; give it a get_input_embeddings",
    }
    with pytest.raises(PPGraphError, match=reasons[missing]):
        expected_losses(model, model.forward, {"mlp": (site, torch.arange(4), 1)}, samples, progress=False)
    assert not any(module._forward_hooks for module in model.modules()), "a hook was left behind"
