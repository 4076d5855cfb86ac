"""`calibrate`: dense passes over example text that give the history its start."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ppgraph._torch import compiled_with
from ppgraph.backend import pruning_of, split_options
from ppgraph.errors import InputError, NonFiniteError
from ppgraph.sensitivity import samples_for_losses
from ppgraph.transform import Pruning, check_inputs

log = logging.getLogger("ppgraph")

# Losses are estimated on samples of the first batches, so that no more than these are kept.
BATCHES_FOR_LOSSES = 8


def calibrate(pruned: nn.Module, batches: Iterable[torch.Tensor | Mapping[str, Any]], *, progress: bool = True) -> None:
    """Fill the history of `pruned` from dense passes over `batches`.

    Each batch adds its samples to a running mean, position by position; padding does not count. Calling it again adds
    to what is there; `pruned.ppgraph.history.reset()` starts over. A method that reads no history (`full-batch`) has
    nothing to calibrate: no batch is run. Where the config has an allocation, it decides here how much each block
    keeps, and the graphs that prune are captured anew.

    Args:
        pruned: A model from `transform`, or one compiled with `backend="ppgraph"`.
        batches: Token ids [B, S], or mappings of model inputs (`input_ids`, `attention_mask`, ...).
        progress: Show a progress bar on stderr.

    Raises:
        InputError: no batches, a batch without tokens or longer than the model's context, or not a pruned model; or
            too few batches to tell channels apart (`method="flap"` needs two), which the history keeps all the same.
        NonFiniteError: a batch gave NaN or infinity; the history keeps what came before it.
    """
    model, pruning = _pruned_model(pruned)
    if not isinstance(batches, Iterable):
        raise InputError(f"expected batches of token ids to calibrate on, found {type(batches).__name__}")
    if not pruning.config.needs_history:
        log.info("nothing to calibrate: statistics='probe' reads no history")
        return
    done, kept = 0, []
    for batch in tqdm(batches, desc="calibrating", unit="batch", disable=not progress):
        arguments = _arguments(batch, done)
        check_inputs(model, arguments)
        _require_within_context(model, arguments)
        try:
            pruning.run("calibrate", {**arguments, "use_cache": False})
        except NonFiniteError as error:
            raise NonFiniteError(f"calibration batch {done}: {error}") from None
        done += 1
        if done <= BATCHES_FOR_LOSSES:
            kept.append(arguments)
    if not done:
        raise InputError("calibration data is empty: expected at least one batch of token ids")
    pruning.allocate(samples_for_losses(kept), progress=progress)


def _pruned_model(pruned: nn.Module) -> tuple[nn.Module, Pruning]:
    compiled = compiled_with(pruned)
    if compiled is not None and compiled[1] == "ppgraph":
        model, _, settings = compiled
        wrapper = pruned if pruned is not model else None
        return model, pruning_of(model, *split_options(settings.get("options"), settings.get("mode")), wrapper)
    pruning = getattr(pruned, "ppgraph", None)
    if not isinstance(pruning, Pruning):
        raise InputError(
            f"expected a model from ppgraph.transform or compiled with backend='ppgraph', found {type(pruned).__name__}"
        )
    return pruned, pruning


def _arguments(batch: object, number: int) -> dict[str, Any]:
    if isinstance(batch, torch.Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping):
        raise InputError(
            f"calibration batch {number}: expected token ids or a mapping of inputs, found {type(batch).__name__}"
        )
    arguments = dict(batch)
    ids = arguments.get("input_ids", arguments.get("inputs_embeds"))
    if not isinstance(ids, torch.Tensor) or ids.dim() < 2:
        found = list(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise InputError(f"calibration batch {number}: expected input_ids [samples, tokens], found {found}")
    return arguments


def _require_within_context(model: nn.Module, arguments: Mapping[str, Any]) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    length = arguments.get("input_ids", arguments.get("inputs_embeds")).shape[1]
    if isinstance(limit, int) and length > limit:
        raise InputError(f"calibration batches are longer than the model's context: {length} tokens, at most {limit}")
