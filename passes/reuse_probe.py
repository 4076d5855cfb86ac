"""Reuse the probe: what it computed for its rows need not be computed a second time.

The products before a block's exit act on each row (one token of one sample) alone. What the probe has for its rows
holds in full inference too, for the channels that are kept; so the full products run on the other rows, and the
probe's rows are put behind them. Where all up to the exit acts on rows alone (an MLP), so does the exit, and the rows
go back into the batch's order after it; elsewhere (attention) after each linear.

Putting rows in order costs the more, the more of them were not probed, and the saving grows with those that were: where
few were, all rows are computed again.
"""

from __future__ import annotations

import operator
from fractions import Fraction

import torch
from torch.fx import Node

from ppgraph._torch import hint
from ppgraph.passes.base import Builder, PassResult, Program, Refusal, Site, shape_of, value_of
from ppgraph.passes.find_sites import Block
from ppgraph.passes.insert_probe import Probe, share_of_rows
from ppgraph.passes.rows import OtherRows, RowOrder, erase_unused, replace_exit, rows_last
from ppgraph.passes.select_weights import sort_topologically
from ppgraph.passes.token_axes import Sampling

aten = torch.ops.aten

# Of a batch's rows; measured on CPUs and an H100 (benchmarks/NOTES.md).
WORTHWHILE_SHARE = Fraction(1, 20)


class ReuseProbe:
    """Makes the linears of each probed block run on the rows that were not probed.

    Where no more than `WORTHWHILE_SHARE` of the rows are probed in the batch that the graph is captured from, nothing
    is changed. Either graph serves batches of all shapes. What cannot be followed row by row is left as it is: the
    result is the same, only the saving differs. The exit is copied with the weight that it has, so `compensate_exit`
    runs before.

    Leaves in `program.shared`, for each site whose exit runs by rows, `("rows", name)`: a `RowPieces`.
    """

    name = "reuse_probe"
    requires: tuple[str, ...] = ("insert_probe", "select_weights")

    def __call__(self, program: Program) -> PassResult:
        outcome = PassResult()
        for site in program.scored_sites:
            probe: Probe | None = program.shared.get(("probe", site.name))
            if ("dense", site.name) in program.results:
                continue
            if probe is not None and _is_worthwhile(program, probe.sampling, program.analysis[site.name].stream):
                build = Builder(program, program.shared["exit", site.name], self.name)
                _reuse(program, build, site, probe, outcome)
                outcome.inserted += build.inserted
        sort_topologically(program.graph)
        return outcome


def _is_worthwhile(program: Program, sampling: Sampling, stream: Node) -> bool:
    """Whether enough rows are probed, by the batch's samples: tokens are about the configured share of a sample's.

    Single rows are about their configured share of the batch's.
    """
    if sampling.tokens is None:
        return share_of_rows(program.config) > WORTHWHILE_SHARE
    probed, samples = (hint(value_of(size)) for size in (sampling.sample_count, shape_of(stream)[0]))
    if probed is None or samples is None:
        return True
    return probed * Fraction(str(program.config.probe_tokens)) > samples * WORTHWHILE_SHARE


def _reuse(program: Program, build: Builder, site: Site, probe: Probe, outcome: PassResult) -> None:
    block: Block = program.analysis[site.name]
    rows = OtherRows(build, block.stream, row_order(program, build, block.stream, probe.sampling))
    try:
        _reuse_at_exit(program, rows, site, probe)
    except Refusal:
        _reuse_at_linears(program, rows, site, probe, outcome)


def _reuse_at_exit(program: Program, rows: OtherRows, site: Site, probe: Probe) -> None:
    """The whole block by rows.

    Raises:
        Refusal: something before the exit mixes rows, or is used elsewhere too.
    """
    exit_linear, narrowed = program.shared["exit", site.name], program.shared["narrowed", site.name]
    others = rows.of(narrowed)
    rows.require_no_other_users(exit_linear)
    build, (_, channels) = rows.build, program.shared["kept", site.name]
    # Two products, as joining their inputs would copy the widest tensors of the block.
    pieces = rows.pieces(others, probe.y, channels)
    products = [build.copy(exit_linear, {narrowed: piece}) for piece in pieces]
    replace_exit(program, site, rows, products, pieces)


def _reuse_at_linears(program: Program, rows: OtherRows, site: Site, probe: Probe, outcome: PassResult) -> None:
    """The linears by rows, each on its own: the narrowed ones, and those that stay whole."""
    narrowed = program.shared["products", site.name]
    replaced = {linear for _, linear, _ in narrowed}
    whole = [(linear, linear, None) for linear in reversed(probe.linears) if linear not in replaced]
    for product, linear, channels in [*narrowed, *whole]:
        if linear not in probe.linears or not product.users:
            continue
        try:
            others = rows.of(product)
        except Refusal as refusal:
            outcome.refused.append(f"{site.name}: {refusal}")
            continue
        pieces = rows.pieces(others, probe.linears[linear], channels)
        product.replace_all_uses_with(rows.in_order(pieces, product))
        erase_unused(program, product)


def row_order(program: Program, build: Builder, stream: Node, sampling: Sampling) -> RowOrder:
    """The order of rows for all blocks that probe the same ones."""
    key = ("row order", sampling.rows)
    if key not in program.shared:
        # A symbolic count is one that only running tells; two shares of 1 tell it ahead.
        all_probed = program.config.probe_batch == program.config.probe_tokens == 1
        count = build(operator.mul, sampling.sample_count, sampling.token_count)
        program.shared[key] = rows_last(build, stream, sampling.rows, count, are_all=all_probed)
    order: RowOrder = program.shared[key]
    return order
