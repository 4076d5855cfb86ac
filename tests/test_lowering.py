"""Graphs cut at their layers: layers alike are compiled once, whatever their caches hold."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.fx import Graph, GraphModule

import ppgraph
from ppgraph import _torch, kernels
from ppgraph.errors import LoweringError
from ppgraph.kernels import ATTENTION_BY_BLOCKS, COLUMNS, HIGHEST
from ppgraph.lowering import lower, structure, written_inputs
from ppgraph.passes.base import Program
from ppgraph.passes.operators import is_fused_attention
from tests.reference import masked, masked_dense_logits
from tests.test_cache import empty_cache
from tests.test_families import FAMILIES
from tests.test_generate import OPTIONS, cached, model, prompts


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[GraphModule]:
    """The parts that were given to Inductor, which run as they are."""
    parts: list[GraphModule] = []

    def keep(module: GraphModule, options: Any) -> Callable[..., Any]:
        parts.append(module)
        return module

    monkeypatch.setattr(_torch, "lower_with_inductor", keep)
    return parts


# Into a static cache the last layer takes the cache's length beside its mask.
@pytest.mark.parametrize(("cache", "kinds"), [(None, 1), ("dynamic", 1), ("static", 2)])
def test_layers_alike_are_compiled_once(cache: str | None, kinds: int, compiled: list[GraphModule]) -> None:
    counts = []
    for layers in (3, 4):
        dense = model(4, layers)
        pruned = ppgraph.transform(dense, **{**OPTIONS, "lowering": "inductor"})
        inputs = prompts(3, 11, padded=False)
        given = cached(empty_cache(cache, dense)) if cache else {"use_cache": False}
        compiled.clear()
        logits = pruned(**inputs, **given).logits
        counts.append(len(compiled))
        assert sum(map(sorts_scores, compiled)) == kinds
        expected = masked_dense_logits(dense, pruned.ppgraph.selection(), **inputs)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert 0 < counts[0] == counts[1]


@pytest.mark.parametrize("cache", [pytest.param("dynamic", marks=pytest.mark.thorough), "static"])
def test_layers_whose_caches_are_filled_are_compiled_once(cache: str, compiled: list[GraphModule]) -> None:
    counts = []
    for layers in (3, 4):
        dense = model(4, layers)
        pruned = ppgraph.transform(dense, **{**OPTIONS, "lowering": "inductor"})
        mine, other = empty_cache(cache, dense), empty_cache(cache, dense)
        for length in (7, 4):
            ids = prompts(3, length, padded=False)["input_ids"]
            compiled.clear()
            logits = pruned(input_ids=ids, **cached(mine)).logits
            with torch.no_grad(), masked(dense, pruned.ppgraph.selection()):
                torch.testing.assert_close(logits, dense(input_ids=ids, **cached(other)).logits, rtol=1e-4, atol=1e-5)
        counts.append(len(compiled))
    assert 0 < counts[0] == counts[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_and_histories_on_a_cpu_lose_columns_by_gather(dtype: torch.dtype, compiled: list[GraphModule]) -> None:
    pruned = ppgraph.transform(model(4).to(dtype), **{**OPTIONS, "lowering": "inductor"})
    pruned(**prompts(3, 11, padded=False), use_cache=False)
    called = [node for part in compiled for node in part.graph.nodes if node.op == "call_function"]
    gathered = [node.args[0].meta["val"] for node in called if node.target is COLUMNS]
    # Each site's exit weight, and its history [S, C].
    known = [all(isinstance(size, int) for size in matrix.shape) for matrix in gathered]
    sites = len(pruned.ppgraph.sites)
    assert known == [True] * sites + [False] * sites


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_made_ready_for_attention_once_for_all_layers(
    dtype: torch.dtype, compiled: list[GraphModule]
) -> None:
    pruned = ppgraph.transform(model(4, 3).to(dtype), **{**OPTIONS, "lowering": "inductor"})
    pruned(**prompts(3, 11, padded=True), use_cache=False)
    reading = [node for part in compiled for node in part.graph.nodes if node.target is ATTENTION_BY_BLOCKS]
    assert len(reading) == 2  # a layer's probe and its full inference
    assert {node.args[3].meta["val"].dtype for node in reading} == {dtype}
    _, full = sorted(reading, key=lambda node: len(node.args[3].all_input_nodes), reverse=True)
    assert full.args[3].op == "placeholder"


def test_a_mask_of_heads_is_looked_at_once_for_all_layers(compiled: list[GraphModule]) -> None:
    falcon = FAMILIES["falcon (sequential, ALiBi)"].model("sdpa", seed=0, sizes={})
    pruned = ppgraph.transform(falcon, **{**OPTIONS, "lowering": "inductor"}, blocks=("attention",))
    pruned(prompts(3, 11, padded=False)["input_ids"], use_cache=False)
    reading = [[node for node in part.graph.nodes if node.target is ATTENTION_BY_BLOCKS] for part in compiled]
    _, (probe, full) = (nodes for nodes in reading if nodes)  # of the second layer
    assert full.args[3].target is torch.ops.aten.index_select.default  # the kept heads'
    assert (probe.args[4].op, full.args[4].op) == ("call_function", "placeholder")


def test_attention_that_has_no_blocks_stays_torchs_own(compiled: list[GraphModule]) -> None:
    """That of steps, with one query."""
    pruned = ppgraph.transform(model(4, 2), decode="dense", **{**OPTIONS, "lowering": "inductor"})
    pruned.generate(prompts(2, 5, padded=False)["input_ids"], max_new_tokens=3, do_sample=False)
    step = compiled[-1]
    assert [node.target for node in step.graph.nodes if node.target is ATTENTION_BY_BLOCKS] == []
    assert any(is_fused_attention(node) for node in step.graph.nodes)


@pytest.mark.parametrize("padded", [False, True])
def test_attention_by_blocks_equals_the_masked_dense_model(
    padded: bool, compiled: list[GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "QUERIES", 4)
    monkeypatch.setattr(kernels, "SCORES", 1)  # one head at a time
    dense = model(4, 2)
    pruned = ppgraph.transform(dense, **{**OPTIONS, "lowering": "inductor"})
    for length in (7, 8, 19):
        inputs = prompts(3, length, padded=padded)
        found = pruned(**inputs, use_cache=False).logits
        real = inputs.get("attention_mask", torch.ones(3, length)).bool()
        expected = masked_dense_logits(dense, pruned.ppgraph.selection(), **inputs)
        torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)
    assert len(pruned.ppgraph.graphs) == 1


def test_inputs_that_a_graph_writes_to_are_told_through_views_too() -> None:
    graph, aten = Graph(), torch.ops.aten
    token, cache, counter, weight = (graph.placeholder(name) for name in ("token", "cache", "counter", "weight"))
    view = graph.call_function(aten.slice.Tensor, (graph.call_function(aten.select.int, (cache, 0, 1)), 0, 0, 2))
    graph.call_function(aten.copy_.default, (view, token))
    graph.call_function(aten.add_.Tensor, kwargs={"self": counter, "other": token})
    graph.output((graph.call_function(aten.mul.Tensor, (weight, token)),))
    program = Program(GraphModule(torch.nn.Module(), graph), ppgraph.PruneConfig(), {})
    assert written_inputs(program) == {1, 2}


def sorts_scores(part: GraphModule) -> bool:
    return any(node.target is HIGHEST and "insert_score" in node.meta.values() for node in part.graph.nodes)


def test_numbers_are_told_by_their_bounds_only_where_no_other_input_has_their_symbol() -> None:
    """Code that was compiled for one number given twice must not serve two."""
    found = []

    def backend(graph: GraphModule, values: list[Any]) -> Any:
        symbol, other = (value for value in _torch.placeholder_values(graph) if isinstance(value, torch.SymInt))
        found.extend(structure(adding(*numbers)) for numbers in ((symbol, other), (other, symbol), (symbol, symbol)))
        return graph

    with torch.no_grad():
        torch.compile(lambda x: x * 2, backend=backend, dynamic=True)(torch.ones(5, 7))
    assert found[0] == found[1] != found[2]


def adding(*numbers: torch.SymInt) -> GraphModule:
    graph = Graph()
    inputs = []
    for place, number in enumerate(numbers):
        inputs.append(graph.placeholder(f"number_{place}"))
        inputs[-1].meta["val"] = number
    graph.output((graph.call_function(operator.add, tuple(inputs)),))
    return GraphModule(torch.nn.Module(), graph)


def test_what_inductor_cannot_compile_is_told_from_what_the_model_does_not_take() -> None:
    pruned = ppgraph.transform(model(2), **{**OPTIONS, "lowering": {"cpp.cxx": ("no-such-compiler",)}})
    with pytest.raises(LoweringError, match=r"expected Inductor to compile the pruned graph; found: .*InvalidCxx"):
        pruned(**prompts(3, 11, padded=False), use_cache=False)
    assert pruned.ppgraph.graphs == []
    assert not pruned.ppgraph.history.seen.any()


def test_a_kernel_that_fails_after_its_graph_was_planned_is_told_the_same(
    compiled: list[GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def failing() -> Iterator[None]:
        yield
        raise RuntimeError("no room for g++")

    monkeypatch.setattr(_torch, "kernels_compiled_meanwhile", failing)
    pruned = ppgraph.transform(model(2), **{**OPTIONS, "lowering": "inductor"})
    with pytest.raises(LoweringError, match=r"expected Inductor to compile the pruned graph; found: no room for g\+\+"):
        pruned(**prompts(3, 11, padded=False), use_cache=False)
    assert pruned.ppgraph.graphs == []


def marked(seen: torch.Tensor, values: torch.Tensor, other: torch.Tensor, lead: torch.Tensor) -> torch.Tensor:
    """What doge does to its mask: Inductor (torch 2.13) checks the places ahead of computing them."""
    places = torch.arange(values.shape[1]) + lead.shape[0]
    samples = torch.arange(values.shape[0])
    kept = (places > 2) & seen[samples[:, None], places[None]].bool()
    marks = torch.where(kept[..., None], (torch.arange(1, 9) * values).exp() + other.log1p(), 0.0)
    return marks.transpose(1, 2).contiguous()


def marked_inputs() -> tuple[torch.Tensor, ...]:
    return torch.ones(5, 40, dtype=torch.int64), torch.rand(5, 20, 8), torch.rand(5, 20, 8), torch.zeros(3)


def test_a_part_whose_vector_code_is_no_code_is_compiled_without(caplog: pytest.LogCaptureFixture) -> None:
    lowered: list[Callable[..., Any]] = []

    def backend(graph: GraphModule, values: list[Any]) -> Any:
        fakes = _torch.placeholder_values(graph)
        with _torch.graph_world(_torch.fake_mode_of(fakes)):
            program = Program(_torch.to_aten(graph, fakes), ppgraph.PruneConfig(), {})
            lowered.append(lower(program, {}))
        return lowered[-1]

    inputs = marked_inputs()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(marked, backend=backend, dynamic=True)(*inputs), marked(*inputs))
    assert len(lowered) == 1
    assert "without vector instructions; with them, g++ said: /" in caplog.text
