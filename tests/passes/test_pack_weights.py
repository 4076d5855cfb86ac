"""`pack_weights`: what depends on the selection and the parameters alone leaves the step's graph."""

from __future__ import annotations

import pytest
import torch

from ppgraph.config import PruneConfig
from ppgraph.errors import GraphError
from ppgraph.passes import REUSE
from ppgraph.passes.pack_weights import PackWeights, nodes_of_selection
from tests.passes.graphs import SITE, SMALL, Attention, Captured, Mlp, Residual, captured, hidden, targets


def packed(block: torch.nn.Module, config: PruneConfig = SMALL) -> Captured:
    graph = captured(Residual(block), hidden().to(next(block.parameters()).dtype), config=config)
    graph.program.shared["selectable"] = {SITE}
    graph.apply(*REUSE)
    return graph


def pack(graph: Captured, units: torch.Tensor) -> list[torch.Tensor]:
    """What the packing graph gives."""
    packing = graph.program.packing
    assert packing is not None
    parameters = dict(graph.module.named_parameters())
    inputs = [
        parameters[graph.program.parameters[node]].detach() if node in graph.program.parameters else units
        for node in packing.inputs
    ]
    return list(packing.module(*inputs, *packing.allocate(torch.device("cpu"), [None] * len(packing.packed))))


@pytest.mark.parametrize("block", [Mlp(bias=True), Attention()], ids=["mlp", "attention"])
def test_the_step_reads_packed_weights_and_gives_the_same(block: torch.nn.Module) -> None:
    unpacked = captured(Residual(block))
    unpacked.program.shared["selectable"] = {SITE}
    unpacked.apply(*REUSE[:-1])
    x, units = hidden(2, 4), torch.arange(0, 12, 2) if isinstance(block, Mlp) else torch.tensor([0, 2])
    expected = unpacked.output(x, state=[units])
    graph = packed(block)
    weights = iter(pack(graph, units))
    state = [next(weights) if item.role == "packed" else units for item in graph.program.state_inputs]
    assert torch.equal(graph.output(x, state=state), expected)
    assert "index_select" not in targets(graph.program)
    assert nodes_of_selection(graph.program) == {}


@pytest.mark.parametrize("threads", [2, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_tensors_are_the_kept_rows_and_columns(
    dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    graph = packed(block := Mlp().to(dtype))
    units = torch.tensor([0, 2, 3, 5, 7, 11])
    up, down = sorted(pack(graph, units), key=lambda tensor: tensor.shape[1], reverse=True)
    assert torch.equal(up, block.up.weight[units])
    assert torch.equal(down, block.down.weight[:, units])


def test_inputs_of_a_packing_stand_before_what_it_computes() -> None:
    graph = packed(Mlp(), SMALL.replace(observed="second-moment", compensation="least-squares"))
    assert graph.program.packing is not None
    nodes = [*graph.program.packing.module.graph.nodes]
    is_input = [node.op == "placeholder" for node in nodes]
    assert is_input == sorted(is_input, reverse=True)
    assert [node.name for node in nodes if node.name.startswith("packed_")] == ["packed_0", "packed_1"]
    assert any("solve" in node.name for node in nodes)


def test_shared_keys_are_indexed_at_each_step() -> None:
    graph = packed(Attention(2))
    selected = [node for node in graph.calls.values() if "index_select" in node.name]
    assert [node.meta["val"].dim() for node in selected] == [4, 4], "keys and values are no weights"


def test_it_needs_a_selection_and_runs_once() -> None:
    graph = captured(Residual(Mlp()))
    graph.apply(REUSE[0])
    with pytest.raises(GraphError, match="pack_weights needs reuse_selection, select_weights"):
        graph.apply(PackWeights())
    with pytest.raises(GraphError, match="pack_weights has already run"):
        packed(Mlp()).apply(PackWeights())


def test_what_is_packed_is_told_alike_in_graphs_that_pack_the_same() -> None:
    contents = [graph.program.packing.contents for graph in (packed(Mlp()), packed(Mlp()), packed(Attention(2)))]  # type: ignore[union-attr]
    assert contents[0] == contents[1]
    assert all(len(set(one)) == len(one) for one in contents)
    assert not set(contents[0]) & set(contents[2])
