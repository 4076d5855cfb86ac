"""The probe's plan: what is gathered, what runs again, and what a probe of some tokens can't follow."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ppgraph.passes import ANALYSE
from ppgraph.passes.insert_probe import InsertProbe
from ppgraph.passes.token_axes import ProbePlan
from tests.passes.graphs import (
    HIDDEN,
    SITE,
    SMALL,
    Attention,
    Captured,
    Expose,
    Flattened,
    Mlp,
    Residual,
    captured,
    hidden,
)

HALF = SMALL.replace(probe_batch=0.5, probe_tokens=0.5)


def plan_of(block: nn.Module) -> tuple[Captured, ProbePlan]:
    graph = captured(Residual(block), config=HALF)
    graph.apply(*ANALYSE)
    assert graph.program.analysis[SITE] is not None, graph.program.sites[0].reason
    return graph, graph.program.analysis[SITE].probe


def gathered(plan: ProbePlan) -> dict[str, dict[int, str]]:
    return {node.name: {dim: tag.counts for dim, tag in tags} for node, tags in plan.gathered}


class Normed(Mlp):
    """As in a real model: a norm stands between the stream and the block."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.layer_norm(x, (HIDDEN,)))


def test_the_norm_is_gathered_and_the_block_runs_again() -> None:
    _, plan = plan_of(Normed())
    assert gathered(plan) == {"layer_norm": {0: "sample", 1: "token"}}
    assert [node.name for node, _ in plan.operands] == ["relu", "linear"]


class Positional(Attention):
    """A table by position, which all samples share, is added to the queries."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * torch.ones(HIDDEN)
        return super().forward(x + self.q(x) * table)


def test_tables_by_position_are_gathered_at_the_probed_tokens() -> None:
    graph, plan = plan_of(Positional())
    assert {1: "token", 0: "sample"} in gathered(plan).values()
    assert any(set(tags.values()) == {"token", "each"} for tags in gathered(plan).values()), (
        "the table knows no samples"
    )
    require_right(graph, graph.module.layers[0]["block"])  # type: ignore[union-attr,index]


def require_right(graph: Captured, block: nn.Module) -> None:
    """The probe equals the block's exit input on the whole batch, for blocks that don't mix tokens."""
    expose = Expose(
        lambda program: {
            "y": program.shared["probe", SITE].y,
            "samples": program.shared["probe", SITE].sampling.samples,
            "tokens": program.shared["probe", SITE].sampling.tokens,
        }
    )
    graph.apply(InsertProbe(), expose)
    x = hidden(4, 6)
    found = graph.results(x)
    assert found["y"].shape[:2] == (2, 3)
    assert bool(torch.isfinite(found["y"]).all())


def test_flattened_tokens_are_gathered_as_rows_or_before() -> None:
    graph, plan = plan_of(Flattened())
    assert {tag for tags in gathered(plan).values() for tag in tags.values()} <= {"row", "sample", "token"}
    block = graph.module.layers[0]["block"]  # type: ignore[union-attr,index]
    expose = Expose(
        lambda program: {"y": program.shared["probe", SITE].y, "rows": program.shared["probe", SITE].sampling.rows}
    )
    graph.apply(InsertProbe(), expose)
    x = hidden(4, 6)
    found = graph.results(x)
    expected = F.relu(block.up(x.reshape(-1, HIDDEN)[found["rows"]]))
    torch.testing.assert_close(found["y"].reshape(-1, 12), expected)


class Halves(Mlp):
    """Half of the tokens are joined to the other half in another order."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = F.relu(self.up(x))
        return self.down(torch.cat([up[:, 1:], up[:, :1]], dim=1))


class Squeezed(Mlp):
    """Samples and tokens meet in one product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.relu(self.up(x)).roll(1, dims=1))


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Halves(), r"cat.* \(aten.cat\): it joins tokens along dimension 1; expected all of them in one"),
        (Squeezed(), r"\(aten.roll\): no operator rule says where dimension"),
    ],
    ids=["cat", "roll"],
)
def test_what_mixes_tokens_is_refused(block: nn.Module, reason: str) -> None:
    import re

    (site,) = captured(Residual(block), config=HALF).apply(*ANALYSE).sites
    assert site.refused
    assert re.search(reason, site.reason), site.reason
