"""Insert the scores: what the probe and the history say about each head and channel, and which are kept.

Paper symbols (sections 4.2 and 4.3): p is the probe's state and g the history's at the probed tokens, both [S', C];
f [C] their importance-scaled fusion, I the PPsp score. All of it is fp32, whatever the model's dtype.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from ppgraph.passes.base import Builder, PassResult, Program, Site, StateInput, shape_of
from ppgraph.passes.find_sites import Block
from ppgraph.passes.insert_probe import Probe, padding_of
from ppgraph.passes.rebuild import unit_indices
from ppgraph.scores import SCORES

aten = torch.ops.aten

# Keeps 0/0 out of the fusion's weight where neither probe nor history saw anything.
TINY = 1e-6


class InsertScore:
    """Adds the score of every pruned site and the indices of what it keeps.

    Leaves in `program.shared`, for each site, `("kept", name)`: the kept units [U'] and the kept channels [C'], and
    `("statistics", name)`: what the score was made of, f [C].
    """

    name = "insert_score"
    requires: tuple[str, ...] = ("find_sites", "insert_probe")

    def __call__(self, program: Program) -> PassResult:
        inserted = 0
        for site in program.pruned_sites:
            block: Block = program.analysis[site.name]
            build = Builder(program, block.exit_linear, self.name)
            statistics = _statistics(program, build, site)
            units = build.ascending(build.highest(_unit_scores(program, build, site, statistics), site.kept_units))
            channels = unit_indices(build, units, site.block)
            program.shared["kept", site.name] = (units, channels)
            program.shared["statistics", site.name] = statistics
            program.results[site.name] = channels
            inserted += build.inserted
        return PassResult(inserted)


def history_of(program: Program, build: Builder, site: Site) -> Node:
    """The site's history at this batch's positions, [S, C] fp32; an input of the graph."""
    key = ("history", site.name)
    if key not in program.shared:
        stream = program.analysis[site.name].stream
        value = stream.meta["val"].new_empty((shape_of(stream)[1], site.width), dtype=torch.float32)
        program.shared[key] = program.add_state_input(StateInput("history", site.name), value)
    node: Node = program.shared[key]
    return node


def _statistics(program: Program, build: Builder, site: Site) -> Node:
    """f [C]: squared channel values summed over tokens."""
    config = program.config
    if config.statistics == "history":
        return _history_statistics(program, build, site)
    probe: Probe = program.shared["probe", site.name]
    squares = probe_state(build, probe)
    used = probe.sampling.used
    if config.statistics == "fused":
        history = build.select(history_of(program, build, site), 0, probe.sampling.tokens)
        squares = fuse(build, squares, history)
    if used is not None:
        squares = build.where(build(aten.unsqueeze.default, used, 1), squares, 0.0)
    return build.sum(squares, 0)


def _history_statistics(program: Program, build: Builder, site: Site) -> Node:
    history = history_of(program, build, site)
    padding = padding_of(program, build, program.analysis[site.name].stream)
    if padding is not None:
        places = build(aten.unsqueeze.default, build(aten.any.dim, padding.real, 0), 1)
        history = build.where(places, history, 0.0)
    return build.sum(history, 0)


def probe_state(build: Builder, probe: Probe) -> Node:
    """p [S', C]: squares of the probed channels, averaged over the samples that have a real token there."""
    y = build(aten.to.dtype, probe.y, torch.float32)
    return mean_squares(build, y, probe.sampling.real)


def mean_squares(build: Builder, y: Node, real: Node | None) -> Node:
    """[B, S, C] fp32 -> [S, C]: mean of squares over the samples where `real` [B, S] holds (all when None)."""
    squares = build.mul(y, y)
    if real is None:
        return build(aten.mean.dim, squares, [0])  # type: ignore[no-any-return]
    squares = build.where(build(aten.unsqueeze.default, real, 2), squares, 0.0)
    count = build(aten.clamp.default, build.sum(real, 0), 1)
    return build(aten.div.Tensor, build.sum(squares, 0), build(aten.unsqueeze.default, count, 1))  # type: ignore[no-any-return]


def fuse(build: Builder, probe: Node, history: Node) -> Node:
    """a·p + (1-a)·g with a = p/(p+g+tiny), elementwise."""
    total = build.add(build.add(probe, history), TINY)
    weight = build(aten.div.Tensor, probe, total)
    return build.add(history, build.mul(weight, build(aten.sub.Tensor, probe, history)))  # type: ignore[no-any-return]


def _unit_scores(program: Program, build: Builder, site: Site, statistics: Node) -> Node:
    """I [units]."""
    score = SCORES[program.config.score]
    term = statistics.meta["val"].new_empty((site.width,))
    weight_term = program.add_state_input(StateInput("weight_term", site.name), term)
    channels = score.channels(build, statistics, weight_term)
    if site.block == 1:
        return channels
    return score.units(build, build(aten.reshape.default, channels, [site.units, site.block]))
