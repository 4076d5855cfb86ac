"""Let a batch that runs dense choose what steps of decoding keep: its full inference is the probe, of all tokens.

Nothing is added that multiplies: each block's own channels, which are there anyway, take the place of probed ones.
"""

from __future__ import annotations

import torch

from ppgraph.passes.base import Builder, PassResult, Program, Site, shape_of
from ppgraph.passes.find_sites import Block
from ppgraph.passes.insert_probe import Probe, is_probed_by_row, padding_of, placed, single_rows
from ppgraph.passes.update_history import aligned_channels

aten = torch.ops.aten


class ProbeWholeBatch:
    """Takes the exit's input of every pruned block for the probe of all samples and tokens. The block stays dense.

    Leaves in `program.shared` what `InsertProbe` leaves, and `("narrowed", name)`: the exit linear's input, of all
    channels.
    """

    name = "probe_whole_batch"
    requires: tuple[str, ...] = ("find_sites",)

    def __call__(self, program: Program) -> PassResult:
        inserted = 0
        for site in program.scored_sites:
            block: Block = program.analysis[site.name]
            program.shared["narrowed", site.name] = block.exit_input
            if program.config.statistics == "history":
                continue
            build = Builder(program, block.exit_linear, self.name)
            by_row = is_probed_by_row(program.config, site)
            program.shared["probe", site.name] = (_rows if by_row else _samples)(program, build, site)
            inserted += build.inserted
        return PassResult(inserted)


def _samples(program: Program, build: Builder, site: Site) -> Probe:
    """All samples at all places, [B, S, C] fp32, aligned at their first real tokens."""
    block: Block = program.analysis[site.name]
    padding = padding_of(program, build, block.stream)
    y, _ = aligned_channels(program, build, block.stream, block.exit_input)
    counts = build.size(block.stream, 0), build.size(block.stream, 1)
    samples, tokens = (build(aten.arange.default, count, device=y.meta["val"].device) for count in counts)
    places = None if padding is None else padding.places
    return Probe(y, placed(build, samples, tokens, places, padding, (*counts, counts[1])), {})


def _rows(program: Program, build: Builder, site: Site) -> Probe:
    """All rows of the batch, [B·S, 1, C], each a sample of one token."""
    block: Block = program.analysis[site.name]
    samples, length = build.size(block.stream, 0), build.size(block.stream, 1)
    y = build(aten.reshape.default, block.exit_input, [-1, 1, shape_of(block.exit_input)[-1]])
    count = build.size(y, 0)
    rows = build(aten.arange.default, count, device=y.meta["val"].device)
    at = build(aten.floor_divide.default, rows, length), build(aten.remainder.Scalar, rows, length)
    padding = padding_of(program, build, block.stream)
    real = None if padding is None else build(aten.reshape.default, padding.by_column, [-1, 1])
    return Probe(y, single_rows(build, samples, at, rows, count, real), {})
