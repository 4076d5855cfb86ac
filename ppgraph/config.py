"""What to prune and how: `PruneConfig`, and the widths that follow from it."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections.abc import Callable, Collection, Iterable, Mapping
from fractions import Fraction
from typing import Any, Final

from ppgraph.errors import ConfigError

BLOCKS: Final = ("attention", "mlp")
PROBE_CHOICES: Final = ("largest", "spread")
STATISTICS: Final = ("fused", "probe", "history")
DECODE_MODES: Final = ("reuse", "dense", "probe")

# Names that the fields of the same name accept. Registering a piece of one's own (ppgraph.methods) adds its name.
KNOWN_OBSERVATIONS: Final = {"mean-square", "fluctuation", "second-moment", "low-rank"}
KNOWN_SCORES: Final = {"ppsp", "wanda-sp", "flap"}
KNOWN_ALLOCATIONS: Final = {"uniform", "global", "spare-heads", "least-loss"}
KNOWN_COMPENSATIONS: Final = {"none", "mean", "least-squares", "low-rank"}

# Where some tokens keep all channels, the least that the others keep, of what is kept on average. At 0.375
# perplexity was more than twice as high as at 0.6 (docs/explorations.md).
LEAST_OF_OTHERS: Final = Fraction(3, 5)

_PRESETS: Final[dict[str, dict[str, object]]] = {
    "pp": {
        "score": "ppsp",
        "statistics": "fused",
        "probe_batch": 0.05,
        "probe_tokens": 0.5,
        "probe_choice": "largest",
        "dense_tokens": 0.0,
        "history_momentum": 0.99,
        "observed": "mean-square",
        "allocation": "uniform",
        "compensation": "none",
    },
    "spread": {
        "probe_choice": "spread",
        "dense_tokens": 0.25,
        "observed": "low-rank",
        "allocation": "spare-heads",
        "compensation": "low-rank",
    },
    "full-batch": {
        "score": "ppsp",
        "statistics": "probe",
        "probe_batch": 1.0,
        "probe_tokens": 1.0,
        "history_momentum": 1.0,
    },
    "wanda-sp": {"score": "wanda-sp", "statistics": "history", "history_momentum": 1.0},
    "flap": {
        "score": "flap",
        "statistics": "history",
        "history_momentum": 1.0,
        "observed": "fluctuation",
        "allocation": "global",
        "compensation": "mean",
    },
}
"""What each method stands for. A momentum of 1 freezes the history: the last three do not update it."""

METHODS: Final = tuple(_PRESETS)
_DEFAULT_METHOD: Final = "pp"

# Stands for "whatever the method says" until `__post_init__` puts the preset's value in its place, so that a
# value which the user wrote can be told from one which was left out.
_FROM_METHOD: Final[Any] = None


@dataclasses.dataclass(frozen=True)
class PruneConfig:
    """How a model is pruned: frozen, hashable, checked at construction.

    `method` is a preset over `score`, `statistics`, `probe_batch`, `probe_tokens`, `probe_choice`, `dense_tokens`,
    `history_momentum`, `observed`, `allocation` and `compensation` (what these are made of: `ppgraph.methods`): what is
    left out (or None) takes the method's value. The values of `"pp"` are mere defaults; the other methods *are* their
    values, so another written beside them raises. Once constructed, every field holds a concrete value.

    Attributes:
        ratio: Share of heads and MLP channels removed, averaged over all layers, in `[0, 1)`.
        method: `"pp"` (the paper's), `"spread"` (the same with MLPs probed all over the batch, tokens that keep all
            channels, more heads and fewer channels kept, and exit weights that make up for what is lost: costs less
            perplexity),
            `"full-batch"`, `"wanda-sp"` or `"flap"`.
        score: Importance of a channel: `"ppsp"`, `"wanda-sp"`, `"flap"` or a registered name.
        statistics: What the score reads: the probe and the history `"fused"`, or only one of them.
        probe_batch: Share of the samples that is probed, in `(0, 1]`.
        probe_tokens: Share of the tokens that is probed, in `(0, 1]`.
        probe_choice: Samples and tokens with the `"largest"` residuals; or for MLPs a `"spread"` of single tokens,
            evenly over all samples, in all a share of `probe_batch * probe_tokens`, whose averages are fused.
        dense_tokens: Share of the tokens that keep all MLP channels, in `[0, 1)`: the probed ones, a third of them, and
            those for which the probe says that the kept channels do worst. The other tokens keep fewer channels, so
            that on average as many are kept; where that were less than 0.6 of it, fewer tokens keep all. Steps of
            decoding keep what the ratio says. Needs a `"spread"`.
        history_momentum: Momentum of the history's moving average, in `[0, 1]`; 1 freezes it.
        observed: What calibration observes and the history holds: `"mean-square"`, `"fluctuation"`,
            `"second-moment"`, `"low-rank"` or a registered name.
        allocation: How many units each site keeps: `"uniform"`, or once calibrated `"spare-heads"` (fewer heads, and
            channels in their place), `"global"` (FLAP's threshold over all sites), `"least-loss"` (what costs the
            model's loss the least) or a registered name.
        compensation: What the exit linear does about lost channels: `"none"`, `"mean"`, `"least-squares"`,
            `"low-rank"` or a registered name.
        skip_layers: Number of first layers left dense.
        rescale_ratio: Raise the ratio of the other layers to make up for the skipped ones.
        width_multiple: Kept MLP widths are multiples of it.
        blocks: The blocks that are pruned, in the order `("attention", "mlp")`.
        dense_below: Prompts (and other batches) of fewer tokens, samples times tokens, run dense: below the break-even
            that is faster. All of their tokens choose what steps of decoding keep, and the history learns of all
            channels.
        history_below: Of the others, prompts (and other batches) of fewer tokens keep what the history alone says: they
            are not probed, and run on weights that are selected once and kept until the history changes. Needs a
            history, so calibrate first.
        decode: Single-token steps `"reuse"` the last selection, run `"dense"`, or `"probe"` anew.
        strict: Raise where a block cannot be rewritten, instead of leaving it dense and saying so.

    Raises:
        ConfigError: A value has the wrong type, is out of range, or contradicts `method`.
    """

    ratio: float = 0.4
    method: str = _DEFAULT_METHOD
    score: str = _FROM_METHOD
    statistics: str = _FROM_METHOD
    probe_batch: float = _FROM_METHOD
    probe_tokens: float = _FROM_METHOD
    probe_choice: str = _FROM_METHOD
    dense_tokens: float = _FROM_METHOD
    history_momentum: float = _FROM_METHOD
    observed: str = _FROM_METHOD
    allocation: str = _FROM_METHOD
    compensation: str = _FROM_METHOD
    skip_layers: int = 3
    rescale_ratio: bool = True
    width_multiple: int = 64
    blocks: tuple[str, ...] = BLOCKS
    dense_below: int = 0
    history_below: int = 0
    decode: str = "reuse"
    strict: bool = False

    def __post_init__(self) -> None:
        _CHECKS["method"]("method", self.method)
        defaults = _PRESETS[_DEFAULT_METHOD] | _PRESETS[self.method]
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            if value is None and name in defaults:
                value = defaults[name]
            object.__setattr__(self, name, check(name, value))  # the documented way in a frozen dataclass
        if self.method != _DEFAULT_METHOD:
            self._require_preset()
        if self.dense_tokens and (self.probe_choice != "spread" or self.statistics == "history"):
            raise ConfigError(
                f"dense_tokens={self.dense_tokens} needs tokens that are probed one by one; expected "
                f"probe_choice='spread' and statistics='fused' or 'probe', found probe_choice={self.probe_choice!r} "
                f"and statistics={self.statistics!r}"
            )
        if self.history_below:
            self._require_use_of_history()

    def _require_use_of_history(self) -> None:
        if self.statistics == "probe":
            raise ConfigError(
                f"history_below={self.history_below} needs statistics='fused' or 'history', found 'probe', for which "
                "nothing fills a history"
            )
        if self.history_below <= self.dense_below:
            raise ConfigError(
                f"history_below={self.history_below} never applies, for batches of fewer than "
                f"dense_below={self.dense_below} tokens run dense; expected more than that, or 0"
            )

    def _require_preset(self) -> None:
        for name, fixed in _PRESETS[self.method].items():
            value = getattr(self, name)
            if value != fixed:
                raise ConfigError(
                    f"method {self.method!r} means {name}={fixed!r}, found {value!r}; "
                    f"leave {name} out, or use method={_DEFAULT_METHOD!r}, which may be varied"
                )

    @property
    def needs_history(self) -> bool:
        """Whether anything reads what calibration observes: the score, the allocation or the compensation."""
        return self.statistics != "probe" or self.allocation != "uniform" or self.compensation != "none"

    @property
    def moves_history(self) -> bool:
        """Whether batches change the history after calibration."""
        return self.statistics == "fused" and self.history_momentum < 1

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON-ready values; `from_dict` takes them back."""
        return dataclasses.asdict(self) | {"blocks": list(self.blocks)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PruneConfig:
        """Build a config from a mapping of field names; fields that are absent take their defaults.

        Raises:
            ConfigError: A key is no field, or a value is bad.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"expected a mapping of PruneConfig fields, found {_show(values)}")
        _require_known(values)
        return cls(**values)

    def replace(self, **changes: Any) -> PruneConfig:
        """Return a copy with some fields changed.

        Fields that hold the values of the old `method` follow a new one.

        Raises:
            ConfigError: A name is no field, or the result contradicts itself.
        """
        _require_known(changes)
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        preset = _PRESETS[_DEFAULT_METHOD] | _PRESETS[self.method]
        kept = {name: value for name, value in values.items() if name not in preset or value != preset[name]}
        return type(self)(**(kept | changes))


def field_names() -> tuple[str, ...]:
    """Names of the fields of `PruneConfig`."""
    return tuple(field.name for field in dataclasses.fields(PruneConfig))


def layer_ratio(config: PruneConfig, num_layers: int) -> float:
    """Return the ratio of each layer that is not skipped, `r' = round(r*N/(N - skip), 2)`.

    The skipped first layers stay dense, so the others lose more: the average over all is `config.ratio`.
    Without `rescale_ratio`, or with a ratio of 0, it is `config.ratio` itself.

    Args:
        config: Gives `ratio`, `skip_layers` and `rescale_ratio`.
        num_layers: Decoder layers of the model, `N`.

    Raises:
        ConfigError: No layer is left to prune, or the result is 1 or more.
    """
    if config.ratio == 0:
        return 0.0
    if config.skip_layers >= num_layers:
        raise ConfigError(
            f"skip_layers={config.skip_layers} leaves none of the model's {num_layers} layers to prune; "
            f"use at most {max(num_layers - 1, 0)}, or ratio=0"
        )
    if not config.rescale_ratio:
        return config.ratio
    ratio = round(config.ratio * num_layers / (num_layers - config.skip_layers), 2)
    if ratio >= 1:
        raise ConfigError(
            f"ratio={config.ratio} over {num_layers} layers with skip_layers={config.skip_layers} asks for a "
            f"ratio of {ratio} in the others, expected below 1; lower ratio or skip_layers, "
            f"or set rescale_ratio=False"
        )
    return ratio


def kept_heads(heads: int, ratio: float) -> int:
    """Return how many of `heads` query heads a layer keeps, `H - int(r'*H)`."""
    return heads - int(ratio * heads)


def kept_channels(width: int, ratio: float, multiple: int) -> int:
    """Return how many of `width` channels a layer keeps: `C - int(r'*C)`, up to a `multiple`, at most `C`."""
    return rounded_up(width - int(ratio * width), multiple, width)


def dense_share(kept: int, width: int, dense: float) -> Fraction:
    """Return which share of the tokens keeps all of `width` channels where `kept` are kept on average.

    `dense`, or so much less that the others keep `LEAST_OF_OTHERS` of `kept`, but never less than its probed third.
    """
    share = Fraction(str(dense))
    most = (1 - LEAST_OF_OTHERS) * kept / (width - LEAST_OF_OTHERS * kept)
    return max(share / 3, min(share, most))


def kept_by_others(kept: int, width: int, dense: Fraction, multiple: int) -> int:
    """Return how many of `width` channels tokens keep where a share `dense` of them keeps all, and `kept` on average.

    The nearest `multiple`, and at least one of it.
    """
    exact = (kept - dense * width) / (1 - dense)
    return min(max(round(exact / multiple), 1) * multiple, kept)


def rounded_up(kept: int, multiple: int, width: int) -> int:
    """Return `kept` rounded up to a `multiple`, at most `width`."""
    return min(width, math.ceil(kept / multiple) * multiple)


def _require_known(names: Iterable[str]) -> None:
    """Raise for the first name that is no field, naming the nearest field."""
    fields = [field.name for field in dataclasses.fields(PruneConfig)]
    for name in names:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
            raise ConfigError(f"PruneConfig has no field {name!r}; {hint}")


def _show(value: object) -> str:
    return f"{value!r} ({type(value).__name__})"


def _number(low: float, high: float, *, open_low: bool = False, open_high: bool = False) -> Callable[[str, Any], float]:
    """Make a check for real numbers of an interval; it gives them back as `float`."""
    interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"

    def check(name: str, value: Any) -> float:
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not is_number:
            raise ConfigError(f"{name} must be a number in {interval}, found {_show(value)}")
        above = low < value if open_low else low <= value
        below = value < high if open_high else value <= high
        if not (above and below):  # NaN ends here too
            raise ConfigError(f"{name} must be in {interval}, found {value!r}")
        return float(value)

    return check


def _integer(low: int) -> Callable[[str, Any], int]:
    """Make a check for whole numbers from `low` on; it gives them back as `int`."""

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < low:
            raise ConfigError(f"{name} must be a whole number, at least {low}, found {_show(value)}")
        return int(value)

    return check


def _choice(known: Collection[str]) -> Callable[[str, Any], str]:
    """Make a check for one of a few names; `known` is read when a value is checked, so it may grow."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in known:
            raise ConfigError(f"{name} must be one of {', '.join(sorted(known))}; found {_show(value)}")
        return value

    return check


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, found {_show(value)}")
    return value


def _blocks(name: str, value: Any) -> tuple[str, ...]:
    """Check the blocks to prune, and put them into the order of `BLOCKS`."""
    if isinstance(value, str) or not isinstance(value, Collection):
        raise ConfigError(f"{name} must be a tuple such as {BLOCKS} or ('mlp',), found {_show(value)}")
    unknown = [block for block in value if block not in BLOCKS]
    if unknown:
        raise ConfigError(f"{name} may hold {' and '.join(BLOCKS)}, found {unknown[0]!r}")
    if not value:
        raise ConfigError(f"{name} is empty, expected one or both of {BLOCKS}; use ratio=0 to prune nothing")
    return tuple(block for block in BLOCKS if block in value)


_CHECKS: Final[dict[str, Callable[[str, Any], object]]] = {
    "ratio": _number(0, 1, open_high=True),
    "method": _choice(_PRESETS),
    "score": _choice(KNOWN_SCORES),
    "statistics": _choice(STATISTICS),
    "probe_batch": _number(0, 1, open_low=True),
    "probe_tokens": _number(0, 1, open_low=True),
    "probe_choice": _choice(PROBE_CHOICES),
    "dense_tokens": _number(0, 1, open_high=True),
    "history_momentum": _number(0, 1),
    "observed": _choice(KNOWN_OBSERVATIONS),
    "allocation": _choice(KNOWN_ALLOCATIONS),
    "compensation": _choice(KNOWN_COMPENSATIONS),
    "skip_layers": _integer(0),
    "rescale_ratio": _flag,
    "width_multiple": _integer(1),
    "blocks": _blocks,
    "dense_below": _integer(0),
    "history_below": _integer(0),
    "decode": _choice(DECODE_MODES),
    "strict": _flag,
}
