"""`find_sites`: what is a block, what it is called, what it keeps, and why it is left alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F

from ppgraph.errors import ConfigError, GraphError
from ppgraph.passes import ANALYSE
from ppgraph.passes.find_sites import products_found
from tests.passes.graphs import HIDDEN, SITE, SMALL, Attention, Fused, Mlp, Residual, captured


def test_a_plain_mlp_is_a_site_with_its_biases() -> None:
    graph = captured(Residual(Mlp(bias=True)))
    (site,) = graph.apply(*ANALYSE).sites
    assert (site.name, site.kind, site.layer, site.status, site.reason) == (SITE, "mlp", 0, "pruned", "")
    assert (site.width, site.units, site.block, site.kept, site.kept_units) == (12, 12, 1, 6, 6)
    assert site.entry == (f"{SITE}.up.weight", f"{SITE}.up.bias")
    assert site.exit == (f"{SITE}.down.weight", f"{SITE}.down.bias")
    block = graph.program.analysis[SITE]
    assert (block.exit_linear.name, block.exit_input.name, block.weight_dim) == ("linear_1", "relu", 1)
    assert block.stream.op == "placeholder"
    assert {node.name for node in block.region} == {block.stream.name, "linear", "relu"}


@pytest.mark.parametrize(("kv_heads", "entry"), [(4, {"q", "k", "v"}), (2, {"q"})], ids=["mha", "gqa"])
def test_attention_is_a_site_of_whole_heads(kv_heads: int, entry: set[str]) -> None:
    (site,) = captured(Residual(Attention(kv_heads))).apply(*ANALYSE).sites
    assert (site.kind, site.width, site.units, site.block, site.kept, site.kept_units) == ("attention", 8, 4, 2, 4, 2)
    assert set(site.entry) == {f"{SITE}.{name}.weight" for name in entry}
    assert site.exit == (f"{SITE}.o.weight",)


class WrittenOut(Attention):
    """Attention as products and a softmax, over keys and values of one head."""

    def __init__(self) -> None:
        super().__init__(kv_heads=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = self.q(x).view(x.shape[0], x.shape[1], -1, 2).transpose(1, 2)
        weights = (query @ self.k(x).unsqueeze(1).transpose(2, 3)).softmax(-1)
        return self.o((weights @ self.v(x).unsqueeze(1)).transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))


class WrittenAsSum(WrittenOut):
    """Scores by `einsum`, channels that belong to no head: attention all the same."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(torch.einsum("bsc,btc->bst", self.q(x), self.q(x)).softmax(-1) @ self.q(x))


class SoftmaxOfChannels(Mlp):
    """Channels compete with one another, as tokens do in attention."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down((x @ self.up.weight.t()).softmax(-1) * self.up(x))


@pytest.mark.parametrize(
    ("block", "kind", "status"),
    [
        (WrittenOut(), "attention", "pruned"),
        (WrittenAsSum(), "attention", "dense"),
        (SoftmaxOfChannels(), "mlp", "pruned"),
    ],
    ids=["matmul", "einsum", "channels"],
)
def test_a_softmax_is_attention_only_over_a_product_of_activations(block: nn.Module, kind: str, status: str) -> None:
    (site,) = captured(Residual(block)).apply(*ANALYSE).sites
    assert (site.kind, site.status) == (kind, status)


class Gated(Mlp):
    """One gate for all channels, as shared experts have: a product with the stream beside the exit linear."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate(x).sigmoid() * super().forward(x)


def test_a_gate_beside_the_block_leaves_it_a_site() -> None:
    (site,) = captured(Residual(Gated())).apply(*ANALYSE).sites
    assert (site.status, site.exit) == ("pruned", (f"{SITE}.down.weight",))


class Adapted(Mlp):
    """A low-rank adapter beside the exit linear, which reads the channels too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 2, bias=False), nn.Linear(2, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = F.relu(self.up(x))
        return self.down(inner) + self.b(self.a(inner))


def test_an_adapter_beside_the_exit_is_no_block_of_its_own() -> None:
    (site,) = captured(Residual(Adapted())).apply(*ANALYSE).sites
    assert (site.status, site.exit) == ("dense", (f"{SITE}.down.weight",))
    assert site.reason == "relu (aten.relu): its value is needed whole elsewhere"


class FlatSum(Residual):
    """Tokens are flattened before the block, and what it gives is added to them as rows."""

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x.flatten(0, 1), attention_mask).view(x.shape)


def test_a_stream_that_is_flattened_is_known_by_its_samples_and_tokens() -> None:
    graph = captured(FlatSum(Mlp()))
    (site,) = graph.apply(*ANALYSE).sites
    assert site.status == "pruned", site.reason
    assert graph.program.analysis[SITE].stream.op == "placeholder"


class Layers(Residual):
    def __init__(self, count: int) -> None:
        super().__init__(Mlp())
        self.layers.extend(nn.ModuleDict({"block": Mlp()}) for _ in range(count - 1))


def test_layers_are_numbered_and_the_first_are_skipped() -> None:
    graph = captured(Layers(3), config=SMALL.replace(skip_layers=1, ratio=0.4))
    first, second, third = graph.apply(*ANALYSE).sites
    assert [site.layer for site in (first, second, third)] == [0, 1, 2]
    assert (first.status, first.kept, first.reason) == ("dense", 12, "one of the first 1 layers (skip_layers)")
    assert second.kept == third.kept == 12 - int(0.6 * 12)  # 0.4 of three layers, taken from two


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"blocks": ("attention",)}, "blocks=('attention',) leaves mlp dense"),
        ({"ratio": 0.0}, "ratio=0.0 removes nothing of 12 channels"),
        ({"width_multiple": 64}, "removes nothing of 12 channels"),
    ],
)
def test_what_the_config_leaves_dense_says_so(change: dict[str, object], reason: str) -> None:
    (site,) = captured(Residual(Mlp()), config=SMALL.replace(**change)).apply(*ANALYSE).sites
    assert site.status == "dense"
    assert not site.refused
    assert reason in site.reason


def test_more_skipped_layers_than_there_are_is_an_error() -> None:
    graph = captured(Residual(Mlp()), config=SMALL.replace(skip_layers=1))
    with pytest.raises(ConfigError, match="leaves none of the model's 1 layers to prune"):
        graph.apply(*ANALYSE)


class MixingTokens(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).cumsum(1))


class WithoutWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = self.up(x)
        return up @ (x.transpose(1, 2) @ x)


class Reversed(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.relu(self.up(x)).flip(1))


class Exchanging(Mlp):
    """Channels travel between ranks before the exit linear, and a part of them is taken."""

    def __init__(self, group: str) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ops = torch.ops._c10d_functional
        summed = ops.wait_tensor(ops.all_reduce(torch.cat([self.up(x)] * 2, dim=-1), "sum", self.group))
        return self.down(summed.chunk(2, dim=-1)[0])


class Normalised(Mlp):
    """The norm mixes all channels: none of them can go."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.layer_norm(self.up(x), (12,)))


class FusedAndRead(Fused):
    """Something else reads the fused projection as it is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = self.up(x)
        gate, up = both.chunk(2, dim=-1)
        return self.down(F.silu(gate) * up) * both.cos().mean()


class BesideHeads(Attention):
    """Three more channels come out beside those of four heads."""

    def __init__(self) -> None:
        super().__init__()
        self.more, self.o = nn.Linear(HIDDEN, 3, bias=False), nn.Linear(HIDDEN + 3, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = F.scaled_dot_product_attention(*self.projected(x), is_causal=True)
        return self.o(torch.cat([mixed.transpose(1, 2).flatten(2), F.relu(self.more(x))], -1))


def test_channels_that_are_no_multiple_of_the_heads_are_not_taken_for_heads() -> None:
    (site,) = captured(Residual(BesideHeads())).apply(*ANALYSE).sites
    assert (site.kind, site.width, site.units, site.block) == ("attention", 11, 11, 1)
    assert site.refused


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (MixingTokens(), "cumsum (aten.cumsum): it mixes neighbouring tokens"),
        (WithoutWeight(), "(aten.matmul): the block does not end in a linear with a weight parameter"),
        (Reversed(), "flip (aten.flip): no operator rule says where dimension"),
        (FusedAndRead(), "cos (aten.cos): it uses the fused output of linear as a whole"),
        (Normalised(), "layer_norm (aten.layer_norm): it mixes dimension 2, so that a part of it takes all"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_refusal_names_the_node_and_the_reason(block: nn.Module, reason: str) -> None:
    graph = captured(Residual(block))
    (site,) = graph.apply(*ANALYSE).sites
    assert site.refused
    assert site.status == "dense"
    assert reason in site.reason
    assert graph.program.pruned_sites == []


@pytest.fixture
def group_of_one() -> Iterator[str]:
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield distributed.GroupMember.WORLD.group_name
    distributed.destroy_process_group()


def test_a_refusal_names_the_exchange_between_ranks(group_of_one: str) -> None:
    graph = captured(Residual(Exchanging(group_of_one)))
    (site,) = graph.apply(*ANALYSE).sites
    assert "all_reduce (_c10d_functional.all_reduce): it exchanges channels between ranks" in site.reason


class WithoutResidual(Residual):
    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.layers[0]["block"](x)


def test_a_graph_without_a_residual_stream_has_no_sites() -> None:
    graph = captured(WithoutResidual(Mlp()))
    assert graph.apply(*ANALYSE).sites == []
    assert products_found(graph.program) == "aten.linear (2)"


def test_a_second_run_is_refused() -> None:
    graph = captured(Residual(Mlp()))
    graph.apply(*ANALYSE)
    with pytest.raises(GraphError, match="find_sites has already run on this graph"):
        graph.apply(*ANALYSE)
    assert len(graph.program.sites) == 1
