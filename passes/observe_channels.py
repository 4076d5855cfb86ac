"""Observe the channels: calibration's dense passes, which give the history its start.

The running mean over samples of every channel's square, for each position. Positions count their own samples, so
ragged and padded batches weigh in where they have tokens.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from ppgraph.passes.base import Builder, PassResult, Program, Site, StateInput, shape_of
from ppgraph.passes.find_sites import Block
from ppgraph.passes.insert_probe import padding_of
from ppgraph.passes.insert_score import history_of
from ppgraph.passes.update_history import aligned_channels, cut_between_layers, finite_flags, total

aten = torch.ops.aten


class ObserveChannels:
    """Adds to a dense graph the update of the history by this batch, all channels of all sites that prune.

    The flag `finite`, a result of the graph, guards the update as a whole.
    """

    name = "observe_channels"
    requires: tuple[str, ...] = ("find_sites",)

    def __call__(self, program: Program) -> PassResult:
        sites = program.pruned_sites
        if not sites:
            return PassResult()
        sums: dict[str, Node] = {}
        totals: list[Node] = []
        for site in sites:
            here = Builder(program, program.analysis[site.name].exit_linear, self.name)
            sums[site.name] = _sum_of_squares(program, here, site)
            totals.append(total(here, [sums[site.name]]))
        build = Builder(program, program.output(), self.name)
        flags = finite_flags(build, totals)
        program.results["finite"] = flags
        whole = build(aten.all.default, flags)
        stream: Node = program.analysis[sites[0].name].stream
        seen, now = _samples_seen(program, build, stream)
        for site in sites:
            cut_between_layers(program, site)
            history = history_of(program, build, site)
            _average(build, history, sums[site.name], (seen, now), whole)
        _copy_where(build, whole, seen, now)
        return PassResult(build.inserted)


def _sum_of_squares(program: Program, build: Builder, site: Site) -> Node:
    """[S, C] fp32 over the samples that have a real token at each position."""
    block: Block = program.analysis[site.name]
    values, real = aligned_channels(program, build, block.stream, block.exit_input)
    squares = build.mul(values, values)
    if real is not None:
        squares = build.where(build(aten.unsqueeze.default, real, 2), squares, 0.0)
    return build.sum(squares, 0)


def _samples_seen(program: Program, build: Builder, stream: Node) -> tuple[Node, Node]:
    """Samples seen at each position, [S] fp32: before this batch (an input) and after it."""
    value = stream.meta["val"].new_empty((shape_of(stream)[1],), dtype=torch.float32)
    seen = program.add_state_input(StateInput("seen", ""), value)
    padding = padding_of(program, build, stream)
    count = build.size(stream, 0) if padding is None else build.sum(padding.real, 0)
    return seen, build.add(seen, count)


def _average(build: Builder, history: Node, total: Node, seen: tuple[Node, Node], whole: Node) -> None:
    before, after = (build(aten.unsqueeze.default, count, 1) for count in seen)
    mean = build(aten.div.Tensor, build.add(build.mul(history, before), total), build(aten.clamp.default, after, 1))
    _copy_where(build, whole, history, mean)


def _copy_where(build: Builder, condition: Node, old: Node, new: Node) -> None:
    build(aten.copy_.default, old, build.where(condition, new, old))
