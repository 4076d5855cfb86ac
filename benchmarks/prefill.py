"""Prefill speed of Probe Pruning on a LLaMA of any shape.

Three variants of one random model run in turns, each compiled, with lm_head, without a KV cache:

- dense: the model as it is;
- static: a model whose layers have the kept widths from the start; no probe, no selection: the limit;
- ppgraph: the dense model, transformed; each batch is probed and selects its own heads and channels.

The history is left empty, which costs the same as a full one. FLOPs are counted by torch on the eager models,
attention in full (causal or not), so that what the table says of them does not rest on ppgraph's own report.

    python benchmarks/prefill.py --dtype float32 --ratio 0.2 --json benchmarks/results/prefill.json
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

import ppgraph
from ppgraph.config import kept_channels, kept_heads, layer_ratio
from ppgraph.inspect.timing import (
    Timing,
    compile_and_time,
    header,
    machine,
    timing_table,
    timings_to_dict,
    write_json,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; the defaults are the shape that the project's speed is stated for."""
    parser = argparse.ArgumentParser(
        description="Time compiled dense, static and pruned prefill of a random LLaMA, in turns.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size")
    parser.add_argument("--layers", type=int, default=8, help="decoder layers")
    parser.add_argument("--intermediate", type=int, default=2816, help="MLP channels")
    parser.add_argument("--heads", type=int, default=16, help="query heads")
    parser.add_argument("--kv-heads", type=int, help="key and value heads; all of --heads if absent")
    parser.add_argument("--vocab", type=int, default=32000, help="vocabulary")
    parser.add_argument("--batch", type=int, default=8, help="samples a batch")
    parser.add_argument("--length", type=int, default=256, help="tokens a sample")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights and activations")
    parser.add_argument("--ratio", type=float, default=0.4, help="share of heads and channels removed")
    parser.add_argument("--skip-layers", type=int, default=0, help="first layers left dense")
    parser.add_argument("--width-multiple", type=int, default=64, help="kept MLP widths are multiples of it")
    parser.add_argument("--probe-batch", type=float, default=0.05, help="share of samples probed")
    parser.add_argument("--probe-tokens", type=float, default=0.5, help="share of tokens probed")
    parser.add_argument("--repeats", type=int, default=20, help="measured rounds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Build the variants, time them, print the table."""
    args = parse(arguments)
    described = machine()
    print(header(described, args.device, DTYPES[args.dtype]))

    config = prune_config(args)
    flops = count_flops(args, config)
    calls = compiled_calls(args, config)
    first_ms, timings = compile_and_time(calls, args.repeats)
    print(timing_table(timings, first_ms, flops, tokens=args.batch * args.length))
    print(f"efficiency (static / ppgraph): {timings['static'].median_ms / timings['ppgraph'].median_ms:.3f}")
    print(f"probe: {flops['probe'] / flops['dense']:.2%} of the dense FLOPs")
    if args.json:
        write_json(args.json, results(args, described, timings, first_ms, flops))


def prune_config(args: argparse.Namespace) -> ppgraph.PruneConfig:
    """The method under test."""
    return ppgraph.PruneConfig(
        ratio=args.ratio,
        skip_layers=args.skip_layers,
        width_multiple=args.width_multiple,
        probe_batch=args.probe_batch,
        probe_tokens=args.probe_tokens,
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


def compiled_calls(args: argparse.Namespace, config: ppgraph.PruneConfig) -> dict[str, Callable[[], object]]:
    """The three variants on one batch of random tokens, not compiled yet."""
    dense = dense_model(args, args.device, "sdpa")
    tokens = torch.randint(args.vocab, (args.batch, args.length), device=args.device)

    def call(model: Callable[..., Any]) -> Callable[[], object]:
        return torch.no_grad()(lambda: model(tokens, use_cache=False))

    return {
        "dense": call(torch.compile(dense)),
        "static": call(torch.compile(static_model(dense, config))),
        "ppgraph": call(ppgraph.transform(dense, config)),
    }


def count_flops(args: argparse.Namespace, config: ppgraph.PruneConfig) -> dict[str, int]:
    """FLOPs of one batch: dense, static, the probe, and static with the probe ("ppgraph").

    The meta device computes nothing, and eager attention shows the counter its products, which sdpa hides.
    """
    dense = dense_model(args, "meta", "eager")
    samples = math.ceil(args.batch * config.probe_batch)
    tokens = min(max(math.ceil(args.length * config.probe_tokens), 2), args.length)
    static_flops = module_flops(static_model(dense, config), args.batch, args.length)[""]
    by_module = module_flops(dense, samples, tokens)
    probe = sum(
        by_module[f"layers.{layer}.{block}"] - by_module[f"layers.{layer}.{block}.{exit_linear}"]
        for layer in range(config.skip_layers, args.layers)
        for block, exit_linear in (("self_attn", "o_proj"), ("mlp", "down_proj"))
    )
    return {
        "dense": module_flops(dense, args.batch, args.length)[""],
        "static": static_flops,
        "probe": probe,
        "ppgraph": static_flops + probe,
    }


def module_flops(model: LlamaForCausalLM, samples: int, tokens: int) -> dict[str, int]:
    """FLOPs by module path inside the decoder, and of the whole model as `""`."""
    mask = torch.zeros(1, 1, tokens, tokens, device="meta", dtype=model.dtype)
    ids = torch.zeros(samples, tokens, device="meta", dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, attention_mask=mask, use_cache=False)
    prefix = f"{type(model).__name__}.model."
    counts = {name: sum(by_operator.values()) for name, by_operator in counter.get_flop_counts().items()}
    return {name.removeprefix(prefix): total for name, total in counts.items()} | {"": counter.get_total_flops()}


def results(
    args: argparse.Namespace,
    described: dict[str, Any],
    timings: dict[str, Timing],
    first_ms: dict[str, float],
    flops: dict[str, int],
) -> dict[str, Any]:
    """Everything that was measured and on what, for the JSON file."""
    return {
        "machine": described,
        "arguments": {name: value for name, value in vars(args).items() if name != "json"},
        "flops": flops,
        "variants": timings_to_dict(timings, first_ms),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
