"""Random cases: a model, a config and calls on it, each call compared with the masked dense model.

`cases()` draws them (hypothesis shrinks what fails), `check(case)` runs one: with a static cache in float64 also with a
dynamic one, which must choose the same. A case prints as the call that makes it, so what a failing test prints is the
program that fails again. `tests/test_fuzzing.py` runs a few of them, `tests/reliability/fuzz.py` thousands.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache

import ppgraph
from ppgraph import _torch
from ppgraph.errors import CaptureError, ConfigError, HistoryError, InputError, NonFiniteError
from ppgraph.methods import DAMPING, TINY
from tests.reference import ADAPTERS, Block, Reference, masked
from tests.test_families import FAMILIES, exits
from tests.test_generate import cached

CAPACITY = 60  # slots of a static cache, and the most tokens of a conversation: models have 64 positions
VOCABULARY = 97

# How far a logit may be from the masked dense model's, relative to the largest of the call.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
# Compensations read the history, which is float32 in every model; least squares solve a damped system in it, whose
# condition is up to 1/DAMPING.
LEAST_COMPENSATED = {"mean": TOLERANCES[torch.float32], "least-squares": 1e-3, "low-rank": 1e-3}
# These multiply queries and keys in float32 in models of every dtype: other shapes, other roundings (1.2e-8 was seen).
FLOAT32_ATTENTION = {"codegen": 1e-6, "gptj": 1e-6}
# Tables of positions are float32 in models of every dtype, and Inductor's sine and cosine are others in the last place:
# compiled and uncompiled dense models in float64 differ by 1e-7 (torch 2.13).
INDUCTOR = 1e-6
# Closer scores than this may be ordered otherwise by another order of additions.
TIE = 1e-4


class Discarded(Exception):
    """The dense model, or PruneConfig, refuses what was drawn: nothing to compare."""


@dataclass(frozen=True, repr=False)
class Batch:
    """A prompt of `samples` times `length` tokens; `turns` are the lengths of the calls that follow it in a cache."""

    samples: int = 2
    length: int = 8
    padding: str = "none"
    seed: int = 0
    turns: tuple[int, ...] = ()

    def __repr__(self) -> str:
        return _as_call(self)


@dataclass(frozen=True, repr=False)
class Case:
    """A model and what is done with it.

    `mask`: how calls tell padding: not at all ("none"), by token ("token"), or by query and key with two texts in each
    row, as booleans ("packed") or added to scores ("packed-added").
    """

    family: str
    batches: tuple[Batch, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, Any] = field(default_factory=dict)
    calibration: tuple[Batch, ...] = ()
    attention: str = "sdpa"
    dtype: str = "float32"
    mask: str = "token"
    cache: str = "none"
    lowering: str = "eager"
    seed: int = 0

    def __repr__(self) -> str:
        return _as_call(self)


def _as_call(value: Any) -> str:
    """A dataclass as the call that makes it, without what has its default."""
    shown = []
    for item in dataclasses.fields(value):
        held = getattr(value, item.name)
        default = item.default_factory() if callable(item.default_factory) else item.default
        if held != default:
            shown.append(f"{item.name}={held!r}")
    return f"{type(value).__name__}({', '.join(shown)})"


# ---- drawing ---------------------------------------------------------------------------------------

PADDINGS = ("none", "left", "right", "holes")
# Whose experts, or other special sizes, hang together: these keep the sizes of tests/test_families.py.
FIXED = {name for name, family in FAMILIES.items() if family.refused}


def _batches(mask: str, cache: str, samples: st.SearchStrategy[int], lengths: st.SearchStrategy[int]) -> Any:
    paddings = st.sampled_from(PADDINGS if mask == "token" else ("none",))
    turns = st.lists(st.sampled_from((1, 1, 3, 5)), min_size=1, max_size=4) if cache != "none" else st.just([])
    return st.builds(Batch, samples, lengths, paddings, st.integers(0, 999), turns.map(tuple))


@st.composite
def _sizes(draw: st.DrawFn, name: str) -> dict[str, Any]:
    if name in FIXED:
        return {}
    heads, head = draw(st.sampled_from((4, 2, 3, 1, 6, 8))), draw(st.sampled_from((16, 8)))
    groups = draw(st.sampled_from([count for count in (2, 1, 3, 4, 6, 8) if heads % count == 0]))
    inner = draw(st.integers(9, 130))
    layered = any(isinstance(value, list) for value in FAMILIES[name].options.values())
    layers = 2 if layered else draw(st.sampled_from((1, 1, 2, 3)))
    widths = dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"), inner)
    hidden = heads * head
    return widths | {
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head,
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "num_hidden_layers": layers,
    }


@st.composite
def configs(draw: st.DrawFn, layers: int) -> dict[str, Any]:
    """All fields of PruneConfig. Contradictions are left to PruneConfig, which refuses them."""
    method = draw(st.sampled_from(("pp", "pp", "pp", "spread", "full-batch", "wanda-sp", "flap")))
    skipped = draw(st.integers(0, layers - 1)) if draw(st.booleans()) else 0
    found = {
        "method": method,
        "ratio": draw(st.sampled_from((0.4, 0.25, 0.6, 0.1, 0.9, 0.0))) * (1 - skipped / layers),
        "skip_layers": skipped,
        "rescale_ratio": draw(st.booleans()),
        "width_multiple": draw(st.sampled_from((8, 1, 3, 16, 64))),
        "blocks": draw(st.sampled_from((("attention", "mlp"), ("mlp",), ("attention",)))),
        "decode": draw(st.sampled_from(("reuse", "dense", "probe"))),
        "dense_below": draw(st.sampled_from((0, 0, 0, 20, 1000))),
        "history_below": draw(st.sampled_from((0, 0, 0, 40, 2000))),
    }
    if method == "pp":
        found |= {
            "statistics": draw(st.sampled_from(("fused", "fused", "probe", "history"))),
            "score": draw(st.sampled_from(("ppsp", "ppsp", "wanda-sp", "flap"))),
            "probe_batch": draw(st.sampled_from((0.05, 0.34, 0.5, 1.0))),
            "probe_tokens": draw(st.sampled_from((0.5, 0.1, 0.3, 1.0))),
            "probe_choice": draw(st.sampled_from(("largest", "spread"))),
            "history_momentum": draw(st.sampled_from((0.99, 0.5, 0.0, 1.0))),
        }
        if draw(st.integers(0, 4)) == 4:
            found |= draw(st.sampled_from(PIECES))
        if found["probe_choice"] == "spread" and found["statistics"] != "history":
            found["dense_tokens"] = draw(st.sampled_from((0.0, 0.25, 0.1, 0.6)))
    return found


PIECES: tuple[dict[str, Any], ...] = (
    {"observed": "second-moment"},
    {"observed": "second-moment", "compensation": "least-squares"},
    {"observed": "low-rank", "compensation": "low-rank"},
    {"observed": "fluctuation", "compensation": "mean"},
    {"allocation": "global"},
    {"allocation": "spare-heads"},
    {"allocation": "least-loss"},
)


@st.composite
def cases(draw: st.DrawFn, *, most_batches: int = 4, lowering: str = "eager") -> Case:
    """A random case whose prompts all call the same graph, but for `turns`: capturing is what takes time."""
    name = draw(st.sampled_from(list(FAMILIES)))
    sizes = draw(_sizes(name))
    mask = draw(st.sampled_from(("token", "token", "token", "none", "packed", "packed-added")))
    cache = draw(st.sampled_from(("none", "dynamic", "static"))) if mask in ("token", "none") else "none"
    kind = draw(st.sampled_from(("many", "many", "many", "one", "tiny")))
    samples = {"many": st.integers(2, 6), "one": st.just(1), "tiny": st.integers(1, 2)}[kind]
    lengths = {"many": st.integers(2, 24), "one": st.integers(2, 24), "tiny": st.integers(1, 2)}[kind]
    batches = st.lists(_batches(mask, cache, samples, lengths), min_size=most_batches // 2 or 1, max_size=most_batches)
    calibration = st.lists(_batches(mask, "none", samples, lengths), max_size=2) if draw(st.booleans()) else st.just([])
    dtypes = ("float64",) if name in FIXED else ("float32", "float32", "float64", "bfloat16", "float16")
    return Case(
        name,
        tuple(draw(batches)),
        draw(configs(sizes.get("num_hidden_layers", 2))),
        sizes,
        tuple(draw(calibration)),
        draw(st.sampled_from(FAMILIES[name].implementations())),
        draw(st.sampled_from(dtypes)),
        mask,
        cache,
        lowering,
        draw(st.integers(0, 99)),
    )


# ---- inputs ----------------------------------------------------------------------------------------


def token_mask(batch: Batch) -> Tensor:
    """[B, S]: 1 at real tokens, of which each sample has one."""
    numbers = torch.Generator().manual_seed(batch.seed)
    mask = torch.ones(batch.samples, batch.length, dtype=torch.long)
    for sample in range(batch.samples):
        gap = int(torch.randint(0, batch.length, (), generator=numbers))
        if batch.padding == "left":
            mask[sample, :gap] = 0
        elif batch.padding == "right":
            mask[sample, batch.length - gap :] = 0
        elif batch.padding == "holes":
            mask[sample] = torch.randint(0, 2, (batch.length,), generator=numbers)
            mask[sample, gap] = 1
    return mask


def packed_mask(batch: Batch) -> Tensor:
    """[B, 1, S, S], True where a token sees another: of two texts in a row, those before it in its own."""
    length = batch.length
    texts = (torch.arange(length) >= batch.seed % length).long()
    return ((texts[:, None] == texts).tril())[None, None].expand(batch.samples, 1, length, length).clone()


def prompt(case: Case, batch: Batch) -> dict[str, Tensor]:
    ids = _ids(batch.samples, batch.length, batch.seed)
    if case.mask == "none":
        return {"input_ids": ids}
    if case.mask == "token":
        mask = token_mask(batch)
        return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    seen = packed_mask(batch)
    if case.mask == "packed-added":
        dtype = getattr(torch, case.dtype)
        seen = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return {"input_ids": ids, "attention_mask": seen}


def _ids(samples: int, length: int, seed: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))


def conversation(case: Case, batch: Batch) -> Iterator[dict[str, Tensor]]:
    """The prompt, then each turn: new ids, and the mask of all tokens so far."""
    inputs = prompt(case, batch)
    mask = inputs.get("attention_mask")
    yield inputs
    total = batch.length
    for number, length in enumerate(batch.turns):
        total += length
        if total > CAPACITY:
            return
        following = {"input_ids": _ids(batch.samples, length, batch.seed + number + 1)}
        if mask is not None:
            mask = F.pad(mask, (0, length), value=1)
            following["attention_mask"] = mask
        yield following


# ---- judging ---------------------------------------------------------------------------------------


def built(case: Case) -> nn.Module:
    """The dense model.

    Raises:
        Discarded: transformers refuses these sizes, or this kind of mask.
    """
    try:
        dense = FAMILIES[case.family].model(case.attention, seed=case.seed, sizes=case.sizes)
        dense = dense.to(getattr(torch, case.dtype))
        for batch in case.batches[:1]:
            with torch.no_grad():
                dense(**prompt(case, batch), use_cache=False)
    except Exception as error:
        raise Discarded(f"{type(error).__name__}: {error}") from error
    return dense


def exit_weight(linear: nn.Module) -> Tensor:
    """[D, C]; that of gpt2's Conv1D is stored the other way round."""
    weight = linear.weight
    return weight if isinstance(linear, nn.Linear) else weight.t()  # type: ignore[return-value,operator]


@contextmanager
def compensated(
    dense: nn.Module, pruned: Any, selection: Mapping[str, Tensor], dense_tokens: Mapping[str, tuple[Tensor, Tensor]]
) -> Iterator[None]:
    """Within it, exit linears make up for dropped channels as the config says, from what the history holds.

    Of tokens that keep all channels nothing is made up for.
    """
    kind, history = pruned.ppgraph.config.compensation, pruned.ppgraph.history
    with ExitStack() as hooks:
        for site, path in exits(pruned).items() if kind != "none" else ():
            linear, kept = dense.get_submodule(path), selection[site]
            weight = exit_weight(linear).double()
            whole, kept = dense_tokens.get(site, (None, kept))
            if kind == "mean":
                mean = history.centre(site, "mean").double().index_fill(0, kept, 0)
                constant = weight @ mean
                hook = linear.register_forward_hook(
                    lambda module, args, out, constant=constant: out + constant.to(out.dtype)
                )
            else:
                change = torch.zeros_like(weight)
                change[:, kept] = (least_squares if kind == "least-squares" else low_rank)(history, site, weight, kept)

                def made_up(module: Any, args: Any, out: Tensor, change: Tensor = change, whole: Any = whole) -> Tensor:
                    added = F.linear(args[0], change.to(out.dtype))
                    return out + (added if whole is None else added.masked_fill(whole.reshape(*out.shape[:-1], 1), 0))

                hook = linear.register_forward_hook(made_up)
            hooks.callback(hook.remove)
        yield


def least_squares(history: Any, site: str, weight: Tensor, kept: Tensor) -> Tensor:
    """What `compensation="least-squares"` adds to the exit weight on kept channels, [D, C'] in float64."""
    moment = history.moment(site, "moment").double()
    among = moment[kept][:, kept]
    noise = DAMPING * among.diagonal() + DAMPING**2 * among.diagonal().mean().clamp(min=TINY)
    return torch.linalg.solve(among + noise.diag(), moment[kept] @ weight.t()).t() - weight[:, kept]


def low_rank(history: Any, site: str, weight: Tensor, kept: Tensor) -> Tensor:
    """The same of `compensation="low-rank"`, by the whole moment that its factor stands for."""
    factor, rest = history.moment(site, "factor").double(), history.moment(site, "rest").double()[:, 0]
    moment = factor @ factor.t()
    energy = moment.diagonal() + rest
    noise = rest + DAMPING * energy + DAMPING**2 * energy.mean().clamp(min=TINY)
    lost = weight.index_fill(1, kept, 0.0) @ moment[:, kept]
    return torch.linalg.solve(moment[kept][:, kept] + noise[kept].diag(), lost.t()).t()


class HistoryReplay:
    """The history of a pruned model, moved on in float64 by what enters the exit linears of the masked dense model."""

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.values: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}

    def _reserve(self, site: str, positions: int, width: int) -> None:
        held = self.values.get(site, torch.zeros(0, width, dtype=torch.float64))
        seen = self.seen.get(site, torch.zeros(0, dtype=torch.float64))
        missing = max(positions - len(held), 0)
        self.values[site], self.seen[site] = F.pad(held, (0, 0, 0, missing)), F.pad(seen, (0, missing))

    def _by_position(self, site: str, y: Tensor, real: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Sums of squares [S, C] and samples [S] at each place behind `start`, samples aligned at their first token."""
        sums = torch.zeros(y.shape[1:], dtype=torch.float64)
        counts = torch.zeros(y.shape[1], dtype=torch.float64)
        for sample, row in zip(y.double(), real, strict=True):
            columns = row.nonzero().flatten()
            places = columns - columns[:1]
            sums[places] += sample[columns].square()
            counts[places] += 1
        self._reserve(site, start + y.shape[1], y.shape[2])
        return sums, counts

    def move(self, site: str, y: Tensor, real: Tensor, start: int, kept: Tensor) -> None:
        """One pruned call: y [B, S, C] that entered the exit linear, of which `kept` channels count."""
        sums, counts = self._by_position(site, y, real, start)
        means = sums / counts.clamp(min=1).unsqueeze(1)
        places = counts.nonzero().flatten()
        cells = (start + places).unsqueeze(1), kept
        held = self.values[site]
        held[cells] = self.momentum * held[cells] + (1 - self.momentum) * means[places][:, kept]

    def calibrate(self, site: str, y: Tensor, real: Tensor) -> None:
        """One dense pass of calibration."""
        sums, counts = self._by_position(site, y, real, 0)
        length = len(counts)
        held, seen = self.values[site], self.seen[site]
        total = (seen[:length] + counts).clamp(min=1).unsqueeze(1)
        held[:length] = (held[:length] * seen[:length].unsqueeze(1) + sums) / total
        seen[:length] += counts


class Watched(Reference):
    """The reference, which also tells how close its decisions were."""

    closest: float = 1.0

    def chosen(self, block: Block, scores: Tensor, kept: int | None = None) -> Tensor:
        self._look(scores, kept or self.kept_units(block), 0.0)
        return super().chosen(block, scores, kept)

    def worst(self, predicted: Tensor, count: int) -> Tensor:
        self._look(predicted[predicted.isfinite()], count, float(predicted.nanmean()))
        return super().worst(predicted, count)

    def _look(self, scores: Tensor, kept: int, zero: float) -> None:
        """How far apart the last that is chosen and the first that is not are, of how far the former is from `zero`."""
        ordered = scores.sort(descending=True).values - zero
        if 0 < kept < len(ordered):
            last, first = float(ordered[kept - 1]), float(ordered[kept])
            self.closest = min(self.closest, (last - first) / abs(last) if last else 1.0)


def reference_of(case: Case, dense: Any, config: ppgraph.PruneConfig) -> Watched | None:
    """The reference for a case, where it can run it."""
    flap = config.method == "flap"
    plain = config.observed == "mean-square" and config.allocation == "uniform" and config.compensation == "none"
    known = dense.config.model_type in ADAPTERS and case.cache == "none" and case.mask in ("none", "token")
    if not known or not (flap or plain) or case.dtype not in ("float32", "float64") or config.ratio == 0:
        return None
    if flap and not (case.calibration and dense.config.model_type == "llama"):
        return None
    names = (
        "ratio",
        "probe_batch",
        "probe_tokens",
        "probe_choice",
        "dense_tokens",
        "dense_below",
        "history_below",
        "history_momentum",
        "skip_layers",
        "rescale_ratio",
        "width_multiple",
        "blocks",
        "statistics",
        "score",
    )
    return Watched(dense, flap=flap, **{name: getattr(config, name) for name in names})


class Judge:
    """Runs calls of one case on the pruned model, and on all that it is compared with."""

    def __init__(self, case: Case) -> None:
        self.case, self.dense = case, built(case)
        self.pruned: Any = ppgraph.transform(self.dense, lowering=case.lowering, **case.config)
        self.config = self.pruned.ppgraph.config
        self.reference = reference_of(case, self.dense, self.config)
        exact = case.dtype in ("float32", "float64") and self.config.observed == "mean-square"
        moving = self.config.statistics == "fused" and self.config.history_momentum < 1
        self.replay = HistoryReplay(self.config.history_momentum) if exact and moving else None
        self.chosen: list[Mapping[str, Tensor]] = []  # of each call

    def calls(self) -> int:
        """Run the whole case. Returns the number of calls."""
        self.calibrate()
        return sum(map(self.run, self.case.batches))

    def calibrate(self) -> None:
        if not self.case.calibration or self.config.ratio == 0:
            return
        batches = [prompt(self.case, batch) for batch in self.case.calibration]
        try:
            ppgraph.calibrate(self.pruned, batches, progress=False)
        except NonFiniteError as error:
            if all(self._dense_is_finite(inputs) for inputs in batches):
                raise
            raise Discarded(str(error)) from error
        except InputError as error:
            if self.config.observed != "fluctuation" or len(batches) > 1:
                raise
            raise Discarded(str(error)) from error
        if self.reference is not None:
            self.reference.calibrate(batches)
        for inputs in batches if self.replay is not None else ():
            with self._seen_at_exits() as seen:
                self.dense(**inputs, use_cache=False)
            real = real_tokens(inputs)
            for site, y in seen.items():  # some are laid out as rows
                self.replay.calibrate(site, y.reshape(*real.shape, -1), real)  # type: ignore[union-attr]
        self._require_history("calibration")

    def run(self, batch: Batch) -> int:
        """One prompt and what follows it. Returns the number of calls."""
        calls, cached_tokens, prompted = 0, 0, {}
        mine, other = self._cache(), self._cache()
        for inputs in conversation(self.case, batch):
            length = inputs["input_ids"].shape[1]
            is_step = cached_tokens > 0 and length == 1
            logits = self._pruned_logits(inputs, mine, other)
            selection = self.pruned.ppgraph.selection()
            if is_step and self.config.decode == "reuse":
                _require(_same(selection, prompted), "a step of decoding has another selection than its prompt")
            is_small = not is_step and inputs["input_ids"].numel() < self.config.dense_below
            is_remembered = not is_step and not is_small and self._goes_by_history(inputs)
            chosen = {} if is_small or (is_step and self.config.decode == "dense") else selection
            self._require_selection(selection)
            self.chosen.append(selection)
            differing = {} if is_step and self.config.decode == "reuse" else self.pruned.ppgraph.dense_tokens()
            _require(not (is_small and differing), "tokens of a prompt that runs dense keep fewer channels")
            _require(not (is_remembered and differing), "tokens of a prompt that is not probed differ")
            expected, seen = self._expected(inputs, other, chosen, differing if chosen else {})
            self._require_logits(logits, expected, inputs)
            if is_remembered:
                self._require_history("a prompt that goes by it alone")
            elif not is_step or self.config.decode == "probe":
                narrowed = {site: others for site, (_, others) in differing.items()}
                every = {site: torch.arange(seen[site].shape[-1]) for site in selection}
                self._follow(inputs, seen, every if is_small else selection | narrowed, cached_tokens)
            if cached_tokens == 0 and self.reference is not None:
                self._compare_with_reference(inputs, logits, selection)
            prompted = prompted if is_step else selection
            cached_tokens += length if mine is not None else 0
            calls += 1
        return calls

    def _pruned_logits(self, inputs: Mapping[str, Tensor], cache: Any, dense_cache: Any) -> Tensor:
        try:
            return self._call(self.pruned, inputs, cache)
        except NonFiniteError as error:
            if self._dense_is_finite(inputs, dense_cache):
                raise
            raise Discarded(str(error)) from error
        except HistoryError as error:
            history = self.pruned.ppgraph.history
            if not self._goes_by_history(inputs) or any(history[site].any() for site in history):
                raise
            raise Discarded(str(error)) from error
        except CaptureError as error:
            self._require_refusal(inputs, dense_cache, error)
            raise Discarded(str(error)) from error

    def _goes_by_history(self, inputs: Mapping[str, Tensor]) -> bool:
        return self.config.ratio > 0 and inputs["input_ids"].numel() < self.config.history_below

    def _dense_is_finite(self, inputs: Mapping[str, Tensor], cache: Any = None) -> bool:
        """Not so in float64 where mpt, and windows in eager attention, hide keys by more than float32 can hold."""
        logits = self._call(self.dense, inputs, copy.deepcopy(cache))
        return bool(torch.isfinite(logits[real_tokens(inputs)]).all())

    def _require_refusal(self, inputs: Mapping[str, Tensor], cache: Any, error: CaptureError) -> None:
        """Raise `error` unless the dense model does not take the call either, or Dynamo does not capture it.

        The former is so for bloom with a static cache, the latter for mpt.
        """
        captured = torch.compile(self.dense, backend="eager", dynamic=True, fullgraph=True)
        if all(self._takes(model, inputs, copy.deepcopy(cache)) for model in (self.dense, captured)):
            raise error

    def _takes(self, model: Any, inputs: Mapping[str, Tensor], cache: Any) -> bool:
        try:
            with _torch.dynamo_settings():
                self._call(model, inputs, cache)
        except RuntimeError:  # Dynamo's own errors are such
            return False
        return True

    def _cache(self) -> Any:
        if self.case.cache == "none":
            return None
        if self.case.cache == "static":
            return StaticCache(config=self.dense.config, max_cache_len=CAPACITY)
        return DynamicCache(config=self.dense.config)

    @torch.no_grad()
    def _call(self, model: Any, inputs: Mapping[str, Tensor], cache: Any) -> Tensor:
        arguments = {"use_cache": False} if cache is None else {**cached(cache), "use_cache": True}
        return model(**inputs, **arguments).logits  # type: ignore[no-any-return]

    def _expected(
        self,
        inputs: Mapping[str, Tensor],
        cache: Any,
        selection: Mapping[str, Tensor],
        differing: Mapping[str, tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        places = {site: path for site, path in exits(self.pruned).items() if site in selection}
        with (
            masked(self.dense, selection, places, differing),
            compensated(self.dense, self.pruned, selection, differing) if selection else ExitStack(),
            self._seen_at_exits() as seen,
        ):
            return self._call(self.dense, inputs, cache), seen

    @contextmanager
    def _seen_at_exits(self) -> Iterator[dict[str, Tensor]]:
        seen: dict[str, Tensor] = {}

        def watch(site: str) -> Any:
            return lambda module, args: seen.update({site: args[0]})

        with ExitStack() as hooks, torch.no_grad():
            for site, path in exits(self.pruned).items():
                hooks.callback(self.dense.get_submodule(path).register_forward_pre_hook(watch(site)).remove)
            yield seen

    def _follow(
        self, inputs: Mapping[str, Tensor], seen: Mapping[str, Tensor], selection: Mapping[str, Tensor], past: int
    ) -> None:
        if self.replay is None:
            return
        start = past - common_padding(inputs, past)
        real = real_tokens(inputs)
        for site, kept in selection.items():
            y = seen[site].reshape(*real.shape, -1)
            self.replay.move(site, y, real, start, kept)
        self._require_history("a call")

    def _require_history(self, after: str) -> None:
        for site, expected in self.replay.values.items() if self.replay is not None else ():
            found = self.pruned.ppgraph.history[site][: len(expected)].double()
            error = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
            _require(float(error) < 1e-4, f"history of {site} after {after}: off by {float(error):.2g}")

    def _require_selection(self, selection: Mapping[str, Tensor]) -> None:
        pruned = {site.name: site for site in self.pruned.ppgraph.sites if site.status == "pruned"}
        _require(set(selection) == set(pruned), f"selected {sorted(selection)}, pruned {sorted(pruned)}")
        for name, kept in selection.items():
            site = pruned[name]
            _require(len(kept) == site.kept, f"{name}: kept {len(kept)} channels, expected {site.kept}")
            _require(bool((kept[1:] > kept[:-1]).all()), f"{name}: kept channels do not ascend")
            heads = kept[:: site.block, None] + torch.arange(site.block)
            _require(torch.equal(heads.flatten(), kept), f"{name}: kept channels are no whole heads")

    def _require_logits(self, found: Tensor, expected: Tensor, inputs: Mapping[str, Tensor]) -> None:
        real = real_tokens(inputs)
        found, expected = found[real], expected[real]
        if not torch.isfinite(expected).all():
            raise Discarded("the dense model's logits are not finite")
        _require(bool(torch.isfinite(found).all()), "logits that are not finite")
        exactly = self.config.ratio == 0 and self.case.lowering == "eager" and self.case.cache == "none"
        if exactly:
            _require(torch.equal(found, expected), "ratio 0 is not the dense model bit for bit")
        error = float((found - expected).abs().max() / expected.abs().max())
        rounded = FLOAT32_ATTENTION.get(self.case.family, INDUCTOR if self.case.lowering == "inductor" else 0)
        limit = max(TOLERANCES[found.dtype], LEAST_COMPENSATED.get(self.config.compensation, 0), rounded)
        _require(error < limit, f"logits are off by {error:.2g} of the largest")

    def _compare_with_reference(
        self, inputs: Mapping[str, Tensor], logits: Tensor, selection: Mapping[str, Tensor]
    ) -> None:
        assert self.reference is not None
        self.reference.closest = 1.0
        expected = self.reference(**inputs)
        real, found = real_tokens(inputs), self.pruned.ppgraph.dense_tokens()
        tokens = {site: dense & real for site, (dense, _) in found.items()}
        alike = _same(selection, expected.selection) and _same(
            tokens, {site: dense for site, (dense, _) in expected.dense.items()}
        )
        if not alike:
            _require(self.reference.closest < TIE, "another selection than the reference's")
            self.reference = None  # a tie; from here on the two go different ways
            return
        error = float((logits - expected.logits)[real].abs().max() / expected.logits[real].abs().max())
        _require(error < 1e-4, f"logits are off from the reference by {error:.2g} of the largest")


def real_tokens(inputs: Mapping[str, Tensor]) -> Tensor:
    """[B, S]: which of this call's tokens are real."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if mask is None or mask.dim() == 4:
        return torch.ones_like(ids, dtype=torch.bool)
    return mask[:, -ids.shape[1] :].bool()


def common_padding(inputs: Mapping[str, Tensor], past: int) -> int:
    """The columns in a cache ahead of every sample's first real token."""
    mask = inputs.get("attention_mask")
    if not past or mask is None:
        return 0
    return int(mask.bool().any(0).nonzero()[0])


def _same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise AssertionError(text)


def check(case: Case) -> int:
    """Run a case and compare each of its calls. Returns how many those were.

    Raises:
        AssertionError: a call differs.
        Discarded: the dense model or PruneConfig refuses the case.
    """
    torch._dynamo.reset()
    try:
        judge = Judge(case)
        calls = judge.calls()
        if case.cache == "static" and case.dtype == "float64":
            other = Judge(dataclasses.replace(case, cache="dynamic"))
            calls += other.calls()
            alike = all(map(_same, judge.chosen, other.chosen))
            _require(alike, "a static cache chose otherwise than one that grows")
    except ConfigError as error:
        raise Discarded(str(error)) from error
    return calls


def repro(case: Case) -> str:
    """A program of a few lines that runs a case again."""
    return f"from tests.fuzzing import Batch, Case, check\n\ncheck({case!r})\n"
