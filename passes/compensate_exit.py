"""Compensate the exits: each exit linear gets the weight and the constant that make up for the channels it lost."""

from __future__ import annotations

from functools import partial

import torch
from torch.fx import Node

from ppgraph.errors import MethodError
from ppgraph.methods import COMPENSATIONS, OBSERVATIONS, Compensation
from ppgraph.passes.base import Builder, PassResult, Program, Site, StateInput, shape_of
from ppgraph.passes.find_sites import Block
from ppgraph.passes.insert_probe import Probe
from ppgraph.passes.insert_score import checked_memory, moment_of
from ppgraph.passes.operators import is_one, linear_weight
from ppgraph.passes.rows import by_row

aten = torch.ops.aten


class CompensateExit:
    """Gives every pruned block's exit linear the configured compensation's weight [D, C'] and constant [D].

    Leaves in `program.shared`, for each site, `("compensation", name)`: both, the constant None when there is none, and
    `("moved", name)`: the moments that they are made of, where a prompt's probe has moved those that the history holds.
    """

    name = "compensate_exit"
    requires: tuple[str, ...] = ("find_sites", "select_weights")

    def __call__(self, program: Program) -> PassResult:
        compensation = COMPENSATIONS[program.config.compensation]
        if compensation is None:
            return PassResult()
        inserted = 0
        for site in program.pruned_sites:
            exit_linear: Node = program.shared["exit", site.name]
            build = Builder(program, exit_linear, self.name)
            weight, constant = _compensated(program, build, site, compensation)
            if site.kept:
                _replace_weight(build, program.analysis[site.name], exit_linear, weight)
            if constant is not None:
                _add_constant(Builder(program, exit_linear.next, self.name), exit_linear, constant)
            program.shared["compensation", site.name] = (weight, constant)
            inserted += build.inserted
        return PassResult(inserted)


def _compensated(program: Program, build: Builder, site: Site, compensation: Compensation) -> tuple[Node, Node | None]:
    block: Block = program.analysis[site.name]
    _, channels = program.shared["kept", site.name]
    whole = block.weight if block.weight_dim == 1 else build(aten.t.default, block.weight)
    moved = _moved(program, build, site)
    memory = {name: moved.get(name) or _remembered(program, site, block, name) for name in compensation.needs}
    name = f"compensation {program.config.compensation!r}"
    found = build.inline(name, compensation.compensate, whole, channels, memory)
    weight, constant = found if isinstance(found, (tuple, list)) and len(found) == 2 else (found, found)
    width = shape_of(whole)[0]
    kept = shape_of(channels)[0]
    fits = shape_of(weight) == (width, kept) and (constant is None or shape_of(constant) == (width,))
    if not fits:
        shown = [list(shape_of(part)) if isinstance(part, Node) else part for part in (weight, constant)]
        raise MethodError(f"{name} must give a weight {[width, kept]} and a constant {[width]} or None, found {shown}")
    return weight, constant


def _moved(program: Program, build: Builder, site: Site) -> dict[str, Node]:
    """The site's moments after this batch's probe; none where it doesn't move them."""
    observation = OBSERVATIONS[program.config.observed]
    probe: Probe | None = program.shared.get(("probe", site.name))
    if observation.probed is None or probe is None or not _is_prompt_by_rows(program, site, probe):
        return {}
    moments = {name: moment_of(program, site, name) for name in observation.moments}
    y = build(aten.to.dtype, by_row(build, probe.y), torch.float32)
    real = None if probe.sampling.real is None else build(aten.reshape.default, probe.sampling.real, [-1])
    name = program.config.observed
    found = build.inline(f"observation {name!r}", observation.probed, moments, y, real)
    moved = checked_memory(name, found, {moment: shape_of(node) for moment, node in moments.items()})
    program.shared["moved", site.name] = moved
    return moved


def _is_prompt_by_rows(program: Program, site: Site, probe: Probe) -> bool:
    """Whether the history moves, and the probe shows rows from all over a prompt: a step's would tell nothing."""
    length = shape_of(program.analysis[site.name].stream)[1]
    return program.config.moves_history and probe.sampling.tokens is None and not is_one(length)


def _replace_weight(build: Builder, block: Block, exit_linear: Node, weight: Node) -> None:
    selected, dim = linear_weight(exit_linear)
    weight = build(aten.to.dtype, weight, selected.meta["val"].dtype)
    exit_linear.replace_input_with(selected, weight if dim == 1 else build(aten.t.default, weight))


def _add_constant(build: Builder, exit_linear: Node, constant: Node) -> None:
    added = build.add(exit_linear, build(aten.to.dtype, constant, exit_linear.meta["val"].dtype))
    exit_linear.replace_all_uses_with(added, delete_user_cb=partial(_is_other, added))


def _is_other(added: Node, user: Node) -> bool:
    return user is not added


def _remembered(program: Program, site: Site, block: Block, name: str) -> Node:
    """What the history holds of a site, an input of the graph: a moment, or a tensor's mean over positions, [C] fp32.

    The positions are those that calibration saw.
    """
    if name in OBSERVATIONS[program.config.observed].moments:
        return moment_of(program, site, name)
    value = block.stream.meta["val"].new_empty((site.width,), dtype=torch.float32)
    return program.add_state_input(StateInput("centre", site.name, tensor=name), value)
