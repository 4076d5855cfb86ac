"""The probe's plan: what is gathered, what runs again, and what a probe of some tokens can't follow."""

from __future__ import annotations

import re
from collections.abc import Callable

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
    MaskedResidual,
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


def probed(graph: Captured, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the probe gives of each of its tokens, `y`, and where those are among all tokens, `rows`."""
    expose = Expose(
        lambda program: {"y": program.shared["probe", SITE].y, "rows": program.shared["probe", SITE].sampling.rows}
    )
    graph.apply(InsertProbe(), expose)
    return graph.results(x)


class Normed(Mlp):
    """As in a real model: a norm stands between the stream and the block."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.layer_norm(x, (HIDDEN,)))


def test_the_norm_is_gathered_and_the_block_runs_again() -> None:
    _, plan = plan_of(Normed())
    assert gathered(plan) == {"layer_norm": {0: "sample", 1: "token"}}
    assert [node.name for node, _ in plan.operands] == ["relu", "linear"]


class Projected(Residual):
    """The residual stream is what a linear makes of the embeddings, as in ELECTRA."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self.into = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(self.into(x), attention_mask)


def test_a_stream_that_a_linear_made_is_gathered_and_not_made_again() -> None:
    graph = captured(Projected(Mlp()), config=HALF)
    graph.apply(*ANALYSE)
    plan = graph.program.analysis[SITE].probe
    assert gathered(plan) == {plan.stream.name: {0: "sample", 1: "token"}}
    assert plan.stream.name not in {node.name for node, _ in plan.operands}


class Positional(Attention):
    """A table by position, which all samples share, is added to the queries. `exit_input` runs on any tokens."""

    def exit_input(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        x = x + self.q(x) * (places.to(x.dtype)[:, None] * torch.ones(HIDDEN))
        query, key, value = self.projected(x)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(self.exit_input(x, torch.arange(x.shape[1])))


class Folded(Positional):
    """As BLOOM's: heads folded with samples, a bias by key, and a table of later keys that all samples share."""

    def exit_input(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        samples, tokens, _ = x.shape
        query, key, value = (heads.reshape(samples * 4, tokens, 2) for heads in self.projected(x))
        later = (places[None, :] > places[:, None])[None]
        scores = (query @ key.transpose(1, 2) + places.to(x.dtype)[None, None, :]).masked_fill(later, -1e9)
        mixed = (scores.softmax(-1) @ value).view(samples, 4, tokens, 2)
        return mixed.transpose(1, 2).reshape(samples, tokens, HIDDEN)


class Scaled(Positional):
    """Scores are scaled by the largest that a token has, as far as it sees keys."""

    def exit_input(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        query, key, value = self.projected(x)
        later = (places[None, :] > places[:, None])[None, None]
        scores = (query @ key.transpose(2, 3)).masked_fill(later, 0.0)
        scores = scores / (scores.abs().amax(-1, keepdim=True) + 1)
        weights = scores.masked_fill(later, -1e9).softmax(-1)
        return (weights @ value).transpose(1, 2).reshape(x.shape[0], x.shape[1], HIDDEN)


def test_tables_by_position_are_gathered_at_the_probed_tokens() -> None:
    _, plan = plan_of(Positional())
    assert {1: "token", 0: "sample"} in gathered(plan).values()
    assert any(set(tags.values()) == {"token", "each"} for tags in gathered(plan).values()), (
        "the table knows no samples"
    )


@pytest.mark.parametrize(("samples", "tokens"), [(2, 3), (4, 5)])  # 5 tokens are more than a padded sample has
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("block", [Positional(), Folded(), Scaled()], ids=["apart", "folded", "scaled"])
def test_the_probe_is_the_block_on_the_probed_tokens_at_their_places(
    block: Positional, is_padded: bool, samples: int, tokens: int
) -> None:
    config = SMALL.replace(probe_batch=samples / 4, probe_tokens=tokens / 6 - 1e-6)
    x, mask = hidden(4, 6), torch.ones(4, 6, dtype=torch.long)
    mask[1, :2] = mask[3, :1] = 0
    inputs = (x, mask) if is_padded else (x,)
    graph = captured((MaskedResidual if is_padded else Residual)(block), *inputs, config=config)
    expose = Expose(
        lambda program: (
            {
                name: node
                for name in ("samples", "columns", "real")
                if (node := getattr(program.shared["probe", SITE].sampling, name)) is not None
            }
            | {"y": program.shared["probe", SITE].y}
        )
    )
    graph.apply(*ANALYSE, InsertProbe(), expose)
    found = graph.results(*inputs)
    assert found["y"].shape == (samples, tokens, HIDDEN)
    columns, stream = found["columns"].expand(samples, tokens), x * mask[:, :, None] if is_padded else x
    for y, sample, places, real in zip(
        found["y"], found["samples"], columns, found.get("real", torch.ones(samples, tokens) > 0), strict=True
    ):
        expected = block.exit_input(stream[sample, places[real]][None], places[real])[0]
        torch.testing.assert_close(y[real], expected)


def test_flattened_tokens_are_gathered_as_rows_or_before() -> None:
    graph, plan = plan_of(Flattened())
    assert {tag for tags in gathered(plan).values() for tag in tags.values()} <= {"row", "sample", "token"}
    block = graph.module.layers[0]["block"]  # type: ignore[union-attr,index]
    x = hidden(4, 6)
    found = probed(graph, x)
    expected = F.relu(block.up(x.reshape(-1, HIDDEN)[found["rows"]]))
    torch.testing.assert_close(found["y"].reshape(-1, 12), expected)


class Changed(Mlp):
    """An MLP whose inner channels [samples, tokens, 12] go through `change` on their way."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.change(F.relu(self.up(x)))).reshape(x.shape)


class Led(Mlp):
    """A learned place ahead of all tokens, as attention sinks have, that only the block itself sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.ones(1, 1, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        led = torch.cat([self.first.expand(x.shape[0], -1, -1), F.relu(self.up(x))], 1)
        return self.down((led * 2)[:, 1:])


class Shifted(Mlp):
    """All channels of a token get a number that the model writes into a tensor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.relu(self.up(x) + x.new_full((*x.shape[:2], 1), 0.5)) * 2)


@pytest.mark.parametrize(("block", "shift"), [(Led(), 0.0), (Shifted(), 0.5)], ids=["behind another", "shifted"])
def test_tokens_are_probed_at_their_places_whatever_the_block_puts_beside_them(block: Mlp, shift: float) -> None:
    graph, _ = plan_of(block)
    x = hidden(4, 6)
    found = probed(graph, x)
    expected = 2 * F.relu(block.up(x.reshape(-1, HIDDEN)[found["rows"]]) + shift)
    torch.testing.assert_close(found["y"].reshape(-1, 12), expected)


class Turned(Mlp):
    """Runs with tokens ahead of samples, as three dimensions or flattened."""

    def __init__(self, *, is_flat: bool) -> None:
        super().__init__()
        self.is_flat = is_flat

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turned = x.transpose(0, 1)
        inner = turned.reshape(-1, x.shape[-1]) if self.is_flat else turned
        return super().forward(inner).view(turned.shape).transpose(0, 1)


class Remembering(Attention):
    """Reads five learned keys ahead of the batch's own, causally from the first of them on."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = (nn.Parameter(torch.ones(1, 4, 5, 2)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.projected(x)
        key = torch.cat([self.keys.expand(x.shape[0], -1, -1, -1), key], 2)
        value = torch.cat([self.values.expand(x.shape[0], -1, -1, -1), value], 2)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))


class FlatStream(Residual):
    """The residual stream itself is [samples times tokens, hidden]."""

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x.flatten(0, 1).exp(), attention_mask).view(x.shape)


REFUSED = {
    "another order": (
        Residual(Changed(lambda up: torch.cat([up[:, 1:], up[:, :1]], dim=1))),
        r"cat.* \(aten.cat\): it joins tokens along dimension 1; expected all of them in one",
    ),
    "rolled": (
        Residual(Changed(lambda up: up.roll(1, dims=1))),
        r"\(aten.roll\): no operator rule says where dimension",
    ),
    "from the middle": (
        Residual(Changed(lambda up: torch.cat([up, up], 1)[:, up.shape[1] :])),
        r"\(aten.slice\): it takes tokens from .* on; expected a constant counted from the front",
    ),
    "up to the middle": (
        Residual(Changed(lambda up: torch.cat([up, up], 1)[:, : up.shape[1]])),
        r"\(aten.slice\): s\d+ places follow the tokens; expected a number known at compile time",
    ),
    "a dimension more": (
        Residual(Changed(lambda up: up.unsqueeze(2))),
        r"expected \[samples, tokens, channels\] or flattened tokens, found \[s\d+, s\d+, 1, 12\]",
    ),
    "tokens first": (Residual(Turned(is_flat=False)), r"dimension 0 of .* should count samples \(s\d+ of them\)"),
    "flattened, tokens first": (Residual(Turned(is_flat=True)), r"dimension 0 of .* \(rows\) is mixed with others in"),
    "causal from a cache on": (Residual(Remembering()), r"is_causal with keys of a cache counts from the first key"),
    "a flat stream": (FlatStream(Mlp()), r"the residual stream is \[samples, tokens, hidden\], not \[s\d+\*s\d+, 8\]"),
}


@pytest.mark.parametrize(("module", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_a_probe_cannot_follow_is_refused(module: Residual, reason: str) -> None:
    (site,) = captured(module, config=HALF).apply(*ANALYSE).sites
    assert site.refused
    assert re.search(reason, site.reason), site.reason
