"""`torch.compile(model, backend="ppgraph")`: the backend that torch finds by entry point.

The backend object holds no state (transformers copies it): what a model remembers hangs on the model, as `.ppgraph`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from ppgraph import _torch
from ppgraph.config import PruneConfig, field_names
from ppgraph.errors import CaptureError, ConfigError, InputError
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
        mode: A mode of `torch.compile`, such as `"max-autotune"`.

    Raises:
        ConfigError: an option that neither knows.
        CaptureError: the graph is not a model's forward as a whole.
        InputError: an input requires a gradient.
    """
    config, lowering = split_options(options, mode)
    model = _torch.traced_module(module)
    if model is None:
        raise CaptureError(
            'backend="ppgraph" needs the whole forward of a causal language model in one graph; this graph reads no '
            "parameters of one. Compile the model itself: torch.compile(model, backend='ppgraph')"
        )
    _refuse_gradients(module)
    runtime = pruning_of(model, config, lowering).runtime
    return runtime.compile(module)


def _refuse_gradients(module: GraphModule) -> None:
    """Inputs that require a gradient would not get one. Parameters do too, but in inference nobody asks for theirs."""
    for node in module.graph.nodes:
        value = node.meta.get("example_value") if node.op == "placeholder" else None
        if isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled():
            source = _torch.placeholder_source(node)
            if not _torch.source_parameter(source):
                name = _torch.source_argument(source) or node.name
                raise InputError(f"{name} requires a gradient, but a pruned forward has none: detach it")


def split_options(options: Mapping[str, Any] | None, mode: str | None) -> tuple[PruneConfig, dict[str, Any]]:
    """Tell pruning options from Inductor's.

    Raises:
        ConfigError: naming the options that neither knows.
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
        lowering = {**torch._inductor.list_mode_options(mode), **lowering}
    return PruneConfig.from_dict(pruning), lowering


def pruning_of(model: nn.Module, config: PruneConfig, lowering: Mapping[str, Any]) -> Pruning:
    """What `model` carries as `.ppgraph`, made at its first compilation with this config."""
    known = model.__dict__.get("ppgraph")
    if isinstance(known, Pruning) and known.is_for(model) and known.config == config:
        return known
    require_causal_lm(model)
    made = Pruning(model, Runtime(config, "inductor", lowering))
    model.__dict__["ppgraph"] = made
    return made
