"""`PruneConfig` and the width rule."""

from __future__ import annotations

import dataclasses
import json
import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppgraph import config as config_module
from ppgraph.config import PruneConfig, dense_share, kept_by_others, kept_channels, kept_heads, layer_ratio
from ppgraph.errors import ConfigError, PPGraphError


def test_defaults_are_those_of_the_interface() -> None:
    assert PruneConfig().to_dict() == {
        "ratio": 0.4,
        "method": "pp",
        "score": "ppsp",
        "statistics": "fused",
        "probe_batch": 0.05,
        "probe_tokens": 0.5,
        "probe_choice": "largest",
        "dense_tokens": 0.0,
        "history_momentum": 0.99,
        "skip_layers": 3,
        "rescale_ratio": True,
        "width_multiple": 64,
        "blocks": ["attention", "mlp"],
        "dense_below": 0,
        "history_below": 0,
        "decode": "reuse",
        "strict": False,
        "observed": "mean-square",
        "allocation": "uniform",
        "compensation": "none",
    }


def test_is_frozen_and_hashable() -> None:
    config = PruneConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.ratio = 0.2  # type: ignore[misc]
    assert {config: "found"}[PruneConfig(ratio=0.4)] == "found"
    assert hash(PruneConfig(blocks=["mlp"])) == hash(PruneConfig(blocks=("mlp",)))  # type: ignore[arg-type]


BAD_VALUES: list[tuple[str, Any, str]] = [
    ("ratio", 1.0, r"ratio must be in \[0, 1\), found 1.0"),
    ("ratio", -0.1, "found -0.1"),
    ("ratio", math.nan, "found nan"),
    ("ratio", math.inf, "found inf"),
    ("ratio", 10**400, "must be in"),
    ("ratio", True, "found True"),
    ("ratio", "0.4", r"found '0.4' \(str\)"),
    ("ratio", None, "found None"),
    ("method", "magic", "one of flap, full-batch, pp, spread, wanda-sp"),
    ("method", ["pp"], r"found \['pp'\] \(list\)"),
    ("method", None, "found None"),
    ("score", "magic", "one of flap, ppsp, wanda-sp"),
    ("score", 1, r"found 1 \(int\)"),
    ("statistics", "both", "one of fused, history, probe"),
    ("probe_choice", "random", "one of largest, spread"),
    ("dense_tokens", 1.0, r"in \[0, 1\), found 1.0"),
    ("probe_batch", 0, r"in \(0, 1\], found 0"),
    ("probe_batch", 1.5, "found 1.5"),
    ("probe_batch", math.nan, "found nan"),
    ("probe_tokens", 0.0, "found 0.0"),
    ("probe_tokens", False, "found False"),
    ("history_momentum", 1.01, r"in \[0, 1\], found 1.01"),
    ("history_momentum", -0.01, "found -0.01"),
    ("skip_layers", -1, "at least 0, found -1"),
    ("dense_below", -1, "at least 0, found -1"),
    ("dense_below", 0.5, r"found 0.5 \(float\)"),
    ("history_below", -1, "at least 0, found -1"),
    ("history_below", True, "found True"),
    ("skip_layers", 1.0, r"found 1.0 \(float\)"),
    ("skip_layers", True, "found True"),
    ("rescale_ratio", 1, r"True or False, found 1 \(int\)"),
    ("width_multiple", 0, "at least 1, found 0"),
    ("width_multiple", "64", "found '64'"),
    ("blocks", "mlp", "tuple such as"),
    ("blocks", None, "found None"),
    ("blocks", (), "is empty"),
    ("blocks", ("mlp", "norm"), "found 'norm'"),
    ("decode", "never", "one of dense, probe, reuse"),
    ("strict", "yes", "found 'yes'"),
]


@pytest.mark.parametrize(("field", "value", "message"), BAD_VALUES)
def test_bad_values_raise_at_construction(field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        PruneConfig(**{field: value})  # type: ignore[arg-type]
    assert str(raised.value).startswith(field)
    assert isinstance(raised.value, ValueError)
    assert isinstance(raised.value, PPGraphError)


@pytest.mark.parametrize("ratio", [0, Fraction(1, 4)])
def test_numbers_are_stored_as_floats(ratio: float) -> None:
    assert type(PruneConfig(ratio=ratio).ratio) is float


def test_blocks_have_one_order() -> None:
    assert PruneConfig(blocks=("mlp", "attention", "mlp")).blocks == ("attention", "mlp")


@pytest.mark.parametrize("others", [{}, {"probe_choice": "spread", "statistics": "history"}], ids=str)
def test_dense_tokens_need_tokens_that_are_probed_one_by_one(others: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"dense_tokens=0.3 needs .* expected probe_choice='spread' and statistics="):
        PruneConfig(dense_tokens=0.3, **others)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"statistics": "probe"}, r"history_below=50 needs statistics='fused' or 'history', found 'probe'"),
        ({"method": "full-batch"}, r"history_below=50 needs statistics='fused' or 'history', found 'probe'"),
        ({"dense_below": 50}, r"history_below=50 never applies, .* dense_below=50 tokens run dense"),
    ],
)
def test_history_below_needs_a_history_and_batches_that_do_not_run_dense(others: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PruneConfig(history_below=50, **others)


@pytest.mark.parametrize(
    ("kept", "dense", "multiple", "expected"),
    [(832, 0.25, 64, 576), (832, 0.25, 1, 597), (832, 0.5, 64, 128), (832, 0.6, 64, 64), (40, 0.25, 64, 40)],
)
def test_other_tokens_keep_so_many_channels_that_the_average_is_kept(
    kept: int, dense: float, multiple: int, expected: int
) -> None:
    assert kept_by_others(kept, 1536, Fraction(str(dense)), multiple) == expected


@pytest.mark.parametrize(
    ("kept", "dense", "expected"),
    [
        (832, 0.25, Fraction(1, 4)),
        (512, 0.25, Fraction(1, 6)),  # the others keep 307, 0.6 of 512
        (512, 0.1, Fraction(1, 10)),
        (128, 0.25, Fraction(1, 12)),  # all of which are probed
    ],
)
def test_fewer_tokens_keep_all_channels_where_the_others_would_keep_too_few(
    kept: int, dense: float, expected: Fraction
) -> None:
    assert dense_share(kept, 1536, dense) == expected


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("pp", ("ppsp", "fused", 0.05, 0.5, 0.99)),
        ("full-batch", ("ppsp", "probe", 1.0, 1.0, 1.0)),
        ("wanda-sp", ("wanda-sp", "history", 0.05, 0.5, 1.0)),
        ("flap", ("flap", "history", 0.05, 0.5, 1.0)),
        ("spread", ("ppsp", "fused", 0.05, 0.5, 0.99)),
    ],
)
def test_method_fills_what_is_left_out(method: str, expected: tuple[object, ...]) -> None:
    config = PruneConfig(method=method)
    found = (
        config.score,
        config.statistics,
        config.probe_batch,
        config.probe_tokens,
        config.history_momentum,
    )
    assert found == expected


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        ("full-batch", "probe_batch", 0.05),
        ("full-batch", "statistics", "fused"),
        ("wanda-sp", "score", "ppsp"),
        ("flap", "history_momentum", 0.99),
    ],
)
def test_contradicting_a_method_raises(method: str, field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"method '{method}' means {field}=.*found {value!r}.*leave {field} out"):
        PruneConfig(method=method, **{field: value})  # type: ignore[arg-type]


def test_pp_may_be_varied() -> None:
    config = PruneConfig(score="flap", statistics="probe", probe_batch=1, history_momentum=0.5)
    assert (config.method, config.score, config.statistics) == ("pp", "flap", "probe")


def test_registered_score_is_accepted() -> None:
    with pytest.raises(ConfigError, match="score"):
        PruneConfig(score="mine")
    config_module.KNOWN_SCORES.add("mine")
    try:
        assert PruneConfig(score="mine").score == "mine"
    finally:
        config_module.KNOWN_SCORES.discard("mine")


CONFIGS = st.one_of(
    st.builds(
        PruneConfig,
        ratio=st.floats(0, 1, exclude_max=True),
        score=st.sampled_from(["ppsp", "wanda-sp", "flap"]),
        statistics=st.sampled_from(config_module.STATISTICS),
        probe_batch=st.floats(0, 1, exclude_min=True),
        history_momentum=st.floats(0, 1),
        skip_layers=st.integers(0, 100),
        rescale_ratio=st.booleans(),
        blocks=st.sets(st.sampled_from(config_module.BLOCKS), min_size=1),
        decode=st.sampled_from(config_module.DECODE_MODES),
    ),
    st.builds(PruneConfig, method=st.sampled_from(["pp", "full-batch", "wanda-sp", "flap"])),
)


@given(CONFIGS)
def test_dict_round_trip_survives_json(config: PruneConfig) -> None:
    values = config.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert PruneConfig.from_dict(values) == config


def test_from_dict_fills_absent_fields() -> None:
    assert PruneConfig.from_dict({"ratio": 0.2}) == PruneConfig(ratio=0.2)


@pytest.mark.parametrize(
    ("key", "hint"),
    [("ratoi", "did you mean 'ratio'"), ("probe_token", "'probe_tokens'"), ("zzz", "known: ratio, method")],
)
def test_unknown_fields_raise_and_name_the_nearest(key: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"no field '{key}'; .*{hint}"):
        PruneConfig.from_dict({key: 1})
    with pytest.raises(ConfigError, match=hint):
        PruneConfig().replace(**{key: 1})


def test_from_dict_wants_a_mapping() -> None:
    with pytest.raises(ConfigError, match="expected a mapping"):
        PruneConfig.from_dict([("ratio", 0.4)])  # type: ignore[arg-type]


@given(CONFIGS)
def test_replacing_nothing_changes_nothing(config: PruneConfig) -> None:
    assert config.replace() == config


@given(st.sampled_from(["pp", "full-batch", "wanda-sp", "flap"]), st.sampled_from(["pp", "full-batch", "flap"]))
def test_replaced_method_brings_its_own_values(old: str, new: str) -> None:
    assert PruneConfig(method=old, ratio=0.2).replace(method=new) == PruneConfig(method=new, ratio=0.2)


def test_replace_keeps_what_the_user_chose() -> None:
    assert PruneConfig(probe_batch=0.1).replace(method="flap").probe_batch == 0.1
    with pytest.raises(ConfigError, match=r"means probe_batch=1\.0, found 0\.1"):
        PruneConfig(probe_batch=0.1).replace(method="full-batch")


@pytest.mark.parametrize(
    ("ratio", "skip", "layers", "expected"),
    [
        (0.4, 3, 32, 0.44),
        (0.2, 3, 32, 0.22),
        (0.4, 0, 8, 0.4),
        (0.4, 3, 30, 0.44),
        (0, 3, 2, 0),
        (0.001, 0, 8, 0),
    ],
)
def test_layer_ratio(ratio: float, skip: int, layers: int, expected: float) -> None:
    assert layer_ratio(PruneConfig(ratio=ratio, skip_layers=skip), layers) == expected


def test_layer_ratio_as_it_is() -> None:
    assert layer_ratio(PruneConfig(ratio=0.123, rescale_ratio=False), 32) == 0.123


def test_layer_ratio_of_one_names_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"ratio=0.6 over 4 layers .* a ratio of 2.4 .*rescale_ratio=False"):
        layer_ratio(PruneConfig(ratio=0.6), 4)
    with pytest.raises(ConfigError, match=r"ratio=0.999 .* a ratio of 1.0"):
        layer_ratio(PruneConfig(ratio=0.999, skip_layers=0), 4)


@pytest.mark.parametrize("layers", [3, 2, 0])
@pytest.mark.parametrize("rescale", [True, False])
def test_skipping_all_layers_raises(layers: int, rescale: bool) -> None:
    with pytest.raises(ConfigError, match=f"skip_layers=3 leaves none of the model's {layers} layers"):
        layer_ratio(PruneConfig(rescale_ratio=rescale), layers)


@pytest.mark.parametrize(
    ("heads", "ratio", "kept"),
    [(32, 0.44, 18), (16, 0.4, 10), (9, 0.22, 8), (1, 0.99, 1), (8, 0, 8), (8, 1.0, 0)],
)
def test_kept_heads(heads: int, ratio: float, kept: int) -> None:
    assert kept_heads(heads, ratio) == kept


@pytest.mark.parametrize(
    ("width", "ratio", "multiple", "kept"),
    [
        (2816, 0.4, 64, 1728),
        (2816, 0.4, 1, 1690),
        (1536, 0.44, 64, 896),
        (100, 0.01, 64, 100),
        (256, 1.0, 64, 0),
    ],
)
def test_kept_channels(width: int, ratio: float, multiple: int, kept: int) -> None:
    assert kept_channels(width, ratio, multiple) == kept


@given(st.integers(1, 20_000), st.integers(0, 99), st.integers(1, 512))
def test_kept_channels_are_a_multiple_and_never_too_few(width: int, percent: int, multiple: int) -> None:
    kept = kept_channels(width, percent / 100, multiple)
    wanted = width - int(percent / 100 * width)
    assert 1 <= wanted <= kept <= width
    assert kept % multiple == 0 or kept == width
    assert kept - wanted < multiple


@given(st.integers(1, 256), st.integers(0, 99), st.integers(0, 99))
def test_more_ratio_never_keeps_more(size: int, one: int, other: int) -> None:
    low, high = sorted((one / 100, other / 100))
    assert kept_heads(size, high) <= kept_heads(size, low)
    assert kept_channels(size, high, 8) <= kept_channels(size, low, 8)
