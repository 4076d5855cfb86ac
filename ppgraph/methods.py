"""What a pruning method is made of: four small pieces, each registered under a name that `PruneConfig` takes.

A method never touches a graph. It is plain tensor code; the passes trace it into the graph of whatever model is
compiled, so a method that works on one family works on all of them, symbolic batch and sequence included.

**Observation** (`PruneConfig.observed`, `register_observation`): what is remembered of the channels that enter a site's
exit linear. It names the tensors that a site's history holds, each [positions, C] fp32, and says how a calibration
batch changes them and what a batch of full inference shows (which the history then moves towards, by its momentum).
Beside tensors it may hold moments, which have no positions; a prompt's probe may move them before the exits use them.
The *first* tensor is g, what scores read; the others may serve compensations.

**Score** (`PruneConfig.score`, `register_score`): how much a unit matters. From f [C] (the observation summed over
tokens: the probe's, the history's, or both fused, as `PruneConfig.statistics` says) and a weight term [C], which only
the exit weight decides and which is computed once, it gives a score for each channel, and a rule gathers the channels
of a head. Each batch keeps the units with the highest scores.

**Allocation** (`PruneConfig.allocation`, `register_allocation`): how many units each site keeps. Python ints, decided
once calibration is over, so every shape stays static; when they change, the model's graphs are captured anew. Until
then, and with `"uniform"`, every layer loses the same share.

**Compensation** (`PruneConfig.compensation`, `register_compensation`): what the exit linear does about the channels it
lost: the weight that it has for those it kept, and a constant that it gains, from its whole weight, the kept channels
and what the history remembers. It runs once a batch, so what it costs does not grow with the number of tokens.

A score that looks at the largest weight instead of their norm, and a method that uses it on calibration data alone:

    import ppgraph

    ppgraph.register_score(
        "peak",
        channels=lambda f, weight_term: f.sqrt() * weight_term,
        weight_term=lambda weight: weight.abs().amax(0),
        units=lambda channels: channels.amax(1),
    )
    pruned = ppgraph.transform(model, ratio=0.3, score="peak", statistics="history")

Traced code must not read values (`.item()`, `if tensor:`), must not make tensors of its own out of data, and must give
the shapes stated here; what breaks this raises MethodError when the graph is made, naming the method.

Symbols: B samples, S positions, D hidden size, C channels of a site, C' kept ones, U units (heads or channels).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeVar

import torch
from torch import Tensor

from ppgraph.config import (
    KNOWN_ALLOCATIONS,
    KNOWN_COMPENSATIONS,
    KNOWN_OBSERVATIONS,
    KNOWN_SCORES,
    kept_channels,
    kept_heads,
)
from ppgraph.errors import ConfigError, InputError

if TYPE_CHECKING:
    from ppgraph.config import PruneConfig
    from ppgraph.passes.base import Site

Memory = Mapping[str, Tensor]


@dataclass(frozen=True)
class Observation:
    """What the history holds of a site.

    Attributes:
        tensors: Names of what is held, each [positions, C] fp32 from 0 on. Scores read the first.
        moments: What is held without positions, by name the columns of each: [C, columns] fp32 from 0 on, C columns
            where None and never more. Calibration changes them, and `probed` if there is one.
        calibrate: (memory at the batch's positions {name: [S, C], moment: [C, columns]}, y [B, S, C], real [B, S] bool
            or None, seen [S]) -> the same after these samples. `seen` counts those observed before at each position.
        batch: (y, real) -> {name: [S, C]} without moments, what one batch shows on its own: the probe's state, and
            what full inference moves the history towards.
        probed: (moments {moment: [C, columns]}, y [n, C], real [n] bool or None) -> the same after these rows, which a
            probe took from all over a batch. Compensations of that batch read what it gives.

    y is fp32 with each sample's first real token at position 0. Where `real` is False it holds anything but NaN;
    None means that all tokens are real.
    """

    tensors: tuple[str, ...]
    calibrate: Callable[[Memory, Tensor, Tensor | None, Tensor], Memory]
    batch: Callable[[Tensor, Tensor | None], Memory]
    moments: Mapping[str, int | None] = field(default_factory=dict)
    probed: Callable[[Memory, Tensor, Tensor | None], Memory] | None = None

    def moment_shape(self, name: str, width: int) -> tuple[int, int]:
        """The shape of a moment of a site of `width` channels."""
        columns = self.moments[name]
        return width, width if columns is None else min(columns, width)


@dataclass(frozen=True)
class Score:
    """How much a unit matters.

    Attributes:
        channels: (f [C], weight term [C]) -> [C], fp32.
        weight_term: exit weight [D, C] in fp32 -> [C]. Computed once, outside the graph.
        units: channels by unit [U, C/U] -> [U]. Not called where a unit is one channel.
    """

    channels: Callable[[Tensor, Tensor], Tensor]
    weight_term: Callable[[Tensor], Tensor]
    units: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Candidate:
    """A site that an allocation decides about.

    Attributes:
        site: Its name, kind, layer, width and units; `unit_macs` are the multiply-adds a token of a unit's linears.
        scores: The configured score of every channel [C] fp32, from calibration alone.
        memory: The site's history {name: [positions, C]}, at the positions that calibration saw.
        step: Units that are best dropped together (`width_multiple` for an MLP, 1 for heads).
        losses: For allocations that ask for them, the estimated rise of the model's loss, in nats a token, when the
            least important 0, 1, 2, ... steps of units go: [levels + 1].
    """

    site: Site
    scores: Tensor
    memory: Memory
    step: int = 1
    losses: Tensor | None = None

    @property
    def positions(self) -> int:
        """Positions that calibration saw."""
        return len(next(iter(self.memory.values())))

    @property
    def unit_macs(self) -> float:
        """Multiply-adds a token of one unit, attention itself included."""
        attention = 2 * self.positions * self.site.block if self.site.kind == "attention" else 0
        return float(self.site.unit_macs + attention)


Allocate = Callable[[Sequence[Candidate], float], Mapping[str, int]]


@dataclass(frozen=True)
class Allocation:
    """How many units each site keeps.

    Attributes:
        allocate: (candidates in the model's order, ratio of each layer that is not skipped) -> {site name: units kept}.
            Sites left out keep all. MLP widths are rounded up to `width_multiple` afterwards.
        by_loss: Whether candidates must come with `losses`, which take a backward pass over some calibration samples.
    """

    allocate: Allocate
    by_loss: bool = False


Compensate = Callable[[Tensor, Tensor, Memory], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Compensation:
    """What the exit linear does about lost channels.

    Attributes:
        compensate: (exit weight [D, C] in the model's dtype, kept channels [C'] int64, memory) -> (weight [D, C'],
            constant [D] or None), fp32 or the model's dtype.
        needs: What the memory holds, by name: tensors of the history, averaged over the positions that calibration
            saw, [C] fp32, and moments, [C, columns]. A config that does not observe them is refused.
    """

    compensate: Compensate
    needs: tuple[str, ...] = ()


OBSERVATIONS: Final[dict[str, Observation]] = {}
SCORES: Final[dict[str, Score]] = {}
ALLOCATIONS: Final[dict[str, Allocation | None]] = {"uniform": None}
COMPENSATIONS: Final[dict[str, Compensation | None]] = {"none": None}

Piece = TypeVar("Piece")

# The share of a channel's energy that least squares takes for noise: kept channels that rarely fire stay finite.
DAMPING: Final = 0.01
TINY: Final = 1e-12
# Directions that observed="low-rank" holds of each site's channels.
RANK: Final = 64
# What it holds counts for no more than so many tokens beside those that a probe shows: text differs between batches.
MEMORY: Final = 256
# Keeps products of directions that hardly differ positive definite: more than what fp32 rounds off of RANK x RANK.
ROUNDING: Final = 1e-3
# Of allocation="spare-heads": what heads lose, as a share of the ratio, the least share of a block's heads that is
# worth its probe and selection, and the largest share that channels lose.
HEADS_SHARE: Final = 1 / 3
FEWEST_HEADS: Final = 1 / 8
MOST_CHANNELS: Final = 0.9


def register_observation(
    name: str,
    *,
    tensors: Sequence[str],
    calibrate: Callable[[Memory, Tensor, Tensor | None, Tensor], Memory],
    batch: Callable[[Tensor, Tensor | None], Memory],
    moments: Mapping[str, int | None] = MappingProxyType({}),
    probed: Callable[[Memory, Tensor, Tensor | None], Memory] | None = None,
) -> None:
    """Make `PruneConfig(observed=name)` possible; the arguments are those of `Observation`.

    Raises:
        ConfigError: the name is taken or no identifier-like string, or there are no tensors.
    """
    names = (*tensors, *moments)
    if not tensors or len(set(names)) != len(names) or any(":" in held for held in names):
        raise ConfigError(f"observation {name!r}: expected different names of tensors and moments, found {names}")
    observation = Observation(tuple(tensors), calibrate, batch, dict(moments), probed)
    _register(name, observation, OBSERVATIONS, KNOWN_OBSERVATIONS)


def squared_norms(weight: Tensor) -> Tensor:
    """Of an exit weight [D, C]: the squared norm of each column, [C]."""
    return weight.square().sum(0)


def sums(channels: Tensor) -> Tensor:
    """Of channels by unit [U, C/U]: the sum of each unit's, [U]."""
    return channels.sum(1)


def register_score(
    name: str,
    channels: Callable[[Tensor, Tensor], Tensor],
    *,
    weight_term: Callable[[Tensor], Tensor] = squared_norms,
    units: Callable[[Tensor], Tensor] = sums,
) -> None:
    """Make `PruneConfig(score=name)` possible; the arguments are those of `Score`.

    Raises:
        ConfigError: the name is taken or no identifier-like string.
    """
    _register(name, Score(channels, weight_term, units), SCORES, KNOWN_SCORES)


def register_allocation(name: str, allocate: Allocate, *, by_loss: bool = False) -> None:
    """Make `PruneConfig(allocation=name)` possible; the arguments are those of `Allocation`.

    Raises:
        ConfigError: the name is taken or no identifier-like string.
    """
    _register(name, Allocation(allocate, by_loss), ALLOCATIONS, KNOWN_ALLOCATIONS)


def register_compensation(name: str, compensate: Compensate, *, needs: Sequence[str] = ()) -> None:
    """Make `PruneConfig(compensation=name)` possible; the arguments are those of `Compensation`.

    Raises:
        ConfigError: the name is taken or no identifier-like string.
    """
    _register(name, Compensation(compensate, tuple(needs)), COMPENSATIONS, KNOWN_COMPENSATIONS)


def require_consistent(config: PruneConfig) -> None:
    """Refuse a config whose pieces don't fit each other.

    Raises:
        ConfigError: its compensation needs what its observation does not hold.
    """
    compensation, observation = COMPENSATIONS[config.compensation], OBSERVATIONS[config.observed]
    missing = set(compensation.needs if compensation else ()) - {*observation.tensors, *observation.moments}
    if missing:
        raise ConfigError(
            f"compensation={config.compensation!r} needs {', '.join(sorted(missing))}, which "
            f"observed={config.observed!r} does not hold"
        )


def _register(name: str, piece: Piece, pieces: dict[str, Piece], known: set[str]) -> None:
    if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
        raise ConfigError(f"expected a name such as 'my-score', found {name!r}")
    if name in pieces:
        raise ConfigError(f"{name!r} is registered already; choose another name")
    pieces[name] = piece
    known.add(name)


def _count(y: Tensor, real: Tensor | None) -> Tensor | int:
    """Samples with a real token, at each position [S] or at all of them."""
    return y.shape[0] if real is None else real.sum(0)


def _only_real(values: Tensor, real: Tensor | None) -> Tensor:
    return values if real is None else torch.where(real.unsqueeze(-1), values, 0.0)


def _mean(values: Tensor, real: Tensor | None) -> Tensor:
    """[B, S, C] -> [S, C] over the samples that have a real token there, 0 without any."""
    if real is None:
        return values.mean(0)
    return _only_real(values, real).sum(0) / real.sum(0).clamp(min=1).unsqueeze(1)


def _running_mean(mean: Tensor, values: Tensor, real: Tensor | None, seen: Tensor) -> Tensor:
    after = (seen + _count(values, real)).clamp(min=1).unsqueeze(1)
    return (mean * seen.unsqueeze(1) + _only_real(values, real).sum(0)) / after


def _calibrate_squares(memory: Memory, y: Tensor, real: Tensor | None, seen: Tensor) -> Memory:
    return {"mean-square": _running_mean(memory["mean-square"], y * y, real, seen)}


def _batch_squares(y: Tensor, real: Tensor | None) -> Memory:
    return {"mean-square": _mean(y * y, real)}


def _over_positions(values: Tensor, places: Tensor | None) -> Tensor:
    """[S, C] -> [C]: mean over the positions that exist."""
    if places is None:
        return values.mean(0)
    return torch.where(places.unsqueeze(1), values, 0.0).sum(0) / places.sum().clamp(min=1)


def _calibrate_fluctuation(memory: Memory, y: Tensor, real: Tensor | None, seen: Tensor) -> Memory:
    """FLAP's running variance around the mean over samples *and* positions; the first group gives none."""
    places = None if real is None else real.any(0)
    mean = _running_mean(memory["mean"], y, real, seen)
    old, new = _over_positions(memory["mean"], places), _over_positions(mean, places)
    count = _count(y, real)
    spread = _only_real((y - new) * (y - old), real).sum(0)
    before = (seen - 1) / (seen + count - 1).clamp(min=1)
    after = (seen + count).clamp(min=1)
    variance = memory["variance"] * before.unsqueeze(1) + spread / after.unsqueeze(1)
    return {"variance": torch.where(seen.unsqueeze(1) > 0, variance, 0.0), "mean": mean}


def _batch_fluctuation(y: Tensor, real: Tensor | None) -> Memory:
    mean = _mean(y, real)
    centre = _over_positions(mean, None if real is None else real.any(0))
    return {"variance": _mean((y - centre).square(), real), "mean": mean}


def _standardised(scores: Tensor) -> Tensor:
    return (scores - scores.mean()) / scores.std().clamp(min=torch.finfo(torch.float32).tiny)


def _global_threshold(candidates: Sequence[Candidate], ratio: float) -> Mapping[str, int]:
    """FLAP: of all units of all sites the least important go, until they make up `ratio` of the whole cost."""
    if not candidates:
        return {}
    if all(bool((candidate.scores == candidate.scores[0]).all()) for candidate in candidates):
        raise InputError(
            "allocation='global' compares the scores of all channels, but calibration left none that differ. "
            "observed='fluctuation' (method='flap') measures from the second batch on: calibrate on further batches, "
            "what was seen so far counts"
        )
    scores = [
        _standardised(candidate.scores).view(candidate.site.units, candidate.site.block).mean(1)
        for candidate in candidates
    ]
    costs = [torch.full_like(score, candidate.unit_macs) for score, candidate in zip(scores, candidates, strict=True)]
    ordered, order = torch.sort(torch.cat(scores), stable=True)
    spent = torch.cat(costs).double()[order].cumsum(0)
    last = int((spent <= ratio * spent[-1]).sum())
    threshold = ordered[min(last, len(ordered) - 1)]
    return {
        candidate.site.name: candidate.site.units - int((score <= threshold).sum())
        for candidate, score in zip(candidates, scores, strict=True)
    }


def _spare_heads(candidates: Sequence[Candidate], ratio: float) -> Mapping[str, int]:
    """Heads lose a third of `ratio`, channels so much more that the multiply-adds of `ratio` go; all layers lose alike.

    A head costs the model more than the channels of as many multiply-adds do, where query heads share keys above all
    (docs/explorations.md). Where a third would be fewer than `FEWEST_HEADS` of a block's heads, all are kept: no probe
    of that block then. Channels lose at most `MOST_CHANNELS` of theirs, and heads what is then missing. Multiply-adds
    are those of linears alone, so that widths don't depend on how long calibration's samples were.
    """
    heads = [candidate.site for candidate in candidates if candidate.site.kind == "attention"]
    channels = [candidate.site for candidate in candidates if candidate.site.kind == "mlp"]
    left = ratio * (_linear_macs(heads) + _linear_macs(channels))
    needed = (left - MOST_CHANNELS * _linear_macs(channels)) / _linear_macs(heads) if heads else 0
    kept: dict[str, int] = {}
    for site in heads:
        lost = int(ratio * HEADS_SHARE * site.units)
        spared = site.units - (lost if lost >= FEWEST_HEADS * site.units else 0)
        kept[site.name] = min(spared, kept_heads(site.units, max(needed, 0)))
        left -= (site.units - kept[site.name]) * site.unit_macs
    share = left / _linear_macs(channels) if channels else 0
    return kept | {site.name: kept_channels(site.units, share, 1) for site in channels}


def _linear_macs(sites: Sequence[Site]) -> int:
    return sum(site.unit_macs * site.units for site in sites)


def _least_loss(candidates: Sequence[Candidate], ratio: float) -> Mapping[str, int]:
    """The widths that cost the least loss at `ratio` of all multiply-adds: a knapsack over the convex hulls."""
    segments = [segment for candidate in candidates for segment in _hull(candidate)]
    left = ratio * sum(candidate.unit_macs * candidate.site.units for candidate in candidates)
    kept = {candidate.site.name: candidate.site.units for candidate in candidates}
    full: set[str] = set()
    for _, name, dropped, cost in sorted(segments, key=lambda segment: segment[0]):
        if cost > left:
            full.add(name)
        elif name not in full:
            kept[name] -= dropped
            left -= cost
    return kept


def _hull(candidate: Candidate) -> list[tuple[float, str, int, float]]:
    """The lower convex hull of a site's losses, as (loss a multiply-add, site, units dropped, multiply-adds saved)."""
    assert candidate.losses is not None
    units, losses = candidate.site.units, candidate.losses.tolist()
    dropped = [min(level * candidate.step, units) for level in range(len(losses))]
    found, at = [], 0
    while at + 1 < len(losses):
        slopes = [(losses[end] - losses[at]) / (dropped[end] - dropped[at]) for end in range(at + 1, len(losses))]
        best = min(range(len(slopes)), key=lambda place: (slopes[place], place))
        end = at + 1 + best
        count = dropped[end] - dropped[at]
        cost = count * candidate.unit_macs
        found.append((slopes[best] / candidate.unit_macs, candidate.site.name, count, cost))
        at = end
    return found


def _mean_output(weight: Tensor, kept: Tensor, memory: Memory) -> tuple[Tensor, Tensor | None]:
    """FLAP's: W·m over the dropped channels."""
    return weight.index_select(1, kept), weight.float() @ memory["mean"].index_fill(0, kept, 0.0)


def _calibrate_second_moment(memory: Memory, y: Tensor, real: Tensor | None, seen: Tensor) -> Memory:
    tokens = _only_real(y, real).flatten(0, 1)
    return {**_calibrate_squares(memory, y, real, seen), "moment": memory["moment"] + tokens.t() @ tokens}


def _least_squares(weight: Tensor, kept: Tensor, memory: Memory) -> tuple[Tensor, Tensor | None]:
    """The weight on kept channels that comes closest to the whole output on calibration: W·M[:,K]·M[K,K]^-1.

    M [C, C] is the sum of y·yT over calibration's tokens. O(C'^3 + D·C·C') a batch, whatever its tokens.
    """
    rows = memory["moment"].index_select(0, kept)
    among_kept = rows.index_select(1, kept)
    diagonal = among_kept.diagonal()
    damped = among_kept + torch.diag_embed(DAMPING * diagonal + DAMPING**2 * diagonal.mean().clamp(min=TINY))
    solved = torch.linalg.solve(damped, rows @ weight.float().t())
    return solved.t(), None


def _calibrate_low_rank(memory: Memory, y: Tensor, real: Tensor | None, seen: Tensor) -> Memory:
    """The best factor of the mean M [C, C] of y·yT so far, M ~ factor·factorT + diag(rest), as far as one can carry on.

    A step of subspace iteration from the factor before and evenly spaced tokens of this batch.
    """
    tokens = _only_real(y, real).flatten(0, 1)
    count = _token_count(tokens, real)
    scaled, old, share = _weighed(memory, tokens, count, memory["tokens"][0])
    rank, length = old.shape[1], tokens.shape[0]
    some = tokens[torch.arange(rank, device=tokens.device) * length // rank]
    basis = torch.linalg.qr(torch.cat([old, some.t()], 1)).Q
    basis = torch.linalg.qr(_times(old, scaled, basis)).Q
    first, second = old.t() @ basis, scaled @ basis
    # Values that are not finite are reported by what sees them; here they would have the solver fail first.
    within = torch.nan_to_num(first.t() @ first + second.t() @ second, 0.0, 0.0, 0.0)
    energies, directions = torch.linalg.eigh(within)
    made = basis @ (directions[:, -rank:] * energies[-rank:].clamp(min=0).sqrt())
    return {**_calibrate_squares(memory, y, real, seen), **_low_rank(memory, scaled, share, count, made)}


def _probe_low_rank(memory: Memory, y: Tensor, real: Tensor | None) -> Memory:
    """The same factor moved by a probe's rows, within the directions that it has: M·X·(XT·M·X)^-1/2, X spanning them.

    Nyström's approximation. Neither decompositions that GPUs wait for nor any pass over the other tokens: four
    products with [C, rank].
    """
    tokens = _only_real(y, real)
    count = _token_count(tokens, real)
    scaled, old, share = _weighed(memory, tokens, count, memory["tokens"][0].clamp(max=MEMORY))
    directions = _whitened(memory["factor"], memory["factor"])
    made = _whitened(directions, _times(old, scaled, directions))
    return _low_rank(memory, scaled, share, count, made)


def _token_count(tokens: Tensor, real: Tensor | None) -> Tensor | int:
    """How many of the rows [n, C] are real."""
    return tokens.shape[0] if real is None else real.sum()


def _weighed(memory: Memory, tokens: Tensor, count: Tensor | int, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a mean over `before` tokens and these `count`: their part as rows [n, C], that of the factor, their share."""
    total = (before + count).clamp(min=1)
    share = count / total
    return tokens * total.rsqrt(), memory["factor"] * (1 - share).sqrt(), share


def _times(factor: Tensor, rows: Tensor, x: Tensor) -> Tensor:
    """(factor·factorT + rowsT·rows)·x."""
    return factor @ (factor.t() @ x) + rows.t() @ (rows @ x)


def _whitened(x: Tensor, image: Tensor) -> Tensor:
    """image·(xT·image)^-1/2 for an image M·x [C, rank] of a symmetric positive M, up to a rotation of its columns."""
    product = x.t() @ image
    scale = product.diagonal().clamp(min=TINY).rsqrt()
    product = product * scale * scale.unsqueeze(1)
    damped = product + torch.diag_embed(torch.full_like(scale, ROUNDING))
    return (image * scale) @ _inverse_of_root(damped).t()


def _inverse_of_root(matrix: Tensor) -> Tensor:
    """L^-1 of L·LT, a symmetric positive matrix [rank, rank].

    Products with it take a fifth of the time that solving for as many columns as a site has channels takes.
    """
    lower = torch.linalg.cholesky_ex(matrix)[0]
    unit = torch.diag_embed(torch.ones_like(lower[0]))
    inverse: Tensor = torch.linalg.solve_triangular(lower, unit, upper=False)
    return inverse


def _low_rank(memory: Memory, rows: Tensor, share: Tensor, count: Tensor | int, made: Tensor) -> Memory:
    """What is held once the factor is `made`: all energy that it lacks is the rest."""
    energy = memory["rest"].squeeze(1) + memory["factor"].square().sum(1)
    energy = energy * (1 - share) + rows.square().sum(0)
    rest = (energy - made.square().sum(1)).clamp(min=0)
    return {"factor": made, "rest": rest.unsqueeze(1), "tokens": memory["tokens"] + count}


def _low_rank_least_squares(weight: Tensor, kept: Tensor, memory: Memory) -> tuple[Tensor, Tensor | None]:
    """As `_least_squares`, of M = factor·factorT + diag(rest), by the Woodbury identity: O(rank·D·C) a batch."""
    factor, rest = memory["factor"], memory["rest"].squeeze(1)
    energy = rest + factor.square().sum(1)
    noise = rest + DAMPING * energy + DAMPING**2 * energy.mean().clamp(min=TINY)
    own = factor.index_select(0, kept)
    scaled = own / noise.index_select(0, kept).unsqueeze(1)
    lost = factor.index_fill(0, kept, 0.0)
    unit = lost.abs().amax().clamp(min=TINY)  # so that fp16 holds it
    lost_output = (weight @ (lost / unit).to(weight.dtype)).float().t() * unit
    inner = own.t() @ scaled
    inner = inner + torch.diag_embed(torch.ones_like(inner[0]))
    root = _inverse_of_root(inner)
    solved = root.t() @ (root @ lost_output)
    # Written once and row by row: a product that is [C', D] would be added to the weight across its rows.
    return torch.addmm(weight.index_select(1, kept).float(), solved.t(), scaled.t()), None


register_observation("mean-square", tensors=("mean-square",), calibrate=_calibrate_squares, batch=_batch_squares)
register_observation(
    "fluctuation", tensors=("variance", "mean"), calibrate=_calibrate_fluctuation, batch=_batch_fluctuation
)
register_score(
    "ppsp",
    lambda f, weight_term: f * weight_term,
    # The norm of the squared column; fp32, because W^4 underflows in fp16.
    weight_term=lambda weight: weight.square().square().sum(0).sqrt(),
    units=lambda channels: channels.square().sum(1).sqrt(),
)
register_score(
    "wanda-sp", lambda f, weight_term: f.sqrt() * weight_term, weight_term=lambda weight: weight.abs().sum(0)
)
register_score("flap", lambda f, weight_term: f * weight_term, units=lambda channels: channels.mean(1))
register_allocation("global", _global_threshold)
register_allocation("spare-heads", _spare_heads)
register_allocation("least-loss", _least_loss, by_loss=True)
register_compensation("mean", _mean_output, needs=("mean",))
register_observation(
    "second-moment",
    tensors=("mean-square",),
    moments={"moment": None},
    calibrate=_calibrate_second_moment,
    batch=_batch_squares,
)
register_compensation("least-squares", _least_squares, needs=("moment",))
register_observation(
    "low-rank",
    tensors=("mean-square",),
    moments={"factor": RANK, "rest": 1, "tokens": 1},
    calibrate=_calibrate_low_rank,
    batch=_batch_squares,
    probed=_probe_low_rank,
)
register_compensation("low-rank", _low_rank_least_squares, needs=("factor", "rest"))
