"""`reuse_selection`: a step of decoding takes what a prefill chose."""

from __future__ import annotations

import pytest
import torch

from ppgraph.errors import GraphError
from ppgraph.passes import ANALYSE
from ppgraph.passes.reuse_selection import ReuseSelection
from tests.passes.graphs import SITE, Attention, Captured, Expose, Mlp, Residual, captured, hidden


def reusing(block: torch.nn.Module, selectable: set[str]) -> Captured:
    graph = captured(Residual(block))
    graph.program.shared["selectable"] = selectable
    expose = Expose(lambda program: {"channels": program.shared["kept", SITE][1]} if selectable else {})
    graph.apply(*ANALYSE, ReuseSelection(), expose)
    return graph


def test_kept_channels_are_an_input() -> None:
    graph = reusing(Mlp(), {SITE})
    assert [(item.role, item.site) for item in graph.program.state_inputs] == [("units", SITE)]
    (units,) = graph.program.state_nodes("units")
    assert (units.meta["val"].shape, units.meta["val"].dtype) == ((6,), torch.int64)


def test_kept_heads_become_their_channels() -> None:
    graph = reusing(Attention(), {SITE})
    (units,) = graph.program.state_nodes("units")
    assert units.meta["val"].shape == (2,)
    assert graph.results(hidden(), state=[torch.tensor([0, 3])])["channels"].tolist() == [0, 1, 6, 7]


def test_what_the_prefill_left_dense_stays_dense() -> None:
    graph = reusing(Mlp(), set())
    (site,) = graph.program.sites
    assert (site.status, site.kept, site.reason) == ("dense", 12, "the prompt, or calibration, left it dense")
    assert graph.program.state_inputs == []


def test_it_needs_sites_and_runs_once() -> None:
    with pytest.raises(GraphError, match="reuse_selection needs find_sites"):
        captured(Residual(Mlp())).apply(ReuseSelection())
    graph = reusing(Mlp(), {SITE})
    with pytest.raises(GraphError, match="reuse_selection has already run"):
        graph.apply(ReuseSelection())
