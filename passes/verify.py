"""What a legal graph looks like after each stage."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from ppgraph.errors import GraphError
from ppgraph.passes.base import Program, Site, shape_of

aten = torch.ops.aten


def verify(program: Program, stage: str) -> None:
    """Check the promises of `stage` and those that always hold.

    Raises:
        GraphError: naming the stage, the node and the broken promise.
    """
    try:
        program.graph.lint()
    except RuntimeError as error:
        raise GraphError(f"after {stage}: {error}") from error
    for node in program.graph.nodes:
        if node.op in ("placeholder", "call_function") and "val" not in node.meta and not _gives_nothing(node):
            raise GraphError(f"after {stage}: {node.name} carries no fake value; passes add nodes through Builder")
    check = PROMISES.get(stage)
    if check is not None:
        check(program)


def _gives_nothing(node: Node) -> bool:
    """Whether a call is an operator without results, as checks of a model's own are."""
    return isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.returns


def _every_site_is_probed(program: Program) -> None:
    for site in program.scored_sites:
        probe = program.shared.get(("probe", site.name))
        if program.config.statistics != "history" and (probe is None or shape_of(probe.y)[-1] != site.width):
            raise GraphError(f"after insert_probe: {site.name} has no probe of its {site.width} channels")


def _every_site_has_indices(program: Program) -> None:
    for site in program.pruned_sites:
        _, channels = program.shared["kept", site.name]
        width = _width(program, site)
        if shape_of(channels) != (width,):
            raise GraphError(f"after insert_score: {site.name} keeps {list(shape_of(channels))} channels, not {width}")


def _width(program: Program, site: Site) -> int:
    """The channels on which a site's tokens run: those kept, or fewer where some tokens keep all."""
    others = program.results.get(("others", site.name))
    return site.kept if others is None else shape_of(others)[0]


def _no_dense_exit_is_left(program: Program) -> None:
    for site in program.pruned_sites:
        narrowed: Node | None = program.shared["narrowed", site.name]
        width = _width(program, site)
        if narrowed is not None and shape_of(narrowed)[-1] != width:
            raise GraphError(f"after select_weights: {site.name} has width {shape_of(narrowed)[-1]}, not {width}")
        block = program.analysis[site.name]
        if any(node is block.exit_linear for node in program.graph.nodes):
            raise GraphError(f"after select_weights: the dense exit linear of {site.name} is still in the graph")


def _every_exit_is_compensated(program: Program) -> None:
    for site in program.pruned_sites:
        if program.config.compensation != "none" and ("compensation", site.name) not in program.shared:
            raise GraphError(f"after compensate_exit: nothing makes up for the channels that {site.name} lost")


def _history_is_written_once(program: Program) -> None:
    written = [
        node.args[0] for node in program.graph.nodes if node.target in (aten.index_copy_.default, aten.copy_.default)
    ]
    if len(written) != len(set(written)):
        raise GraphError("a history is written twice in one graph")


PROMISES: dict[str, Callable[[Program], None]] = {
    "insert_probe": _every_site_is_probed,
    "insert_score": _every_site_has_indices,
    "select_weights": _no_dense_exit_is_left,
    "compensate_exit": _every_exit_is_compensated,
    "update_history": _history_is_written_once,
    "observe_channels": _history_is_written_once,
}
