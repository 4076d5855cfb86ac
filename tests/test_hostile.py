"""Careless and hostile input beside what tests/test_transform.py holds: a clear error each, and nothing has changed."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import ppgraph
from ppgraph.config import PruneConfig
from ppgraph.errors import CaptureError, ConfigError, HistoryError, InputError, NonFiniteError, UnsupportedModelError
from ppgraph.loading import load_model
from ppgraph.transform import learned_positions
from tests.reference import masked_dense_logits
from tests.test_exactness import SIZES, batch, llama, relative
from tests.test_families import Family
from tests.test_generate import cache_in, cached

OPTIONS: dict[str, Any] = {"ratio": 0.4, "lowering": "eager", **SIZES}
IDS = batch(3, 16)["input_ids"]


@pytest.fixture(scope="module")
def warm() -> LlamaForCausalLM:
    pruned = ppgraph.transform(llama(2), **OPTIONS)
    pruned(IDS, use_cache=False)
    return pruned


def causal(samples: int = 3, length: int = 16) -> torch.Tensor:
    return torch.ones(samples, 1, length, length, dtype=torch.bool).tril()


def added_to_scores(visible: torch.Tensor) -> torch.Tensor:
    return torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)


FIRST_TWO = torch.tensor([True, True, False])[:, None, None, None]  # samples that see something


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("ids of bool", {"input_ids": IDS.bool()}, r"\(int64 or int32\), found torch.bool \[3, 16\]"),
    ("ids of int8", {"input_ids": IDS.to(torch.int8)}, r"\(int64 or int32\), found torch.int8"),
    (
        "embeddings of another dtype",
        {"inputs_embeds": torch.ones(3, 16, 64).half()},
        "torch.float32 with 64 numbers a token; found torch.float16 with 64",
    ),
    ("embeddings of another width", {"inputs_embeds": torch.ones(3, 16, 32)}, "found torch.float32 with 32"),
    ("complex embeddings", {"inputs_embeds": torch.ones(3, 16, 64).cfloat()}, "found torch.complex64"),
    (
        "a mask of whole numbers",
        {"input_ids": IDS, "attention_mask": causal().long()},
        r"torch.int64: use mask.bool\(\)",
    ),
    ("a mask of other tokens", {"input_ids": IDS, "attention_mask": causal(3, 15)}, r"found \[3, 1, 15, 15\]"),
    ("a mask of other samples", {"input_ids": IDS, "attention_mask": causal(2)}, r"found \[2, 1, 16, 16\]"),
    (
        "a mask in a dict",
        {"input_ids": IDS, "attention_mask": {"full_attention": causal(2)}},
        r"found \[2, 1, 16, 16\]",
    ),
    (
        "a mask by query that hides a sample",
        {"input_ids": IDS, "attention_mask": causal() & FIRST_TWO},
        "hides every token of sample 2",
    ),
    (
        "numbers that hide a sample",
        {"input_ids": IDS, "attention_mask": added_to_scores(causal() & FIRST_TWO)},
        "hides every token of sample 2",
    ),
    ("a list for a mask", {"input_ids": IDS, "attention_mask": [[1] * 16] * 3}, "as a tensor, found list"),
]


def state_of(pruned: Any) -> dict[str, Any]:
    state = pruned.ppgraph
    history = {name: state.history[name].tolist() for name in state.history}
    chosen = {name: kept.tolist() for name, kept in state.selection().items()}
    return {"history": history, "selection": chosen, "graphs": len(state.graphs)}


@pytest.mark.parametrize(("inputs", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_careless_input_is_refused_and_changes_nothing(
    warm: LlamaForCausalLM, inputs: dict[str, Any], message: str
) -> None:
    before = state_of(warm)
    with pytest.raises(InputError, match=message):
        warm(**inputs, use_cache=False)
    assert state_of(warm) == before


UNFIT: list[tuple[str, Callable[[Any], dict[str, Any]]]] = [
    ("other positions", lambda pruned: {"position_ids": torch.arange(4)[None]}),
    ("text for a cache", lambda pruned: cached("cache")),
    ("the cache of other samples", lambda pruned: cached(cache_in(pruned(IDS[:2], use_cache=True)))),
    ("the cache of another model", lambda pruned: cached(cache_in(llama(4)(IDS, use_cache=True)))),
]


@pytest.mark.parametrize("make", [case[1] for case in UNFIT], ids=[case[0] for case in UNFIT])
def test_what_the_dense_model_refuses_is_one_clear_error(
    warm: LlamaForCausalLM, make: Callable[[Any], dict[str, Any]]
) -> None:
    inputs = make(warm)
    before = state_of(warm)
    with pytest.raises(CaptureError, match=r"expected inputs that the dense LlamaForCausalLM takes.*found: "):
        warm(IDS, **inputs)
    assert state_of(warm) == before
    warm(IDS, use_cache=False)


def test_embeddings_that_are_not_finite_change_nothing(warm: LlamaForCausalLM) -> None:
    embedded = warm.get_input_embeddings()(IDS).detach().clone()
    warm(inputs_embeds=embedded, use_cache=False)
    before = state_of(warm)
    for bad in (torch.nan, torch.inf):
        embedded[1, 2, 3] = bad
        with pytest.raises(NonFiniteError, match="The history and the last selection stay as they were"):
            warm(inputs_embeds=embedded, use_cache=False)
        assert state_of(warm) == before


@pytest.mark.parametrize(
    "ids",
    [torch.cat([IDS, IDS], 1)[:, ::2], IDS.t().contiguous().t(), IDS[:1].expand(3, 16), IDS.int()],
    ids=["strided", "transposed", "expanded", "int32"],
)
def test_ids_in_any_layout_mean_the_same(warm: LlamaForCausalLM, ids: torch.Tensor) -> None:
    logits = warm(ids, use_cache=False).logits
    expected = masked_dense_logits(warm_dense(warm), warm.ppgraph.selection(), ids)
    assert relative(logits, expected) < 1e-5


def warm_dense(pruned: Any) -> LlamaForCausalLM:
    dense = llama(2)
    dense.load_state_dict(pruned.state_dict())
    return dense


@pytest.mark.parametrize(
    "store", [pickle.dumps, lambda model: torch.save(model, io.BytesIO())], ids=["pickle", "torch.save"]
)
def test_a_pruned_model_is_not_pickled_and_says_what_to_do(warm: LlamaForCausalLM, store: Callable[[Any], Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"can't be pickled.*save_pretrained.*history.save\(folder\)"):
        store(warm)


def test_more_tokens_than_learned_positions_are_refused() -> None:
    """Of 64; a cache counts. Families that compute positions go on as their dense models do."""
    pruned = ppgraph.transform(Family("gpt2").model("sdpa"), **OPTIONS)
    ids = batch(2, 65)["input_ids"]
    with pytest.raises(InputError, match="65 tokens are longer than the model's context: it has learned 64 positions"):
        pruned(ids, use_cache=False)
    cache = cache_in(pruned(ids[:, :60], use_cache=True))
    with pytest.raises(InputError, match="65 tokens are longer"):
        pruned(ids[:, 60:], **cached(cache))
    for model_type in ("gpt2", "opt"):
        assert learned_positions(Family(model_type).model("sdpa")) == 64
    assert learned_positions(llama(2)) is None


@pytest.mark.parametrize("off", ["variable", "stance"])
def test_a_model_that_would_run_dense_raises(warm: LlamaForCausalLM, off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch.compile is switched off. By variable and by stance it once ran dense silently."""
    message = "torch.compile switched on and no dispatch mode around it|the model ran dense"
    if off == "variable":
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
        message = "the model ran dense"
    fresh = ppgraph.transform(llama(2), **OPTIONS)
    before = state_of(warm)
    # What was captured before goes on where the variable is set: it is only for later captures that it counts.
    for pruned in (fresh, warm) if off == "stance" else (fresh,):
        stance = torch.compiler.set_stance("force_eager") if off == "stance" else contextlib.nullcontext()
        with stance, pytest.raises(CaptureError, match=message):
            pruned(IDS, use_cache=False)
    assert state_of(warm) == before
    monkeypatch.undo()
    warm(IDS, use_cache=False)


# Files


class Payload:
    """What a pickle may run when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def test_a_pickle_in_a_models_folder_runs_nothing(tmp_path: Path) -> None:
    folder, touched = tmp_path / "model", tmp_path / "touched"
    llama(2).config.save_pretrained(folder)
    torch.save({"weight": Payload(touched)}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot load"):
        load_model(folder)
    assert not touched.exists()


def test_code_in_a_models_folder_is_not_run(tmp_path: Path) -> None:
    folder, touched = tmp_path / "model", tmp_path / "touched"
    llama(2).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(touched)!r}).touch()\n")
    with pytest.raises(InputError, match="cannot load"):
        load_model(folder)
    assert not touched.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": -1},
        {"num_attention_heads": 0},
        {"num_hidden_layers": "many"},
        {"hidden_size": 63},
        {"model_type": "no-such-family"},
    ],
    ids=str,
)
def test_an_absurd_model_config_is_one_clear_error(tmp_path: Path, change: dict[str, Any]) -> None:
    llama(2).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match="cannot load"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ratoi": 0.4}, "no field 'ratoi'; did you mean 'ratio'"),
        ({"ratio": float("nan")}, "ratio must be in"),
        ({"ratio": "0.4"}, "ratio must be a number"),
        ({"skip_layers": 10**30, "ratio": -1}, "ratio must be in"),
        ({"width_multiple": 0}, "at least 1"),
        ({"blocks": ["mlp", "embedding"]}, "found 'embedding'"),
        ({"decode": "../../etc"}, "decode must be one of"),
        ([1], "expected a mapping"),
    ],
    ids=str,
)
def test_absurd_values_of_a_config_file_are_named(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PruneConfig.from_dict(json.loads(json.dumps(values)))


def test_the_history_of_another_model_is_refused_by_name(tmp_path: Path, warm: LlamaForCausalLM) -> None:
    other = ppgraph.transform(llama(2, layers=2), **OPTIONS)
    other(IDS, use_cache=False)
    other.ppgraph.history.save(tmp_path)
    before = state_of(warm)
    with pytest.raises(HistoryError, match=r"belongs to another model or config: model\.layers\.1"):
        warm.ppgraph.history.load(tmp_path)
    assert state_of(warm) == before
