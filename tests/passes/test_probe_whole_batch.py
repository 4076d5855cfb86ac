"""`probe_whole_batch`: a batch that runs dense is its own probe."""

from __future__ import annotations

import pytest
import torch

from ppgraph.config import PruneConfig
from ppgraph.errors import GraphError
from ppgraph.passes import ANALYSE, CHOOSE
from ppgraph.passes.insert_score import InsertScore
from ppgraph.passes.probe_whole_batch import ProbeWholeBatch
from tests.passes.graphs import SITE, SMALL, Captured, MaskedResidual, Mlp, Residual, captured, hidden, targets

CONFIG = SMALL.replace(history_momentum=0.875)
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])


def choosing(module: Residual, *inputs: torch.Tensor, config: PruneConfig = CONFIG) -> Captured:
    graph = captured(module, *inputs, config=config)
    graph.apply(*CHOOSE)
    return graph


def squares(block: Mlp, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.relu(block.up(x)).square()


def highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    return scores.topk(count).indices.sort().values


def test_nothing_that_multiplies_weights_is_added() -> None:
    graph = captured(Residual(Mlp()), config=CONFIG)
    before = targets(graph.program).count("linear")
    program = graph.apply(*CHOOSE)
    assert targets(program).count("linear") == before
    read = [user for node in program.parameters for user in node.users]
    assert {str(node.target) for node in read} == {"aten.linear.default"}


def test_the_result_is_dense_and_the_history_learns_of_all_channels() -> None:
    module = Residual(block := Mlp())
    graph, x, history = choosing(module), hidden(4, 6), torch.ones(6, 12)
    values = graph.values(x, state=[history, torch.ones(12)])
    with torch.no_grad():
        assert torch.equal(values[graph.program.output().args[0][0]], module(x))
    torch.testing.assert_close(history, 0.875 + 0.125 * squares(block, x).mean(0))


@pytest.mark.parametrize("choice", ["largest", "spread"])
def test_every_real_token_counts(choice: str) -> None:
    config = CONFIG.replace(statistics="probe", probe_choice=choice)
    graph = choosing(MaskedResidual(block := Mlp()), hidden(), torch.ones(3, 5, dtype=torch.long), config=config)
    x = hidden(3, 5)
    found = graph.results(x, MASK, state=[torch.ones(12)])[SITE]
    shown = squares(block, x)
    aligned = torch.zeros(3, 5, 12)
    for sample, real in enumerate(MASK.bool()):
        aligned[sample, : int(real.sum())] = shown[sample, real]
    by_place = aligned.sum(0) / torch.tensor([3.0, 3, 3, 1, 1])[:, None]
    statistics = by_place.sum(0) if choice == "largest" else aligned.sum((0, 1))
    assert torch.equal(found, highest(statistics, len(found)))


def test_scores_need_it_and_it_runs_once() -> None:
    graph = captured(Residual(Mlp()), config=CONFIG)
    graph.apply(*ANALYSE)
    with pytest.raises(GraphError, match="insert_score needs probe_whole_batch to run before it"):
        graph.apply(InsertScore("probe_whole_batch"))
    graph.apply(ProbeWholeBatch())
    with pytest.raises(GraphError, match="probe_whole_batch has already run"):
        graph.apply(ProbeWholeBatch())
