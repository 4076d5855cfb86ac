"""What the speed benchmarks compare: a random LLaMA, a static model of the kept widths, and the method's config."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

import ppgraph
from ppgraph.config import kept_channels, kept_heads, layer_ratio
from ppgraph.inspect.timing import Timing, timings_to_dict

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser, *, repeats: int, batch: int | None = None) -> None:
    """The options that all speed benchmarks take; the defaults are the shape that the project's speed is stated for.

    A benchmark with no default for `batch` runs several shapes, and asks for them itself.
    """
    if batch is not None:
        parser.add_argument("--batch", type=int, default=batch, help="samples a batch")
        parser.add_argument("--length", type=int, default=256, help="tokens a sample")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size")
    parser.add_argument("--layers", type=int, default=8, help="decoder layers")
    parser.add_argument("--intermediate", type=int, default=2816, help="MLP channels")
    parser.add_argument("--heads", type=int, default=16, help="query heads")
    parser.add_argument("--kv-heads", type=int, help="key and value heads; all of --heads if absent")
    parser.add_argument("--vocab", type=int, default=32000, help="vocabulary")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights and activations")
    parser.add_argument("--ratio", type=float, default=0.4, help="share of heads and channels removed")
    parser.add_argument("--skip-layers", type=int, default=0, help="first layers left dense")
    parser.add_argument("--width-multiple", type=int, default=64, help="kept MLP widths are multiples of it")
    parser.add_argument("--probe-batch", type=float, default=0.05, help="share of samples probed")
    parser.add_argument("--probe-tokens", type=float, default=0.5, help="share of tokens probed")
    parser.add_argument("--dense-below", type=int, default=0, help="batches of fewer tokens run dense")
    parser.add_argument("--history-below", type=int, default=0, help="batches of fewer tokens go by the history alone")
    parser.add_argument("--method", choices=("pp", "spread"), default="pp", help="how what is kept is chosen")
    parser.add_argument("--repeats", type=int, default=repeats, help="measured rounds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="also write the results to this file")


def prune_config(args: argparse.Namespace) -> ppgraph.PruneConfig:
    """The method under test."""
    return ppgraph.PruneConfig(
        ratio=args.ratio,
        method=args.method,
        skip_layers=args.skip_layers,
        width_multiple=args.width_multiple,
        probe_batch=args.probe_batch,
        probe_tokens=args.probe_tokens,
        dense_below=args.dense_below,
        history_below=args.history_below,
    )


def dense_model(args: argparse.Namespace, device: str, attention: str) -> LlamaForCausalLM:
    """A LLaMA of the wanted shape with random weights."""
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads or args.heads,
        max_position_embeddings=max(2048, args.length),
        attn_implementation=attention,
        dtype=DTYPES[args.dtype],
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(DTYPES[args.dtype]).eval()


def static_model(dense: LlamaForCausalLM, config: ppgraph.PruneConfig) -> LlamaForCausalLM:
    """A copy whose layers have the kept widths: the same products as pruning, with nothing to choose."""
    model = copy.deepcopy(dense)
    ratio = layer_ratio(config, len(model.model.layers))
    for layer in model.model.layers[config.skip_layers :]:
        narrow_attention(layer.self_attn, ratio)
        narrow_mlp(layer.mlp, ratio, config.width_multiple)
    return model


def compiled_models(args: argparse.Namespace) -> dict[str, Any]:
    """Dense, static and pruned ("ppgraph") of one random model, each to be compiled by its first call."""
    dense, config = dense_model(args, args.device, "sdpa"), prune_config(args)
    return {
        "dense": torch.compile(dense),
        "static": torch.compile(static_model(dense, config)),
        "ppgraph": pruned_model(args, dense),
    }


def pruned_model(args: argparse.Namespace, dense: LlamaForCausalLM, **lowering: Any) -> Any:
    """The pruned twin. Its history is empty, which costs the same as a full one, unless prompts go by it alone."""
    pruned = ppgraph.transform(dense, prune_config(args), **lowering)
    if args.history_below:
        ppgraph.calibrate(pruned, [torch.randint(args.vocab, (4, 64), device=args.device)], progress=False)
    return pruned


def narrow_attention(attention: LlamaAttention, ratio: float) -> None:
    """Keep some query heads: with MHA their K/V heads too, with GQA each reads its own of all K/V heads."""
    size = attention.head_dim
    heads = attention.q_proj.out_features // size
    kept = spread(heads, kept_heads(heads, ratio), attention.q_proj.weight.device)
    channels = (kept[:, None] * size + torch.arange(size, device=kept.device)).flatten()
    attention.q_proj = narrowed(attention.q_proj, rows=channels)
    attention.o_proj = narrowed(attention.o_proj, columns=channels)
    if attention.num_key_value_groups == 1:
        attention.k_proj = narrowed(attention.k_proj, rows=channels)
        attention.v_proj = narrowed(attention.v_proj, rows=channels)
    else:
        read = kept // attention.num_key_value_groups
        attention.k_proj = nn.Sequential(attention.k_proj, GatherHeads(read, size))
        attention.v_proj = nn.Sequential(attention.v_proj, GatherHeads(read, size))
        attention.num_key_value_groups = 1


def narrow_mlp(mlp: LlamaMLP, ratio: float, multiple: int) -> None:
    """Keep some channels of a gated MLP."""
    width = mlp.down_proj.in_features
    kept = spread(width, kept_channels(width, ratio, multiple), mlp.down_proj.weight.device)
    mlp.gate_proj = narrowed(mlp.gate_proj, rows=kept)
    mlp.up_proj = narrowed(mlp.up_proj, rows=kept)
    mlp.down_proj = narrowed(mlp.down_proj, columns=kept)


class GatherHeads(nn.Module):
    """Repeat K or V heads `[B, S, KV*hd]` into those that the kept query heads read, `[B, S, H'*hd]`."""

    heads: Tensor

    def __init__(self, heads: Tensor, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.register_buffer("heads", heads)

    def forward(self, states: Tensor) -> Tensor:
        """Gather along the head dimension."""
        by_head = states.view(*states.shape[:-1], -1, self.head_size)
        return by_head[..., self.heads, :].flatten(-2)


def spread(total: int, kept: int, device: torch.device) -> Tensor:
    """Indices of `kept` units of `total`, evenly spread and ascending."""
    return torch.arange(kept, device=device) * total // kept


def narrowed(linear: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Linear:
    """A bias-free linear with some of another's rows or columns, stored densely."""
    weight = linear.weight.detach()
    weight = weight if rows is None else weight[rows]
    weight = weight if columns is None else weight[:, columns]
    result = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    result.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    return result


def prefill_call(model: Callable[..., Any], tokens: Tensor) -> Callable[[], object]:
    """A call that gives the logits of the last token, as a prefill of `generate` does."""
    return torch.no_grad()(lambda: model(tokens, use_cache=False, logits_to_keep=1))


def options(args: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, for the JSON file."""
    return {name: value for name, value in vars(args).items() if name != "json"}


def results(
    args: argparse.Namespace,
    described: Mapping[str, Any],
    timings: Mapping[str, Timing],
    first_ms: Mapping[str, float],
    **more: Any,
) -> dict[str, Any]:
    """Everything that was measured and on what, for the JSON file."""
    return {
        "machine": described,
        "arguments": options(args),
        **more,
        "variants": timings_to_dict(timings, first_ms),
    }
