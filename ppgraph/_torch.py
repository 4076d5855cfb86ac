"""Everything private of torch that ppgraph relies on, in one place; `tests/test_torch_canaries.py` watches each.

Checked with torch 2.11 to 2.13. When a release breaks one of these, the canary of the same name says which.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import sympy
import torch
import torch._dynamo.config
import torch.fx.experimental._config as _symbolic_config
from torch._decomp import get_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.exc import (
    BackendCompilerFailed,
    ShortenTraceback,
    TensorifyScalarRestartAnalysis,
    TorchDynamoException,
)
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.output_graph import OutputGraph
from torch._dynamo.symbolic_convert import TensorifyState
from torch._guards import CompileContext, Guard, TracingContext, tracing
from torch._inductor import async_compile
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.codegen.cpp import stride_at_vec_range  # type: ignore[attr-defined]
from torch._inductor.compile_fx import compile_fx
from torch._inductor.exc import CppCompileError, InductorError
from torch._inductor.sizevars import SizeVarAllocator
from torch._inductor.utils import clear_on_fresh_cache
from torch._logging._internal import trace_structured
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.utils._dtype_abbrs import dtype_abbrs
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._sympy.functions import FloorDiv, ModularIndexing
from torch.utils.flop_counter import sdpa_flop_count

__all__ = [
    "ATTENTION_FLOPS_ON_CPU",
    "BackendCompilerFailed",
    "CppCompileError",
    "FakeTensorMode",
    "TensorifyScalarRestartAnalysis",
    "TorchDynamoException",
    "arguments_of",
    "bounds",
    "call_on_fakes",
    "compiled_with",
    "dtype_abbrs",
    "dynamo_settings",
    "expression",
    "fake_mode_of",
    "fresh_function",
    "graph_world",
    "graphs_left",
    "hides_interrupt",
    "hint",
    "indices_simplified_where_it_matters",
    "inductor_options",
    "is_wrapped",
    "kernels_compiled_meanwhile",
    "lower_with_inductor",
    "module_path",
    "own_symbols",
    "passing_errors",
    "placeholder_source",
    "placeholder_values",
    "quotient",
    "sizes_compared_by_hints",
    "source_argument",
    "source_parameter",
    "to_aten",
    "trace",
    "trace_artifact",
    "trace_below_autograd",
    "traced_code",
    "traced_module",
    "unset_fake_temporarily",
    "wants_cuda_graphs",
    "wrapper_of",
]

_one_at_a_time = threading.RLock()  # for what is changed in torch and put back

# What FlopCounterMode lacks (torch 2.13): it has formulas for attention on GPUs, and counts nothing for that on CPUs.
ATTENTION_FLOPS_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(
        query, key, value
    )
}


def placeholder_values(module: GraphModule) -> list[Any]:
    """Fake tensors and SymInts of a Dynamo graph's placeholders, in order."""
    return [node.meta["example_value"] for node in module.graph.nodes if node.op == "placeholder"]


def fake_mode_of(values: Sequence[Any]) -> FakeTensorMode:
    """The mode that Dynamo's fake values live in (its backend runs under a younger one with the same shapes)."""
    for value in values:
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise RuntimeError("the captured graph has no tensor input")


@contextlib.contextmanager
def graph_world(mode: FakeTensorMode) -> Iterator[None]:
    """Compute fake values in `mode` without guarding on sizes that happen to be 0 or 1.

    A probe of one sample today may be one of two samples tomorrow: `backed_size_oblivious` keeps the broadcasting
    rules from turning that into a guard and so into a recompilation.

    The mode's cache is off: with symbolic sizes, filling it takes as long as computing (half of all time in passes,
    torch 2.13), and passes share the values of calls that look alike themselves.
    """
    cached, mode.cache_enabled = mode.cache_enabled, False
    try:
        with tracing(TracingContext(mode)), mode, _symbolic_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            yield
    finally:
        mode.cache_enabled = cached


def call_on_fakes(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call an operator on fake values, with the kernels in Python that take symbolic sizes.

    Without them `baddbmm` refuses to broadcast its first operand (torch 2.13).
    """
    with enable_python_dispatcher():
        return target(*args, **kwargs)


def to_aten(module: GraphModule, values: Sequence[Any], taken_apart: Sequence[OpOverload] = ()) -> GraphModule:
    """Dynamo's graph as ATen operators before dispatch, the dialect of `torch.export`; call inside `graph_world`.

    Operators `taken_apart` are replaced by those that torch makes them of. Each node keeps the stack trace of the
    model's source line and the modules that it stands in.
    """
    interpreter = torch.fx.Interpreter(module)

    def captured(*inputs: Any) -> Any:
        return interpreter.run(*inputs)

    with torch.fx.traceback.preserve_node_meta():
        traced = make_fx(
            captured,
            decomposition_table=_decompositions(tuple(taken_apart)),
            pre_dispatch=True,
            tracing_mode="real",
            _allow_non_fake_inputs=True,
        )(*values)
    return GraphModule(traced, traced.graph, class_name="Captured")  # make_fx names it "<lambda>", which is no Python


@functools.cache
def _decompositions(operators: tuple[OpOverload, ...]) -> dict[OpOverload, Callable[..., Any]]:
    """What each is made of: as torch's Python has it, or else its C++."""
    written = get_decompositions(operators)
    return {operator: written.get(operator, operator.decompose) for operator in operators}


def trace(function: Callable[..., Any], values: Sequence[Any]) -> GraphModule:
    """Tensor code as a graph of ATen operators that keeps symbolic sizes; call inside `graph_world`."""
    traced = make_fx(function, pre_dispatch=True, tracing_mode="real")(*values)
    assert isinstance(traced, GraphModule)
    return traced


def trace_below_autograd(function: Callable[..., Any], values: Sequence[Any]) -> GraphModule:
    """As `trace`, of what tensor subclasses such as DTensor come down to; call inside `graph_world`."""
    traced = make_fx(function, tracing_mode="real", _allow_non_fake_inputs=True)(*values)
    assert isinstance(traced, GraphModule)
    return traced


def inductor_options() -> frozenset[str]:
    """Names that `torch.compile(options=...)` takes for Inductor."""
    from torch._inductor import config

    return frozenset(config.get_config_copy()) - {"_raise_error_for_testing"}


def wants_cuda_graphs(options: Mapping[str, Any], device: torch.device) -> bool:
    """Whether options of Inductor, or its settings for the process, ask for CUDA graphs on a device that has them."""
    from torch._inductor import config

    return device.type == "cuda" and bool(options.get("triton.cudagraphs", config.triton.cudagraphs))


def lower_with_inductor(module: GraphModule, options: Mapping[str, Any]) -> Callable[..., Sequence[Any]]:
    """Compile an ATen graph with Inductor; takes ownership of `module`. Call inside `graph_world`."""
    placeholders = module.graph.find_nodes(op="placeholder")
    values = [_by_its_symbol(node.meta["val"]) for node in placeholders]
    _write_constants(module, dict(zip(placeholders, values, strict=True)))
    hidden = _hidden_sizes(values)
    if hidden:
        values += _added_inputs(module, values, hidden)
    patches = dict(options)
    if not _symbols_are_inputs(values):
        patches["fx_graph_cache"] = False
    with tracing(TracingContext(fake_mode_of(values))):  # one for each: what it holds belongs to a single graph
        try:
            compiled = compile_fx(module, values, config_patches=patches)
        except InductorError as error:
            if isinstance(error.inner_exception, CppCompileError):  # as torch 2.11 raises it
                raise error.inner_exception from None
            raise
    assert callable(compiled)
    if not hidden:
        return compiled
    return lambda *given: compiled(*given, *(read(given) for read in hidden.values()))


Read = Callable[[Sequence[Any]], int]


def _added_inputs(module: GraphModule, values: Sequence[Any], hidden: Mapping[sympy.Symbol, Read]) -> list[Any]:
    """Give a graph inputs behind its own, one for each symbol; their values."""
    env, shown = fake_mode_of(values).shape_env, [*map(_sizes_alone, values)]
    assert env is not None
    *_, place = module.graph.find_nodes(op="placeholder")
    added = []
    for symbol, read in hidden.items():
        with module.graph.inserting_after(place):
            place = module.graph.placeholder(str(symbol))
        place.meta["val"] = env.create_symintnode(symbol, hint=read(shown))
        added.append(place.meta["val"])
    module.recompile()
    return added


def _hidden_sizes(values: Sequence[Any]) -> dict[sympy.Symbol, Read]:
    """Symbols that a graph's sizes are made of though none is one, each with how to read it off the inputs.

    Inductor knows a symbol by the input that is it: of a number that comes in as `s + 1` alone it never finds `s`.
    """
    sizes = {size.node.expr: read for size, read in sizes_of_inputs(values) if hint(size) is not None}
    known = {size for size in sizes if size.is_Symbol}
    found: dict[sympy.Symbol, Read] = {}
    for size, read in sizes.items():
        for symbol in size.free_symbols - known - found.keys():
            rest = size.xreplace({symbol: sympy.Integer(0)})
            if size - rest in (symbol, -symbol) and rest.free_symbols <= known:
                others = sorted(rest.free_symbols, key=str)
                sign = 1 if size - rest == symbol else -1
                found[symbol] = _solved(read, sign, sympy.lambdify(others, rest), [sizes[other] for other in others])
    return found


def sizes_of_inputs(values: Sequence[Any]) -> Iterator[tuple[torch.SymInt, Read]]:
    """The symbolic sizes among a graph's inputs, in order, each with how to read it off what the graph is given."""
    for place, value in enumerate(values):
        is_tensor = isinstance(value, torch.Tensor)
        sizes: dict[int | None, Any] = dict(enumerate(value.shape)) if is_tensor else {None: value}
        for dim, size in sizes.items():
            if isinstance(size, torch.SymInt):
                yield size, _size_at(place, dim)


def _size_at(place: int, dim: int | None) -> Read:
    """A dimension of the tensor at a place, or the number there."""
    return lambda given: int(given[place] if dim is None else given[place].shape[dim])


def _solved(read: Read, sign: int, rest: Callable[..., int], others: Sequence[Read]) -> Read:
    """Of a size `sign * symbol + rest` and what its rest is made of: the symbol."""
    return lambda given: sign * (read(given) - int(rest(*(other(given) for other in others))))


def _sizes_alone(value: Any) -> Any:
    """An input of the call that is being captured, as far as sizes go."""
    return SimpleNamespace(shape=[*map(hint, value.shape)]) if isinstance(value, torch.Tensor) else hint(value)


def _symbols_are_inputs(values: Sequence[Any]) -> bool:
    """Whether sizes that are inputs are made of sizes that are inputs too, so that Inductor may keep the graph on disk.

    With such a graph it keeps a guard on these sizes, where others have the names that they had in Dynamo. Another
    process that looks for the graph fails on those.
    """
    sizes = [value.node.expr for value in values if isinstance(value, torch.SymInt)]
    known = {size for size in sizes if size.is_Symbol}
    return all(size.free_symbols <= known for size in sizes)


@contextlib.contextmanager
def kernels_compiled_meanwhile() -> Iterator[None]:
    """Several graphs for Inductor in a row: C++ kernels of one compile in its workers while Python plans the next.

    The module that Inductor generates for a graph waits for its kernels, which it puts in the place of futures. Here
    all these waits come at the end, before anything is called, and the kernels of a graph are one file. Other threads
    compile and wait as ever.
    """
    wait, own_thread = AsyncCompile.wait, threading.get_ident()
    postponed: list[tuple[AsyncCompile, dict[str, Any]]] = []
    files = [_KernelFile()]

    def collect(argument_types: Sequence[str], code: str, **options: Any) -> Callable[[], Any]:
        if threading.get_ident() == own_thread and _KernelFile.takes(code):
            return files[-1].add(argument_types, code)
        alone: Callable[[], Any] = CppPythonBindingsCodeCache.load_pybinding_async(argument_types, code, **options)
        return alone

    def postpone(compiler: AsyncCompile, scope: dict[str, Any]) -> None:
        if threading.get_ident() == own_thread:
            files[-1].submit()
            files.append(_KernelFile())
            postponed.append((compiler, scope))
        else:
            wait(compiler, scope)

    cache = SimpleNamespace(load_pybinding_async=collect, load_pybinding=CppPythonBindingsCodeCache.load_pybinding)
    with (
        _one_at_a_time,
        mock.patch.object(AsyncCompile, "wait", postpone),
        mock.patch.object(async_compile, "CppPythonBindingsCodeCache", cache),
    ):
        yield
    for compiler, scope in postponed:
        wait(compiler, scope)


class _KernelFile:
    """C++ kernels of one graph in one file, each in a namespace.

    Most of the time that g++ takes for a kernel by itself goes to headers (benchmarks/NOTES.md).
    """

    exported = 'extern "C"'
    header = f"#include <{CppPythonBindingsCodeCache._get_uncompiled_header('cpu')}>"
    # What torch includes for the functions that Python calls: not to be in a namespace.
    headers = "#define PY_SSIZE_T_CLEAN\n" + "\n".join(
        f"#include <{name}>" for name in ("Python.h", "cerrno", "cstdlib", "sstream")
    )

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.load: Callable[[], Any]

    @classmethod
    def takes(cls, code: str) -> bool:
        """Whether a kernel exports one function and includes nothing but the header of all."""
        directives = (line for line in map(str.strip, code.splitlines()) if line.startswith("#"))
        plain = all(line == cls.header or line.startswith("#pragma ") for line in directives)
        return plain and code.count(cls.exported) == 1

    def add(self, argument_types: Sequence[str], code: str) -> Callable[[], Any]:
        """Put a kernel in. What is returned gives the function that Python calls, once the file is submitted."""
        file = self

        class Kernel(CppPythonBindingsCodeCache):
            entry_function = f"kernel{len(file.parts)}"

            @classmethod
            def load_async(cls, main_code: str, *_: Any, **__: Any) -> Any:
                """Torch calls this with what it has added to the kernel: a module of Python's, named as above."""
                file.parts.append(f"namespace {cls.entry_function} {{\n{main_code}\n}}\n")
                return lambda: cls._load_library_inner(file.load().path, file.load().key)

        kernel: Callable[[], Any] = Kernel.load_pybinding_async(argument_types, code.replace(self.exported, ""))
        return kernel

    def submit(self) -> None:
        """Have a worker compile the file by the options set now."""
        if self.parts:
            code = "\n".join((self.header, self.headers, *self.parts))
            self.load = _Library.load_async(code, submit_fn=AsyncCompile.submit)


@clear_on_fresh_cache
class _Library(CppPythonBindingsCodeCache):
    """Inductor's cache of what it compiles, for files of which each kernel is loaded by itself."""

    cache: dict[str, Callable[[], Any]] = {}  # noqa: RUF012 (as torch declares it)
    cache_clear = staticmethod(cache.clear)

    @classmethod
    def _load_library_inner(cls, path: str, key: str) -> Any:
        return SimpleNamespace(path=path, key=key)


@contextlib.contextmanager
def sizes_compared_by_hints() -> Iterator[None]:
    """Let Inductor guard on which of two sizes is the smaller one, where it would fail else.

    In `graph_world` it takes sizes for unknown, and a slice up to one size of another is a TypeError. The program has
    been captured with that slice in range, so Dynamo has the guard already.
    """
    evaluate_min = SizeVarAllocator.evaluate_min

    def by_hints(sizes: SizeVarAllocator, left: sympy.Expr, right: sympy.Expr) -> sympy.Expr:
        try:
            return evaluate_min(sizes, left, right)
        except TypeError:
            with _symbolic_config.patch(backed_size_oblivious=False):  # type: ignore[attr-defined]
                return evaluate_min(sizes, left, right)

    with _one_at_a_time, mock.patch.object(SizeVarAllocator, "evaluate_min", by_hints):
        yield


@contextlib.contextmanager
def indices_simplified_where_it_matters() -> Iterator[None]:
    """Let Inductor's C++ backend ask sympy to simplify an index only where the loop's variable is divided in it.

    It does so for every index and loop, which takes a seventh of planning a graph with symbolic sizes. Elsewhere it is
    done in vain: the stride that is looked for is simplified by itself.
    """
    names = stride_at_vec_range.__wrapped__.__globals__  # the module differs between releases
    simplify = names["simplify_index_in_vec_range"]

    def where_it_matters(index: sympy.Expr, var: sympy.Symbol, vec_length: int) -> sympy.Expr:
        matters = any(division.has(var) for division in index.atoms(FloorDiv, ModularIndexing))
        return simplify(index, var, vec_length) if matters else index

    with _one_at_a_time, mock.patch.dict(names, simplify_index_in_vec_range=where_it_matters):
        yield


def _write_constants(module: GraphModule, values: Mapping[Node, Any]) -> None:
    """Have a graph read no number that is known: AOTAutograd makes it a symbol, on which Dynamo then can't guard."""
    known = {node: value for node, value in values.items() if isinstance(value, int)}
    for user in {user: None for node in known for user in node.users}:
        user.args, user.kwargs = map_arg((user.args, user.kwargs), lambda read: known.get(read, read))
    if known:
        module.recompile()


def _by_its_symbol(value: Any) -> Any:
    """A size whose symbol was found to equal another one, under that one's name; Inductor looks for no other (2.11)."""
    if not isinstance(value, torch.SymInt):
        return value
    return value.node.shape_env.create_symintnode(value.node.expr, hint=value.node.hint)


def module_path(node: Node) -> str:
    """The innermost module that a captured node stands in, as a dotted path in the model; empty when unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((str(entry[0]) for entry in reversed(stack.values())), "")
    return re.sub(r"^L(\[[^\]]*\])*(\.__self__)?\.?", "", path)


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a subclass that holds others, such as a quantised weight: captured graphs see through it."""
    return bool(is_traceable_wrapper_subclass(tensor))


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Hand a text to `TORCH_TRACE`, where tlparse shows it beside Dynamo's and Inductor's; free without that."""
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)


def placeholder_source(node: Node) -> str:
    """Where Dynamo found this input, as text such as `L['self']._modules['model']…`; empty when unknown."""
    source = getattr(node, "_dynamo_source", None)
    return "" if source is None else _source_name(source)


def _source_name(source: Any) -> str:
    """A method up to torch 2.11, a property since."""
    name = source.name
    return str(name() if callable(name) else name)


def traced_module(module: GraphModule) -> torch.nn.Module | None:
    """The model whose parameters a Dynamo graph reads, while Dynamo is calling its backend; None when there is none.

    Dynamo hands its backend names such as `L['self']._modules[...]`; what `L` stands for is in its OutputGraph.
    """
    placeholders = (node for node in module.graph.nodes if node.op == "placeholder")
    parameters = (node for node in placeholders if source_parameter(placeholder_source(node)))
    source = getattr(next(parameters, None), "_dynamo_source", None)
    scopes = _dynamo_scopes()
    if source is None or scopes is None:
        return None
    while "._modules" in _source_name(source) or "._parameters" in _source_name(source):
        source = source.base
    # An access path that Dynamo made, such as L['args'][0]; no user's text.
    root = eval(_source_name(source), {"__builtins__": {}}, scopes)  # noqa: S307
    if not isinstance(root, torch.nn.Module):
        return None
    # Models of one class share their code, so their graphs too unless a guard tells them apart.
    TracingContext.get().guards_context.dynamo_guards.add(source.make_guard(_match_module))
    return root


class _Unmatched:
    """What can be referred to weakly."""


_OF_NO_FRAME = _Unmatched()


def _match_module(builder: GuardBuilder, guard: Guard) -> None:
    """Guard on a module's identity, and let Dynamo count its graphs apart from those of other modules.

    Dynamo runs a frame uncompiled, so the model dense, once its code has `recompile_limit` graphs. It counts by module
    where that is a local of the frame; decorators of transformers get the model in `*args`. Entries that match another
    object than the frame's local of some name are not counted; no frame has this object, nor a local of this name.
    """
    builder.ID_MATCH(guard)
    builder.id_matched_objs["ppgraph"] = weakref.ref(_OF_NO_FRAME)


def _dynamo_scopes() -> dict[str, Any] | None:
    graph = _output_graph()
    return None if graph is None else {"L": graph.local_scope, "G": graph.global_scope}


def _output_graph() -> OutputGraph | None:
    found = (frame.f_locals.get("self") for frame in _frames())
    return next((value for value in found if isinstance(value, OutputGraph)), None)


def _frames() -> Iterator[types.FrameType]:
    """The calling frames, the nearest first."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def traced_code() -> tuple[str, str] | None:
    """File and name of the function that Dynamo is compiling; those of the compiled one are the same."""
    graph = _output_graph()
    return None if graph is None else (graph.root_tx.f_code.co_filename, graph.root_tx.f_code.co_name)


def arguments_of(code: tuple[str, str]) -> list[Any]:
    """What the nearest running call of that function was given, `*args` and `**kwargs` laid out."""
    frame = next((frame for frame in _frames() if (frame.f_code.co_filename, frame.f_code.co_name) == code), None)
    values: list[Any] = []
    for value in frame.f_locals.values() if frame is not None else ():
        values += value if isinstance(value, tuple) else value.values() if isinstance(value, dict) else [value]
    return values


def wrapper_of(module: torch.nn.Module) -> torch.nn.Module | None:
    """The `torch.compile(module)` whose call is running; None when the module is compiled in another way."""
    # Only torch's own frames are looked into: to ask a frame for its locals keeps them alive with it (Python 3.11).
    call = OptimizedModule.__call__.__code__
    found = (frame.f_locals["self"] for frame in _frames() if frame.f_code is call)
    return next((value for value in found if value._orig_mod is module), None)


def graphs_left() -> int:
    """How often Dynamo may still compile the code that it is compiling before it leaves it uncompiled for good."""
    compile_id = CompileContext.current_compile_id()
    done = 0 if compile_id is None else compile_id.frame_compile_id or 0
    return int(torch._dynamo.config.accumulated_recompile_limit) - 1 - int(done)


@contextlib.contextmanager
def passing_errors(kind: type[Exception]) -> Iterator[None]:
    """Let errors of this kind pass through Dynamo as they are; others it wraps as the failure of a backend."""
    try:
        yield
    except kind as error:
        raise _as_passing(error).with_traceback(error.__traceback__) from None


def _as_passing(error: Exception) -> Exception:
    """The same error, of a class that is Dynamo's own too: those it hands on, though with advice on reporting bugs."""
    kind, text = type(error), str(error)

    def initialise(self: ShortenTraceback, *arguments: object) -> None:
        ShortenTraceback.__init__(self, *arguments, first_useful_frame=None)

    members = {"__init__": initialise, "__str__": lambda self: text, "__module__": kind.__module__}
    passing = type(kind.__name__, (kind, ShortenTraceback), members)
    return passing(*error.args)  # type: ignore[no-any-return]


def compiled_with(model: object) -> tuple[torch.nn.Module, str, dict[str, Any]] | None:
    """The module behind `torch.compile(model, ...)` or `model.compile(...)`, with its backend's name and arguments."""
    context: Any = None
    if isinstance(model, OptimizedModule):
        inner, context = model._orig_mod, model.dynamo_ctx
    elif isinstance(model, torch.nn.Module) and model._compiled_call_impl is not None:
        closure = model._compiled_call_impl.get_compiler_config.__closure__  # type: ignore[attr-defined]
        contents = [cell.cell_contents for cell in closure or ()]
        inner, context = model, next((item for item in contents if hasattr(item, "callback")), None)
    else:
        return None
    backend: Any = getattr(context, "callback", None)
    while hasattr(backend, "_torchdynamo_orig_backend"):
        if hasattr(backend, "compiler_name") and hasattr(backend, "kwargs"):
            break
        backend = backend._torchdynamo_orig_backend
    return inner, str(getattr(backend, "compiler_name", "")), dict(getattr(backend, "kwargs", {}))


def source_parameter(source: str) -> str:
    """Dotted parameter or buffer name in a Dynamo source, or an empty string when it is neither."""
    if not re.search(r"_(parameters|buffers)\['[^']+'\]$", source):
        return ""
    return ".".join(re.findall(r"_(?:modules|parameters|buffers)\['([^']+)'\]", source))


def source_argument(source: str, positional: Sequence[str] = ()) -> str:
    """Name of the model argument that a Dynamo source, or an entry in a dict, stands for; or an empty string.

    `positional` are the names of what a decorator takes as `*args`.
    """
    place = re.fullmatch(r"L\['args'\]\[(\d+)\]", source)
    if place:
        return next(iter(positional[int(place.group(1)) :]), "")
    match = re.fullmatch(r"L(?:\['kwargs'\])?\['(\w+)'\](?:\['\w+'\])?", source)
    return match.group(1) if match else ""


def expression(size: Any) -> sympy.Expr:
    """The size as a sympy expression, so that two sizes compare without adding a guard."""
    return _without_floors(size.node.expr) if isinstance(size, torch.SymInt) else sympy.Integer(size)


@functools.lru_cache(maxsize=4096)
def _without_floors(formula: sympy.Expr) -> sympy.Expr:
    """`view(-1)` leaves sizes such as `s*t//t`; where that comes out even, the plain `s`."""
    if not formula.has(FloorDiv):
        return formula
    return formula.replace(FloorDiv, lambda left, right: quotient(left, right) or FloorDiv(left, right))


@functools.lru_cache(maxsize=4096)
def quotient(dividend: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr | None:
    """`dividend / divisor` where it comes out even whatever the symbols stand for, else None."""
    found = dividend / divisor
    if not found.is_Integer:
        found = sympy.cancel(found)
        if found.as_numer_denom()[1] != 1:
            return None
    return found if found != 0 else None


def bounds(size: torch.SymInt) -> tuple[Any, Any]:
    """The lowest and the highest value that Dynamo takes a size to have."""
    known = size.node.shape_env.bound_sympy(size.node.expr)
    return known.lower, known.upper


def unite(sizes: Sequence[torch.SymInt]) -> None:
    """Have one symbol stand for sizes that are equal in this call; a guard of the graph says that they are."""
    first, *others = sizes
    for size in others:
        bool(size == first)


def hint(size: int | torch.SymInt) -> int | None:
    """What a size is in the call that is being captured; None where only running tells. Adds no guard."""
    if not isinstance(size, torch.SymInt):
        return size
    return int(size.node.hint) if size.node.has_hint() else None


def hides_interrupt(error: Exception) -> bool:
    """Whether an error stands for a Ctrl-C: torch's C++ gives what it meets in Python that it calls, as a text."""
    return "KeyboardInterrupt: " in str(error)


def fresh_function(template: types.FunctionType) -> types.FunctionType:
    """A copy of `template` with a code object of its own.

    Dynamo keeps its compiled graphs and counts recompilations by code object; models that share a `forward` would
    otherwise use up one another's limit.
    """
    copied = types.FunctionType(
        template.__code__.replace(),
        template.__globals__,
        template.__name__,
        template.__defaults__,
        template.__closure__,
    )
    copied.__kwdefaults__ = template.__kwdefaults__
    return copied


_OWN_SYMBOLS = contextlib.ExitStack()


@contextlib.contextmanager
def own_symbols(module: GraphModule) -> Iterator[None]:
    """Compile a graph whose inputs have a symbol for each of their first two sizes; Dynamo traces again where not.

    With duck shapes one symbol stands for all sizes that happen to be equal: for samples and tokens of a square batch.
    A backend may only ask for a new trace; whether that one has duck shapes is a setting of the process, so it is off
    from here until Dynamo comes back.

    Floats, which `dynamic=True` makes inputs, become constants: a graph that has been traced once more can't read them.
    """
    _OWN_SYMBOLS.close()
    values = placeholder_values(module)
    shared, floats = any(map(_is_square, values)), [name for value in values if (name := _float_symbol(value))]
    for name in floats:
        TensorifyState.specialize(name)
    if shared:
        _OWN_SYMBOLS.enter_context(_symbolic_config.patch(use_duck_shape=False))  # type: ignore[attr-defined]
    if shared or floats:
        raise TensorifyScalarRestartAnalysis(restart_reason="ppgraph: sizes share a symbol, or floats are inputs")
    yield


def _float_symbol(value: Any) -> str:
    """The symbol of a float that Dynamo passes as a tensor and was not asked to make constant; "" of all else."""
    known = value.item_memo if isinstance(value, FakeTensor) else None
    name = getattr(known.node._expr, "name", "") if isinstance(known, torch.SymFloat) else ""
    return "" if TensorifyState.should_specialize(name) else name


def _is_square(value: Any) -> bool:
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return False
    first, second = (expression(size) for size in value.shape[:2])
    return not first.is_Integer and bool(first == second)


@contextlib.contextmanager
def dynamo_settings() -> Iterator[None]:
    """Dynamo as ppgraph captures with it.

    Floats of the config are constants (as symbols they compile twice). Sizes that happen to be equal, such as samples
    and tokens of a square batch, have a symbol each: with duck shapes one would stand for both. Each kind of call (with
    a mask or without, of one sample, into which cache) has a graph, of which `recompile_limit` would allow 8. Filling
    the cache of fake tensors takes longer than it saves.
    """
    config = torch._dynamo.config
    settings = {
        "specialize_float": True,
        "recompile_limit": config.accumulated_recompile_limit,
        "fake_tensor_cache_enabled": False,
    }
    with config.patch(settings), _symbolic_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
        yield
