"""With the rest of the ecosystem: what works is compared with the dense or masked model, what can't is refused by name.

Packages that the tests don't install are tried where they are there; what ppgraph does about them is tested without.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast, pipeline

import ppgraph
from ppgraph import runtime
from tests.reference import masked_dense_logits
from tests.test_exactness import SIZES, batch, llama, relative

OPTIONS: dict[str, Any] = {"ratio": 0.4, "lowering": "eager", **SIZES}
INPUTS = batch(3, 16)


class Adapter(nn.Module):
    """A linear with a low-rank adapter beside it, as PEFT leaves it before merging."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.base(x) + 2 * self.up(self.down(x))
        return result


def with_adapters(*names: str) -> LlamaForCausalLM:
    model = llama(2)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if name in names:
                    setattr(parent, name, Adapter(child))
    return model.eval()


def agrees_with_masked_dense(model: Any, pruned: Any) -> bool:
    logits = pruned(**INPUTS, use_cache=False).logits
    return relative(logits, masked_dense_logits(model, pruned.ppgraph.selection(), **INPUTS)) < 1e-5


def test_adapters_on_entry_linears_are_pruned_with_them() -> None:
    model = with_adapters("q_proj", "v_proj", "gate_proj", "up_proj")
    pruned = ppgraph.transform(model, **OPTIONS)
    assert agrees_with_masked_dense(model, pruned)
    assert [site.status for site in pruned.ppgraph.sites] == ["pruned", "pruned"]


def test_adapters_on_exit_linears_are_refused_by_name() -> None:
    pruned = ppgraph.transform(with_adapters("down_proj"), **OPTIONS)
    refused = [site for site in pruned.ppgraph.sites if site.refused]
    assert [site.exit[0] for site in refused] == ["model.layers.0.mlp.down_proj.base.weight"]
    with pytest.raises(ppgraph.PPGraphError, match="none of which can be rewritten"):
        ppgraph.transform(with_adapters("o_proj", "down_proj"), **OPTIONS)(**INPUTS)


@pytest.mark.filterwarnings("ignore")  # PEFT uses what transformers deprecates
@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "up_proj"], "all-linear"], ids=["entry", "all"])
def test_peft_models(targets: Any) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    adapted = peft.get_peft_model(llama(2), peft.LoraConfig(target_modules=targets, init_lora_weights=False)).eval()
    if targets != "all-linear":
        pruned = ppgraph.transform(adapted, **OPTIONS)
        assert agrees_with_masked_dense(adapted.get_base_model(), pruned)
    else:
        with pytest.raises(ppgraph.PPGraphError, match="down_proj"):
            ppgraph.transform(adapted, **OPTIONS)(**INPUTS)
    merged = adapted.merge_and_unload().eval()
    assert agrees_with_masked_dense(merged, ppgraph.transform(merged, **OPTIONS))


def test_weights_that_are_tensor_subclasses_are_refused_by_name() -> None:
    model = llama(2)
    weight = model.model.layers[0].mlp.up_proj.weight.detach()
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
    with pytest.raises(
        ppgraph.PPGraphError, match=r"layers\.0\.mlp\.up_proj\.weight is no plain weight but a TwoTensor"
    ):
        ppgraph.transform(model, **OPTIONS)


def test_packed_weights_are_refused_by_name() -> None:
    model = llama(2)
    packed = torch.zeros(64 * 64, 1, dtype=torch.uint8)
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ppgraph.PPGraphError, match=r"layers\.0\.mlp\.up_proj\.weight .* torch\.uint8 \[4096, 1\]"):
        ppgraph.transform(model, **OPTIONS)


def test_torchao_models_are_refused_by_name() -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    model = llama(2)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(ppgraph.PPGraphError, match=r"layers\.0\.self_attn\.q_proj\.weight is no plain weight"):
        ppgraph.transform(model, **OPTIONS)


@pytest.mark.filterwarnings("ignore")
def test_bitsandbytes_8_bit_blocks_stay_dense_and_the_others_are_pruned() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    model = llama(2)
    for layer in model.model.layers:
        old = layer.mlp.up_proj
        new = bitsandbytes.nn.Linear8bitLt(old.in_features, old.out_features, bias=False, has_fp16_weights=False)
        new.load_state_dict(old.state_dict())
        layer.mlp.up_proj = new.to("cpu")
    pruned = ppgraph.transform(model.eval(), **OPTIONS)
    sites = {site.name: site for site in pruned.ppgraph.sites}
    assert sites["model.layers.0.self_attn"].status == "pruned"
    assert "bitsandbytes." in sites["model.layers.0.mlp"].reason


def test_a_pipeline_generates_with_the_pruned_model() -> None:
    words = {f"w{number}": number for number in range(97)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))  # noqa: S106
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0")  # noqa: S106
    pruned = ppgraph.transform(llama(2), **OPTIONS)
    options = {"max_new_tokens": 3, "do_sample": False}
    said = pipeline("text-generation", model=pruned, tokenizer=fast)("w5 w6 w7 w8", **options)[0]["generated_text"]
    expected = pruned.generate(torch.tensor([[5, 6, 7, 8]]), **options)
    assert said.replace(" ", "") == "".join(f"w{number}" for number in expected[0].tolist())
    assert {record.phase for record in pruned.ppgraph.graphs} == {"prefill", "reuse"}


def test_a_single_device_map_loads_a_model_that_prunes(tmp_path: Path) -> None:
    llama(2).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}).eval()
    assert agrees_with_masked_dense(model, ppgraph.transform(model, **OPTIONS))


ON_CPU = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head"), "cpu")


@pytest.mark.parametrize(
    ("places", "found"),
    [(ON_CPU | {"model.layers.0": "disk"}, "cpu, disk"), ({"": "disk"}, "disk")],
    ids=["one", "all"],
)
def test_models_with_layers_on_disk_are_refused(tmp_path: Path, places: dict[str, str], found: str) -> None:
    llama(2).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "off").eval()
    with pytest.raises(
        ppgraph.PPGraphError, match=f"lies on {found}, .* with device_map={{'': device}}.* under torchrun"
    ):
        ppgraph.transform(model, **OPTIONS)
    with pytest.raises(ppgraph.PPGraphError, match=r"by hooks of accelerate .* under torchrun"), torch.no_grad():
        torch.compile(model, backend="ppgraph")(**INPUTS)


def test_models_that_accelerate_offloads_or_hooks_are_refused() -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    for model, found in (
        (accelerate.cpu_offload(llama(2), execution_device="cpu"), "meta"),
        (accelerate.dispatch_model(llama(2), {"": "cpu"}, force_hooks=True), "cpu"),
    ):
        with pytest.raises(ppgraph.PPGraphError, match=f"lies on {found}, .* by hooks of accelerate"):
            ppgraph.transform(model, **OPTIONS)


def test_models_on_several_devices_are_refused() -> None:
    model = llama(2)
    model.model.layers[0].to("meta")
    with pytest.raises(ppgraph.PPGraphError, match="lies on cpu, meta, "):
        ppgraph.transform(model, **OPTIONS)


def test_saving_beside_the_model_and_loading_back(tmp_path: Path) -> None:
    pruned = ppgraph.transform(llama(2), **OPTIONS)
    ppgraph.calibrate(pruned, [batch(4, 12)], progress=False)
    pruned.save_pretrained(tmp_path)
    pruned.ppgraph.history.save(tmp_path)
    expected = pruned(**INPUTS, use_cache=False).logits

    dense = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    config = ppgraph.PruneConfig.from_dict(json.loads((tmp_path / "ppgraph.json").read_text())["config"])
    again = ppgraph.transform(dense, config, lowering="eager")
    again.ppgraph.history.load(tmp_path)
    assert torch.equal(again(**INPUTS, use_cache=False).logits, expected)


def test_a_rewritten_graph_can_be_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Inductor would be given, with the inputs of a real call, goes through `torch.export`."""
    seen: list[Any] = []

    def record(program: Any, options: Any) -> Any:
        def call(*inputs: Any) -> Any:
            seen.append([value.clone() if isinstance(value, torch.Tensor) else value for value in inputs])
            return program.module(*inputs)

        return call

    monkeypatch.setattr(runtime, "lower", record)
    pruned = ppgraph.transform(llama(2), ratio=0.4, **SIZES)
    logits = pruned(**INPUTS, use_cache=False).logits
    (inputs,) = seen
    exported = torch.export.export(pruned.ppgraph.graphs[0].rewritten, tuple(inputs), strict=False)
    assert torch.equal(exported.module()(*inputs)[0], logits)
