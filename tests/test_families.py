"""Every decoder family of transformers, tiny and with random weights, against its own masked dense model.

Which blocks are pruned, and which stay dense for what reason, is written to `docs/families.md` and README.md: a test
whose row differs from the one there rewrites it and fails, so that a change of what works is seen and committed.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import ppgraph
from ppgraph.passes import Site
from tests.reference import masked

# Sizes under every name that a family's config may have for them; a config takes those that it knows.
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "n_inner": 96,
    "word_embed_proj_dim": 64,
    "sliding_window": 6,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}
SPECIAL_TOKENS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
PRUNING: dict[str, Any] = {"ratio": 0.4, "skip_layers": 0, "width_multiple": 8, "lowering": "eager"}
NEW_TOKENS = 10
IMPLEMENTATIONS = ("sdpa", "eager")


@dataclass(frozen=True)
class Family:
    """A `model_type` of transformers with options of its config, and the sites of it that are refused: {name: why}."""

    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def model(self, implementation: str) -> nn.Module:
        defaults = AutoConfig.for_model(self.model_type)
        known = defaults.to_dict().keys() | defaults.attribute_map.keys()
        sizes = {key: size for key, size in SIZES.items() if key in known}
        config = AutoConfig.for_model(self.model_type, **{**sizes, **SPECIAL_TOKENS, **self.options})
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms too, which begin as 0 and 1
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        return model

    def implementations(self) -> tuple[str, ...]:
        """Implementations of attention that transformers has for this family."""
        kind = AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model(self.model_type))]
        return IMPLEMENTATIONS if kind._supports_sdpa else ("eager",)


BOTH_KINDS_OF_WINDOW = {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = r"a stack of experts that tokens choose from; pruning needs a linear with one weight for all tokens"
NEIGHBOURS = r"mixes neighbouring tokens, so a probe of some of them can't run this block"

FAMILIES: dict[str, Family] = {
    "llama": Family("llama"),
    "opt": Family("opt"),
    "opt, norm after": Family("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "mistral": Family("mistral"),
    "qwen2": Family("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma"),
    "gemma2": Family("gemma2"),
    "gemma3_text": Family("gemma3_text", BOTH_KINDS_OF_WINDOW),
    "phi": Family("phi", {"qk_layernorm": True}),
    "phi3": Family("phi3"),
    "gpt_neox": Family("gpt_neox"),
    "gpt_neox, sequential": Family("gpt_neox", {"use_parallel_residual": False}),
    "gpt2": Family("gpt2"),
    "falcon, multi-query": Family("falcon"),
    "falcon, sequential, ALiBi": Family(
        "falcon", {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}
    ),
    "falcon, grouped": Family("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "olmo": Family("olmo"),
    "olmo2": Family("olmo2"),
    "olmo3": Family("olmo3", BOTH_KINDS_OF_WINDOW),
    "granite": Family("granite", {"residual_multiplier": 0.3, "attention_multiplier": 0.2}),
    "starcoder2": Family("starcoder2"),
    "cohere": Family("cohere", {"use_qk_norm": True}),
    "cohere2": Family("cohere2", BOTH_KINDS_OF_WINDOW),
    "stablelm": Family("stablelm"),
    "stablelm, parallel": Family("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "smollm3": Family("smollm3", {"no_rope_layers": [1, 0]}),
    "bloom": Family("bloom"),
    "gptj": Family("gptj"),
    "codegen": Family("codegen"),
    "mpt": Family("mpt", {"expansion_ratio": 2, "max_seq_len": 64}),
    "glm": Family("glm"),
    "glm4": Family("glm4"),
    "nemotron": Family("nemotron"),
    "exaone4": Family("exaone4", BOTH_KINDS_OF_WINDOW),
    "ernie4_5": Family("ernie4_5"),
    "seed_oss": Family("seed_oss"),
    "arcee": Family("arcee"),
    "apertus": Family("apertus"),
    "helium": Family("helium"),
    "persimmon": Family("persimmon"),
    "mixtral": Family(
        "mixtral", refused={"model.layers.0.mlp.experts": EXPERTS, "model.layers.1.mlp.experts": EXPERTS}
    ),
    "qwen3_moe": Family("qwen3_moe", {"mlp_only_layers": [0]}, {"model.layers.1.mlp.experts": EXPERTS}),
    "qwen2_moe": Family(
        "qwen2_moe", refused={"model.layers.0.mlp.experts": EXPERTS, "model.layers.1.mlp.experts": EXPERTS}
    ),
    "gpt_oss": Family(
        "gpt_oss", refused={"model.layers.0.mlp.experts": EXPERTS, "model.layers.1.mlp.experts": EXPERTS}
    ),
    "deepseek_v3": Family(
        "deepseek_v3",
        {
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "head_dim": 8,
        },
        {"model.layers.1.mlp.experts": EXPERTS},
    ),
    "llama4_text": Family(
        "llama4_text",
        {"interleave_moe_layer_step": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 96},
        {"model.layers.1.feed_forward.experts": EXPERTS},
    ),
    "lfm2": Family("lfm2", {"layer_types": ["conv", "full_attention"]}, {"model.layers.0.conv": NEIGHBOURS}),
    "qwen3_next": Family(
        "qwen3_next",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
        },
        {
            "model.layers.0.linear_attn": NEIGHBOURS,
            "model.layers.0.mlp.experts": EXPERTS,
            "model.layers.1.mlp.experts": EXPERTS,
        },
    ),
}

CASES = [
    pytest.param(name, implementation, id=f"{name}-{implementation}")
    for name, family in FAMILIES.items()
    for implementation in family.implementations()
]


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_family_equals_its_masked_dense_model(name: str, implementation: str) -> None:
    family = FAMILIES[name]
    dense = family.model(implementation)
    pruned = ppgraph.transform(dense, **PRUNING)
    for padding in ("left", "right"):
        check_logits(dense, pruned, batch(padding))
    check_sites(family, pruned.ppgraph.sites)
    if implementation == family.implementations()[0]:
        check_generation(dense, pruned, batch("left"))
    if implementation == family.implementations()[-1]:
        check_ratio_zero(dense)
    check_row(name, pruned.ppgraph.sites)


def batch(padding: str) -> dict[str, Tensor]:
    """Three prompts of 8 to 11 tokens."""
    ids = torch.randint(3, 97, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for sample, gap in ((1, 3), (2, 1)):
        mask[sample, slice(gap) if padding == "left" else slice(-gap, None)] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def exits(pruned: Any) -> dict[str, str]:
    """The module of each pruned site's exit linear."""
    return {site.name: site.exit[0].rpartition(".")[0] for site in pruned.ppgraph.sites if site.status == "pruned"}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def check_logits(dense: Any, pruned: Any, inputs: dict[str, Tensor]) -> None:
    real = inputs["attention_mask"].bool()
    logits = pruned(**inputs, use_cache=False).logits[real]
    selection = pruned.ppgraph.selection()
    with masked(dense, selection, exits(pruned)):
        expected = dense(**inputs, use_cache=False).logits[real]
    assert relative(logits, expected) < 1e-5
    assert relative(logits, dense(**inputs, use_cache=False).logits[real]) > 0.01, "nothing was pruned"


def check_generation(dense: Any, pruned: Any, prompts: dict[str, Tensor]) -> None:
    """Ten greedy tokens through a cache, and the logits that each came from."""
    options = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    found = pruned.generate(**prompts, **options)
    with masked(dense, pruned.ppgraph.selection(), exits(pruned)):
        expected = dense.generate(**prompts, **options)
    assert relative(torch.stack(found.logits), torch.stack(expected.logits)) < 1e-5
    assert torch.equal(found.sequences, expected.sequences)
    assert found.sequences.shape[1] == prompts["input_ids"].shape[1] + NEW_TOKENS


@torch.no_grad()
def check_ratio_zero(dense: Any) -> None:
    """Bit for bit, and without an attention mask."""
    ids = batch("left")["input_ids"]
    same = ppgraph.transform(dense, **{**PRUNING, "ratio": 0.0})
    assert torch.equal(same(input_ids=ids, use_cache=False).logits, dense(input_ids=ids, use_cache=False).logits)
    assert {site.status for site in same.ppgraph.sites} == {"dense"}


def check_sites(family: Family, sites: list[Site]) -> None:
    """Every layer has a pruned attention and MLP, but for those that are refused with the reason expected."""
    refused = {site.name: site.reason for site in sites if site.refused}
    assert set(refused) == set(family.refused)
    for name, reason in family.refused.items():
        assert re.search(reason, refused[name])
    pruned = [site for site in sites if not site.refused]
    assert all(site.status == "pruned" and site.kept < site.width and site.exit for site in pruned)
    assert len({site.exit for site in pruned}) == len(pruned)
    blocks = {(site.layer, site.kind) for site in sites}
    expected = {(layer, kind) for layer in range(SIZES["num_hidden_layers"]) for kind in ("attention", "mlp")}
    replaced = {(site.layer, "attention") for site in sites if site.refused and "experts" not in site.name}
    assert blocks >= expected - replaced
    if not family.refused:
        assert len(sites) == len(expected)


# ---- the table of families -------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "families.md"
INTRODUCTION = """\
# Families

Written by `tests/test_families.py`, which compares each of these, tiny and with random weights, with its own dense
model whose dropped heads and channels are zeroed. The columns count the blocks that are pruned, of all there are.

| family | attention | MLP | stays dense |
| --- | --- | --- | --- |
"""


def check_row(name: str, sites: list[Site]) -> None:
    """The family's row in `docs/families.md` is what was found just now; if it isn't, it is corrected there."""
    expected = row(name, sites)
    with FileLock(Path(tempfile.gettempdir()) / "ppgraph-families.lock"):
        rows = read_rows()
        if rows.get(name) == expected:
            return
        rows[name] = expected
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(INTRODUCTION + "\n".join(rows[known] for known in FAMILIES if known in rows) + "\n")
    pytest.fail(f"{TABLE} had another row for {name} and has been corrected; look at the change and commit it")


def read_rows() -> dict[str, str]:
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    cells = {line: line.split("|")[1].strip() for line in lines if line.startswith("| ")}
    return {name: line for line, name in cells.items() if name in FAMILIES}


def row(name: str, sites: list[Site]) -> str:
    counts = []
    for kind in ("attention", "mlp"):
        of_kind = [site for site in sites if site.kind == kind]
        counts.append(f"{sum(site.status == 'pruned' for site in of_kind)} of {len(of_kind)}")
    refusals = [site for site in sites if site.refused]
    # Without the layer's number, the node and the operator: those differ between layers and releases of torch.
    reasons = {re.sub(r"\.\d+\.", ".*.", site.name): site.reason.partition("): ")[2] for site in refusals}
    refused = "; ".join(f"`{site}`: {reason}" for site, reason in reasons.items())
    return f"| {name} | {' | '.join(counts)} | {refused} |"
