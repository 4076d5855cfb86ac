"""`transform`: a model of the same class and with the same parameters whose forward prunes."""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
import textwrap
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

import torch
from torch import nn
from torch.fx import GraphModule

from ppgraph import _torch
from ppgraph.capture import input_embedding, install_output_hooks
from ppgraph.config import PruneConfig
from ppgraph.errors import (
    CaptureError,
    ConfigError,
    DecodeError,
    InputError,
    PPGraphError,
    UnsupportedModelError,
)
from ppgraph.methods import Candidate
from ppgraph.passes import Site
from ppgraph.runtime import (
    CHOOSING,
    SELECTION,
    Call,
    GraphRecord,
    Phase,
    Runtime,
    Selection,
    cache_of,
    cached_length,
    note_length,
)
from ppgraph.selections import jaccard
from ppgraph.sensitivity import expected_losses
from ppgraph.sharding import local_value, require_known_sharding
from ppgraph.state import History

if TYPE_CHECKING:
    from ppgraph.inspect.report import Report

Model = TypeVar("Model", bound=nn.Module)
Lowering = Literal["inductor", "eager"]


class Pruning:
    """What a pruned model carries as `.ppgraph`: config, sites, selection, history, graphs and report."""

    def __init__(self, model: nn.Module, runtime: Runtime) -> None:
        self._model, self.runtime = model, runtime
        self._compiled: dict[tuple[Phase, frozenset[str]], Callable[..., Any]] = {}
        self._allocation = runtime.history.allocation

    def __repr__(self) -> str:
        return f"Pruning({self.config})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Pruning:
        """A copied model gets a copy of the state, and compiles for itself."""
        return Pruning(copy.deepcopy(self._model, memo), copy.deepcopy(self.runtime, memo))

    def is_for(self, model: nn.Module) -> bool:
        """Whether this belongs to `model` (and did not come along with a shallow copy of another one)."""
        return self._model is model

    def __reduce__(self) -> NoReturn:
        raise UnsupportedModelError(
            "a pruned model can't be pickled (by torch.save or a process pool): its graphs are compiled code. Save the "
            "weights with save_pretrained or state_dict and the history with .ppgraph.history.save(folder)"
        )

    @property
    def config(self) -> PruneConfig:
        """The config this model was transformed with."""
        return self.runtime.config

    @property
    def sites(self) -> list[Site]:
        """One record a block, in order. The first use captures the model when it has not run yet."""
        self._follow_allocation()
        if self.runtime.sites is None:
            analyse(self._model, self._dense_forward(), self.runtime)
        return list(self.runtime.sites or [])

    @property
    def history(self) -> History:
        """The statistics of past batches."""
        if self.runtime.sites is None:
            analyse(self._model, self._dense_forward(), self.runtime)
        return self.runtime.history

    @property
    def graphs(self) -> list[GraphRecord]:
        """The graphs captured so far."""
        return list(self.runtime.graphs)

    def selection(self) -> dict[str, torch.Tensor]:
        """{site name: kept channels of the exit linear's input} of the last batch, ascending int64.

        Where tensor parallelism spreads a model over ranks, each tells its own of them, numbered as in the whole model.
        """
        shares = self.runtime.shares
        chosen = self.runtime.selection.channels if self.runtime.selection else {}
        return {name: shares[name].channels[kept] if name in shares else kept for name, kept in chosen.items()}

    def dense_tokens(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """{site name: (tokens [B, S] bool, channels [C'] int64)} of the last prompt, for sites where tokens differ.

        Those tokens kept all channels of the site, the others these, ascending and fewer than `selection()` has.
        """
        shares, selection = self.runtime.shares, self.runtime.selection
        found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        if selection is None:
            return found
        for name, (rows, others) in selection.by_token.items():
            tokens = torch.zeros(selection.shape, dtype=torch.bool, device=rows.device)
            tokens.view(-1)[rows] = True
            found[name] = (tokens, shares[name].channels[others] if name in shares else others)
        return found

    def report(self, full_batch: Mapping[str, Any] | None = None) -> Report:
        """Sites, widths, FLOPs, graphs, memory and how selections behave; `str()` gives a table, `plot()` a figure.

        Args:
            full_batch: Model inputs for which to compare what this model chooses with what probing all samples and
                tokens would choose. Both run uncompiled, on copies of the state: nothing is remembered of it.
        """
        from ppgraph.inspect.report import Report

        return Report.of(self, full_batch)

    def full_batch_overlap(self, inputs: Mapping[str, Any]) -> dict[str, float]:
        """{site name: Jaccard overlap of what this model chooses for a batch with what probing all of it would choose}.

        The batch runs twice, uncompiled and without a cache, and leaves nothing behind.
        """
        check_inputs(self._model, inputs)
        whole = {"statistics": "probe", "probe_batch": 1.0, "probe_tokens": 1.0, "history_momentum": 1.0}
        whole |= {"dense_tokens": 0.0, "history_below": 0}  # of the former only a third would be probed
        # Not `replace`: there a method's own observation, allocation and compensation follow the new method.
        everything = PruneConfig.from_dict(self.config.to_dict() | {"method": "pp"} | whole)
        choices = []
        for config in (self.config, everything):
            trial = Pruning(self._model, Runtime(config, "eager"))
            trial.runtime.history = copy.deepcopy(self.history)
            trial.run(trial.runtime.phase_of(False, batch_of(inputs)), {**inputs, "use_cache": False})
            choices.append(trial.selection())
        return {name: jaccard(kept, choices[1][name]) for name, kept in choices[0].items()}

    def extra_repr(self) -> str:
        """What `print(pruned)` says below the model's class: what each block keeps. It captures nothing by itself."""
        from ppgraph.inspect.tables import block_lines

        sites = self.runtime.sites
        lines = block_lines(sites) if sites else ["not captured yet: the first call or .ppgraph.sites tells the blocks"]
        title = f"pruned by ppgraph: method={self.config.method!r}, ratio={self.config.ratio:g}"
        own = type(self._model).extra_repr(self._model)
        return "\n".join([*([own] if own else []), title, *(f"  {line}" for line in lines)])

    def allocate(self, samples: Sequence[Mapping[str, Any]], *, progress: bool = True) -> None:
        """Let the config's allocation decide widths from what calibration saw; new ones are captured anew.

        `samples` are model inputs of one sample each, for allocations by loss.
        """

        def losses(candidates: Sequence[Candidate]) -> Mapping[str, torch.Tensor]:
            orders = {item.site.name: (item.site, self.runtime.order_of(item), item.step) for item in candidates}
            return expected_losses(self._model, self._dense_forward(), orders, samples, progress=progress)

        with self.runtime.lock:
            self.runtime.allocate(self.sites, lambda name: local_value(self._model.get_parameter(name)), losses)

    def _follow_allocation(self) -> None:
        """Drop graphs and sites of other widths than calibration has decided by now; calibration's own are dense."""
        allocation = self.runtime.history.allocation
        if allocation == self._allocation:
            return
        self._allocation, self.runtime.sites = allocation, None
        self._compiled = {key: call for key, call in self._compiled.items() if key[0] == "calibrate"}
        self.runtime.graphs = [record for record in self.runtime.graphs if record.phase == "calibrate"]

    def forward(self, arguments: Mapping[str, Any]) -> Any:
        """One call of the pruned model: a prefill, or a step of decoding as the config wants it."""
        cache = cache_of(arguments.values())
        length = cached_length(cache) if cache is not None else 0
        batch = batch_of(arguments)
        phase = self.runtime.phase_of(length > 0 and is_step(batch[1], arguments), batch)
        call = Call()
        if phase == "reuse":
            call.selection = getattr(cache, SELECTION, None) or _no_selection(cache)
        elif phase in CHOOSING:
            call.start = _first_position(arguments, length)
        with self.runtime.lock:
            output = self.run(phase, arguments, call)
            if cache is not None:
                note_length(cache, length + batch[1])
            if phase in CHOOSING:
                _attach(cache if cache is not None else cache_of(_items(output)), self.runtime.selection)
        return output

    def run(self, phase: Phase, arguments: Mapping[str, Any], call: Call | None = None) -> Any:
        """Call the model's compiled forward of a phase."""
        with self.runtime.lock:
            self._follow_allocation()
            call = self.runtime.call = call or Call()
            # Graphs of prompts may disagree on what can be pruned; a step needs a graph for what its prompt pruned.
            key = (phase, self.runtime.selection_to_reuse().sites if phase == "reuse" else frozenset())
            if key not in self._compiled:
                self._compiled[key] = compiled_forward(self._dense_forward(), self.runtime, phase)
            if asks_for_outputs(self._model, arguments):
                install_output_hooks(self._model)
            try:
                with torch.no_grad(), _torch.dynamo_settings(), self._capture_errors(call):
                    output = self._compiled[key](**arguments)
            except PPGraphError as error:
                if torch._dynamo.config.verbose:
                    raise
                # Without the frames of Dynamo, as its own errors are shown.
                raise error.with_traceback(None)  # noqa: B904
            if not call.ran:
                raise CaptureError(
                    "the model ran dense, for torch.compile is switched off here (TORCHDYNAMO_DISABLE, "
                    "torch.compiler.set_stance, torch._dynamo.config.disable); a pruned forward needs it, also with "
                    'lowering="eager"'
                )
            return output

    @contextlib.contextmanager
    def _capture_errors(self, call: Call) -> Iterator[None]:
        """Say in ppgraph's words that the model's own forward failed, or did not become a graph."""
        try:
            yield
        except PPGraphError:
            raise
        except (_torch.TorchDynamoException, RuntimeError) as error:
            if call.ran or not (type(error) is RuntimeError or isinstance(error, _torch.TorchDynamoException)):
                raise  # of the graph itself, such as a lack of memory
            if _torch.hides_interrupt(error):
                raise KeyboardInterrupt from error
            raise CaptureError(
                f"expected inputs that the dense {type(self._model).__name__} takes, torch.compile switched on and no "
                f"dispatch mode around it, to capture its forward as one graph; found: {_reason(error)}. Nothing has "
                "changed: does the dense model take this call?"
            ) from error

    def _dense_forward(self) -> Callable[..., Any]:
        return types.MethodType(type(self._model).forward, self._model)


def transform(
    model: Model,
    config: PruneConfig | None = None,
    *,
    lowering: Lowering | Mapping[str, Any] = "inductor",
    **overrides: Any,
) -> Model:
    """Give `model` a pruned twin: same class, same parameters; each batch chooses its own heads and channels.

    Nothing is captured yet: that happens at the first call. `model` itself stays dense and untouched.

    Args:
        model: A causal language model of transformers in eval mode.
        config: What to prune; the default config when None.
        lowering: `"inductor"`, a dict of Inductor's own options, or `"eager"` (the rewritten graph as it is). With
            `{"triton.cudagraphs": True}` steps of decoding and prompts below `history_below` are recorded as CUDA
            graphs.
        **overrides: Fields of `PruneConfig` that replace those of `config`.

    Raises:
        ConfigError: a bad field or lowering.
        UnsupportedModelError: no causal language model, or one in training mode.
    """
    config = (config or PruneConfig()).replace(**overrides)
    require_causal_lm(model)
    kind, options = _lowering(lowering)
    twin = copy.copy(model)
    for registry in ("_modules", "_parameters", "_buffers"):
        twin.__dict__[registry] = dict(model.__dict__[registry])
    for compiled in COMPILED_BEFORE:
        twin.__dict__.pop(compiled, None)
    pruning = Pruning(twin, Runtime(config, kind, options))
    twin.__dict__["ppgraph"] = pruning
    twin.__dict__["forward"] = PrunedForward(twin, pruning)
    twin.__dict__["get_compiled_call"] = OwnCall(twin)
    twin.__dict__["extra_repr"] = pruning.extra_repr
    return twin


# What a model was compiled to before it was transformed would run in place of the pruned forward: by this backend, by
# `model.compile`, and by `generate` of transformers with a static cache.
COMPILED_BEFORE = ("ppgraph_variants", "_compiled_call_impl", "_compiled_call", "_last_compile_config")


class OwnCall:
    """Stands for `get_compiled_call`, by which transformers compiles decoding itself: a pruned model is compiled."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, compile_config: object = None) -> Callable[..., Any]:
        return self.model.__call__


class PrunedForward:
    """The forward of a pruned model: checks its input, then runs the compiled graph.

    An outer `torch.compile` stops here instead of tracing through, which would leave the model dense.
    """

    def __init__(self, model: nn.Module, pruning: Pruning) -> None:
        self.model, self.pruning = model, pruning
        self.positions = learned_positions(model)
        dense = inspect.signature(type(model).forward)
        self.__signature__ = dense.replace(parameters=list(dense.parameters.values())[1:])

    @torch.compiler.disable(  # type: ignore[untyped-decorator]
        recursive=False,
        reason="a model from ppgraph.transform compiles itself: call it as it is, or without fullgraph",
    )
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = bind(self.__signature__, args, kwargs)
        check_inputs(self.model, arguments)
        if self.positions is not None:
            require_known_positions(self.positions, arguments)
        return self.pruning.forward(arguments)


def _reason(error: Exception) -> str:
    """What Dynamo's long texts come down to: the error within, or the first line."""
    inner = getattr(error, "inner_exception", None)  # of a BackendCompilerFailed, whose own first line says nothing
    text = str(error) if inner is None else f"{type(inner).__name__}: {inner}"
    within = re.search(r"got (\w+\(.*)", text)
    return textwrap.shorten(within.group(1) if within else text.splitlines()[0], 300, placeholder=" ...")


def is_step(tokens: int, arguments: Mapping[str, Any]) -> bool:
    """Whether a call that goes on from a cache is a step of decoding, which keeps to the prompt's selection.

    It has one new token, or `tokens` drafted ones that are to be verified: `generate` with an assistant, or with prompt
    lookup, asks for the logits of each new token, and for the last one's only when it runs a prompt.
    """
    asked = arguments.get("logits_to_keep")
    return tokens == 1 or (isinstance(asked, int) and asked == tokens)


def asks_for_outputs(model: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Whether a call, or the model's config, wants hidden states or attentions."""
    names = ("output_hidden_states", "output_attentions")
    return any(arguments.get(name, getattr(model.config, name, False)) for name in names)


def batch_of(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Samples of this call, and tokens of each.

    Raises:
        InputError: there are no token ids or embeddings, or they have no samples and tokens.
    """
    samples, tokens = _tokens(arguments).shape[:2]
    return samples, tokens


def _first_position(arguments: Mapping[str, Any], cached: int) -> int:
    """The position of the first new token: cached columns, without those that are padding in every sample."""
    mask = arguments.get("attention_mask")
    masks = mask.values() if isinstance(mask, Mapping) else [mask]
    # A mask of fewer keys is that of a sliding cache, and says nothing of the first columns.
    whole = [one for one in masks if isinstance(one, torch.Tensor) and one.shape[-1] > cached]
    return max(cached - min(map(_first_seen, whole), default=0), 0) if cached else 0


def _first_seen(mask: torch.Tensor) -> int:
    """The first column that a mask [B, keys], or [B, heads, S, keys], shows in any sample."""
    hides = 0 if mask.dim() == 2 or mask.dtype == torch.bool else torch.finfo(mask.dtype).min / 2
    seen = mask != 0 if hides == 0 else mask > hides
    return int(seen.flatten(0, -2).any(dim=0).int().argmax())


def _items(output: Any) -> Iterable[Any]:
    if isinstance(output, Mapping):
        return output.values()
    return output if isinstance(output, (tuple, list)) else [output]


def _attach(cache: Any, selection: Selection | None) -> None:
    if cache is not None and selection is not None:
        setattr(cache, SELECTION, selection)


def _no_selection(cache: Any) -> Selection:
    raise DecodeError(
        f"this {type(cache).__name__} was not filled by this pruned model, so there is no selection to decode with: "
        'run the prompt through the pruned model, or use PruneConfig(decode="dense")'
    )


def bind(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name, so that the graph's inputs can be told apart."""
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name, {}))
    return arguments


def check_inputs(model: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Refuse what no pruned forward can do anything sensible with, before anything is compiled.

    Raises:
        InputError: training mode, gradients, no tokens or none that the model knows, tensors on another device, a mask
            of another shape, or a sample that is all padding.
    """
    if model.training:
        raise InputError("the model is in training mode, but pruning is for inference: call .eval() first")
    home = next(model.parameters()).device
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled():
            raise InputError(
                f"{name} requires a gradient, but a pruned forward has none: detach it or use the dense model"
            )
        if name in ON_DEVICE and isinstance(value, torch.Tensor) and value.device != home:
            raise InputError(f"{name} is on {value.device}, but the model on {home}: move one to the other")
    tokens = _tokens(arguments)
    if tokens.dim() == 3:
        _require_fitting_embeddings(tokens, model)
    mask = arguments.get("attention_mask")
    for one in mask.values() if isinstance(mask, Mapping) else [mask]:
        _require_mask(one, *tokens.shape[:2])
    if tokens.dim() == 2 and tokens.shape[1] > 1:  # steps of decoding are not held up by a look at their values
        _require_known_ids(tokens, model)


def learned_positions(model: nn.Module) -> int | None:
    """The positions that a model has learned vectors for; None where it computes positions, or has none.

    A table of them has a row for each position of the context, and in some families two more.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    tokens = input_embedding(model)
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and module is not tokens]
    known = any(isinstance(limit, int) and limit <= table.num_embeddings <= limit + 2 for table in tables)
    return limit if known else None


def require_known_positions(positions: int, arguments: Mapping[str, Any]) -> None:
    """Refuse more tokens than a model has learned positions for: reading beyond its table ends a GPU's process.

    Raises:
        InputError: there are more, those in a cache included.
    """
    cache = cache_of(arguments.values())
    total = batch_of(arguments)[1] + (cached_length(cache) if cache is not None else 0)
    if total > positions:
        raise InputError(f"{total} tokens are longer than the model's context: it has learned {positions} positions")


ON_DEVICE = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")


# What torch's embedding takes.
ID_DTYPES = (torch.int64, torch.int32)


def _tokens(arguments: Mapping[str, Any]) -> torch.Tensor:
    """The batch's token ids [B, S] or embeddings [B, S, D]."""
    given = [name for name in ("input_ids", "inputs_embeds") if arguments.get(name) is not None]
    if len(given) != 1:
        raise InputError(f"expected either input_ids or inputs_embeds, found {' and '.join(given) or 'neither'}")
    name, tokens = given[0], arguments[given[0]]
    is_ids = name == "input_ids"
    is_tensor = isinstance(tokens, torch.Tensor)
    fits = is_tensor and (tokens.dtype in ID_DTYPES if is_ids else tokens.is_floating_point())
    if not fits or tokens.dim() != (2 if is_ids else 3):
        found = f"{tokens.dtype} {list(tokens.shape)}" if is_tensor else type(tokens).__name__
        expected = "whole numbers [samples, tokens]" if is_ids else "numbers [samples, tokens, hidden]"
        expected += " (int64 or int32)" if is_ids else ""
        raise InputError(f"expected {name} as a tensor of {expected}, found {found}")
    if tokens.numel() == 0:
        raise InputError(f"a batch without tokens: {name} has shape {list(tokens.shape)}")
    return tokens  # type: ignore[no-any-return]


def _require_fitting_embeddings(embeddings: torch.Tensor, model: nn.Module) -> None:
    table = input_embedding(model)
    if table is None or torch.is_autocast_enabled(embeddings.device.type):
        return
    weight = table.weight
    if embeddings.dtype != weight.dtype or embeddings.shape[2] != weight.shape[1]:
        raise InputError(
            f"expected inputs_embeds as the model embeds its tokens, {weight.dtype} with {weight.shape[1]} numbers a "
            f"token; found {embeddings.dtype} with {embeddings.shape[2]}"
        )


def _require_mask(mask: object, samples: int, length: int) -> None:
    """A mask by token [B, cached + S] in which every sample has a real token, or one by query and key."""
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor):
        raise InputError(f"expected attention_mask as a tensor, found {type(mask).__name__}")
    if mask.dim() == 4:
        _require_mask_by_query(mask, samples, length)
        return
    if mask.dim() != 2 or mask.shape[0] != samples or mask.shape[1] < length:
        raise InputError(
            f"expected an attention_mask for {samples} samples of {length} tokens (and those of a cache), "
            f"found {list(mask.shape)}"
        )
    if length > 1 or mask.shape[1] == 1:  # the new token of a step of decoding is real
        _require_a_real_token(mask != 0)


def _require_mask_by_query(mask: torch.Tensor, samples: int, length: int) -> None:
    """A mask [B, heads, S, keys] of booleans, or of numbers that are added to scores."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise InputError(
            "expected a 4-dimensional attention_mask of booleans (True where a token is seen), or of numbers that are "
            f"added to scores; found {mask.dtype}: use mask.bool()"
        )
    if mask.shape[0] not in (1, samples) or mask.shape[2] != length or mask.shape[3] < length:
        raise InputError(
            f"expected an attention_mask [samples, heads, tokens, keys] for {samples} samples of {length} tokens, "
            f"found {list(mask.shape)}"
        )
    if length > 1 or mask.shape[3] == 1:
        _require_a_real_token(mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)


def _require_a_real_token(visible: torch.Tensor) -> None:
    """Something that a mask [B, ...] leaves visible, of each sample."""
    empty = (~visible.flatten(1).any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"attention_mask hides every token of sample {empty[0]}; each needs at least one real token")


def _require_known_ids(ids: torch.Tensor, model: nn.Module) -> None:
    embedding = input_embedding(model)
    if embedding is None:
        return
    vocabulary = embedding.weight.shape[0]
    unknown = ((ids < 0) | (ids >= vocabulary)).nonzero()
    if len(unknown):
        sample, token = unknown[0].tolist()
        raise InputError(
            f"token id {int(ids[sample, token])} (sample {sample}, token {token}) is outside of the vocabulary of "
            f"{vocabulary}; is this another model's tokenizer?"
        )


def compiled_forward(dense: Callable[..., Any], runtime: Runtime, phase: Phase) -> Callable[..., Any]:
    """`dense` through Dynamo, its graphs rewritten for `phase` by `runtime`."""
    # Dynamo keeps every backend until it is reset: this one must not keep the model.
    model = weakref.ref(dense.__self__)  # type: ignore[attr-defined]

    def forward(**kwargs: Any) -> Any:
        return dense(**kwargs)

    def backend(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        with _torch.passing_errors(PPGraphError):
            captured = model()
            assert captured is not None  # its forward is running
            require_eval_mode(captured)
            return runtime.compile(module, phase)

    own = _torch.fresh_function(forward)  # type: ignore[arg-type]
    compiled: Callable[..., Any] = torch.compile(own, backend=backend, dynamic=True, fullgraph=True)
    return compiled


class _Analysed(Exception):
    """Ends a capture once its graph has been looked at."""


def analyse(model: nn.Module, dense: Callable[..., Any], runtime: Runtime) -> None:
    """Find the model's sites from a tiny batch, without running or compiling it."""
    device = next(model.parameters()).device
    ids = torch.zeros(2, 4, dtype=torch.long, device=device)

    def backend(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        with _torch.passing_errors(PPGraphError):
            runtime.analyse(module)
        raise _Analysed

    def forward(**kwargs: Any) -> Any:
        return dense(**kwargs)

    capturing = torch.compile(_torch.fresh_function(forward), backend=backend, dynamic=True, fullgraph=True)  # type: ignore[arg-type]
    with torch.no_grad(), _torch.dynamo_settings():
        try:
            capturing(input_ids=ids, use_cache=False)
        except _torch.BackendCompilerFailed as error:
            if not isinstance(error.inner_exception, _Analysed):
                raise CaptureError(f"the model did not come through as one graph: {error}") from error


def require_causal_lm(model: object) -> None:
    """Raise UnsupportedModelError for anything but a dense causal language model in eval mode."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a transformers causal language model, found {type(model).__name__}")
    require_one_device(model)  # first, for where hooks break a graph the backend sees a part of the model
    if isinstance(model.__dict__.get("forward"), PrunedForward):
        raise UnsupportedModelError("this model is pruned already; transform the dense model it came from")
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{type(model).__name__} is an encoder-decoder; ppgraph prunes decoder-only models")
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if config is None or output is None or not callable(getattr(model, "generate", None)):
        raise UnsupportedModelError(
            f"{type(model).__name__} is no causal language model of transformers (expected one with a "
            "config, generate and an output embedding, such as AutoModelForCausalLM gives)"
        )
    require_eval_mode(model)
    require_known_sharding(model)
    for name, parameter in model.named_parameters():
        weight = local_value(parameter)
        if _torch.is_wrapped(weight) or weight.dtype == torch.uint8:
            kind = f"{type(weight).__name__} {weight.dtype} {list(weight.shape)}"
            raise UnsupportedModelError(
                f"{name} is no plain weight but a {kind}, as quantisation leaves it, of which rows and columns "
                "can't be selected; load the model without, or dequantise it (model.dequantize())"
            )


def require_one_device(model: nn.Module) -> None:
    """Raise UnsupportedModelError for a model on several devices, or one that accelerate moves while it runs."""
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) < 2 and not any(hasattr(module, "_hf_hook") for module in model.modules()):
        return
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()} or devices
    raise UnsupportedModelError(
        f"{type(model).__name__} lies on {', '.join(sorted(places))}, and its weights and activations are moved while "
        "it runs, by hooks of accelerate that a captured graph does not have; expected all of it on one device: load "
        "it with device_map={'': device}. Where it is too large for one, spread it over the GPUs of a machine with "
        'DistributedConfig(tp_plan="auto") of transformers, under torchrun'
    )


def require_eval_mode(model: nn.Module) -> None:
    """Raise UnsupportedModelError where a part of the model, or all of it, is in training mode."""
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        part = f"{training} of " if training else ""
        raise UnsupportedModelError(f"{part}{type(model).__name__} is in training mode; call .eval() on the model")


def _lowering(lowering: object) -> tuple[str, Mapping[str, Any]]:
    if lowering in ("inductor", "eager"):
        return str(lowering), {}
    if isinstance(lowering, Mapping):
        unknown = sorted(set(lowering) - _torch.inductor_options())
        if unknown:
            raise ConfigError(f"lowering has options that Inductor does not know: {', '.join(map(str, unknown))}")
        return "inductor", dict(lowering)
    raise ConfigError(f"expected lowering 'inductor', 'eager' or a dict of Inductor options, found {lowering!r}")
