"""`verify`: a graph that breaks a promise does not get past the pass that broke it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from ppgraph.errors import GraphError
from ppgraph.passes import CALIBRATE, PRUNE, Pass, PassResult, Program
from tests.passes.graphs import SITE, Captured, Mlp, Residual, captured

aten = torch.ops.aten


class Breaking:
    """Runs another pass and then breaks what it promises."""

    def __init__(self, step: Pass, damage: Callable[[Program], object]) -> None:
        self.step, self.damage = step, damage
        self.name, self.requires = step.name, step.requires

    def __call__(self, program: Program) -> PassResult:
        outcome = self.step(program)
        self.damage(program)
        return outcome


def broken(damage: Callable[[Program], object], passes: tuple[Pass, ...], at: int) -> Captured:
    graph = captured(Residual(Mlp()))
    graph.apply(*passes[:at], Breaking(passes[at], damage))
    return graph


def keep_fewer(program: Program) -> None:
    program.sites = [replace(site, kept=5) for site in program.sites]


def node_without_a_value(program: Program) -> None:
    with program.graph.inserting_before(program.output()):
        program.graph.call_function(aten.neg.default, (program.output().args[0][0],))


def forget_the_probe(program: Program) -> None:
    del program.shared["probe", SITE]


def probe_something_narrower(program: Program) -> None:
    probe = program.shared["probe", SITE]
    program.shared["probe", SITE] = replace(probe, y=program.analysis[SITE].stream)


def put_the_exit_back(program: Program) -> None:
    block = program.analysis[SITE]
    with program.graph.inserting_before(program.output()):
        dense = program.graph.call_function(aten.neg.default, (program.placeholders()[0],))
    dense.meta["val"] = program.output().args[0][0].meta["val"]
    program.analysis[SITE] = replace(block, exit_linear=dense)


def write_twice(program: Program) -> None:
    (write,) = (node for node in program.graph.nodes if node.target is aten.index_copy_.default)
    with program.graph.inserting_after(write):
        again = program.graph.node_copy(write)
    again.meta["val"] = write.meta["val"]


def observe_twice(program: Program) -> None:
    write = next(node for node in program.graph.nodes if node.target is aten.copy_.default)
    with program.graph.inserting_after(write):
        again = program.graph.node_copy(write)
    again.meta["val"] = write.meta["val"]


@pytest.mark.parametrize(
    ("damage", "passes", "at", "message"),
    [
        (node_without_a_value, PRUNE, 0, r"after find_sites: neg\w* carries no fake value; passes add nodes through"),
        (forget_the_probe, PRUNE, 1, f"after insert_probe: {SITE} has no probe of its 12 channels"),
        (probe_something_narrower, PRUNE, 1, f"{SITE} has no probe of its 12 channels"),
        (keep_fewer, PRUNE, 2, rf"after insert_score: {SITE} keeps \[6\] channels, not 5"),
        (keep_fewer, PRUNE, 3, f"after select_weights: {SITE} has width 6, not 5"),
        (put_the_exit_back, PRUNE, 3, f"after select_weights: the dense exit linear of {SITE} is still in the graph"),
        (write_twice, PRUNE, 7, "a history is written twice in one graph"),
        (observe_twice, CALIBRATE, 1, "a history is written twice in one graph"),
    ],
)
def test_a_broken_promise_is_named(
    damage: Callable[[Program], object], passes: tuple[Pass, ...], at: int, message: str
) -> None:
    with pytest.raises(GraphError, match=message):
        broken(damage, passes, at)


def use_before_definition(program: Program) -> None:
    last = program.output().args[0][0]
    first = next(node for node in program.graph.nodes if node.op == "call_function")
    first.args = (last, *first.args[1:])


def test_an_illegal_graph_is_caught_by_lint() -> None:
    with pytest.raises(GraphError, match=r"after find_sites: .*was used before it has been defined"):
        broken(use_before_definition, PRUNE, 0)


@pytest.mark.parametrize("passes", [PRUNE, CALIBRATE])
def test_what_the_passes_leave_is_legal(passes: tuple[Pass, ...]) -> None:
    broken(lambda program: None, passes, len(passes) - 1)
