"""Update the history: an exponential moving average of full inference's squared channels, for each position.

Only kept channels are updated, only at positions with a real token, and only when every number of the batch is finite:
all updates stand at the end of the graph, behind one flag, so a bad batch leaves the whole history as it was.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from ppgraph.passes.base import Builder, PassResult, Program, Site, shape_of
from ppgraph.passes.find_sites import Block
from ppgraph.passes.insert_probe import padding_of
from ppgraph.passes.insert_score import history_of, mean_squares

aten = torch.ops.aten


class UpdateHistory:
    """Adds the update of every pruned site's history, and the flag `finite` that guards it.

    The flag is a result of the graph: one boolean for each pruned site, in order.
    """

    name = "update_history"
    requires: tuple[str, ...] = ("find_sites", "select_weights")

    def __call__(self, program: Program) -> PassResult:
        if not program.pruned_sites:
            return PassResult()
        build = Builder(program, program.output(), self.name)
        moving = program.config.statistics == "fused" and program.config.history_momentum < 1
        observed: dict[str, Node] = {}
        for site in program.pruned_sites:
            if moving:
                observed[site.name] = _observed(program, site, self.name)
        flags = finite_flags(build, [_seen_by(program, site, observed) for site in program.pruned_sites])
        program.results["finite"] = flags
        whole = build(aten.all.default, flags)
        for site in program.pruned_sites:
            if moving:
                _move(program, build, site, observed[site.name], whole)
        return PassResult(build.inserted)


def _seen_by(program: Program, site: Site, observed: dict[str, Node]) -> list[Node]:
    """All statistics of a site: what its score was made of, and what full inference showed."""
    scored: Node = program.shared["statistics", site.name]
    return [scored, observed[site.name]] if site.name in observed else [scored]


def finite_flags(build: Builder, statistics: list[list[Node]]) -> Node:
    """For each site, whether all its statistics are finite: [sites]. None is negative, so a sum hides nothing."""
    totals = []
    for tensors in statistics:
        sums = [build(aten.sum.default, tensor) for tensor in tensors]
        totals.append(sums[0] if len(sums) == 1 else build.add(*sums))
    return build(aten.isfinite.default, build(aten.stack.default, totals))  # type: ignore[no-any-return]


def aligned_channels(program: Program, build: Builder, stream: Node, values: Node) -> tuple[Node, Node | None]:
    """Exit inputs [B, S, C] fp32 with each sample's first real token at place 0, and where they are real [B, S]."""
    if len(shape_of(values)) == 2:
        sizes = [build.size(stream, 0), build.size(stream, 1), shape_of(values)[-1]]
        values = build(aten.reshape.default, values, sizes)
    values = build(aten.to.dtype, values, torch.float32)
    padding = padding_of(program, build, stream)
    if padding is None:
        return values, None
    device = padding.columns.meta["val"].device
    samples = build(aten.arange.default, build.size(stream, 0), device=device)
    samples = build(aten.unsqueeze.default, samples, 1)
    return build(aten.index.Tensor, values, [samples, padding.columns]), padding.real


def _observed(program: Program, site: Site, author: str) -> Node:
    """What full inference shows: [S, C'] fp32, computed where the block ends so that its channels can be freed."""
    block: Block = program.analysis[site.name]
    narrowed: Node = program.shared["narrowed", site.name]
    build = Builder(program, narrowed.next, author)
    values, real = aligned_channels(program, build, block.stream, narrowed)
    return mean_squares(build, values, real)


def _move(program: Program, build: Builder, site: Site, observed: Node, whole: Node) -> None:
    """g <- m·g + (1-m)·observed on kept channels, in place."""
    momentum = program.config.history_momentum
    history = history_of(program, build, site)
    _, channels = program.shared["kept", site.name]
    old = build.select(history, 1, channels)
    new = build.add(build.mul(old, momentum), build.mul(observed, 1 - momentum))
    allowed = whole
    padding = program.shared.get("padding")
    if padding is not None:
        seen = build(aten.unsqueeze.default, build(aten.any.dim, padding.real, 0), 1)
        allowed = build(aten.logical_and.default, seen, whole)
    build(aten.index_copy_.default, history, 1, channels, build.where(allowed, new, old))
