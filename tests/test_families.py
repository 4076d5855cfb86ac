"""Every decoder family of transformers, tiny and with random weights, against its own masked dense model.

By default each family takes a padded prompt into a cache, with one implementation of attention, and a few are checked
whole: generating, without a cache, with either padding, at `ratio=0`. `--thorough` does so for all, with both
implementations.

Which blocks are pruned, and which stay dense for what reason, stands in `docs/families.md` and README.md. A family
whose row there is not what was found fails, unless `--write-families` is to write what was found.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.pytorch_utils import Conv1D

import ppgraph
from ppgraph import _torch
from ppgraph.errors import NothingToPruneError
from ppgraph.passes import Site
from tests.reference import Reference, masked

# Sizes under every name that a family's config may have for them; a config takes those that it knows.
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "max_position_embeddings": 64,
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
    """A `model_type` of transformers with options of its config, and the sites of it that are refused: {name: why}.

    `thorough`: all is checked by default too.
    """

    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    thorough: bool = False

    @property
    def layers(self) -> int:
        """Two where they differ, or all is checked."""
        layered = any(isinstance(value, list) for value in self.options.values())
        return 2 if layered or self.refused or self.thorough else 1

    def model(self, implementation: str, *, seed: int = 0, sizes: Mapping[str, Any] | None = None) -> nn.Module:
        """A random model; `sizes` replace some of `SIZES`."""
        defaults = AutoConfig.for_model(self.model_type)
        known = defaults.to_dict().keys() | defaults.attribute_map.keys()
        taken = {
            key: size
            for key, size in {**SIZES, "num_hidden_layers": self.layers, **(sizes or {})}.items()
            if key in known
        }
        config = AutoConfig.for_model(self.model_type, **{**taken, **SPECIAL_TOKENS, **self.options})
        torch.manual_seed(seed)
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
    "opt (post-norm)": Family("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "mistral": Family("mistral"),
    "qwen2": Family("qwen2", {"use_sliding_window": True, **BOTH_KINDS_OF_WINDOW}),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma"),
    "gemma2": Family("gemma2", thorough=True),
    "gemma3_text": Family("gemma3_text", BOTH_KINDS_OF_WINDOW),
    "phi": Family("phi", {"qk_layernorm": True}),
    "phi3": Family("phi3"),
    "gpt_neox": Family("gpt_neox"),
    "gpt_neox (sequential)": Family("gpt_neox", {"use_parallel_residual": False}),
    "gpt2": Family("gpt2"),
    "falcon (multi-query)": Family("falcon"),
    "falcon (sequential, ALiBi)": Family(
        "falcon", {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}, thorough=True
    ),
    "falcon (grouped)": Family("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "olmo": Family("olmo"),
    "olmo2": Family("olmo2"),
    "olmo3": Family("olmo3", BOTH_KINDS_OF_WINDOW),
    "granite_swa": Family("granite_swa"),  # reads its keys twice: the probed ones, and all of them for their logsumexp
    "granite": Family("granite", {"residual_multiplier": 0.3, "attention_multiplier": 0.2}),
    "starcoder2": Family("starcoder2"),
    "cohere": Family("cohere", {"use_qk_norm": True}),
    "cohere2": Family("cohere2", BOTH_KINDS_OF_WINDOW),
    "stablelm": Family("stablelm"),
    "stablelm (parallel)": Family("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
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
    "doge": Family("doge"),
    "mixtral": Family(
        "mixtral", refused={"model.layers.0.mlp.experts": EXPERTS, "model.layers.1.mlp.experts": EXPERTS}
    ),
    "qwen3_moe": Family("qwen3_moe", {"mlp_only_layers": [0]}, {"model.layers.1.mlp.experts": EXPERTS}),
    "qwen2_moe": Family(
        "qwen2_moe",
        refused={"model.layers.0.mlp.experts": EXPERTS, "model.layers.1.mlp.experts": EXPERTS},
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


def case(name: str, implementation: str) -> Any:
    family = FAMILIES[name]
    by_default = implementation == family.implementations()[0]
    marks = [] if by_default else [pytest.mark.thorough]
    return pytest.param(name, implementation, id=f"{name}-{implementation}", marks=marks)


CASES = [case(name, implementation) for name, family in FAMILIES.items() for implementation in family.implementations()]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The rewritten graphs of prompts as text, as `TORCH_TRACE` is given them."""
    texts: list[str] = []

    def keep(name: str, text: Callable[[], str]) -> None:
        if name == "ppgraph_prefill_update_history":
            texts.append(text())

    monkeypatch.setattr(_torch, "trace_artifact", keep)
    return texts


@pytest.mark.filterwarnings(
    "ignore:.*'torch.autograd.function.Function'> should not be instantiated:DeprecationWarning"
)
@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_family_equals_its_masked_dense_model(
    name: str, implementation: str, written: list[str], pytestconfig: pytest.Config
) -> None:
    family = FAMILIES[name]
    dense = family.model(implementation)
    pruned = ppgraph.transform(dense, **PRUNING)
    check_logits(dense, pruned, batch("left"), use_cache=True)
    assert "def forward" in written[0]
    check_sites(family, pruned.ppgraph.sites)
    if family.thorough or pytestconfig.getoption("--thorough"):
        check_generation(dense, pruned, batch("left"))
        for padding in ("left", "right"):
            check_logits(dense, pruned, batch(padding), use_cache=False)
        check_ratio_zero(dense)
    check_row(name, row(name, pruned.ppgraph.sites), write=pytestconfig.getoption("--write-families"))


def batch(padding: str, seed: int = 1) -> dict[str, Tensor]:
    """Three prompts of 8 to 11 tokens."""
    ids = torch.randint(3, 97, (3, 11), generator=torch.Generator().manual_seed(seed))
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
def check_logits(dense: Any, pruned: Any, inputs: dict[str, Tensor], *, use_cache: bool) -> None:
    real = inputs["attention_mask"].bool()
    logits = pruned(**inputs, use_cache=use_cache).logits[real]
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
        "use_cache": True,  # some configs say otherwise
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
    expected = {(layer, kind) for layer in range(family.layers) for kind in ("attention", "mlp")}
    replaced = {(site.layer, "attention") for site in sites if site.refused and "experts" not in site.name}
    assert blocks >= expected - replaced
    if not family.refused:
        assert len(sites) == len(expected)


# ---- against the reference, over batches that follow one another -----------------------------------


def opt(*, norm_before: bool) -> nn.Module:
    options = {"do_layer_norm_before": norm_before, "word_embed_proj_dim": 64 if norm_before else 32}
    return Family("opt", {**options, "num_hidden_layers": 3}).model("sdpa")


def gpt2() -> nn.Module:
    return Family("gpt2", {"num_hidden_layers": 3, "scale_attn_by_inverse_layer_idx": True}).model("sdpa")


@pytest.mark.parametrize(
    "dense", [opt(norm_before=True), opt(norm_before=False), gpt2()], ids=["opt", "opt (post-norm)", "gpt2"]
)
def test_stateful_batches_equal_the_reference(dense: Any) -> None:
    """Norms with biases, plain MLPs, learned positions, fused and transposed weights: logits, choices, history."""
    config = {"ratio": 0.4, "skip_layers": 1, "width_multiple": 8, "history_momentum": 0.9, "probe_batch": 0.4}
    pruned = ppgraph.transform(dense, lowering="eager", **config)
    reference = Reference(dense, **config)
    ppgraph.calibrate(pruned, [batch("right")], progress=False)
    reference.calibrate([batch("right")])
    for seed, padding in enumerate(("left", "right", "left")):
        inputs = batch(padding, seed)
        real = inputs["attention_mask"].bool()
        logits = pruned(**inputs, use_cache=False).logits
        expected = reference(**inputs)
        selection = pruned.ppgraph.selection()
        assert list(selection) == list(expected.selection)
        assert all(torch.equal(selection[site], kept) for site, kept in expected.selection.items())
        assert relative(logits[real], expected.logits[real]) < 1e-5
    for site, history in reference.history.items():
        torch.testing.assert_close(pruned.ppgraph.history[site][: len(history)], history, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("is_masked", [False, True])
def test_rows_of_one_sample_are_probed_where_a_block_spells_its_shapes_out(is_masked: bool) -> None:
    """GPT-2 reshapes to [samples, tokens, channels] in its MLP, and a batch of one sample is a number there."""
    dense = Family("gpt2").model("sdpa")
    config = {"ratio": 0.4, "skip_layers": 0, "width_multiple": 8, "probe_choice": "spread", "dense_tokens": 0.5}
    pruned, reference = ppgraph.transform(dense, lowering="eager", **config), Reference(dense, **config)
    inputs = {name: tensor[1:2] for name, tensor in batch("left").items() if is_masked or name == "input_ids"}
    logits, expected = pruned(**inputs, use_cache=False).logits, reference(**inputs)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    assert all(torch.equal(kept, expected.selection[site]) for site, kept in pruned.ppgraph.selection().items())
    assert relative(logits[real], expected.logits[real]) < 1e-5


# ---- a family that nobody listed -------------------------------------------------------------------


class OddConfig(PretrainedConfig):
    model_type = "odd"


class OddBlock(nn.Module):
    """Attention and MLP side by side, from one product whose parts come in an order that no other model has.

    The projection's weight is stored in x out and gives, of flattened tokens, [values | gate and up, interleaved |
    queries, the head size before the heads | keys]. Query heads share key heads inside the fused operator. The residual
    is scaled, by a number and channel by channel, and each block is added in another way.
    """

    def __init__(self, hidden: int, heads: int, kv_heads: int, head: int, inner: int) -> None:
        super().__init__()
        self.heads, self.head, self.inner = heads, head, inner
        self.parts = [kv_heads * head, 2 * inner, heads * head, kv_heads * head]
        self.scale, self.carried = nn.Parameter(torch.ones(hidden)), nn.Parameter(torch.rand(hidden))
        self.inward = nn.Parameter(torch.randn(hidden, sum(self.parts)) / 4)
        self.offset = nn.Parameter(torch.randn(sum(self.parts)) / 4)
        self.mixed = Conv1D(hidden, heads * head)
        self.thought = nn.Linear(inner, hidden)

    def forward(self, stream: Tensor, visible: Tensor) -> Tensor:
        samples, tokens = stream.shape[:2]
        x = F.layer_norm(stream, stream.shape[-1:]) * self.scale
        fused = torch.addmm(self.offset, x.flatten(0, 1), self.inward)
        value, pairs, query, key = fused.split(self.parts, dim=-1)
        query = query.view(samples, tokens, self.head, self.heads).permute(0, 3, 1, 2)
        key, value = (each.view(samples, tokens, -1, self.head).transpose(1, 2) for each in (key, value))
        heads = F.scaled_dot_product_attention(query, key, value, visible, scale=0.3, enable_gqa=True)
        gate, up = pairs.view(samples, tokens, self.inner, 2).unbind(-1)
        stream = (stream * 0.8 * self.carried).add_(self.mixed(heads.transpose(1, 2).flatten(2)), alpha=1.5)
        return self.thought(gate.sigmoid() * up**2) * 0.5 + stream


class OddModel(PreTrainedModel, GenerationMixin):
    config_class = OddConfig

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(OddConfig())
        self.words, self.places = nn.Embedding(97, 48), nn.Embedding(64, 48)
        self.tower = nn.ModuleList(blocks)

    def get_output_embeddings(self) -> nn.Module:
        return self.words

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False
    ) -> CausalLMOutput:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        order = torch.arange(input_ids.shape[1])
        visible = (order <= order[:, None]) & (mask[:, None, None] != 0)
        stream = self.words(input_ids) + self.places((mask.cumsum(1) - 1).clamp(min=0))
        for block in self.tower:
            stream = block(stream, visible)
        return CausalLMOutput(logits=F.linear(stream, self.words.weight))


def test_a_family_that_nobody_listed() -> None:
    torch.manual_seed(0)
    dense = OddModel([OddBlock(48, 6, 2, 8, 80) for _ in range(3)]).eval()
    pruned = ppgraph.transform(dense, **PRUNING)
    for padding in ("left", "right"):
        check_logits(dense, pruned, batch(padding), use_cache=False)
    assert [(site.name, site.kind, site.status) for site in pruned.ppgraph.sites] == [
        (f"tower.{layer}.{exit_linear}", kind, "pruned")
        for layer in range(3)
        for exit_linear, kind in (("mixed", "attention"), ("thought", "mlp"))
    ]
    check_fused_products(pruned.ppgraph.graphs[0].rewritten)


def check_fused_products(rewritten: GraphModule) -> None:
    """Each block's fused product is taken apart: the parts of one block don't compute those of the other."""
    widths = [
        node.meta["val"].shape[-1]
        for node in rewritten.graph.nodes
        if node.target is torch.ops.aten.addmm.default
        and node.meta.get("ppgraph_pass") in ("select_weights", "reuse_probe")
    ]
    # Queries of 4 of 6 heads with whole keys and values (2 heads each); gate and up of 48 channels; the first exit.
    assert sorted(widths) == sorted(3 * [4 * 8 + 2 * 2 * 8, 2 * 48, 48])


class OtherWords(nn.Module):
    """Attention over grouped keys, and MLPs, in operators that torch makes of others, or does not tag as pointwise."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(48, 48), nn.Linear(48, 16), nn.Linear(48, 16)
        self.joined, self.back = nn.Linear(48, 48), nn.Linear(48, 48)
        self.pairs, self.leave = nn.Linear(48, 160), nn.Linear(80, 48)
        self.wide, self.slope, self.narrow = nn.Linear(48, 64), nn.PReLU(64), nn.Linear(64, 48)

    def forward(self, stream: Tensor, visible: Tensor) -> Tensor:
        x = F.layer_norm(stream, stream.shape[-1:])
        heads = self.query(x).unflatten(-1, (6, 8))
        key, value = (each(x).unflatten(-1, (2, 8)).repeat_interleave(3, 2) for each in (self.key, self.value))
        scores = torch.einsum("bqhd,bkhd->bhqk", heads, key).divide(8**0.5)
        shares = scores.masked_fill(~visible, torch.tensor(-torch.inf)).softmax(-1)
        stream = stream + self.joined(torch.einsum("bhqk,bkhd->bqhd", shares, value).reshape_as(x))
        query, key, value = heads.swapaxes(1, 2), key.movedim(1, 2), value.movedim(1, 2)
        query = torch.concat([query[..., 4:].negative(), query[..., :4]], -1)
        hidden = visible.logical_not().expand_as(scores)
        mixed = (query @ key.mT).masked_fill(hidden, -1e9).softmax(-1) @ value
        stream = stream + self.back(mixed.swapaxes(1, 2).flatten(2))
        stream = stream + self.leave(F.glu(self.pairs(stream)))
        wide = self.wide(stream)
        return stream + self.narrow(self.slope(wide.mT).mT.multiply(F.hardswish(wide).subtract(F.logsigmoid(wide))))


def test_operators_that_torch_makes_of_others_need_no_rules() -> None:
    torch.manual_seed(0)
    dense = OddModel([OtherWords()]).eval()
    pruned = ppgraph.transform(dense, **PRUNING)
    for padding in ("left", "right"):
        check_logits(dense, pruned, batch(padding), use_cache=False)
    assert [(site.name, site.kind, site.status, site.reason) for site in pruned.ppgraph.sites] == [
        (f"tower.0.{name}", kind, "pruned", "")
        for name, kind in (("joined", "attention"), ("back", "attention"), ("leave", "mlp"), ("narrow", "mlp"))
    ]


class Refused(nn.Module):
    """An MLP that `change` makes impossible to prune."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.change = change
        self.norm, self.enter, self.leave = nn.LayerNorm(48), nn.Linear(48, 80), nn.Linear(80, 48, bias=False)
        self.length = nn.Parameter(torch.ones(48, 1))
        self.filter = nn.Conv1d(80, 80, 3, groups=80, padding=2)

    def forward(self, stream: Tensor, visible: Tensor) -> Tensor:
        inner = self.enter(self.norm(stream)).relu()
        if self.change == "scaled weight":
            return stream + F.linear(inner, self.leave.weight * self.length)
        if self.change == "softmax":
            inner = inner.softmax(-1)
        elif self.change == "roll":
            inner = inner.roll(1, 2)
        elif self.change == "convolution":
            inner = self.filter(inner.transpose(1, 2))[..., : stream.shape[1]].transpose(1, 2)
        elif self.change == "previous token":
            inner = inner + torch.cat([inner[:, :1], inner[:, :-1]], 1)
        return stream + self.leave(inner)


REFUSALS = {
    "scaled weight": r"linear_\d+ \(aten\.linear\): the block does not end in a linear with a weight parameter",
    "softmax": r"softmax \(aten\.softmax\): it mixes dimension 2, .*; pruning needs an operator that keeps it apart",
    "roll": r"roll \(aten\.roll\): no operator rule says where dimension 2 comes from; RULES in .* needs one",
    "convolution": r"conv1d \(aten\.conv1d\): it mixes neighbouring tokens, so a probe of some of them can't run this",
    "previous token": r"cat \(aten\.cat\): it joins tokens along dimension 1; expected all of them in one of its",
}


@pytest.mark.parametrize(("change", "reason"), REFUSALS.items(), ids=REFUSALS)
def test_a_refusal_names_site_node_operator_and_what_is_needed(change: str, reason: str) -> None:
    torch.manual_seed(0)
    dense = OddModel([OddBlock(48, 6, 2, 8, 80), Refused(change)]).eval()
    *others, site = ppgraph.transform(dense, **PRUNING).ppgraph.sites
    assert [other.status for other in others] == ["pruned", "pruned"]
    assert (site.kind, site.status, site.refused) == ("mlp", "dense", True)
    assert site.name.startswith("tower.1")
    assert re.fullmatch(reason + ".*", site.reason)


class TokensFirst(OddModel):
    """The residual stream is [tokens, samples, hidden]."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False
    ) -> CausalLMOutput:
        stream = self.words(input_ids.t())
        for block in self.tower:
            stream = block(stream, attention_mask)
        return CausalLMOutput(logits=F.linear(stream, self.words.weight).transpose(0, 1))


def test_tokens_ahead_of_samples_are_not_taken_for_them() -> None:
    pruned = ppgraph.transform(TokensFirst([Refused("nothing")]).eval(), **PRUNING)
    with pytest.raises(NothingToPruneError, match=r"is \[tokens, samples, hidden\]; pruning needs samples ahead of"):
        pruned(**batch("left"))


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_a_model_with_nothing_to_prune_raises_and_says_why() -> None:
    pruned = ppgraph.transform(Family("mamba").model("eager"), **PRUNING)
    with pytest.raises(NothingToPruneError) as raised:
        pruned(**batch("left"), use_cache=False)
    assert re.fullmatch(
        r"nothing to prune: expected attention or MLP blocks that end in a linear layer, found none that adds to a "
        r"residual stream, only aten\.conv1d \(1\), aten\.linear \(\d+\), aten\.matmul \(\d+\)",
        str(raised.value),
    )


# ---- the table of families -------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
TABLE, README = ROOT / "docs" / "families.md", ROOT / "README.md"
WRITE = "pytest tests/test_families.py --write-families"
BEGIN, END = "<!-- families, written by tests/test_families.py -->", "<!-- end of families -->"
INTRODUCTION = f"""\
# Families

Written by `{WRITE}`, which compares each of these, tiny and with random
weights, with its own dense model whose dropped heads and channels are zeroed. The columns say which of its blocks can
be pruned, counted in models of two layers.

| family | attention | MLP | stays dense |
| --- | --- | --- | --- |
"""


def test_the_tables_list_all_families(pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("--write-families"):
        pytest.skip("the tables are being written")
    rows = read_rows()
    assert list(rows) == list(FAMILIES), f"docs/families.md lists other families: run `{WRITE}`"
    assert TABLE.read_text() == table(rows), f"docs/families.md has other text beside its rows: run `{WRITE}`"
    assert README.read_text() == readme(rows), f"README.md says other than docs/families.md: run `{WRITE}`"


def check_row(name: str, found: str, *, write: bool) -> None:
    """The family's row in `docs/families.md` is what was found just now; with `write` it is written there."""
    if write:
        with FileLock(Path(tempfile.gettempdir()) / "ppgraph-families.lock"):  # of the workers of pytest-xdist
            rows = {**read_rows(), name: found}
            rows = {known: rows[known] for known in FAMILIES if known in rows}
            TABLE.write_text(table(rows))
            README.write_text(readme(rows))
    assert read_rows().get(name) == found, f"docs/families.md has another row for {name}: run `{WRITE}`"


def table(rows: Mapping[str, str]) -> str:
    return INTRODUCTION + "\n".join(rows.values()) + "\n"


def readme(rows: Mapping[str, str]) -> str:
    """README.md with, between its marks, the table in short: whose blocks are all pruned, and what stays dense."""
    stays_dense = {name: line.split("|")[4].strip() for name, line in rows.items()}
    whole = ", ".join(name for name, reasons in stays_dense.items() if not reasons)
    lines = ["| families | stays dense |", "| --- | --- |", f"| {whole} | nothing |"]
    lines += [f"| {name} | {reasons} |" for name, reasons in stays_dense.items() if reasons]
    before, begin, rest = README.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"README.md has no {BEGIN} ... {END}"
    return "\n".join([before + BEGIN, *lines, END + after])


def read_rows() -> dict[str, str]:
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    found = {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}
    return {name: line for name, line in found.items() if name not in ("family", "---")}


def row(name: str, sites: list[Site]) -> str:
    counts = []
    for kind in ("attention", "mlp"):
        of_kind = [site for site in sites if site.kind == kind]
        pruned = sum(not site.refused for site in of_kind)
        counts.append("all" if pruned == len(of_kind) else f"{pruned} of {len(of_kind)}")
    refusals = [site for site in sites if site.refused]
    # Without the layer's number, the node and the operator: those differ between layers and releases of torch.
    reasons = {re.sub(r"\.\d+\.", ".*.", site.name): site.reason.partition("): ")[2] for site in refusals}
    refused = "; ".join(f"`{site}`: {reason}" for site, reason in reasons.items())
    return f"| {name} | {' | '.join(counts)} | {refused} |"
