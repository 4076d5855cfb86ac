"""`run_passes`: order, records, and what becomes of results."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn

from ppgraph.errors import GraphError
from ppgraph.passes import ANALYSE, CALIBRATE, PRUNE, REUSE, Builder, PassResult, Program, manager
from tests.passes.graphs import Expose, Mlp, Residual, captured, hidden, targets

aten = torch.ops.aten


@dataclass
class Noting:
    """A pass that does nothing but refuse."""

    name: str = "noting"
    requires: tuple[str, ...] = ()

    def __call__(self, program: Program) -> PassResult:
        return PassResult(refused=["somewhere: neg (aten.neg): no reason"])


class Negating:
    """A pass that adds one node, which becomes a result."""

    name = "negating"
    requires: tuple[str, ...] = ("noting",)

    def __call__(self, program: Program) -> PassResult:
        build = Builder(program, program.output(), self.name)
        program.results["negated"] = build(aten.neg.default, program.output().args[0][0])
        build(aten.abs.default, program.results["negated"])  # used by nobody
        return PassResult(build.inserted)


def test_results_become_outputs_and_what_nobody_uses_goes() -> None:
    graph = captured(Residual(block := Mlp()))
    graph.apply(Noting(), Negating())
    assert targets(graph.program) == ["linear", "relu", "linear", "add", "neg"]
    x = hidden()
    with torch.no_grad():
        expected = x + block(x)
    torch.testing.assert_close(graph.results(x)["negated"], -expected)
    torch.testing.assert_close(graph.output(x), expected)
    assert len(graph.program.output().args[0]) == 2


class Window(nn.Module):
    """Makes room for a new token in its input, as full sliding windows do, and reads the input again."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x.copy_(torch.cat([x[:, 1:], x[:, :1].neg()], 1))
        return x.relu(), x.sum(1).exp()


class Rereading:
    """A pass that reads the old tokens once more, at the graph's end, and then adds something else."""

    name = "rereading"
    requires: tuple[str, ...] = ()

    def __call__(self, program: Program) -> PassResult:
        build = Builder(program, program.output(), self.name)
        old = next(node for node in program.graph.nodes if node.args[1:3] == (1, 1))
        program.results["old"] = build(aten.abs.default, old)
        program.results["else"] = build(aten.neg.default, program.output().args[0][0])
        return PassResult(build.inserted)


def test_an_input_is_overwritten_behind_all_that_reads_it_passes_included() -> None:
    graph = captured(Window())
    graph.apply(Rereading())
    *_, read, written, last = targets(graph.program)
    assert (read, written, last) == ("abs", "copy_", "neg")
    old, x = hidden(), hidden()
    found = graph.values(x)
    torch.testing.assert_close(x, torch.cat([old[:, 1:], -old[:, :1]], 1))
    torch.testing.assert_close(found[graph.program.results["old"]], old[:, 1:].abs())
    torch.testing.assert_close(graph.output(hidden()), x.relu())


def test_each_pass_is_recorded_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    graph = captured(Residual(Mlp()))
    with caplog.at_level(logging.INFO, "ppgraph.passes"):
        graph.apply(Noting(), Negating())
    assert graph.program.applied == ["noting", "negating"]
    lines = [record.getMessage() for record in caplog.records if record.name == "ppgraph.passes"]
    assert lines[0].startswith("noting: 0 nodes added, 1 refusals, ")
    assert lines[1] == "noting refused somewhere: neg (aten.neg): no reason"
    assert lines[2].startswith("negating: 2 nodes added, 0 refusals, ")


def test_observers_are_told_how_long_each_stage_took(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = captured(Residual(Mlp()))
    told: list[tuple[str, float]] = []
    graph.program.observer = lambda program, stage, outcome, elapsed_ms: told.append((stage, elapsed_ms))
    monkeypatch.setattr(manager.time, "perf_counter", partial(next, itertools.count(10)))
    graph.apply(Noting(), Negating())
    assert told == [("captured", 0.0), ("noting", 1e3), ("negating", 1e3), ("attach_results", 1e3)]


def test_order_and_repetition_are_checked_before_a_pass_touches_the_graph() -> None:
    graph = captured(Residual(Mlp()))
    with pytest.raises(GraphError, match="negating needs noting to run before it; found none"):
        graph.apply(Negating())
    graph.apply(Noting())
    with pytest.raises(GraphError, match="noting has already run on this graph; capture the model again"):
        graph.apply(Noting())
    assert targets(graph.program) == ["linear", "relu", "linear", "add"]


@pytest.mark.parametrize("passes", [ANALYSE, PRUNE, REUSE, CALIBRATE])
def test_the_pipelines_meet_their_own_requirements(passes: tuple[Expose, ...]) -> None:
    done: list[str] = []
    for step in passes:
        assert set(step.requires) <= set(done)
        done.append(step.name)
    assert len(done) == len(set(done))


def test_a_whole_pipeline_refuses_a_rewritten_graph() -> None:
    graph = captured(Residual(Mlp()))
    graph.apply(*PRUNE)
    before = targets(graph.program)
    for passes in (PRUNE, CALIBRATE, REUSE):
        with pytest.raises(GraphError, match="find_sites has already run"):
            graph.apply(*passes)
    assert targets(graph.program) == before
