"""`select_weights`: the block on its kept rows and columns, in the place of the dense one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.fx import Graph
from torch.nn import functional as F

from ppgraph.errors import GraphError
from ppgraph.passes import ANALYSE
from ppgraph.passes.reuse_selection import ReuseSelection
from ppgraph.passes.select_weights import SelectWeights, sort_topologically
from tests.passes.graphs import SITE, Attention, Captured, Flattened, Fused, Mlp, Residual, captured, hidden, targets

aten = torch.ops.aten


def narrowed(block: nn.Module, *inputs: torch.Tensor, kept: int | None = None) -> Captured:
    """The block's graph, captured with `inputs` if there are any, with the kept units as an input."""
    graph = captured(Residual(block), *inputs)
    graph.program.allocation = None if kept is None else {SITE: kept}
    graph.program.shared["selectable"] = {SITE}
    graph.apply(*ANALYSE, ReuseSelection(), SelectWeights())
    return graph


def without_others(block: nn.Module, exit_linear: nn.Module, x: torch.Tensor, kept: list[int]) -> torch.Tensor:
    """`x + block(x)` with the other channels of the exit linear's input zeroed."""

    def zero(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        mask = torch.zeros(args[0].shape[-1])
        mask[kept] = 1
        return (args[0] * mask,)

    handle = exit_linear.register_forward_pre_hook(zero)
    result: torch.Tensor = x + block(x)
    handle.remove()
    return result


@pytest.mark.parametrize("bias", [False, True])
def test_an_mlp_runs_on_its_kept_channels(bias: bool) -> None:
    graph = narrowed(block := Mlp(bias=bias))
    x, kept = hidden(4, 6), [0, 3, 4, 7, 9, 11]
    expected = without_others(block, block.down, x, kept)
    torch.testing.assert_close(graph.output(x, state=[torch.tensor(kept)]), expected)
    added = targets(graph.program, "select_weights")
    assert added.count("linear") == 2
    assert added.count("index_select") == (3 if bias else 2)  # the exit's bias is whole
    assert targets(graph.program).count("linear") == 2, "the dense block is gone"


@pytest.mark.parametrize("kind", [Mlp, Flattened])
@pytest.mark.parametrize("bias", [False, True])
def test_an_mlp_that_keeps_nothing_is_its_exits_bias(kind: type[Mlp], bias: bool) -> None:
    graph = narrowed(block := kind(bias=bias), kept=0)
    assert [site.kept for site in graph.program.sites] == [0]
    x = hidden(4, 6)
    state = [torch.tensor([], dtype=torch.long) for _ in graph.program.state_inputs]
    torch.testing.assert_close(graph.output(x, state=state), x + block.down.bias if bias else x)
    assert targets(graph.program).count("linear") == 0


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
def test_attention_runs_on_its_kept_heads(kv_heads: int) -> None:
    graph = narrowed(block := Attention(kv_heads))
    x, heads = hidden(4, 6), [1, 2]
    expected = without_others(block, block.o, x, [2, 3, 4, 5])
    torch.testing.assert_close(graph.output(x, state=[torch.tensor(heads)]), expected)
    (attention,) = (node for node in graph.calls.values() if "attention" in node.name)
    assert "enable_gqa" not in attention.kwargs or kv_heads == 4, "each kept head has its own keys"
    widths = [node.meta["val"].shape[-1] for node in graph.calls.values() if "linear" in node.name]
    whole = 2 * kv_heads
    assert sorted(widths) == sorted([4, 8] + ([4, 4] if kv_heads == 4 else [whole, whole]))


class Biased(Attention):
    """Scores get a bias [tokens, tokens], or one of each head behind `leading` dimensions of size 1."""

    def __init__(self, kv_heads: int, leading: int | None) -> None:
        super().__init__(kv_heads)
        self.leading = leading

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.projected(x)
        bias = torch.arange(x.shape[1], dtype=x.dtype).expand(x.shape[1], -1)
        if self.leading is not None:
            by_head = bias * torch.arange(1, 5)[:, None, None]
            bias = by_head[(None,) * self.leading]
        mixed = F.scaled_dot_product_attention(query, key, value, bias, enable_gqa=key.shape[1] != 4)
        return self.o(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))


@pytest.mark.parametrize("leading", [None, 0, 1], ids=["shared", "by head", "by sample and head"])
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
def test_attention_keeps_the_biases_of_its_kept_heads(kv_heads: int, leading: int | None) -> None:
    graph = narrowed(block := Biased(kv_heads, leading))
    x = hidden(4, 6)
    expected = without_others(block, block.o, x, [2, 3, 4, 5])
    torch.testing.assert_close(graph.output(x, state=[torch.tensor([1, 2])]), expected)


class Step(Attention):
    """One token attends to 5 that came before, whose keys and values something else reads as well."""

    def __init__(self, kv_heads: int, mask: Callable[[], torch.Tensor | None]) -> None:
        super().__init__(kv_heads)
        self.mask = mask
        self.past_keys, self.past_values = (nn.Parameter(torch.zeros(1, kv_heads, 5, 2)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.projected(x)
        key, value = (
            torch.cat([past.expand(x.shape[0], -1, -1, -1), new], 2)
            for past, new in ((self.past_keys, key), (self.past_values, value))
        )
        mixed = self.attention(query, key, value)
        return self.o(mixed.transpose(1, 2).reshape(x.shape[0], 1, -1)) * (key + value).mean()

    def attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The heads' results, [samples, 4, 1, 2]."""
        shared = key.shape[1] != 4
        return F.scaled_dot_product_attention(query, key, value, self.mask(), scale=0.3, enable_gqa=shared)


class CausalStep(Step):
    """As torch has it, the first token of a causal attention sees the first key alone."""

    def attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The heads' results, [samples, 4, 1, 2]."""
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=key.shape[1] != 4)


@pytest.mark.parametrize(
    "mask",
    [
        lambda: None,
        lambda: torch.arange(6).unsqueeze(0) % 4 != 1,
        lambda: torch.zeros(1, 1, 1, 6, dtype=torch.bool),
        lambda: torch.arange(24.0).view(4, 1, 6).sin(),
    ],
    ids=["no mask", "tokens hidden", "all hidden", "by head"],
)
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
def test_a_step_attends_with_its_kept_heads_to_keys_left_in_place(
    kv_heads: int, mask: Callable[[], torch.Tensor | None]
) -> None:
    graph, x = narrowed(block := Step(kv_heads, mask), hidden(3, 1)), hidden(4, 1)
    expected = without_others(block, block.o, x, [2, 3, 4, 5])
    torch.testing.assert_close(graph.output(x, state=[torch.tensor([1, 2])]), expected)
    assert "scaled_dot_product_attention" not in targets(graph.program)


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
def test_attention_whose_mask_torch_makes_runs_on_all_heads(kv_heads: int) -> None:
    graph, x = narrowed(block := CausalStep(kv_heads, lambda: None), hidden(3, 1)), hidden(4, 1)
    expected = without_others(block, block.o, x, [2, 3, 4, 5])
    torch.testing.assert_close(graph.output(x, state=[torch.tensor([1, 2])]), expected)
    assert "scaled_dot_product_attention" in targets(graph.program)


def test_a_fused_projection_loses_the_rows_of_both_halves() -> None:
    graph = narrowed(block := Fused())
    x, kept = hidden(3, 5), [1, 2, 5, 8, 9, 10]
    expected = without_others(block, block.down, x, kept)
    (rows,) = (
        item.constant for item in graph.program.state_inputs if item.role == "rows" and item.constant is not None
    )
    state = [torch.tensor(kept) if item.role == "units" else item.constant for item in graph.program.state_inputs]
    assert rows.numel() == 12
    torch.testing.assert_close(graph.output(x, state=state), expected)


def test_flattened_tokens() -> None:
    graph = narrowed(block := Flattened())
    x, kept = hidden(3, 5), [0, 1, 5, 8, 9, 10]
    expected = without_others(block, block.down, x, kept)
    torch.testing.assert_close(graph.output(x, state=[torch.tensor(kept)]), expected)


def test_nodes_stand_behind_their_operands() -> None:
    graph = narrowed(Attention(2))
    seen = set()
    for node in graph.program.graph.nodes:
        assert set(node.all_input_nodes) <= seen
        seen.add(node)


def test_it_needs_sites_and_runs_once() -> None:
    with pytest.raises(GraphError, match="select_weights needs find_sites"):
        captured(Residual(Mlp())).apply(SelectWeights())
    graph = narrowed(Mlp())
    with pytest.raises(GraphError, match="select_weights has already run"):
        graph.apply(SelectWeights())


def test_nodes_are_put_in_order_however_deep_the_model_is() -> None:
    graph = Graph()
    chain = [graph.placeholder("x")]
    for _ in range(3000):
        chain.append(graph.call_function(torch.neg, (chain[-1],)))
    graph.output(chain[-1])
    for node in chain[1:]:
        chain[0].append(node)  # each ahead of its operand
    sort_topologically(graph)
    assert list(graph.nodes)[:-1] == chain


def test_a_node_that_depends_on_itself_is_an_error() -> None:
    graph = Graph()
    first = graph.call_function(torch.neg, (graph.placeholder("x"),))
    second = graph.call_function(torch.neg, (first,))
    graph.output(second)
    first.args = (second,)
    with pytest.raises(GraphError, match="neg depends on itself"):
        sort_topologically(graph)


@pytest.mark.parametrize("through", ["itself", "a view"])
def test_a_node_that_moves_past_a_write_to_what_it_reads_is_an_error(through: str) -> None:
    graph = Graph()
    x = graph.placeholder("x")
    memory = graph.call_function(aten.clone.default, (x,))
    written = memory if through == "itself" else graph.call_function(aten.slice.Tensor, (memory, 0, 0, 1))
    user = graph.call_function(aten.neg.default, (x,))
    graph.call_function(aten.add_.Tensor, (written, x))
    read = graph.call_function(aten.exp.default, (memory,))
    graph.output((user, read))
    sort_topologically(graph)  # nothing moves
    user.args = (read,)
    with pytest.raises(GraphError, match=r"exp.* has moved past add_"):
        sort_topologically(graph)


class Counting(Mlp):
    """Joins vectors whose lengths only running tells."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.nonzero(x[:, :, 0] > 0)[:, 0]
        return super().forward(x) + 0 * torch.cat([rows, rows]).sum()


def test_joined_vectors_of_unknown_lengths_are_left_as_they_are() -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        graph = narrowed(Counting())
    assert targets(graph.program).count("cat") == 1
