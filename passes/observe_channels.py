"""Observe the channels: calibration's dense passes, which give the history its start.

What is observed is the configured observation (ppgraph.methods): for each position the mean square of every channel
over samples, or another statistic. Positions count their own samples, so ragged and padded batches weigh in where they
have tokens.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from ppgraph.methods import OBSERVATIONS
from ppgraph.passes.base import Builder, PassResult, Program, Site, StateInput, shape_of
from ppgraph.passes.find_sites import Block
from ppgraph.passes.insert_probe import padding_of
from ppgraph.passes.insert_score import checked_memory, history_of, moment_of
from ppgraph.passes.update_history import aligned_channels, check_finite, copy_where, cut_between_layers, total

aten = torch.ops.aten


class ObserveChannels:
    """Adds to a dense graph the update of the history by this batch, all channels of all sites that have one.

    The flag `finite`, a result of the graph, guards the update as a whole.
    """

    name = "observe_channels"
    requires: tuple[str, ...] = ("find_sites",)

    def __call__(self, program: Program) -> PassResult:
        sites = program.observed_sites
        if not sites:
            return PassResult()
        stream: Node = program.analysis[sites[0].name].stream
        seen = _samples_seen(program, stream)
        observed: dict[str, dict[str, Node]] = {}
        totals: list[Node] = []
        for site in sites:
            here = Builder(program, program.analysis[site.name].exit_linear, self.name)
            observed[site.name] = _observed(program, here, site, seen)
            totals.append(total(here, list(observed[site.name].values())))
        build = Builder(program, program.output(), self.name)
        whole = check_finite(program, build, sites, totals)
        for site in sites:
            cut_between_layers(program, sites, site)
            old = _memory(program, site)
            for key, new in observed[site.name].items():
                copy_where(build, whole, old[key], new)
        padding = padding_of(program, build, stream)
        count = build.size(stream, 0) if padding is None else build.sum(padding.real, 0)
        copy_where(build, whole, seen, build.add(seen, count))
        return PassResult(build.inserted)


def _samples_seen(program: Program, stream: Node) -> Node:
    """Samples seen before this batch at each position, [S] fp32; an input of the graph."""
    value = stream.meta["val"].new_empty((shape_of(stream)[1],), dtype=torch.float32)
    return program.add_state_input(StateInput("seen", ""), value)


def _observed(program: Program, build: Builder, site: Site, seen: Node) -> dict[str, Node]:
    """The site's history after this batch, {tensor: [S, C], moment: [C, C]} fp32, computed where the block ends."""
    block: Block = program.analysis[site.name]
    values, real = aligned_channels(program, build, block.stream, block.exit_input)
    name = program.config.observed
    memory = _memory(program, site)
    found = build.inline(f"observation {name!r}", OBSERVATIONS[name].calibrate, memory, values, real, seen)
    return checked_memory(name, found, {key: shape_of(node) for key, node in memory.items()})


def _memory(program: Program, site: Site) -> dict[str, Node]:
    """All that the history holds of a site at this batch's positions."""
    observation = OBSERVATIONS[program.config.observed]
    tensors = {tensor: history_of(program, site, tensor) for tensor in observation.tensors}
    return tensors | {moment: moment_of(program, site, moment) for moment in observation.moments}
