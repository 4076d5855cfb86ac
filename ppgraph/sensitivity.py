"""How much each block's units matter to the model's own loss: what allocations decide by.

With y the channels that enter an exit linear W and G the gradient of a token's loss at its output, dropping channels
changes the loss by about half the square of the sum of y·(W·G) over them (the Fisher approximation of the Hessian, as
in Optimal Brain Surgeon). One backward pass a sample tells this for every block and for every number of dropped units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from ppgraph.capture import input_embedding
from ppgraph.errors import InputError, MethodError, UnsupportedModelError
from ppgraph.passes import Site

# Tokens that losses are estimated on. More change the allocation little and cost a backward pass each.
LOSS_TOKENS = 2048


def samples_for_losses(batches: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first samples of calibration batches, one at a time, `LOSS_TOKENS` tokens in all or what there is."""
    samples: list[dict[str, Any]] = []
    tokens = 0
    for batch in batches:
        ids = batch.get("input_ids")
        for number in range(len(ids) if isinstance(ids, Tensor) else 0):
            if tokens >= LOSS_TOKENS:
                return samples
            one = {name: value[number : number + 1] for name, value in batch.items() if isinstance(value, Tensor)}
            samples.append(one)
            tokens += int(one["input_ids"].numel())
    return samples


def expected_losses(
    model: nn.Module,
    forward: Callable[..., Any],
    orders: Mapping[str, tuple[Site, Tensor, int]],
    samples: Sequence[Mapping[str, Any]],
    *,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Estimate the loss that dropping a site's least important units costs.

    Args:
        model: The model whose modules hold the exit linears.
        forward: Its dense forward.
        orders: By site name, the site, its units [U] with the least important first, and how many go at a time.
        samples: Model inputs of one sample each, with `input_ids` [1, S].
        progress: Show a progress bar on stderr.

    Returns:
        {site name: [levels + 1] fp32}: nats a token after 0, 1, 2, ... steps of units.

    Raises:
        InputError: no samples with token ids.
        MethodError: an exit linear is no module of the model, or its forward does not run.
    """
    if not samples:
        raise InputError("an allocation by loss needs calibration batches with input_ids, found none")
    totals: dict[str, Tensor] = {}
    tokens = 0
    for sample in tqdm(samples, desc="estimating losses", unit="sample", disable=not progress):
        with torch.inference_mode(False), torch.enable_grad():
            seen, tokens_here = _activations_and_gradients(model, forward, orders, sample)
        tokens += tokens_here
        for name, (y, gradient) in seen.items():
            site, order, step = orders[name]
            contribution = _contributions(model, site, y, gradient)
            found = 0.5 * contribution[:, order].cumsum(1)[:, _levels(len(order), step)].square().sum(0)
            totals[name] = totals.get(name, 0) + found
    return {name: functional.pad(total / tokens, (1, 0)) for name, total in totals.items()}


def _levels(units: int, step: int) -> Tensor:
    """Last unit of each step, the last step perhaps smaller."""
    return torch.tensor([min(end, units) - 1 for end in range(step, units + step, step)])


def _contributions(model: nn.Module, site: Site, y: Tensor, gradient: Tensor) -> Tensor:
    """What each unit adds to a token's loss, to first order: y [T, C], gradient [T, D] -> [T, U] fp32."""
    weight = model.get_parameter(site.exit[0]).detach().float()
    at_channels = gradient.float() @ (weight if site.channel_dim == 1 else weight.t())
    return (y.float() * at_channels).view(len(y), site.units, site.block).sum(2)


def _activations_and_gradients(
    model: nn.Module,
    forward: Callable[..., Any],
    orders: Mapping[str, tuple[Site, Tensor, int]],
    sample: Mapping[str, Any],
) -> tuple[dict[str, tuple[Tensor, Tensor]], int]:
    """One sample's exit inputs [T, C] and gradients of its summed loss at exit outputs [T, D]; predictions made."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles = list(_hooks(model, orders, inputs, outputs))
    try:
        logits = forward(**sample, use_cache=False).logits
        loss, predictions = _loss(logits, sample)
        missing = [name for name in orders if name not in outputs]
        if missing:
            raise MethodError(f"{missing[0]}: its exit linear does not run as a module, so its loss can't be estimated")
        gradients = torch.autograd.grad(loss, list(outputs.values()))
    finally:
        for handle in handles:
            handle.remove()
    flat = {
        name: (inputs[name].flatten(0, -2), gradient.flatten(0, -2))
        for name, gradient in zip(outputs, gradients, strict=True)
    }
    return flat, predictions


def _hooks(
    model: nn.Module,
    orders: Mapping[str, tuple[Site, Tensor, int]],
    inputs: dict[str, Tensor],
    outputs: dict[str, Tensor],
) -> Iterator[Any]:
    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            inputs[name], outputs[name] = args[0].detach(), output

        return hook

    embedding = input_embedding(model)
    if embedding is None:
        raise UnsupportedModelError(
            f"the allocation needs gradients from the input embedding on, which {type(model).__name__} doesn't name; "
            "give it a get_input_embeddings, or choose another allocation"
        )
    yield embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    for name, (site, _, _) in orders.items():
        yield model.get_submodule(site.exit[0].rpartition(".")[0]).register_forward_hook(keep(name))


def _loss(logits: Tensor, sample: Mapping[str, Any]) -> tuple[Tensor, int]:
    """Summed negative log-likelihood of the sample's real tokens, and how many predictions that is."""
    ids = sample["input_ids"]
    mask = sample.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    both = real[:, 1:] & real[:, :-1]
    return functional.cross_entropy(logits[:, :-1][both].float(), ids[:, 1:][both], reduction="sum"), int(both.sum())
