"""`insert_score`: fused statistics, scores, and the indices of what is kept; checked against plain arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch.fx import Node

from ppgraph.config import PruneConfig
from ppgraph.errors import GraphError
from ppgraph.passes import ANALYSE, Program
from ppgraph.passes.insert_probe import InsertProbe
from ppgraph.passes.insert_score import InsertScore
from tests.passes.graphs import SITE, SMALL, Attention, Captured, Expose, Mlp, Residual, captured, hidden

HALF = SMALL.replace(probe_batch=0.5, probe_tokens=0.5)
POSITIONS = 6


def expose(program: Program) -> dict[str, Node]:
    found = {"f": program.shared["statistics", SITE]}
    probe = program.shared.get(("probe", SITE))
    return found | ({"y": probe.y, "tokens": probe.sampling.tokens} if probe else {})


def scored(module: Residual, config: PruneConfig = HALF) -> Captured:
    graph = captured(module, config=config)
    graph.apply(*ANALYSE, InsertProbe(), InsertScore(), Expose(expose))
    return graph


def state(graph: Captured, width: int) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(1)
    known = {
        "history": torch.rand(POSITIONS, width, generator=made),
        "weight_term": torch.rand(width, generator=made) + 0.5,
    }
    return [known[item.role] for item in graph.program.state_inputs]


def highest(scores: torch.Tensor, count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda place: -float(scores[place]))[:count])


def test_probe_and_history_are_fused_by_importance() -> None:
    graph = scored(Residual(Mlp()))
    history, term = given = state(graph, 12)
    found = graph.results(hidden(4, POSITIONS), state=given)
    p, g = found["y"].square().mean(0), history[found["tokens"]]
    share = p / (p + g + 1e-6)
    f = (share * p + (1 - share) * g).sum(0)
    torch.testing.assert_close(found["f"], f)
    assert found[SITE].tolist() == highest(f * term, 6)
    assert [item.role for item in graph.program.state_inputs] == ["history", "weight_term"]


def test_the_probe_alone() -> None:
    graph = scored(Residual(Mlp()), HALF.replace(statistics="probe"))
    (term,) = given = state(graph, 12)
    found = graph.results(hidden(4, POSITIONS), state=given)
    torch.testing.assert_close(found["f"], found["y"].square().mean(0).sum(0))
    assert found[SITE].tolist() == highest(found["f"] * term, 6)


@pytest.mark.parametrize("score", ["ppsp", "wanda-sp"])
def test_the_history_alone(score: str) -> None:
    graph = scored(Residual(Mlp()), SMALL.replace(statistics="history", score=score))
    history, term = given = state(graph, 12)
    found = graph.results(hidden(4, POSITIONS), state=given)
    f = history.sum(0)
    torch.testing.assert_close(found["f"], f)
    assert found[SITE].tolist() == highest((f if score == "ppsp" else f.sqrt()) * term, 6)


@pytest.mark.parametrize("score", ["ppsp", "wanda-sp"])
def test_heads_are_kept_and_dropped_as_a_whole(score: str) -> None:
    graph = scored(Residual(Attention()), SMALL.replace(statistics="history", score=score))
    history, term = given = state(graph, 8)
    kept = graph.results(hidden(4, POSITIONS), state=given)[SITE]
    channels = (history.sum(0) if score == "ppsp" else history.sum(0).sqrt()) * term
    by_head = channels.view(4, 2)
    heads = highest(by_head.norm(dim=1) if score == "ppsp" else by_head.sum(1), 2)
    assert kept.tolist() == [channel for head in heads for channel in (2 * head, 2 * head + 1)]


def test_of_equal_scores_the_first_are_kept() -> None:
    graph = scored(Residual(Mlp()), SMALL.replace(statistics="history"))
    kept = graph.results(hidden(2, POSITIONS), state=[torch.ones(POSITIONS, 12), torch.ones(12)])[SITE]
    assert kept.tolist() == list(range(6))


def test_statistics_are_fp32_whatever_the_model() -> None:
    graph = captured(Residual(Mlp()).to(torch.bfloat16), hidden().to(torch.bfloat16), config=HALF)
    graph.apply(*ANALYSE, InsertProbe(), InsertScore(), Expose(expose))
    assert graph.program.shared["probe", SITE].y.meta["val"].dtype == torch.bfloat16
    assert graph.program.shared["statistics", SITE].meta["val"].dtype == torch.float32
    assert all(node.meta["val"].dtype == torch.float32 for node in graph.program.state_nodes("history"))


def test_it_needs_a_probe_and_runs_once() -> None:
    graph = captured(Residual(Mlp()))
    graph.apply(*ANALYSE)
    with pytest.raises(GraphError, match=r"insert_score needs insert_probe to run before it; found \['find_sites'\]"):
        graph.apply(InsertScore())
    graph.apply(InsertProbe(), InsertScore())
    with pytest.raises(GraphError, match="insert_score has already run"):
        graph.apply(InsertScore())
