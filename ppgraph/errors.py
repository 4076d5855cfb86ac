"""Every error that ppgraph raises on purpose.

All derive from `PPGraphError`, and from the built-in that fits, so that callers may catch either. Their texts
say what was expected, what was found (site, node, shape) and what to do about it.
"""

from __future__ import annotations


class PPGraphError(Exception):
    """Base of all errors of this package."""


class ConfigError(PPGraphError, ValueError):
    """A `PruneConfig` field, or a width that follows from it, is outside what the method allows."""


class InputError(PPGraphError, ValueError):
    """What the user handed over cannot be used: a model to load, a batch, a calibration text, a mask."""


class UnsupportedModelError(PPGraphError, ValueError):
    """The model is of a kind that ppgraph does not rewrite, such as an encoder-decoder or no causal LM."""


class NothingToPruneError(PPGraphError, RuntimeError):
    """Not one block of the model could be rewritten; the text lists the reason of each."""


class CaptureError(PPGraphError, RuntimeError):
    """The model did not come through Dynamo as one graph, or the graph could not be normalised."""


class LoweringError(PPGraphError, RuntimeError):
    """Inductor could not compile the rewritten graph."""


class GraphError(PPGraphError, RuntimeError):
    """A pass left an illegal graph behind, was run twice, or found one that breaks its requirements."""


class NonFiniteError(PPGraphError, RuntimeError):
    """A batch put NaN or infinity into the activations; the history was left as it was before."""


class HistoryError(PPGraphError, ValueError):
    """A saved history is damaged, or belongs to another model or config."""


class MethodError(PPGraphError, ValueError):
    """A registered piece of a method can't be traced, or gives other shapes than it must."""


class DecodeError(PPGraphError, RuntimeError):
    """A single-token step needs a selection or a cache that the steps before it did not leave."""
