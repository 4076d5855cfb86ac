"""`torch.compile(model, backend="ppgraph")`: the backend that torch finds by entry point.

The backend object holds no state (transformers copies it): what a model remembers hangs on the model, as `.ppgraph`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from ppgraph import _torch
from ppgraph.config import PruneConfig, field_names
from ppgraph.errors import CaptureError, ConfigError, InputError, PPGraphError
from ppgraph.runtime import Runtime
from ppgraph.transform import Pruning, require_causal_lm


def ppgraph_backend(
    module: GraphModule,
    inputs: list[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Rewrite one graph that Dynamo captured and lower it with Inductor.

    Args:
        module: Dynamo's graph.
        inputs: Its example inputs.
        options: Fields of `PruneConfig`, and Inductor's own options (which may not be combined with `mode`).
        mode: A mode of `torch.compile`. Those with CUDA graphs, such as `"reduce-overhead"`, record steps of decoding
            and prompts below `history_below`.

    Raises:
        ConfigError: an option that neither knows, or an unknown mode.
        CaptureError: the graph is not a model's forward as a whole, or Dynamo would not compile another one.
        InputError: an input requires a gradient.
    """
    with _torch.passing_errors(PPGraphError), _torch.own_symbols(module):
        config, lowering = split_options(options, mode)
        model = _torch.traced_module(module)
        if model is None:
            raise CaptureError(
                'backend="ppgraph" needs the whole forward of a causal language model in one graph; this graph reads '
                "no parameters of one. Compile the model itself: torch.compile(model, backend='ppgraph')"
            )
        positional = _positional(module, model)
        _require_known_names(module, model)
        _refuse_gradients(module, positional)
        if _torch.graphs_left() <= 0:
            raise CaptureError(
                "Dynamo has compiled this forward as often as torch._dynamo.config.accumulated_recompile_limit allows; "
                "later models and shapes would run dense. Raise that limit, or use ppgraph.transform, which has none"
            )
        return pruning_of(model, config, lowering, _torch.wrapper_of(model)).runtime.compile(
            module, positional=positional
        )


def _positional(module: GraphModule, model: nn.Module) -> list[str]:
    """Names of what the traced function calls `args`, if any: decorators of a forward take it so, the model with it."""
    sources = (_torch.placeholder_source(node) for node in module.graph.nodes if node.op == "placeholder")
    takes_self = any(source.startswith("L['args'][0]._") for source in sources)
    names = list(inspect.signature(type(model).forward).parameters)
    return names if takes_self else names[1:]


def _require_known_names(module: GraphModule, model: nn.Module) -> None:
    """Raise CaptureError for a tensor of the traced function that the model's forward does not know by that name.

    It might be the mask, and padding would count.
    """
    known = inspect.signature(type(model).forward).parameters
    for node in module.graph.nodes:
        source = _torch.placeholder_source(node) if node.op == "placeholder" else ""
        name = _torch.source_argument(source)
        own = source == f"L['{name}']" and name not in known
        if own and isinstance(node.meta["example_value"], torch.Tensor):
            raise CaptureError(
                f"expected tensors under the names that {type(model).__name__}.forward gives them, to tell token ids "
                f"and masks; found {name!r}. Compile the model itself, torch.compile(model, backend='ppgraph'), or "
                "name the function's arguments like the model's"
            )


def _refuse_gradients(module: GraphModule, positional: Sequence[str]) -> None:
    """Inputs that require a gradient would not get one. Parameters do too, but in inference nobody asks for theirs."""
    for node in module.graph.nodes:
        value = node.meta.get("example_value") if node.op == "placeholder" else None
        if isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled():
            source = _torch.placeholder_source(node)
            if not _torch.source_parameter(source):
                name = _torch.source_argument(source, positional) or node.name
                raise InputError(f"{name} requires a gradient, but a pruned forward has none: detach it")


def split_options(options: Mapping[str, Any] | None, mode: str | None) -> tuple[PruneConfig, dict[str, Any]]:
    """Tell pruning options from Inductor's.

    Raises:
        ConfigError: naming the options that neither knows, or the mode that Inductor doesn't.
    """
    given = dict(options or {})
    pruning = {name: value for name, value in given.items() if name in field_names()}
    lowering = {name: value for name, value in given.items() if name not in pruning}
    unknown = sorted(name for name in lowering if name.replace("-", "_") not in _torch.inductor_options())
    if unknown:
        raise ConfigError(
            f"unknown options: {', '.join(unknown)}; expected fields of PruneConfig ({', '.join(field_names())}) or "
            "options of Inductor (torch._inductor.list_options())"
        )
    if mode and mode != "default":
        modes = torch._inductor.list_mode_options()
        if mode not in modes:
            raise ConfigError(f"unknown mode {mode!r}; expected one of {', '.join(sorted(modes))}")
        lowering = {**modes[mode], **lowering}
    return PruneConfig.from_dict(pruning), lowering


def pruning_of(
    model: nn.Module, config: PruneConfig, lowering: Mapping[str, Any], wrapper: nn.Module | None = None
) -> Pruning:
    """What `model` remembers as compiled with this config and lowering, made at the first use.

    A model may be compiled in several ways at once, each with a state of its own: `wrapper.ppgraph` is that of
    `wrapper = torch.compile(model, ...)`, `model.ppgraph` the one that was compiled or calibrated last.
    """
    variants: dict[Any, Pruning] = model.__dict__.setdefault("ppgraph_variants", {})
    key = (config, repr(sorted(lowering.items())))
    known = variants.get(key)
    if known is None or not known.is_for(model):
        require_causal_lm(model)
        known = variants[key] = Pruning(model, Runtime(config, "inductor", lowering))
    for holder in (model, wrapper):
        if holder is not None:
            holder.__dict__["ppgraph"] = known
    return known
