"""Probe Pruning for language models, as a transformation of their torch.compile graphs."""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from ppgraph.errors import PPGraphError

if TYPE_CHECKING:
    from ppgraph.calibrate import calibrate
    from ppgraph.config import PruneConfig
    from ppgraph.inspect.explain import explain
    from ppgraph.methods import register_allocation, register_compensation, register_observation, register_score
    from ppgraph.transform import transform

__version__ = "0.1.0"

__all__ = [
    "PPGraphError",
    "PruneConfig",
    "calibrate",
    "explain",
    "register_allocation",
    "register_compensation",
    "register_observation",
    "register_score",
    "transform",
]

# Loaded at first use: importing torch and transformers takes seconds, which `ppgraph --help` has no need of.
_HOMES = {
    "PruneConfig": "ppgraph.config",
    "calibrate": "ppgraph.calibrate",
    "explain": "ppgraph.inspect.explain",
    "register_allocation": "ppgraph.methods",
    "register_compensation": "ppgraph.methods",
    "register_observation": "ppgraph.methods",
    "register_score": "ppgraph.methods",
    "transform": "ppgraph.transform",
}


class _Package(types.ModuleType):
    """This package, in which importing `ppgraph.transform` does not hide the function of the same name."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOMES[name]), name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
