"""`update_history`: the moving average of what full inference showed, behind one flag."""

from __future__ import annotations

import math

import pytest
import torch

from ppgraph.config import PruneConfig
from ppgraph.errors import GraphError
from ppgraph.passes import PRUNE
from ppgraph.passes.update_history import UpdateHistory
from tests.passes.graphs import SITE, SMALL, Captured, MaskedResidual, Mlp, Residual, captured, hidden, targets

POSITIONS = 6
EIGHTH = SMALL.replace(history_momentum=0.875)


def updating(module: Residual, *inputs: torch.Tensor, config: PruneConfig = EIGHTH) -> Captured:
    graph = captured(module, *inputs, config=config)
    graph.apply(*PRUNE)
    return graph


def history_of_ones() -> torch.Tensor:
    return torch.ones(POSITIONS, 12)


def squares(block: Mlp, x: torch.Tensor) -> torch.Tensor:
    return torch.relu(block.up(x)).square()


def test_kept_channels_move_towards_this_batch() -> None:
    graph = updating(Residual(block := Mlp()))
    history, x = history_of_ones(), hidden(4, POSITIONS)
    kept = graph.results(x, state=[history, torch.ones(12)])[SITE]
    expected = history_of_ones()
    expected[:, kept] = 0.875 + 0.125 * squares(block, x).mean(0)[:, kept]
    torch.testing.assert_close(history, expected)


def test_padding_is_left_out_and_unseen_positions_stay() -> None:
    graph = updating(MaskedResidual(block := Mlp()), hidden(), torch.ones(3, 5, dtype=torch.long))
    history, x = history_of_ones(), hidden(2, POSITIONS)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    found = graph.results(x, mask, state=[history, torch.ones(12)])
    kept = found[SITE]
    left, right = squares(block, x[0, 2:]), squares(block, x[1, :3])
    means = torch.cat([(left[:3] + right) / 2, left[3:]])
    expected = history_of_ones()
    expected[:4, kept] = 0.875 + 0.125 * means[:, kept]
    torch.testing.assert_close(history, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_number_leaves_the_whole_history_as_it_was(bad: float) -> None:
    graph = updating(Residual(Mlp()))
    history, x = history_of_ones(), hidden(4, POSITIONS)
    x[1, 2, 3] = bad
    found = graph.results(x, state=[history, torch.ones(12)])
    assert found["finite"].tolist() == [False]
    assert torch.equal(history, history_of_ones())


def test_what_overflows_on_another_rank_leaves_the_history_as_it_was() -> None:
    block = Mlp(bias=True)
    graph = captured(MaskedResidual(block), hidden(), torch.ones(3, 5, dtype=torch.long), config=EIGHTH)
    graph.program.sharded = dict.fromkeys(graph.program.parameters)  # type: ignore[arg-type]
    graph.apply(*PRUNE)
    assert graph.program.checked == [SITE, "channels of another rank"]
    history, x = history_of_ones(), hidden(2, POSITIONS)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    x[0, 1] = math.inf  # padding
    state = [history, torch.ones(12)]
    assert graph.results(x, mask, state=state)["finite"].tolist() == [True, True]
    assert not torch.equal(before := history.clone(), history_of_ones())
    with torch.no_grad():
        block.down.bias[0] = math.inf  # as the sum over ranks brings it
    assert graph.results(x, mask, state=state)["finite"].tolist() == [True, False]
    assert torch.equal(history, before)


@pytest.mark.parametrize(
    "change", [{"history_momentum": 1.0}, {"statistics": "probe"}, {"statistics": "history"}], ids=str
)
def test_a_frozen_history_is_not_written_but_still_checked(change: dict[str, object]) -> None:
    graph = updating(Residual(Mlp()), config=EIGHTH.replace(**change))
    assert "index_copy_" not in targets(graph.program)
    assert "isfinite" in targets(graph.program, "update_history")


def test_writes_stand_last() -> None:
    graph = updating(Residual(Mlp()))
    assert targets(graph.program)[-1] == "index_copy_"


def test_without_pruned_sites_there_is_nothing_to_do() -> None:
    graph = updating(Residual(Mlp()), config=EIGHTH.replace(ratio=0.0))
    assert targets(graph.program) == ["linear", "relu", "linear", "add"]


def test_it_needs_selected_weights_and_runs_once() -> None:
    graph = captured(Residual(Mlp()))
    graph.apply(*PRUNE[:3])
    with pytest.raises(GraphError, match="update_history needs select_weights"):
        graph.apply(UpdateHistory())
    with pytest.raises(GraphError, match="update_history has already run"):
        updating(Residual(Mlp())).apply(UpdateHistory())
