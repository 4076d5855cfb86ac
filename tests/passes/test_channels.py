"""The channel analysis: where a block's channels come from, and where the walk has to stop."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ppgraph.passes import ANALYSE
from ppgraph.passes.channels import Narrowing
from ppgraph.passes.operators import Axis
from tests.passes.graphs import HIDDEN, SITE, Attention, Captured, Mlp, Residual, captured


def plan_of(block: nn.Module) -> tuple[Captured, Narrowing]:
    graph = captured(Residual(block))
    graph.apply(*ANALYSE)
    assert graph.program.analysis[SITE] is not None, graph.program.sites[0].reason
    return graph, graph.program.analysis[SITE].narrowing


def actions(plan: Narrowing) -> dict[str, str]:
    return {node.name: action for node, action in plan.actions.items()}


def test_the_walk_ends_at_the_linears_that_make_the_channels() -> None:
    graph, plan = plan_of(Mlp())
    assert actions(plan) == {"relu": "copy", "linear": "leaf"}
    assert plan.stops == []
    (layout,) = plan.entries[graph.calls["linear"]].narrowed.values()
    assert layout.consecutive
    assert layout.distinct
    assert layout.channels.shape == (12, 1)


def test_heads_are_units_of_their_channels() -> None:
    graph, plan = plan_of(Attention())
    attention = next(node for node in graph.calls.values() if "attention" in node.name)
    assert plan.axes[attention] == Axis(1)
    assert plan.actions[attention] == "copy"
    assert len(plan.entries) == 3
    layouts = [layout for entry in plan.entries.values() for layout in entry.narrowed.values()]
    assert {tuple(layout.channels.shape) for layout in layouts} == {(4, 2)}


def test_shared_key_heads_stay_whole_and_are_indexed() -> None:
    graph, plan = plan_of(Attention(2))
    attention = next(node for node in graph.calls.values() if "attention" in node.name)
    assert plan.actions[attention] == "share_keys"
    assert len(plan.entries) == 1


class Interleaved(nn.Module):
    """Gate and up in one projection, taking turns channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 24, bias=False), nn.Linear(12, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.up(x).view(x.shape[0], x.shape[1], 12, 2).unbind(-1)
        return self.down(F.silu(gate) * up)


def test_the_layout_of_a_fused_projection_is_read_off_its_views() -> None:
    _graph, plan = plan_of(Interleaved())
    (entry,) = plan.entries.values()
    rows = sorted(layout.channels.flatten().tolist() for layout in entry.narrowed.values())
    assert rows == [list(range(24))], "units of two channels that lie side by side"
    assert entry.whole == {}
    assert all(layout.distinct and layout.consecutive for layout in entry.narrowed.values())


class ReadElsewhere(nn.Module):
    """The channels' sum is used too: the activation has to be there as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 12, bias=False), nn.Linear(12, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = F.relu(self.up(x))
        return self.down(up) * up.mean()


def test_a_value_that_is_needed_whole_is_refused_where_nothing_is_left_to_narrow() -> None:
    graph = captured(Residual(ReadElsewhere()))
    (site,) = graph.apply(*ANALYSE).sites
    assert site.status == "dense"
    assert "relu (aten.relu): its value is needed whole elsewhere" in site.reason


class PartlyWhole(nn.Module):
    """Of two factors one can be narrowed; the other is normalised over all channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(HIDDEN, 12, bias=False) for _ in range(2))
        self.down = nn.Linear(12, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x) * F.softmax(self.gate(x), -1))


def test_what_cannot_be_narrowed_is_indexed_and_the_stop_is_told() -> None:
    _graph, plan = plan_of(PartlyWhole())
    assert actions(plan)["softmax"] == "select"
    assert [stop.node.name for stop in plan.stops] == ["softmax"]
    assert "it mixes dimension 2" in str(plan.stops[0])
    assert len(plan.entries) == 1


class Twisted(nn.Module):
    """One value is wanted along two dimensions at once."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 16, bias=False), nn.Linear(16, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        square = self.up(x).view(x.shape[0], x.shape[1], 4, 4)
        return self.down((square + square.transpose(2, 3)).flatten(2))


def test_units_that_meet_in_two_dimensions_are_refused() -> None:
    (site,) = captured(Residual(Twisted())).apply(*ANALYSE).sites
    assert site.status == "dense"
    assert site.reason


@pytest.mark.parametrize("block", [Mlp(), Attention(), Attention(2), Interleaved(), PartlyWhole()])
def test_planning_changes_nothing(block: nn.Module) -> None:
    graph = captured(Residual(block))
    before = str(graph.program.graph)
    graph.apply(*ANALYSE)
    assert str(graph.program.graph) == before
