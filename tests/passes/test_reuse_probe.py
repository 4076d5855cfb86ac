"""`reuse_probe`: the full products run on the rows that were not probed, and the result is the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import Node
from torch.nn import functional as F

from ppgraph.config import PruneConfig
from ppgraph.errors import GraphError
from ppgraph.passes import PRUNE, Program
from ppgraph.passes.base import StateInput
from ppgraph.passes.reuse_probe import ReuseProbe
from tests.passes.graphs import (
    SMALL,
    Attention,
    ByPosition,
    Captured,
    Flattened,
    Fused,
    Mlp,
    Residual,
    captured,
    hidden,
)

SELECTED, REUSED = PRUNE[:5], PRUNE[:7]
PROBED = SMALL.replace(statistics="probe")


def state_of(program: Program) -> list[torch.Tensor]:
    """Weight terms that rank channels by number, and the constants."""

    def value(item: StateInput, node: Node) -> torch.Tensor:
        if item.constant is not None:
            return item.constant
        return torch.arange(1.0, 1 + node.meta["val"].numel())

    nodes = program.placeholders()[-len(program.state_inputs) :]
    return [value(item, node) for item, node in zip(program.state_inputs, nodes, strict=True)]


def output(block: nn.Module, x: torch.Tensor, config: PruneConfig, *, reused: bool) -> tuple[torch.Tensor, Captured]:
    graph = captured(Residual(block), config=config)
    graph.apply(*(REUSED if reused else SELECTED))
    return graph.output(x, state=state_of(graph.program)), graph


def rows_of_linears(graph: Captured, x: torch.Tensor) -> list[int]:
    """On how many rows each linear of the pruned block runs, the probe's own left out."""
    values = graph.values(x, state=state_of(graph.program))
    linears = [node for node in graph.calls.values() if node.target is torch.ops.aten.linear.default]
    own = [node for node in linears if node.meta.get("ppgraph_pass") != "insert_probe"]
    return [values[node].numel() // values[node].shape[-1] for node in own]


class Gated(Mlp):
    """A gate beside the other entry linear."""

    def __init__(self) -> None:
        super().__init__(bias=True)
        self.gate = nn.Linear(8, 12, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Scaled(Mlp):
    """Channels are scaled and shifted, by numbers that all rows share."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(12)), nn.Parameter(torch.ones(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.relu(self.up(x)) * self.scale + self.shift)


class FlattenedFused(Fused):
    """Gate and up are one linear, on [samples times tokens, hidden]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)


# 4 samples of 6 tokens: of 24 rows, 3 are probed.
X = hidden(4, 6)


@pytest.mark.parametrize(
    ("block", "rows"),
    [
        (Mlp(), [3, 21, 21]),  # the exit runs on all rows, the probe's apart
        (Gated(), [3, 21, 21, 21]),
        (Scaled(), [3, 21, 21]),
        (Flattened(), [3, 21, 21]),
        (FlattenedFused(), [3, 21, 21]),
        (Attention(), [21, 21, 21, 24]),
        (Attention(2), [21, 21, 21, 24]),  # keys and values of groups stay whole, but for the probe's rows
    ],
    ids=["mlp", "gated", "scaled", "flattened", "fused", "mha", "gqa"],
)
def test_products_leave_out_the_rows_that_were_probed(block: nn.Module, rows: list[int]) -> None:
    expected, _ = output(block, X, PROBED, reused=False)
    found, graph = output(block, X, PROBED, reused=True)
    torch.testing.assert_close(found, expected)
    assert sorted(rows_of_linears(graph, X)) == rows


def test_where_all_rows_are_probed_only_the_exit_is_left() -> None:
    config = PROBED.replace(probe_batch=1.0, probe_tokens=1.0)
    for block in (Gated(), Attention()):
        expected, _ = output(block, X, config, reused=False)
        found, graph = output(block, X, config, reused=True)
        torch.testing.assert_close(found, expected)
        assert rows_of_linears(graph, X) == [24]


def test_two_tokens_of_one_sample_are_all_probed_without_another_graph() -> None:
    x = hidden(2, 2)[:1]
    for block in (Gated(), Attention()):
        expected, _ = output(block, x, PROBED, reused=False)
        found, graph = output(block, x, PROBED, reused=True)
        torch.testing.assert_close(found, expected)
        assert rows_of_linears(graph, x).count(0) in (2, 3)


def test_a_block_that_does_not_act_on_rows_alone_goes_on_in_order_after_its_linears() -> None:
    block = ByPosition()
    expected, _ = output(block, X, PROBED, reused=False)
    found, graph = output(block, X, PROBED, reused=True)
    torch.testing.assert_close(found, expected)
    assert sorted(rows_of_linears(graph, X)) == [21, 24]


def test_a_history_alone_has_no_rows_to_reuse() -> None:
    graph = captured(Residual(Mlp()), config=SMALL.replace(statistics="history"))
    graph.apply(*REUSED)
    assert all(node.meta.get("ppgraph_pass") != "reuse_probe" for node in graph.program.graph.nodes)


def test_it_needs_the_selection_and_runs_once() -> None:
    with pytest.raises(GraphError, match="reuse_probe needs insert_probe, select_weights"):
        captured(Residual(Mlp())).apply(ReuseProbe())
    graph = captured(Residual(Mlp()))
    graph.apply(*REUSED)
    with pytest.raises(GraphError, match="reuse_probe has already run"):
        graph.apply(ReuseProbe())
