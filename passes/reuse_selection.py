"""Reuse a selection: decoding keeps to what its prompt's batch chose, small prompts to what the history says."""

from __future__ import annotations

from dataclasses import replace

import torch

from ppgraph.passes.base import Builder, PassResult, Program, Site, StateInput
from ppgraph.passes.find_sites import Block
from ppgraph.passes.rebuild import unit_indices

aten = torch.ops.aten


class ReuseSelection:
    """Takes each pruned site's kept channels [C'] as an input of the graph: no probe, no score, no history.

    `program.shared["selectable"]` names the sites that the selection has. Leaves there, for each of them,
    `("kept", name)`: the kept units [U'] and the kept channels [C'].
    """

    name = "reuse_selection"
    requires: tuple[str, ...] = ("find_sites",)

    def __call__(self, program: Program) -> PassResult:
        inserted = 0
        selectable = program.shared["selectable"]
        program.sites = [site if site.name in selectable else _left_dense(site) for site in program.sites]
        for site in program.pruned_sites:
            block: Block = program.analysis[site.name]
            build = Builder(program, block.exit_linear, self.name)
            value = block.stream.meta["val"].new_empty((site.kept_units,), dtype=torch.int64)
            units = program.add_state_input(StateInput("units", site.name), value)
            program.shared["kept", site.name] = (units, unit_indices(build, units, site.block))
            inserted += build.inserted
        return PassResult(inserted)


def _left_dense(site: Site) -> Site:
    if site.status == "dense":
        return site
    return replace(site, status="dense", kept=site.width, reason="the prompt, or calibration, left it dense")
