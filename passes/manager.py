"""Runs passes over a program: in order, each once, timed, verified and recorded."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch
from torch.fx import Node

from ppgraph.errors import GraphError
from ppgraph.passes.base import Pass, PassResult, Program
from ppgraph.passes.operators import memory_of
from ppgraph.passes.verify import verify

log = logging.getLogger("ppgraph.passes")
aten = torch.ops.aten


def run_passes(program: Program, passes: Sequence[Pass]) -> Program:
    """Run `passes` over `program` in place, then attach their results to the graph's output.

    Raises:
        GraphError: a pass ran before, what it requires did not run, or it left an illegal graph.
    """
    observe = program.observer or _nobody
    if not program.applied:
        observe(program, "captured", PassResult(), 0.0)
    for step in passes:
        _check_order(program, step)
        start = time.perf_counter()
        outcome = step(program)
        verify(program, step.name)
        program.applied.append(step.name)
        elapsed_ms = 1e3 * (time.perf_counter() - start)
        log.info(
            "%s: %d nodes added, %d refusals, %.0f ms",
            step.name,
            outcome.inserted,
            len(outcome.refused),
            elapsed_ms,
        )
        for refusal in outcome.refused:
            log.info("%s refused %s", step.name, refusal)
        observe(program, step.name, outcome, elapsed_ms)
    start = time.perf_counter()
    _attach_results(program)
    observe(program, "attach_results", PassResult(), 1e3 * (time.perf_counter() - start))
    return program


def _nobody(program: Program, stage: str, outcome: PassResult, elapsed_ms: float) -> None:
    """The observer of a program that has none."""


def _check_order(program: Program, step: Pass) -> None:
    if step.name in program.applied:
        raise GraphError(f"{step.name} has already run on this graph; capture the model again to rewrite it again")
    missing = [name for name in step.requires if name not in program.applied]
    if missing:
        raise GraphError(f"{step.name} needs {', '.join(missing)} to run before it; found {program.applied or 'none'}")


def _attach_results(program: Program) -> None:
    """Results become outputs after the model's own; writes to inputs go to their layers, and what nothing uses goes."""
    output = program.output()
    (outputs,) = output.args
    assert isinstance(outputs, (tuple, list))
    output.args = ((*outputs, *program.results.values()),)
    _write_behind_last_readers(program)
    program.graph.eliminate_dead_code()
    program.graph.lint()
    program.module.recompile()


def _write_behind_last_readers(program: Program) -> None:
    """Overwrite inputs (full sliding windows) in the layer that reads them last, which can then free the new keys.

    Capture puts such writes at the graph's end, behind all that the passes add.
    """
    last: dict[Node, Node] = {}
    writes: list[Node] = []
    for node in program.graph.nodes:
        if node.target is aten.copy_.default and node.all_input_nodes[0].op == "placeholder":
            writes.append(node)
        else:
            last |= dict.fromkeys(map(memory_of, node.all_input_nodes), node)
    for node in writes:
        written, source = node.all_input_nodes
        max(last.get(written, source), source, program.first_call().prev).append(node)
