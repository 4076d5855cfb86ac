"""Insert the scores: what the probe and the history say about each head and channel, and which are kept.

Paper symbols (sections 4.2 and 4.3): p is the probe's state and g the history's at the probed tokens, both [S', C];
f [C] their importance-scaled fusion, I the PPsp score. All of it is fp32, whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from ppgraph.config import dense_share, kept_by_others
from ppgraph.errors import MethodError
from ppgraph.methods import OBSERVATIONS, SCORES
from ppgraph.passes.base import Builder, PassResult, Program, Refusal, Site, StateInput, same_size, shape_of
from ppgraph.passes.find_sites import Block
from ppgraph.passes.insert_probe import Probe, padding_of
from ppgraph.passes.rebuild import unit_indices
from ppgraph.passes.rows import require_by_rows

aten = torch.ops.aten

# Keeps 0/0 out of the fusion's weight where neither probe nor history saw anything.
TINY = 1e-6


class InsertScore:
    """Adds the score of every pruned site and the indices of what it keeps.

    Leaves in `program.shared`, for each site, `("kept", name)`: the kept units [U'] and the kept channels [C'], and
    `("statistics", name)`: what the score was made of, f [C].
    """

    name = "insert_score"

    def __init__(self, probed_by: str = "insert_probe") -> None:
        self.requires: tuple[str, ...] = ("find_sites", probed_by)

    def __call__(self, program: Program) -> PassResult:
        outcome, config = PassResult(), program.config
        for site in program.pruned_sites:
            block: Block = program.analysis[site.name]
            build = Builder(program, block.exit_linear, self.name)
            if not site.kept:
                program.shared["kept", site.name] = _nothing(build, block)
                program.results[site.name] = program.shared["kept", site.name][1]
                continue
            statistics = _statistics(program, build, site)
            scores = _unit_scores(program, build, site, statistics)
            units = build.highest_in_order(scores, site.kept_units)
            channels = unit_indices(build, units, site.block)
            program.results[site.name] = channels
            if _lets_tokens_differ(program, site, outcome):
                dense = dense_share(site.kept, site.width, config.dense_tokens)
                width = kept_by_others(site.kept, site.width, dense, config.width_multiple)
                units = channels = build.highest_in_order(scores, width)
                program.results["others", site.name] = channels
            program.shared["kept", site.name] = (units, channels)
            program.shared["statistics", site.name] = statistics
            outcome.inserted += build.inserted
        return outcome


def _lets_tokens_differ(program: Program, site: Site, outcome: PassResult) -> bool:
    """Whether some of the tokens can keep all channels of a site: each is probed, and runs, without the others."""
    probe: Probe | None = program.shared.get(("probe", site.name))
    block: Block = program.analysis[site.name]
    is_alone = shape_of(block.stream)[:2] == (1, 1)
    if not program.config.dense_tokens or probe is None or probe.sampling.tokens is not None or is_alone:
        return False
    try:
        require_by_rows(block)
    except Refusal as refusal:
        outcome.refused.append(f"{site.name} keeps the same channels for all tokens: {refusal}")
        return False
    return True


def _nothing(build: Builder, block: Block) -> tuple[Node, Node]:
    """The units and channels of a block that loses all: [0] each."""
    units = build(aten.arange.default, 0, device=block.stream.meta["val"].device, pin_memory=False)
    return units, units


def history_of(program: Program, site: Site, tensor: str | None = None) -> Node:
    """A tensor of the site's history at this batch's positions, [S, C] fp32; an input of the graph.

    The first tensor of the configured observation unless named: the one that scores read.
    """
    tensor = tensor or OBSERVATIONS[program.config.observed].tensors[0]
    key = ("history", site.name, tensor)
    if key not in program.shared:
        stream = program.analysis[site.name].stream
        value = stream.meta["val"].new_empty((shape_of(stream)[1], site.width), dtype=torch.float32)
        program.shared[key] = program.add_state_input(StateInput("history", site.name, tensor=tensor), value)
    node: Node = program.shared[key]
    return node


def moment_of(program: Program, site: Site, moment: str) -> Node:
    """A moment of the site's history, [C, columns] fp32; an input of the graph."""
    key = ("moment", site.name, moment)
    if key not in program.shared:
        stream = program.analysis[site.name].stream
        shape = OBSERVATIONS[program.config.observed].moment_shape(moment, site.width)
        value = stream.meta["val"].new_empty(shape, dtype=torch.float32)
        program.shared[key] = program.add_state_input(StateInput("moment", site.name, tensor=moment), value)
    node: Node = program.shared[key]
    return node


def _statistics(program: Program, build: Builder, site: Site) -> Node:
    """f [C]: squared channel values summed over tokens."""
    config = program.config
    if config.statistics == "history":
        return _history_statistics(program, build, site)
    probe: Probe = program.shared["probe", site.name]
    squares = probe_state(program, build, probe)
    tokens, used = probe.sampling.tokens, probe.sampling.used
    if config.statistics == "fused":
        history = history_of(program, site)
        # Rows of no position in common are averaged, and so is what they are fused with: [1, C].
        history = _mean_over_places(program, build, site) if tokens is None else build.select(history, 0, tokens)
        squares = fuse(build, squares, history)
    if used is not None:
        squares = build.where(build(aten.unsqueeze.default, used, 1), squares, 0.0)
    return build.sum(squares, 0)


def _history_statistics(program: Program, build: Builder, site: Site) -> Node:
    history = history_of(program, site)
    padding = padding_of(program, build, program.analysis[site.name].stream)
    if padding is not None:
        places = build(aten.unsqueeze.default, padding.places, 1)
        history = build.where(places, history, 0.0)
    return build.sum(history, 0)


def _mean_over_places(program: Program, build: Builder, site: Site) -> Node:
    """The history averaged over the places at which any sample has a token, [1, C]."""
    stream = program.analysis[site.name].stream
    padding = padding_of(program, build, stream)
    count = build.size(stream, 1) if padding is None else build(aten.clamp.default, padding.length, 1)
    total = build(aten.unsqueeze.default, _history_statistics(program, build, site), 0)
    return build(aten.div.Tensor, total, count)  # type: ignore[no-any-return]


def probe_state(program: Program, build: Builder, probe: Probe) -> Node:
    """p [S', C]: what the probed channels show, over the samples that have a real token there."""
    y = build(aten.to.dtype, probe.y, torch.float32)
    return next(iter(observed_in_batch(program, build, y, probe.sampling.real).values()))


def observed_in_batch(program: Program, build: Builder, y: Node, real: Node | None) -> dict[str, Node]:
    """[B, S, C] fp32 -> {tensor of the history: [S, C]}, over the samples where `real` [B, S] holds (all when None)."""
    name = program.config.observed
    observation = OBSERVATIONS[name]
    found = build.inline(f"observation {name!r}", observation.batch, y, real)
    return checked_memory(name, found, dict.fromkeys(observation.tensors, shape_of(y)[1:]))


def checked_memory(name: str, found: Mapping[str, Node], shapes: Mapping[str, Sequence[Any]]) -> dict[str, Node]:
    """What an observation gave, in its own order.

    Raises:
        MethodError: other names or shapes than it registered.
    """
    fits = isinstance(found, Mapping) and set(found) == set(shapes)
    if not fits or any(not _has_shape(found[key], shape) for key, shape in shapes.items()):
        shown = {key: list(shape_of(node)) for key, node in found.items()} if isinstance(found, Mapping) else found
        expected = {key: list(shape) for key, shape in shapes.items()}
        raise MethodError(f"observation {name!r} must give {expected}, found {shown}")
    return {key: found[key] for key in shapes}


def _has_shape(node: Any, shape: Sequence[Any]) -> bool:
    found = shape_of(node) if isinstance(node, Node) else ()
    return len(found) == len(shape) and all(same_size(a, b) for a, b in zip(found, shape, strict=True))


def fuse(build: Builder, probe: Node, history: Node) -> Node:
    """a·p + (1-a)·g with a = p/(p+g+tiny), elementwise."""
    total = build.add(build.add(probe, history), TINY)
    weight = build(aten.div.Tensor, probe, total)
    return build.add(history, build.mul(weight, build.sub(probe, history)))  # type: ignore[no-any-return]


def _unit_scores(program: Program, build: Builder, site: Site, statistics: Node) -> Node:
    """I [units]."""
    name = program.config.score
    score = SCORES[name]
    term = statistics.meta["val"].new_empty((site.width,))
    weight_term = program.add_state_input(StateInput("weight_term", site.name), term)
    channels = build.inline(f"score {name!r}", score.channels, statistics, weight_term)
    _require_vector(f"score {name!r}: channels", channels, site.width)
    if site.block == 1:
        return channels  # type: ignore[no-any-return]
    by_unit = build(aten.reshape.default, channels, [site.units, site.block])
    units = build.inline(f"score {name!r}", score.units, by_unit)
    _require_vector(f"score {name!r}: units", units, site.units)
    return units  # type: ignore[no-any-return]


def _require_vector(what: str, found: Any, length: int) -> None:
    if not _has_shape(found, (length,)):
        shown = list(shape_of(found)) if isinstance(found, Node) else found
        raise MethodError(f"{what} must have shape [{length}], found {shown}")
