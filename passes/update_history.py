"""Update the history: an exponential moving average of full inference's squared channels, for each position.

Only channels that ran are updated (the kept ones, or all in a batch that runs dense), only at positions with a real
token, and only when every number of the batch is finite: all updates stand at the end of the graph, behind one flag, so
a bad batch leaves the whole history as it was. Moments that the probe's rows have moved are taken over there too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch.fx import Node

from ppgraph.passes.base import Builder, PassResult, Program, Site, shape_of
from ppgraph.passes.find_sites import Block
from ppgraph.passes.insert_probe import padding_of
from ppgraph.passes.insert_score import history_of, moment_of, observed_in_batch
from ppgraph.passes.rows import RowPieces

aten = torch.ops.aten


class UpdateHistory:
    """Adds the update of every pruned site's history, and the flag `finite` that guards it.

    The flag is a result of the graph: one boolean for each of the program's `checked`, in order.
    """

    name = "update_history"

    def __init__(self, behind: str = "select_weights") -> None:
        self.requires: tuple[str, ...] = ("find_sites", behind)

    def __call__(self, program: Program) -> PassResult:
        sites = program.scored_sites
        if not sites:
            return PassResult()
        moving = program.config.moves_history
        observed: dict[str, dict[str, Node]] = {}
        totals: list[Node] = []
        places = _behind_layers(program, sites) if moving else {}
        for site in sites:
            place = places.get(site.name, _behind_statistics(program, site))
            here = Builder(program, place, self.name)
            seen: list[Node] = [program.shared["statistics", site.name], *_moved_moments(program, site).values()]
            if moving:
                observed[site.name] = _observed(program, here, site)
                seen += observed[site.name].values()
            totals.append(total(here, seen))
        program.cuts |= {place.prev for place in places.values()}
        build = Builder(program, program.output(), self.name)
        whole = check_finite(program, build, sites, totals)
        for site in sites if moving else ():
            cut_between_layers(program, sites, site)
            for tensor, shown in observed[site.name].items():
                _move(program, build, site, history_of(program, site, tensor), shown, whole)
            for moment, moved in _moved_moments(program, site).items():
                copy_where(build, whole, moment_of(program, site, moment), moved)
        return PassResult(build.inserted)


def _behind_layers(program: Program, sites: Sequence[Site]) -> dict[str, Node]:
    """For each site, the node that follows its layer: before it the statistics of the layer's sites are a part.

    Fused with the kernel that makes the channels, their reduction over samples would set that kernel's loops (on CPUs
    it took six times as long). Here the layer's channels are freed before the next layer's are made.
    """
    ending = {program.shared["narrowed", site.name]: site.name for site in sites}
    places: dict[str, Node] = {}
    place = program.output()
    for node in reversed(program.graph.nodes):
        if node in program.cuts:
            place = node.next
        if node in ending:
            places[ending[node]] = place
    return places


def _runs_dense(program: Program) -> bool:
    """Whether the blocks were left as they are, and all of their channels ran."""
    return "select_weights" not in program.applied


def _behind_statistics(program: Program, site: Site) -> Node:
    """Where a site's channels and what its score was made of are known."""
    if _runs_dense(program):
        block: Block = program.analysis[site.name]
        return block.exit_linear
    narrowed: Node = program.shared["narrowed", site.name]
    return narrowed.next


def cut_between_layers(program: Program, sites: Sequence[Site], site: Site) -> None:
    """Let what has been added at the graph's end be a part of its own where `site` is the first of a layer."""
    first = next(other for other in sites if other.layer == site.layer)
    if first is site:
        program.cuts.add(program.output().prev)


def total(build: Builder, statistics: list[Node]) -> Node:
    """The sum of all a site's statistics, []; over an infinity or NaN it is never finite."""
    sums = [build(aten.sum.default, tensor) for tensor in statistics]
    return functools.reduce(build.add, sums)  # type: ignore[no-any-return]


def check_finite(program: Program, build: Builder, sites: Sequence[Site], totals: Sequence[Node]) -> Node:
    """Make the result `finite` of the sites' totals; gives whether all of them are finite, []."""
    checked = {site.name: value for site, value in zip(sites, totals, strict=True)}
    if program.sharded:
        # Ranks must agree on whether a batch counts. What overflows in the channels of one comes to all by the sum
        # over ranks behind each exit linear.
        checked["channels of another rank"] = _stream_total(program, build, program.analysis[sites[0].name].stream)
    flags = build(aten.isfinite.default, build(aten.stack.default, list(checked.values())))
    program.results["finite"] = flags
    program.checked = list(checked)
    return build(aten.all.default, flags)  # type: ignore[no-any-return]


def _stream_total(program: Program, build: Builder, stream: Node) -> Node:
    """The sum of the residual stream behind the last block, over real tokens, []."""
    last: Node = program.shared["last stream"]
    rows = build.sum(build(aten.to.dtype, last, torch.float32), len(shape_of(last)) - 1)
    values, real = aligned_channels(program, build, stream, build(aten.unsqueeze.default, rows, -1))
    if real is not None:
        values = build.where(build(aten.unsqueeze.default, real, -1), values, 0.0)
    return build(aten.sum.default, values)  # type: ignore[no-any-return]


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


def _observed(program: Program, build: Builder, site: Site) -> dict[str, Node]:
    """What full inference shows: {tensor: [S, C']} fp32."""
    block: Block = program.analysis[site.name]
    rows: RowPieces | None = program.shared.get(("rows", site.name))
    values = program.shared["narrowed", site.name] if rows is None else rows.in_order(build)
    values, real = aligned_channels(program, build, block.stream, values)
    return observed_in_batch(program, build, values, real)


def _moved_moments(program: Program, site: Site) -> dict[str, Node]:
    """The site's moments after this batch, where its probe moves them."""
    moved: dict[str, Node] = program.shared.get(("moved", site.name), {})
    return moved


def copy_where(build: Builder, condition: Node, old: Node, new: Node) -> None:
    """Take over new contents of what the history holds, in place, if a condition [] is met."""
    build(aten.copy_.default, old, build.where(condition, new, old))


def _move(program: Program, build: Builder, site: Site, history: Node, observed: Node, whole: Node) -> None:
    """g <- m·g + (1-m)·observed on the channels that ran, in place."""
    momentum = program.config.history_momentum
    runs_dense = _runs_dense(program)
    _, channels = program.shared["kept", site.name]
    old = history if runs_dense else build.select(history, 1, channels)
    new = build.add(build.mul(old, momentum), build.mul(observed, 1 - momentum))
    allowed = whole
    padding = program.shared.get("padding")
    if padding is not None:
        seen = build(aten.unsqueeze.default, padding.places, 1)
        allowed = build(aten.logical_and.default, seen, whole)
    if runs_dense:
        copy_where(build, allowed, old, new)
    else:
        build(aten.index_copy_.default, history, 1, channels, build.where(allowed, new, old))
