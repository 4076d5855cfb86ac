"""Probe Pruning for language models, as a transformation of their torch.compile graphs."""

from ppgraph.calibrate import calibrate
from ppgraph.config import PruneConfig
from ppgraph.errors import PPGraphError
from ppgraph.transform import transform

__version__ = "0.1.0"

__all__ = ["PPGraphError", "PruneConfig", "calibrate", "transform"]
