"""A canary for each private part of torch that `ppgraph/_torch.py` uses: one that fails says what a release broke."""

from __future__ import annotations

import gc
import operator
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import sympy
import torch
from torch import nn
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codegen.cpp import stride_at_vec_range
from torch._inductor.sizevars import SizeVarAllocator
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.sym_node import SymNode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._sympy.functions import FloorDiv, ModularIndexing
from torch.utils.flop_counter import FlopCounterMode

from ppgraph import _torch
from ppgraph.errors import InputError
from tests.test_lowering import marked, marked_inputs


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4)])
        self.register_buffer("scale", torch.full((4,), 2.0))

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        x = torch.relu(self.layers[0](x)) * self.scale
        x = x if attention_mask is None else x * attention_mask
        return x + kwargs["bias"] if kwargs else x


Look = Callable[[GraphModule, list[Any]], Any]


def seen_by_backend(look: Look, module: nn.Module | None = None, **inputs: Any) -> Any:
    """What `look` finds in the graph that Dynamo hands to a backend."""
    found: list[Any] = []

    def backend(graph: GraphModule, values: list[Any]) -> Any:
        found.append(look(graph, values))
        return graph

    torch._dynamo.reset()
    given = inputs or {"x": torch.ones(3, 4)}
    for value in given.values():
        torch._dynamo.maybe_mark_dynamic(value, 0)
    with torch.no_grad():
        torch.compile(module or Tiny(), backend=backend, fullgraph=True)(**given)
    return found[0]


def test_placeholder_values_are_fake_tensors_of_one_mode() -> None:
    def look(graph: GraphModule, values: list[Any]) -> Any:
        return _torch.placeholder_values(graph), _torch.fake_mode_of(_torch.placeholder_values(graph)), values

    fakes, mode, values = seen_by_backend(look)
    assert len(fakes) == len(values)
    assert isinstance(mode, _torch.FakeTensorMode)
    sizes = [value for value in fakes if isinstance(value, torch.SymInt)]
    tensors = [value for value in fakes if isinstance(value, torch.Tensor)]
    assert len(sizes) == 1, "the marked dimension is an input of its own"
    assert all(tensor.fake_mode is mode for tensor in tensors)  # type: ignore[attr-defined]


def test_fake_mode_of_says_when_there_is_no_tensor() -> None:
    with pytest.raises(RuntimeError, match="no tensor input"):
        _torch.fake_mode_of([3])


def test_placeholder_source_names_parameters_buffers_and_arguments() -> None:
    def look(graph: GraphModule, values: list[Any]) -> Any:
        sources = [_torch.placeholder_source(node) for node in graph.graph.nodes if node.op == "placeholder"]
        return {_torch.source_parameter(source) for source in sources}, {_torch.source_argument(s) for s in sources}

    parameters, arguments = seen_by_backend(look, x=torch.ones(3, 4), attention_mask=torch.ones(3, 1))
    assert parameters - {""} == {"layers.0.weight", "layers.0.bias", "scale"}
    assert arguments - {""} == {"x", "attention_mask"}
    _, arguments = seen_by_backend(look, x=torch.ones(3, 4), bias=torch.ones(3, 1))
    assert arguments - {""} == {"x", "bias"}


def test_traced_module_is_the_model_being_compiled() -> None:
    model = Tiny()
    assert seen_by_backend(lambda graph, values: _torch.traced_module(graph), model) is model
    assert seen_by_backend(lambda graph, values: _torch.traced_module(graph), nn.ReLU(), input=torch.ones(3, 4)) is None


def test_traced_module_guards_on_the_models_identity() -> None:
    traced: list[Any] = []

    def backend(graph: GraphModule, values: list[Any]) -> Any:
        traced.append(_torch.traced_module(graph))
        return graph

    torch._dynamo.reset()
    models = [Tiny(), Tiny()]
    with torch.no_grad():
        for model in models:
            torch.compile(model, backend=backend)(torch.ones(3, 4))
    assert [found is model for found, model in zip(traced, models, strict=True)] == [True, True]


def test_graphs_guarded_by_traced_module_do_not_count_towards_the_recompile_limit() -> None:
    traced: list[Any] = []

    def backend(graph: GraphModule, values: list[Any]) -> Any:
        traced.append(_torch.traced_module(graph))
        return graph

    torch._dynamo.reset()
    models = [Tiny() for _ in range(4)]
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        for model in models:
            torch.compile(model, backend=backend)(torch.ones(3, 4))
    assert [id(model) for model in traced] == [id(model) for model in models]


def test_traced_code_and_arguments_of_find_the_running_call() -> None:
    codes: list[Any] = []
    given: list[Any] = []

    def backend(graph: GraphModule, values: list[Any]) -> Any:
        codes.append(_torch.traced_code())

        def run(*inputs: Any) -> Any:
            given.extend(_torch.arguments_of(codes[0]))
            return graph(*inputs)

        return run

    torch._dynamo.reset()
    x, bias = torch.ones(3, 4), torch.ones(3, 1)
    with torch.no_grad():
        torch.compile(Tiny(), backend=backend)(x, bias=bias)
    assert codes[0][1] == "forward"
    assert any(value is x for value in given)
    assert any(value is bias for value in given)
    assert _torch.traced_code() is None


def test_wrapper_of_is_the_running_torch_compile_of_a_module() -> None:
    model = Tiny()
    found: list[Any] = []

    def backend(graph: GraphModule, values: list[Any]) -> Any:
        found.append((_torch.wrapper_of(model), _torch.graphs_left()))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad(), torch._dynamo.config.patch(accumulated_recompile_limit=5):
        compiled(torch.ones(3, 4))
    assert found == [(compiled, 4)]
    assert _torch.wrapper_of(model) is None


def test_passing_errors_come_out_of_dynamo_as_they_are() -> None:
    def backend(graph: GraphModule, values: list[Any]) -> Any:
        with _torch.passing_errors(InputError):
            raise InputError("too long")

    torch._dynamo.reset()
    for fullgraph in (False, True):
        with torch.no_grad(), pytest.raises(InputError) as raised:
            torch.compile(Tiny(), backend=backend, fullgraph=fullgraph)(torch.ones(3, 4))
        assert str(raised.value) == "too long"


def test_dynamo_lets_go_of_a_models_graphs() -> None:
    model = Tiny()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=lambda graph, values: graph)(torch.ones(3, 4))
    gone = weakref.ref(model)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


def test_to_aten_gives_operators_before_dispatch_with_symbolic_sizes() -> None:
    def look(graph: GraphModule, values: list[Any]) -> Any:
        fakes = _torch.placeholder_values(graph)
        with _torch.graph_world(_torch.fake_mode_of(fakes)):
            return _torch.to_aten(graph, fakes)

    graph = seen_by_backend(look).graph
    calls = [node for node in graph.nodes if node.op == "call_function"]
    aten = torch.ops.aten
    assert [node.target for node in calls] == [aten.linear.default, aten.relu.default, aten.mul.Tensor]
    assert all(isinstance(node.meta["val"].shape[0], torch.SymInt) for node in calls)


def test_to_aten_takes_apart_what_it_is_told_to() -> None:
    """One that torch's C++ makes of others, and one that its Python does."""
    aten = torch.ops.aten

    class Composite(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.glu(x.swapaxes(0, 1), 0)

    def look(graph: GraphModule, values: list[Any]) -> Any:
        fakes = _torch.placeholder_values(graph)
        with _torch.graph_world(_torch.fake_mode_of(fakes)):
            return _torch.to_aten(graph, fakes, (aten.swapaxes.default, aten.glu.default))

    graph = seen_by_backend(look, Composite()).graph
    targets = {node.target for node in graph.nodes if node.op == "call_function"}
    assert aten.transpose.int in targets and aten.mul.Tensor in targets
    assert not targets & {aten.swapaxes.default, aten.glu.default}


def test_graph_world_does_not_guard_on_sizes_of_one() -> None:
    def look(graph: GraphModule, values: list[Any]) -> Any:
        fakes = _torch.placeholder_values(graph)
        x = next(value for value in fakes if isinstance(value, torch.Tensor) and value.shape[0] not in (4,))
        before = len(x.fake_mode.shape_env.guards)  # type: ignore[attr-defined]
        with _torch.graph_world(_torch.fake_mode_of(fakes)):
            count = (x.shape[0] + 19) // 20  # 1 of today's 3 samples
            total = x.new_ones(count, 4) + x.new_ones(count, 4)
        return total.shape[0], len(x.fake_mode.shape_env.guards) - before  # type: ignore[attr-defined]

    size, guards = seen_by_backend(look)
    assert isinstance(size, torch.SymInt)
    assert guards == 0


def test_graph_world_turns_the_fake_modes_cache_off() -> None:
    """`cache_enabled` is private: under another name, setting it would do nothing and passes take twice as long."""

    def calls_that_cache() -> int:
        _torch.FakeTensorMode.cache_clear()
        assert torch.add(x, x).shape == (3,)
        info = _torch.FakeTensorMode.cache_info()
        return int(info.hits + info.misses + sum(info.bypasses.values()))

    mode = _torch.FakeTensorMode()
    with mode:
        x = torch.empty(3)
        assert calls_that_cache() == 1
        with _torch.graph_world(mode):
            assert calls_that_cache() == 0
        assert calls_that_cache() == 1


def test_call_on_fakes_broadcasts_symbolic_baddbmm() -> None:
    def look(graph: GraphModule, values: list[Any]) -> Any:
        fakes = _torch.placeholder_values(graph)
        x = next(
            value for value in fakes if isinstance(value, torch.Tensor) and isinstance(value.shape[0], torch.SymInt)
        )
        with _torch.graph_world(_torch.fake_mode_of(fakes)):
            arguments = (x.new_ones(1, 1, 1), x.new_ones(x.shape[0], 2, 4), x.new_ones(x.shape[0], 4, 2))
            return _torch.call_on_fakes(torch.ops.aten.baddbmm.default, arguments, {})

    assert seen_by_backend(look).shape[1:] == (2, 2)


def test_unset_fake_temporarily_gives_real_tensors() -> None:
    def look(graph: GraphModule, values: list[Any]) -> Any:
        with _torch.graph_world(_torch.fake_mode_of(_torch.placeholder_values(graph))), _torch.unset_fake_temporarily():
            return torch.arange(3).tolist()

    assert seen_by_backend(look) == [0, 1, 2]


def test_inductor_options_are_those_that_torch_compile_takes() -> None:
    options = _torch.inductor_options()
    assert {"max_autotune", "epilogue_fusion"} <= options
    torch.compile(nn.ReLU(), options={"max_autotune": False})


def test_modes_with_cuda_graphs_and_the_setting_of_the_process_ask_for_them() -> None:
    gpu, modes = torch.device("cuda:0"), torch._inductor.list_mode_options
    assert _torch.wants_cuda_graphs(modes("reduce-overhead"), gpu)
    assert not _torch.wants_cuda_graphs(modes("reduce-overhead"), torch.device("cpu"))
    assert not _torch.wants_cuda_graphs(modes("max-autotune-no-cudagraphs"), gpu)
    with torch._inductor.config.patch({"triton.cudagraphs": True}):
        assert _torch.wants_cuda_graphs({}, gpu)
        assert not _torch.wants_cuda_graphs({"triton.cudagraphs": False}, gpu)


def test_lower_with_inductor_takes_an_aten_graph_and_options_and_may_postpone_its_kernels() -> None:
    compiled: list[Any] = []

    def backend(graph: GraphModule, values: list[Any]) -> Any:
        fakes = _torch.placeholder_values(graph)
        with _torch.graph_world(_torch.fake_mode_of(fakes)):
            traced = _torch.to_aten(graph, fakes)
            with mock.patch.object(AsyncCompile, "wait", autospec=True, side_effect=AsyncCompile.wait) as wait:
                with _torch.kernels_compiled_meanwhile():
                    compiled.append(_torch.lower_with_inductor(traced, {"max_autotune": False}))
                    assert not wait.called
                assert wait.called
        return compiled[0]

    torch._dynamo.reset()
    model, x = Tiny(), torch.randn(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))
    assert compiled


def test_kernels_of_a_graph_are_one_file_but_for_those_that_need_one_of_their_own() -> None:
    """Each is what it is alone: the same code in a namespace."""
    files: list[str] = []
    load = _torch._Library.load_async

    def loading(code: str, **options: Any) -> Any:
        files.append(code)
        return load(code, **options)

    def three_kernels(x: torch.Tensor) -> torch.Tensor:
        return ((x.sin() @ x.t()).cos() @ x).exp()

    def backend(graph: GraphModule, values: list[Any]) -> Any:
        fakes = _torch.placeholder_values(graph)
        with _torch.graph_world(_torch.fake_mode_of(fakes)):
            traced = _torch.to_aten(graph, fakes)
            with mock.patch.object(_torch._Library, "load_async", loading), _torch.kernels_compiled_meanwhile():
                return _torch.lower_with_inductor(traced, {"fx_graph_cache": False})

    x = torch.randn(5, 7)
    as_ever = [mock.DEFAULT]
    takes = mock.Mock(wraps=_torch._KernelFile.takes, side_effect=as_ever * 3 + [False] + as_ever * 2)
    with mock.patch.object(_torch._KernelFile, "takes", takes):
        for _ in range(2):
            torch._dynamo.reset()
            torch.testing.assert_close(torch.compile(three_kernels, backend=backend)(x), three_kernels(x))
    assert [code.count("namespace kernel") for code in files] == [3, 2]


@pytest.mark.parametrize(
    ("code", "is_taken"),
    [
        ('#include <torch/csrc/inductor/cpp_prefix.h>\nextern "C" void kernel() {\n  #pragma omp for\n}', True),
        ('#include <torch/csrc/inductor/cpp_prefix.h>\n#include <omp.h>\nextern "C" void kernel() {}', False),
        ('extern "C" void kernel() {}\nextern "C" void more() {}', False),
    ],
)
def test_a_kernel_with_headers_or_exports_of_its_own_is_a_file_of_its_own(code: str, is_taken: bool) -> None:
    assert _torch._KernelFile.takes(code) == is_taken


def test_strides_are_those_of_indices_that_are_simplified() -> None:
    """What is left out changes no stride that Inductor makes its loops by."""
    x, y, size = sympy.symbols("x y size", integer=True, positive=True)
    width = sympy.Max(2, FloorDiv(size + 1, 2))
    indices = [
        1408 * x + y,
        x + width * y,
        width * (x + y) + FloorDiv(size + 19, 20),
        FloorDiv(x, 32) + y,
        FloorDiv(x, width) * 7 + ModularIndexing(x, 1, 64),
        ModularIndexing(y, 1, width) + x,
        (x + 3) * (y + size) - x * y,
    ]
    stride = stride_at_vec_range.__wrapped__
    simplify = stride.__globals__["simplify_index_in_vec_range"]
    expected = [stride(index, var, 16) for index in indices for var in (x, y)]
    watched = mock.Mock(side_effect=simplify)
    with (
        mock.patch.dict(stride.__globals__, simplify_index_in_vec_range=watched),
        _torch.indices_simplified_where_it_matters(),
    ):
        found = [stride(index, var, 16) for index in indices for var in (x, y)]
    assert found == expected
    asked = {(call.args[0], call.args[1]) for call in watched.call_args_list}
    assert {(index, var) for index in indices for var in (x, y)} & asked == {
        (indices[3], x),
        (indices[4], x),
        (indices[5], y),
    }


def test_a_graph_whose_size_is_made_of_one_that_is_no_input_compiles_again() -> None:
    """Inductor's cache on disk would have it fail the second time, in the same process as in another."""

    def backend(graph: GraphModule, values: list[Any]) -> Any:
        fakes = _torch.placeholder_values(graph)
        samples, more = (value for value in fakes if isinstance(value, torch.SymInt))
        with _torch.graph_world(_torch.fake_mode_of(fakes)):
            for _ in range(2):
                part = Graph()
                count, total, x = map(part.placeholder, ("count", "total", "x"))
                count.meta["val"], total.meta["val"] = samples, samples + more
                x.meta["val"] = next(value for value in fakes if isinstance(value, torch.Tensor))
                added = part.call_function(torch.ops.aten.add.Tensor, (x, count))
                added.meta["val"] = x.meta["val"] + 1
                part.output((added,))
                lowered.append(_torch.lower_with_inductor(GraphModule(nn.Module(), part), {}))
        return graph

    lowered: list[Any] = []
    torch._dynamo.reset()
    torch.compile(lambda x, more: x * more, backend=backend, dynamic=True)(torch.ones(3), 5)
    for compiled in lowered:
        assert torch.equal(compiled(3, 8, torch.ones(3))[0], torch.full((3,), 4.0))
    assert len(lowered) == 2


@pytest.mark.parametrize("given", ["number", "negative", "dimension"])
def test_a_graph_takes_sizes_made_of_one_that_is_no_input(given: str) -> None:
    """Inductor refuses a tensor of such a size; of a number it writes code that reads what nothing has."""
    sign = -1 if given == "negative" else 1

    def backend(graph: GraphModule, values: list[Any]) -> Any:
        fakes = _torch.placeholder_values(graph)
        number = next(value for value in fakes if isinstance(value, torch.SymInt))
        one = next(value for value in fakes if isinstance(value, torch.Tensor)).new_empty(1)
        with _torch.graph_world(_torch.fake_mode_of(fakes)):
            part = Graph()
            size, x = map(part.placeholder, ("size", "x"))
            x.meta["val"] = one
            size.meta["val"] = 3 + sign * number
            if given == "dimension":
                size.meta["val"] = one.new_empty(3 + number)
                size = part.call_function(torch.ops.aten.sym_size.int, (size, 0))
            less = part.call_function(operator.sub, (size, 3))
            counted = part.call_function(
                torch.ops.aten.arange.default, (part.call_function(operator.mul, (less, sign)),)
            )
            part.output((part.call_function(torch.ops.aten.add.Tensor, (counted, x)),))
            lowered.append(_torch.lower_with_inductor(GraphModule(nn.Module(), part), {}))
        return graph

    lowered: list[Any] = []
    torch._dynamo.reset()
    torch.compile(lambda x, more: x * more, backend=backend, dynamic=True)(torch.ones(3), 5)
    for number in (5, 7):
        size = torch.empty(3 + number) if given == "dimension" else 3 + sign * number
        assert lowered[0](size, torch.ones(1))[0].tolist() == [*range(1, number + 1)]


def test_inductor_compares_two_sizes_by_hints_where_it_is_told_to() -> None:
    """Slices of sliding caches end at one size of another (cohere2, several tokens into a static cache)."""
    found: list[Any] = []

    def backend(graph: GraphModule, values: list[Any]) -> Any:
        fakes = _torch.placeholder_values(graph)
        left, right = (value.node.expr for value in fakes if isinstance(value, torch.SymInt))
        mode = _torch.fake_mode_of(fakes)
        sizes = SizeVarAllocator(mode.shape_env)
        with _torch.graph_world(mode):
            if not torch.__version__.startswith("2.11."):  # which looks at hints by itself
                with pytest.raises(TypeError, match="evaluate_min"):
                    sizes.evaluate_min(left, right)
            with _torch.sizes_compared_by_hints():
                found.append((sizes.evaluate_min(left, right), right))
        return graph

    torch._dynamo.reset()
    torch.compile(lambda x, end: x * end, backend=backend, dynamic=True)(torch.ones(7), 5)
    smaller, end = found[0]
    assert smaller == end


def test_a_number_that_is_known_leaves_no_symbol_to_guard_on() -> None:
    """smollm3 with prompts of one token: one part's number was 2, and Dynamo's guards failed on `sym_1`."""

    def backend(graph: GraphModule, values: list[Any]) -> Any:
        fakes = _torch.placeholder_values(graph)
        part = Graph()
        end, x = map(part.placeholder, ("end", "x"))
        end.meta["val"], x.meta["val"] = 3, next(value for value in fakes if isinstance(value, torch.Tensor))
        cut = part.call_function(torch.ops.aten.slice.Tensor, (x, 0, 0, end))
        part.output((part.call_function(torch.ops.aten.add.Tensor, (cut, 1)),))
        with _torch.graph_world(_torch.fake_mode_of(fakes)):
            lowered.append(_torch.lower_with_inductor(GraphModule(nn.Module(), part), {}))
        assert not end.users  # guards come with graphs that Inductor has in its cache, so not here
        return graph

    lowered: list[Any] = []
    torch._dynamo.reset()
    torch.compile(lambda x: x * 2, backend=backend, dynamic=True)(torch.ones(7))
    assert lowered[0](3, torch.arange(7.0))[0].tolist() == [1, 2, 3]


def test_cpp_compile_error_says_what_the_compiler_said() -> None:
    """Where this fails as the C++ compiles, torch has mended it: `lowering._compiled_alone` can go."""

    def backend(graph: GraphModule, values: list[Any]) -> Any:
        fakes = _torch.placeholder_values(graph)
        with _torch.graph_world(_torch.fake_mode_of(fakes)):
            module = _torch.to_aten(graph, fakes)
            with pytest.raises(_torch.CppCompileError) as caught:
                _torch.lower_with_inductor(module, {})
        said.append(caught.value.output)
        return graph

    said: list[str] = []

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(marked, backend=backend, dynamic=True)(*marked_inputs())
    assert len(said) == 1
    assert "error:" in said[0]


def test_backend_compiler_failed_carries_the_error_of_the_backend() -> None:
    def backend(graph: GraphModule, values: list[Any]) -> Any:
        raise InputError("no")

    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(_torch.BackendCompilerFailed) as caught:
        torch.compile(Tiny(), backend=backend)(torch.ones(3, 4))
    assert isinstance(caught.value.inner_exception, InputError)


def test_what_fails_in_capture_is_a_torch_dynamo_exception() -> None:
    def product(values: torch.Tensor) -> torch.Tensor:
        return values @ torch.ones(3, 3)

    with pytest.raises(_torch.TorchDynamoException):
        torch.compile(product, backend="eager", fullgraph=True)(torch.ones(2, 2))


def test_compiled_with_finds_backend_and_options_behind_torch_compile() -> None:
    model = Tiny()
    settings = {"options": {"ratio": 0.4}}
    found = _torch.compiled_with(torch.compile(model, backend="ppgraph", **settings))
    assert found == (model, "ppgraph", settings)
    model.compile(backend="ppgraph", **settings)
    assert _torch.compiled_with(model) == (model, "ppgraph", settings)


def test_compiled_with_tells_other_models_apart() -> None:
    assert _torch.compiled_with(Tiny()) is None
    found = _torch.compiled_with(torch.compile(Tiny(), backend="eager"))
    assert found is not None
    assert found[1] == "eager"


def test_expression_and_quotient_compare_sizes_without_guards() -> None:
    def look(graph: GraphModule, values: list[Any]) -> Any:
        samples = next(value for value in _torch.placeholder_values(graph) if isinstance(value, torch.SymInt))
        symbol = _torch.expression(samples)
        return symbol.is_Symbol, _torch.expression(samples * 4 // 4) == symbol, samples.node.shape_env.guards

    assert seen_by_backend(look) == (True, True, [])
    s, t = sympy.symbols("s t", positive=True, integer=True)
    assert _torch.quotient(s * t, t) == s
    assert _torch.quotient(s, t) is None
    assert _torch.expression(7) == 7


def test_bounds_are_what_dynamo_takes_a_size_to_have() -> None:
    def look(graph: GraphModule, values: list[Any]) -> Any:
        return [_torch.bounds(value) for value in _torch.placeholder_values(graph) if isinstance(value, torch.SymInt)]

    (lowest, highest), *_ = seen_by_backend(look)
    assert lowest == 2
    assert highest > 2**31


def test_floor_division_in_sizes_is_taken_apart() -> None:
    s, t = sympy.symbols("s t", positive=True, integer=True)
    assert _torch._without_floors(_torch.FloorDiv(s * t, t)) == s
    assert _torch._without_floors(_torch.FloorDiv(s, 2)) == _torch.FloorDiv(s, 2)


def test_fresh_function_has_graphs_of_its_own() -> None:
    compilations: list[int] = []

    def backend(graph: GraphModule, values: list[Any]) -> Any:
        compilations.append(1)
        return graph

    def template(x: torch.Tensor, *, factor: int = 3) -> torch.Tensor:
        return x * factor

    torch._dynamo.reset()
    for _ in range(20):  # more than Dynamo's limit of recompilations of one function
        own = _torch.fresh_function(template)
        assert torch.equal(torch.compile(own, backend=backend, fullgraph=True)(torch.ones(2)), torch.full((2,), 3.0))
    assert len(compilations) == 20


def test_dynamo_settings_make_floats_constants_and_cache_no_fake_values() -> None:
    placeholders, caches = [], []

    def backend(graph: GraphModule, values: list[Any]) -> Any:
        placeholders.append(len(values))
        caches.append(_torch.fake_mode_of(_torch.placeholder_values(graph)).cache_enabled)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda x, factor: x * factor, backend=backend, dynamic=True)
    with _torch.dynamo_settings():
        compiled(torch.ones(2, 3), 0.5)
    without_sizes = placeholders[0]
    torch._dynamo.reset()
    torch.compile(lambda x, factor: x * factor, backend=backend, dynamic=True)(torch.ones(2, 3), 0.5)
    assert placeholders[1] == without_sizes + 1
    assert caches == [False, True]


def test_a_hint_is_what_a_size_is_in_the_captured_call() -> None:
    hints: list[Any] = []

    def backend(graph: GraphModule, values: list[Any]) -> Any:
        sizes = {size for value in values if isinstance(value, torch.Tensor) for size in value.shape}
        hints.append(sorted(_torch.hint(size + 1) for size in sizes))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + 1, backend=backend, dynamic=True)
    compiled(torch.ones(7, 3))
    compiled(torch.ones(5, 4))
    assert hints == [[4, 8]]
    assert _torch.hint(6) == 6


def test_own_symbols_make_dynamo_trace_again() -> None:
    sizes: list[list[Any]] = []

    def backend(graph: GraphModule, values: list[Any]) -> Any:
        sizes.extend(value.shape for value in _torch.placeholder_values(graph) if isinstance(value, torch.Tensor))
        with _torch.own_symbols(graph):
            return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x * 2, backend=backend, dynamic=True)
    assert compiled(torch.ones(5, 5)).shape == (5, 5)
    assert compiled(torch.ones(4, 3)).shape == (4, 3)
    shared, own = sizes
    assert _torch.expression(shared[0]) == _torch.expression(shared[1])
    assert _torch.expression(own[0]) != _torch.expression(own[1])


def test_floats_become_constants_in_the_trace_that_own_symbols_ask_for() -> None:
    inputs: list[int] = []

    def backend(graph: GraphModule, values: list[Any]) -> Any:
        inputs.append(len(values))
        with _torch.own_symbols(graph):
            return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda x, factor: x * factor, backend=backend, dynamic=True)
    for factor in (0.5, 2.0):
        assert torch.equal(compiled(torch.ones(3, 5), factor), torch.full((3, 5), factor))
    with_float, without, *again = inputs
    assert without == with_float - 1
    assert again[-1] == without


def test_a_backend_that_raises_what_inductor_raises_for_floats_is_called_again() -> None:
    calls = []

    def backend(graph: GraphModule, values: list[Any]) -> Any:
        calls.append(graph)
        if len(calls) == 1:
            raise _torch.TensorifyScalarRestartAnalysis
        return graph

    assert torch.equal(torch.compile(lambda x: x * 2, backend=backend)(torch.ones(5)), torch.full((5,), 2.0))
    assert len(calls) == 2


def test_captured_nodes_know_their_module_and_source_line() -> None:
    def look(graph: GraphModule, values: list[Any]) -> Any:
        fakes = _torch.placeholder_values(graph)
        with _torch.graph_world(_torch.fake_mode_of(fakes)):
            return _torch.to_aten(graph, fakes)

    module = seen_by_backend(look)
    linear, relu, *_ = (node for node in module.graph.nodes if node.op == "call_function")
    assert _torch.module_path(linear) == "layers.0"
    assert _torch.module_path(relu) == ""
    assert "self.layers[0](x)" in linear.meta["stack_trace"]
    assert type(module).__name__.isidentifier()


def test_dtype_abbrs_are_those_of_print_readable() -> None:
    module = torch.fx.symbolic_trace(lambda x: x + 1)
    for node in module.graph.nodes:
        node.meta["val"] = torch.ones(2, dtype=torch.bfloat16)
    assert f'"{_torch.dtype_abbrs[torch.bfloat16]}[2]"' in module.print_readable(print_output=False)


def test_is_wrapped_tells_subclasses_that_hold_tensors() -> None:
    assert not _torch.is_wrapped(nn.Parameter(torch.ones(2)))
    assert _torch.is_wrapped(TwoTensor(torch.ones(2), torch.ones(2)))


# The canary of `_torch.trace_artifact` needs a process of its own: tests/test_dump.py.


def test_every_public_name_has_a_canary() -> None:
    """A name that is added to `_torch.py` is watched here too."""
    from pathlib import Path

    text = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in _torch.__all__ if f"_torch.{name}" not in text] == []


def test_attention_flops_on_cpu() -> None:
    query = torch.ones(2, 3, 5, 8)
    for mapping, expected in (({}, 0), (_torch.ATTENTION_FLOPS_ON_CPU, 2 * 2 * 2 * 3 * 5 * 5 * 8)):
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
        assert counter.get_total_flops() == expected, "torch counts it now: drop the formula"


def test_hides_interrupt() -> None:
    either = (RuntimeError, KeyboardInterrupt)  # torch 2.11 hands it on

    def capture(x: torch.Tensor) -> torch.Tensor:
        with mock.patch.object(SymNode, "is_int", side_effect=KeyboardInterrupt), pytest.raises(either) as found:
            torch.ops.aten.as_strided.default(x, [x.shape[0]], [x.shape[1]])
        assert isinstance(found.value, KeyboardInterrupt) or _torch.hides_interrupt(found.value)
        return x

    make_fx(capture, tracing_mode="symbolic")(torch.ones(5, 6))
    assert not _torch.hides_interrupt(RuntimeError("KeyboardInterrupted"))


def test_trace_below_autograd() -> None:
    traced = _torch.trace_below_autograd(lambda x: x.relu() + 1, [torch.ones(2)])
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.aten.relu.default, torch.ops.aten.add.Tensor]
