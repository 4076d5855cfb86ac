"""Sanity of the judge itself: equal to dense and masked dense, padding, the formulas on numbers by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.reference import (
    Reference,
    Result,
    fuse,
    masked_dense_logits,
    ppsp,
    probed_places,
    share,
    top,
    wanda_sp,
)

LENGTHS = (24, 17, 9, 24, 13)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny products: on a busy machine, threads would take minutes over them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(seed: int = 0, layers: int = 4, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_attention_heads": 8,
        "vocab_size": 97,
    }
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **{**shape, **config})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # larger than by default, biases and norms too: attention gets sharp
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


SHAPES = {
    "mha": {"num_key_value_heads": 8},
    "gqa": {"num_key_value_heads": 2},
    "mqa-bias": {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    "head-size": {"num_key_value_heads": 4, "head_dim": 12},
}
SIDES = ("none", "right", "left")
METHODS: dict[str, dict[str, Any]] = {
    "pp": {},
    "full-batch": {"statistics": "probe", "probe_batch": 1.0, "probe_tokens": 1.0},
    "wanda-sp": {"statistics": "history", "score": "wanda-sp"},
}


def batch(side: str, lengths: tuple[int, ...] = LENGTHS, width: int = 29, seed: int = 1) -> dict[str, Tensor]:
    """Texts of these lengths, padded on a side to `width`; "none" cuts to the longest, all of that length."""
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(0, 97, (max(lengths),), generator=generator) for _ in lengths]
    if side == "none":
        return {"input_ids": torch.stack(texts)}
    ids = torch.full((len(lengths), width), 5)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for b, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        place = slice(0, length) if side == "right" else slice(width - length, width)
        ids[b, place], mask[b, place] = text[:length], 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def real(values: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """The rows of real tokens, sample by sample."""
    return values.flatten(0, 1) if "attention_mask" not in inputs else values[inputs["attention_mask"].bool()]


def distance(value: Tensor, wanted: Tensor) -> float:
    return float((value.double() - wanted.double()).norm() / wanted.double().norm())


def assert_same_selection(one: Result, other: Result) -> None:
    assert one.selection.keys() == other.selection.keys()
    for site, kept in one.selection.items():
        assert torch.equal(kept, other.selection[site]), site


# ---- dense ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_ratio_zero_is_the_dense_model(shape: str, side: str) -> None:
    model, inputs = tiny(**SHAPES[shape]), batch(side)
    result = Reference(model, ratio=0)(**inputs)
    with torch.no_grad():
        dense = model(**inputs).logits
    assert result.selection == {}
    assert distance(real(result.logits, inputs), real(dense, inputs)) < 1e-6


def test_without_position_ids_columns_are_positions_as_in_the_dense_model() -> None:
    model, inputs = tiny(), batch("left")
    del inputs["position_ids"]
    result = Reference(model, ratio=0)(**inputs)
    with torch.no_grad():
        dense = model(**inputs).logits
    assert distance(real(result.logits, inputs), real(dense, inputs)) < 1e-6


def test_mask_with_holes_is_the_dense_model() -> None:
    model, inputs = tiny(), batch("right")
    inputs["attention_mask"][0, 3:6] = 0
    with torch.no_grad():
        dense = model(**inputs).logits
    assert distance(real(Reference(model, ratio=0)(**inputs).logits, inputs), real(dense, inputs)) < 1e-6


# ---- pruned --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_the_masked_dense_model(shape: str, options: dict[str, Any]) -> None:
    model = tiny(**SHAPES[shape])
    reference = Reference(model, ratio=0.4, skip_layers=1, width_multiple=16, **options)
    reference.calibrate([batch("left", seed=5), batch("none", seed=6)])
    for seed, side in enumerate(("right", "none", "left")):
        inputs = batch(side, seed=seed)
        result = reference(**inputs)
        assert len(result.selection) == 6
        masked = masked_dense_logits(model, result.selection, **inputs)
        assert distance(real(result.logits, inputs), real(masked, inputs)) < 1e-5
        with torch.no_grad():
            dense = model(**inputs).logits
        assert distance(real(dense, inputs), real(masked, inputs)) > 0.05  # pruning does something


def test_kept_widths_and_sites() -> None:
    model = tiny(layers=5, num_key_value_heads=2)
    head = 8
    result = Reference(model, ratio=0.4, skip_layers=2, width_multiple=32)(**batch("none"))
    sites = [f"model.layers.{layer}.{kind}" for layer in (2, 3, 4) for kind in ("self_attn", "mlp")]
    assert list(result.selection) == sites
    for site, kept in result.selection.items():
        assert torch.equal(kept, kept.sort().values)
        if site.endswith("mlp"):
            assert len(kept) == 64  # r' = round(0.4 * 5 / 3, 2) = 0.67; 160 - 107 = 53, up to 64
        else:
            assert len(kept) == 3 * head  # 8 - int(5.36)
            assert torch.equal(kept.view(-1, head), kept.view(-1, head)[:, :1] + torch.arange(head))
    alike = Reference(model, ratio=0.4, skip_layers=2, rescale_ratio=False, blocks=("mlp",), width_multiple=7)
    kept = alike(**batch("none")).selection
    assert {site: len(k) for site, k in kept.items()} == {s: 98 for s in sites if s.endswith("mlp")}  # 96, up to 98
    exact = Reference(model, ratio=0.4, skip_layers=2, blocks=("mlp",), width_multiple=1)(**batch("none"))
    assert len(exact.selection["model.layers.4.mlp"]) == 53  # of 0.67, not of 2/3
    # Rounding up to the whole width leaves the site dense: no selection, no history.
    dense = Reference(model, ratio=0.1, skip_layers=0, rescale_ratio=False)
    assert dense(**batch("none")).selection == {} and dense.history == {}
    with pytest.raises(ValueError, match="becomes"):
        Reference(model, ratio=0.5, skip_layers=3)


@pytest.mark.parametrize("shape", ["mha", "gqa"])
def test_padding_changes_nothing(shape: str) -> None:
    model = tiny(**SHAPES[shape])
    first: list[tuple[Result, Tensor]] = []
    histories = []
    for side, width in (("right", 24), ("right", 31), ("left", 24), ("left", 31)):
        reference = Reference(model, ratio=0.4, skip_layers=1, width_multiple=16, probe_batch=0.4)
        reference.calibrate([batch(side, width=width, seed=9), batch(side, (3, 30), 31, seed=10)])
        for step in range(3):
            lengths = LENGTHS[step:]
            inputs = batch(side, lengths, width, seed=step)
            result = reference(**inputs)
            if side == "right" and width == 24:
                first.append((result, real(result.logits, inputs)))
            assert_same_selection(result, first[step][0])
            assert distance(real(result.logits, inputs), first[step][1]) < 1e-5
        histories.append(reference.history)
    for history in histories[1:]:
        for site, g in history.items():
            assert g.shape[0] == 30 and distance(g, histories[0][site]) < 1e-5


def test_unpadded_equals_padded() -> None:
    model, lengths = tiny(), (24, 24, 24)
    options: dict[str, Any] = {"ratio": 0.4, "skip_layers": 1, "width_multiple": 16}
    plain = Reference(model, **options)(**batch("none", lengths))
    for side in ("right", "left"):
        inputs = batch(side, lengths, 37)
        padded = Reference(model, **options)(**inputs)
        assert_same_selection(padded, plain)
        assert distance(real(padded.logits, inputs), plain.logits.flatten(0, 1)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, inputs = tiny().to(dtype), batch("left")
    reference = Reference(model, ratio=0.4, skip_layers=1, width_multiple=16)
    result = reference(**inputs)
    assert result.logits.dtype == dtype and result.logits.isfinite().all()
    assert all(g.dtype == torch.float32 for g in reference.history.values())
    masked = masked_dense_logits(model, result.selection, **inputs)
    assert distance(real(result.logits, inputs), real(masked, inputs)) < (0.05 if dtype is torch.bfloat16 else 0.01)


# ---- statistics: against the activations of the transformers model itself ------------------------


def exit_inputs(model: LlamaForCausalLM, inputs: dict[str, Tensor], selection: dict[str, Tensor]) -> dict[str, Tensor]:
    """What enters each exit linear of the dense model whose dropped channels are zeroed."""
    seen: dict[str, Tensor] = {}
    handles = []
    for layer, module in enumerate(model.model.layers):
        for site, linear in (("self_attn", module.self_attn.o_proj), ("mlp", module.mlp.down_proj)):
            name = f"model.layers.{layer}.{site}"
            handles.append(linear.register_forward_pre_hook(lambda _, a, name=name: seen.__setitem__(name, a[0])))
    masked_dense_logits(model, selection, **inputs)
    for handle in handles:
        handle.remove()
    return seen


def test_calibration_is_a_mean_over_samples_with_counts_per_position() -> None:
    model = tiny()
    reference = Reference(model, ratio=0.4, skip_layers=1)
    batches = [
        batch("left", (4, 7), 8, seed=1),
        batch("right", (9, 2, 5), 9, seed=2),
        batch("none", (6,), seed=3),
    ]
    reference.calibrate(batches)
    squares: dict[str, list[Tensor]] = {}
    for inputs in batches:
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        for site, y in exit_inputs(model, inputs, {}).items():
            squares.setdefault(site, []).extend(y[b, mask[b]].square() for b in range(len(y)))
    assert len(reference.history) == 6
    for site, g in reference.history.items():
        assert len(g) == 9
        for j in range(9):
            at = [s[j] for s in squares[site] if len(s) > j]
            assert distance(g[j], sum(at[1:], at[0]) / len(at)) < 1e-5


def test_history_moves_on_kept_channels_and_real_positions_only() -> None:
    model = tiny()
    reference = Reference(model, ratio=0.4, skip_layers=1, history_momentum=0.9)
    reference.calibrate([batch("right", (5, 9), 9)])
    before = {site: g.clone() for site, g in reference.history.items()}
    inputs = batch("left", (4, 6), 20, seed=4)
    result = reference(**inputs)
    ys = exit_inputs(model, inputs, {})  # of the same pruned model: y of a kept channel is read before it is zeroed
    ys = exit_inputs(model, inputs, result.selection)
    for site, g in reference.history.items():
        kept = result.selection[site]
        wanted = before[site].clone()
        for j in range(6):
            at = [ys[site][b, 20 - n + j, kept].square() for b, n in enumerate((4, 6)) if j < n]
            wanted[j, kept] = 0.9 * wanted[j, kept] + 0.1 * sum(at[1:], at[0]) / len(at)
        assert distance(g, wanted) < 1e-5
        dropped = [c for c in range(g.shape[1]) if c not in kept.tolist()]
        assert torch.equal(g[:, dropped], before[site][:, dropped]) and torch.equal(g[6:], before[site][6:])
    # A longer batch makes it grow; what it has not seen is 0, and the values kept before stay.
    result = reference(**batch("none", (12,), seed=5))
    for site, g in reference.history.items():
        dropped = [c for c in range(g.shape[1]) if c not in result.selection[site].tolist()]
        assert len(g) == 12 and not g[9:, dropped].any() and g[9:, result.selection[site]].any()


def test_static_statistics() -> None:
    model, inputs = tiny(), batch("none")
    probe = Reference(model, ratio=0.4, skip_layers=1, statistics="probe")
    probe.calibrate([inputs])
    probe(**inputs)
    assert probe.history == {}
    static = Reference(model, ratio=0.4, skip_layers=1, statistics="history", score="wanda-sp")
    static.calibrate([inputs])
    before = {site: g.clone() for site, g in static.history.items()}
    one, other = static(**inputs), static(**batch("none", seed=8))
    assert_same_selection(one, other)
    assert all(torch.equal(g, before[site]) for site, g in static.history.items())


def test_first_probe_from_the_dense_models_own_activations() -> None:
    """The first pruned site: all is probed, there is no history, so f is almost the sum of mean squares."""
    model, inputs = tiny(), batch("right")
    reference = Reference(model, ratio=0.5, skip_layers=2, rescale_ratio=False, probe_batch=1.0, probe_tokens=1.0)
    kept = reference(**inputs).selection["model.layers.2.self_attn"]
    y = exit_inputs(model, inputs, {})["model.layers.2.self_attn"] * inputs["attention_mask"][:, :, None]
    p = y[:, :24].square().sum(0) / inputs["attention_mask"][:, :24].sum(0)[:, None]
    f = (p * p / (p + 1e-6)).sum(0)
    weight = model.model.layers[2].self_attn.o_proj.weight.detach()
    scores = [float(torch.linalg.matrix_norm(f[h : h + 8] * weight[:, h : h + 8] ** 2)) for h in range(0, 64, 8)]
    heads = sorted(sorted(range(8), key=lambda h: -scores[h])[:4])
    assert kept.tolist() == [8 * h + i for h in heads for i in range(8)]


@pytest.mark.parametrize("calibrated", [False, True])
def test_statistic_is_the_block_on_the_probed_tokens_alone_fused_with_the_history(calibrated: bool) -> None:
    """The probe is transformers' own attention on the probed tokens alone, at their own positions."""
    site, model = "model.layers.0.self_attn", tiny(num_key_value_heads=2)
    inputs, short = batch("left", (20, 15, 18), 22), batch("right", (16, 9), 16, seed=3)
    reference = Reference(model, ratio=0.5, skip_layers=0, blocks=("attention",), probe_batch=0.5, probe_tokens=0.6)
    history = torch.zeros(20, 64)  # positions 16 to 19 are never seen
    if calibrated:
        reference.calibrate([short])
        y = exit_inputs(model, short, {})[site]
        history[:9], history[9:16] = y[:, :9].square().mean(0), y[0, 9:].square()
    statistics: list[Tensor] = []
    reference.score = lambda f, w, size: statistics.append(f) or ppsp(f, w, size)  # type: ignore[func-returns-value]
    kept = reference(**inputs).selection[site]

    ids = [row[mask.bool()] for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    embedding = model.model.embed_tokens.weight.detach()
    norms = torch.zeros(3, 20)
    for b, text in enumerate(ids):
        norms[b, : len(text)] = embedding[text].norm(dim=1)
    tokens = sorted(norms.norm(dim=0).topk(12).indices.tolist())
    assert tokens != list(range(12))
    total, count = torch.zeros(12, 64), torch.zeros(12, 1)
    for b in norms[:, tokens].norm(dim=1).topk(2).indices.tolist():
        probed = [j for j in tokens if j < len(ids[b])]
        text = {"input_ids": ids[b][probed][None], "position_ids": torch.tensor([probed])}
        text["attention_mask"] = torch.ones(1, len(probed), dtype=torch.long)  # without it: taken for packed texts
        total[: len(probed)] += exit_inputs(model, text, {})[site][0].square()
        count[: len(probed)] += 1
    p, g = total / count.clamp(min=1), history[tokens]
    a = p / (p + g + 1e-6)
    f = (a * p + (1 - a) * g).sum(0)
    assert distance(statistics[0], f) < 1e-5
    heads = (f * model.model.layers[0].self_attn.o_proj.weight.detach() ** 2).unflatten(1, (8, 8)).norm(dim=(0, 2))
    assert kept.view(-1, 8)[:, 0].div(8, rounding_mode="floor").tolist() == top(heads, 4).tolist()


# ---- the formulas, by hand -----------------------------------------------------------------------


def test_share_and_top() -> None:
    assert [share(20, 0.05), share(21, 0.05), share(10, 0.1), share(30, 0.1), share(1, 0.05)] == [
        1,
        2,
        1,
        3,
        1,
    ]
    assert share(3, 0.7) == 3 and share(70, 0.7) == 49 and share(100, 0.07) == 7  # 100 * 0.07 > 7 as floats
    assert top(torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0]), 4).tolist() == [1, 2, 3, 4]
    assert top(torch.zeros(5000), 4).tolist() == [0, 1, 2, 3]


def test_places_by_hand() -> None:
    n = torch.tensor([[1.0, 5.0, 2.0, 9.0], [2.0, 5.0, 1.0, 9.0], [2.0, 1.0, 4.0, 9.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    # norms over samples: 3, sqrt 51, sqrt 20 (the 1 is padding): keep 1 and 2, 1 becomes 0 (2 <= 10)
    samples, tokens = probed_places(n, mask, 0.5, 0.5)
    assert tokens.tolist() == [0, 2]
    assert samples.tolist() == [0, 2]  # over tokens 0 and 2: sqrt 5, 2, sqrt 20
    # Many tokens: nothing is replaced. 22 positions, half of them: the 11 last, and the louder sample.
    n = torch.arange(22.0).expand(2, 22) + torch.tensor([[1.0], [2.0]])
    samples, tokens = probed_places(n, torch.ones(2, 22, dtype=torch.bool), 0.05, 0.5)
    assert tokens.tolist() == list(range(11, 22)) and samples.tolist() == [1]
    # One token only: S' cannot be 2.
    assert probed_places(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), 0.05, 0.5)[1].tolist() == [0]


def test_fusion_by_hand() -> None:
    p, g = torch.tensor([[3.0, 0.0], [1.0, 2.0]]), torch.tensor([[1.0, 4.0], [0.0, 2.0]])
    # channel 0: a = 3/4 -> 3/4*3 + 1/4*1 = 2.5;  a = 1 -> 1.     channel 1: a = 0 -> 4;  a = 1/2 -> 2.
    assert torch.allclose(fuse(p, g), torch.tensor([3.5, 6.0]), atol=1e-5)
    assert fuse(torch.zeros(1, 1), torch.zeros(1, 1)).item() == 0  # the 1e-6 keeps it finite
    assert math.isclose(fuse(torch.full((1, 1), 1e-6), torch.zeros(1, 1)).item(), 0.5e-6, rel_tol=1e-5)


def test_scores_by_hand() -> None:
    weight, f = (
        torch.tensor([[1.0, 2.0, 0.0, -1.0], [-1.0, 0.0, 3.0, 1.0]]),
        torch.tensor([4.0, 1.0, 9.0, 0.0]),
    )
    # sum W^4: 2, 16, 81, 2 -> roots sqrt 2, 4, 9, sqrt 2
    assert torch.allclose(ppsp(f, weight, 1), torch.tensor([4 * math.sqrt(2), 4.0, 81.0, 0.0]))
    assert torch.allclose(ppsp(f, weight, 2), torch.tensor([math.sqrt(32 + 16), 81.0]))
    # sum |W|: 2, 2, 3, 2
    assert torch.allclose(wanda_sp(f, weight, 1), torch.tensor([4.0, 2.0, 9.0, 0.0]))
    assert torch.allclose(wanda_sp(f, weight, 2), torch.tensor([6.0, 9.0]))
