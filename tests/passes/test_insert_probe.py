"""`insert_probe`: the samples and tokens with the largest residuals, through the block with its dense weights."""

from __future__ import annotations

import pytest
import torch
from torch.fx import Node
from torch.nn import functional as F

from ppgraph.config import PruneConfig
from ppgraph.errors import GraphError
from ppgraph.passes import ANALYSE, Program
from ppgraph.passes.insert_probe import InsertProbe, Probe
from tests.passes.graphs import (
    HIDDEN,
    SITE,
    SMALL,
    Attention,
    Captured,
    Expose,
    MaskedResidual,
    Mlp,
    Residual,
    captured,
    hidden,
    targets,
)

HALF = SMALL.replace(probe_batch=0.5, probe_tokens=0.5)


def expose(program: Program) -> dict[str, Node]:
    probe: Probe = program.shared["probe", SITE]
    nodes = {"y": probe.y, "samples": probe.sampling.samples, "tokens": probe.sampling.tokens}
    return nodes | {name: node for name in ("real", "used") if (node := getattr(probe.sampling, name)) is not None}


def probed(module: Residual, *inputs: torch.Tensor, config: PruneConfig = HALF) -> Captured:
    graph = captured(module, *inputs, config=config)
    graph.apply(*ANALYSE, InsertProbe(), Expose(expose))
    return graph


def stream(lengths: list[list[float]]) -> torch.Tensor:
    """A residual stream whose norms are `lengths` [B, S]."""
    values = torch.zeros(len(lengths), len(lengths[0]), HIDDEN)
    values[:, :, 0] = torch.tensor(lengths)
    return values


def test_tokens_are_chosen_first_over_all_samples_and_then_samples_over_those() -> None:
    # Sample 2 is the longest, but only at token 1, which the others outvote.
    lengths = [[1.0, 0, 5, 6, 1, 1], [1, 0, 5, 5, 1, 1], [1, 6, 0, 0, 1, 1]]
    found = probed(Residual(Mlp())).results(stream(lengths))
    assert found["tokens"].tolist() == [0, 2, 3]  # half of six; the first of so few is the sink
    assert found["samples"].tolist() == [0, 1]


def test_of_equal_norms_the_first_are_chosen() -> None:
    found = probed(Residual(Mlp())).results(stream([[1.0] * 6] * 3))
    assert (found["samples"].tolist(), found["tokens"].tolist()) == ([0, 1], [0, 1, 2])


def test_the_sink_is_not_forced_among_more_than_ten_tokens() -> None:
    lengths = [[float(token) for token in range(22)]] * 2
    found = probed(Residual(Mlp())).results(stream(lengths))
    assert found["tokens"].tolist() == list(range(11, 22))


def test_the_probe_is_the_block_up_to_its_exit() -> None:
    graph = probed(Residual(block := Mlp(bias=True)))
    x = hidden(4, 6)
    found = graph.results(x)
    expected = F.relu(block.up(x[found["samples"]][:, found["tokens"]]))
    torch.testing.assert_close(found["y"], expected)
    assert targets(graph.program, "insert_probe").count("linear") == 1, "the exit linear itself is not run"
    torch.testing.assert_close(graph.output(x), x + block(x))  # the dense block is still there


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
def test_probed_attention_sees_the_probed_tokens_alone(kv_heads: int) -> None:
    graph = probed(Residual(block := Attention(kv_heads)))
    x = hidden(4, 6)
    found = graph.results(x)
    inputs: list[torch.Tensor] = []
    block.o.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    block(x[found["samples"]][:, found["tokens"]])
    torch.testing.assert_close(found["y"], inputs[0])


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
def test_probed_attention_hides_padding_and_later_tokens(kv_heads: int) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])
    graph = probed(MaskedResidual(block := Attention(kv_heads)), hidden(), torch.ones(3, 5, dtype=torch.long))
    x = hidden(3, 6)
    found = graph.results(x, mask)
    inputs: list[torch.Tensor] = []
    block.o.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    for sample, real, y in zip(found["samples"].tolist(), found["real"], found["y"], strict=True):
        columns = found["tokens"][real] + int(mask[sample].argmax())
        block(x[[sample]][:, columns])
        torch.testing.assert_close(y[None, real], inputs.pop())


def test_padding_is_not_chosen_and_rows_are_aligned_at_their_first_token() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    graph = probed(MaskedResidual(block := Mlp()), hidden(), torch.ones(3, 5, dtype=torch.long))
    x = stream([[9.0, 9, 1, 2, 3, 4], [1, 2, 3, 3, 9, 9]])
    found = graph.results(x, mask)
    # Four real places, two of which are probed; the batch's width allows three, so the last only fills up.
    assert found["used"].tolist() == [True, True, False]
    assert found["tokens"][:2].tolist() == [0, 3]
    assert found["samples"].tolist() == [0]
    assert found["real"].tolist() == [[True, True, False]]
    torch.testing.assert_close(found["y"][0, :2], F.relu(block.up(x[0, [2, 5]])))


def test_two_tokens_and_one_sample_at_the_least() -> None:
    tiny = SMALL.replace(probe_batch=0.01, probe_tokens=0.01)
    found = probed(Residual(Mlp()), config=tiny).results(hidden(3, 7))
    assert found["y"].shape == (1, 2, 12)


def test_a_method_that_only_reads_the_history_has_no_probe() -> None:
    graph = captured(Residual(Mlp()), config=SMALL.replace(statistics="history"))
    graph.apply(*ANALYSE, InsertProbe())
    assert targets(graph.program, "insert_probe") == []


def test_nodes_say_whose_they_are() -> None:
    graph = probed(Residual(Mlp()))
    added = [node for node in graph.program.graph.nodes if node.meta.get("ppgraph_pass") == "insert_probe"]
    assert added
    assert all("val" in node.meta for node in added)


def test_it_needs_sites_and_runs_once() -> None:
    graph = captured(Residual(Mlp()))
    with pytest.raises(GraphError, match="insert_probe needs find_sites to run before it; found none"):
        graph.apply(InsertProbe())
    graph.apply(*ANALYSE, InsertProbe())
    with pytest.raises(GraphError, match="insert_probe has already run on this graph"):
        graph.apply(InsertProbe())
