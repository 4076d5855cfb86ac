"""`observe_channels`: calibration's running mean over samples, each position with its own count."""

from __future__ import annotations

import math

import pytest
import torch

from ppgraph.errors import GraphError
from ppgraph.passes import CALIBRATE
from ppgraph.passes.observe_channels import ObserveChannels
from tests.passes.graphs import SITE, SMALL, Captured, MaskedResidual, Mlp, Residual, captured, hidden, targets

POSITIONS = 6


def observing(module: Residual, *inputs: torch.Tensor) -> Captured:
    graph = captured(module, *inputs)
    graph.apply(*CALIBRATE)
    return graph


def fresh(graph: Captured) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    known = {"seen": torch.zeros(POSITIONS), "history": torch.zeros(POSITIONS, 12)}
    return [known[item.role] for item in graph.program.state_inputs], known["history"], known["seen"]


def squares(block: Mlp, x: torch.Tensor) -> torch.Tensor:
    return torch.relu(block.up(x)).square()


def test_batches_add_up_to_the_mean_over_samples() -> None:
    graph = observing(Residual(block := Mlp()))
    state, history, seen = fresh(graph)
    x = hidden(5, POSITIONS)
    for part in (x[:2], x[2:]):
        torch.testing.assert_close(graph.output(part, state=state), part + block(part))  # the pass is dense
    torch.testing.assert_close(history, squares(block, x).mean(0))
    assert seen.tolist() == [5] * POSITIONS


def test_each_position_counts_its_own_samples() -> None:
    graph = observing(MaskedResidual(block := Mlp()), hidden(), torch.ones(3, 5, dtype=torch.long))
    state, history, seen = fresh(graph)
    x = hidden(2, POSITIONS)
    graph.output(x, torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]), state=state)
    left, right = squares(block, x[0, 2:]), squares(block, x[1, :3])
    expected = torch.cat([(left[:3] + right) / 2, left[3:], torch.zeros(2, 12)])
    torch.testing.assert_close(history, expected)
    assert seen.tolist() == [2, 2, 2, 1, 0, 0]


def test_a_bad_batch_changes_nothing() -> None:
    graph = observing(Residual(Mlp()))
    state, history, seen = fresh(graph)
    x = hidden(3, POSITIONS)
    graph.output(x, state=state)
    before = history.clone(), seen.clone()
    x[0, 0, 0] = math.inf
    assert graph.results(x, state=state)["finite"].tolist() == [False]
    assert torch.equal(history, before[0])
    assert torch.equal(seen, before[1])


def test_without_pruned_sites_there_is_nothing_to_observe() -> None:
    graph = captured(Residual(Mlp()), config=SMALL.replace(ratio=0.0))
    graph.apply(*CALIBRATE)
    assert graph.program.results == {}
    assert targets(graph.program) == ["linear", "relu", "linear", "add"]


def test_it_needs_sites_and_runs_once() -> None:
    with pytest.raises(GraphError, match="observe_channels needs find_sites"):
        captured(Residual(Mlp())).apply(ObserveChannels())
    graph = observing(Residual(Mlp()))
    assert [(item.role, item.site) for item in graph.program.state_inputs] == [("seen", ""), ("history", SITE)]
    with pytest.raises(GraphError, match="observe_channels has already run"):
        graph.apply(ObserveChannels())
