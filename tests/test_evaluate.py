"""Quality measured: what a number is taken on, and that an interrupted comparison goes on."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

import ppgraph
from ppgraph import evaluate
from ppgraph.commands import evaluate as command
from ppgraph.errors import InputError
from ppgraph.evaluate import Settings, compare, dense_flops, perplexity, windows
from ppgraph.inspect.timing import WARM_UP_ROUNDS, Timing
from ppgraph.zero_shot import read_task, real_tokens, task_config, zero_shot
from tests.reference import masked_dense_logits
from tests.test_exactness import SIZES, llama


class Letters:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text: str, **options: Any) -> Any:
        return SimpleNamespace(input_ids=torch.tensor([[ord(letter) % 97 for letter in text]]))


TEXT = "The cat sat on the mat, and the dog lay by the door. " * 20
OTHER = "Rain fell; nobody came. " * 40
SETTINGS = Settings(length=16, batch=3, batches=2, calibration_batches=1, lowering="eager")
CONFIGS = {
    "pp 0.4": ppgraph.PruneConfig(ratio=0.4, **SIZES),
    "full-batch 0.4": ppgraph.PruneConfig(ratio=0.4, method="full-batch", **SIZES),
}


@pytest.fixture
def transformed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """As `transform`, with the graphs of a config that was given before, and no history."""
    twins: dict[ppgraph.PruneConfig, Any] = {}

    def transform(model: Any, config: ppgraph.PruneConfig, **options: Any) -> Any:
        if config not in twins:
            twins[config] = ppgraph.transform(model, config, **options)
        twins[config].ppgraph.history.reset()
        return twins[config]

    monkeypatch.setattr(evaluate, "transform", transform)
    return transform


def measured(
    output: Path | None = None,
    settings: Settings = SETTINGS,
    configs: Mapping[str, Any] = CONFIGS,
    *,
    dtype: torch.dtype = torch.float32,
    text: str = TEXT,
    calibration: str = OTHER,
) -> evaluate.Comparison:
    return compare(
        llama(2).to(dtype),
        Letters(),
        configs,
        texts=[text],
        calibration=calibration,
        settings=settings,
        output=output,
        progress=False,
    )


def test_windows_follow_each_other_and_texts_alternate() -> None:
    alone = windows(Letters(), [TEXT], 16)
    assert alone.flatten().tolist() == [ord(letter) % 97 for letter in TEXT[: alone.numel()]]
    mixed = windows(Letters(), [TEXT, OTHER], 16)
    assert torch.equal(mixed[0::2], alone[: len(mixed) // 2])
    assert torch.equal(mixed[1], windows(Letters(), [OTHER], 16)[0])
    shuffled = windows(Letters(), [TEXT], 16, seed=3)
    assert not torch.equal(shuffled, alone)
    assert sorted(shuffled.tolist()) == sorted(alone.tolist())
    with pytest.raises(InputError, match="at least 16 tokens, found 3"):
        windows(Letters(), ["abc"], 16)


def test_perplexity_is_that_of_all_predictions() -> None:
    model, ids = llama(2), windows(Letters(), [TEXT], 16)[:5]
    found = perplexity(model, ids.split(3), progress=False)
    with torch.no_grad():
        logits = model(ids).logits
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert found.tokens == 5 * 15
    assert math.log(found.value) == pytest.approx(float(expected), rel=1e-5)


def test_causal_perplexity_of_the_dense_model_is_that_of_second_halves() -> None:
    model, ids = llama(2), windows(Letters(), [TEXT], 16)[:3]
    with torch.no_grad():
        logits = model(ids).logits
    expected = functional.cross_entropy(logits[:, 7:-1].flatten(0, 1), ids[:, 8:].flatten())
    found = perplexity(model, [ids], causal=True, progress=False)
    assert (found.tokens, math.log(found.value)) == (3 * 8, pytest.approx(float(expected), rel=1e-5))


def test_causal_perplexity_chooses_from_first_halves_alone() -> None:
    model, ids = llama(2), windows(Letters(), [TEXT], 16)[:3]
    pruned = ppgraph.transform(model, ratio=0.4, lowering="eager", **SIZES)
    pruned(input_ids=ids[:, :8], use_cache=True)
    selection = pruned.ppgraph.selection()
    pruned.ppgraph.history.reset()
    found = perplexity(pruned, [ids], causal=True, progress=False)
    logits = masked_dense_logits(model, selection, ids)
    expected = functional.cross_entropy(logits[:, 7:-1].flatten(0, 1), ids[:, 8:].flatten())
    assert math.log(found.value) == pytest.approx(float(expected), rel=1e-5)


def test_a_comparison_measures_all_alike(transformed: Callable[..., Any]) -> None:
    comparison = measured()
    dense, *rows = comparison.rows
    assert [row.name for row in comparison.rows] == ["dense", *CONFIGS]
    assert dense.found["flops"] == dense_flops(llama(2), windows(Letters(), [TEXT], 16)[:3])
    for row, config in zip(rows, CONFIGS.values(), strict=True):
        pruned = transformed(llama(2), config, lowering="eager")
        if config.needs_history:
            ppgraph.calibrate(pruned, [windows(Letters(), [OTHER], 16)[:3]], progress=False)
        batches = windows(Letters(), [TEXT], 16)[:6].split(3)
        assert row.found["perplexity"] == pytest.approx(perplexity(pruned, batches, progress=False).value)
        assert dense.found["flops"] == pruned.ppgraph.report().cost.flops.dense  # so that both count the same products
        saved = row.saved(dense)
        lost = row.found["perplexity"] - dense.found["perplexity"]
        expected = lost / (100 * saved["flops_saved"]) if saved["flops_saved"] > 0 else math.nan  # nothing to divide by
        assert saved["prr_flops"] == pytest.approx(expected, nan_ok=True)
    assert "full-batch 0.4" in str(comparison)
    assert "length 16, batch 3" in str(comparison)


def test_configs_that_observe_the_same_are_calibrated_once(
    transformed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = {
        "pp 0.4": ppgraph.PruneConfig(ratio=0.4, **SIZES),
        "pp 0.3": ppgraph.PruneConfig(ratio=0.3, **SIZES),
        "wanda-sp 0.3": ppgraph.PruneConfig(ratio=0.3, method="wanda-sp", **SIZES),
        "mlp 0.4": ppgraph.PruneConfig(ratio=0.4, blocks=("mlp",), **SIZES),  # fewer sites
        "global 0.4": ppgraph.PruneConfig(ratio=0.4, allocation="global", **SIZES),
        "global 0.3": ppgraph.PruneConfig(ratio=0.3, allocation="global", **SIZES),
    }
    settings = dataclasses.replace(SETTINGS, causal=False)
    calibrated = []

    def counted(twin: Any, batches: Any, **options: Any) -> None:
        calibrated.append(next(name for name, config in configs.items() if config == twin.ppgraph.config))
        ppgraph.calibrate(twin, batches, **options)

    monkeypatch.setattr(evaluate, "calibrate", counted)
    together = measured(None, settings, configs)
    assert calibrated == ["pp 0.4", "mlp 0.4", "global 0.4", "global 0.3"]
    calibrated.clear()
    for name, config in configs.items():
        alone = measured(None, settings, {name: config}).rows[1]
        assert next(row.found for row in together.rows if row.name == name) == alone.found
    assert calibrated == list(configs)


@pytest.mark.usefixtures("transformed")
def test_an_interrupted_comparison_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "results.json"
    configs = {"probe": ppgraph.PruneConfig(ratio=0.4, statistics="probe", **SIZES)}
    calls, stop = [], 4

    def measure(model: Any, batches: Any, *, causal: bool = False, progress: bool = True) -> Any:
        calls.append(causal)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return perplexity(model, batches, causal=causal, progress=progress)

    monkeypatch.setattr(evaluate, "perplexity", measure)
    with pytest.raises(KeyboardInterrupt):
        measured(output, configs=configs)
    interrupted = json.loads(output.read_text())
    assert [sorted(row.keys() & {"perplexity", "causal_perplexity"}) for row in interrupted["rows"]] == [
        ["causal_perplexity", "perplexity"],
        ["perplexity"],
    ]
    calls.clear()
    again = measured(output, configs=configs).to_dict()
    assert calls == [True, False]  # what was left, and a batch for the twin's FLOPs
    assert again == json.loads(output.read_text())
    for row, known in zip(again["rows"], interrupted["rows"], strict=True):
        assert row["perplexity"] == known["perplexity"]


def test_dense_and_all_methods_are_timed_in_turns_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "results.json"
    settings = Settings(16, 3, 2, calibration_batches=1, causal=False, repeats=3, lowering="inductor")
    rounds = []

    def uncompiled(model: Any, config: ppgraph.PruneConfig, **options: Any) -> Any:
        return ppgraph.transform(model, config, lowering="eager")

    def alternate(calls: Mapping[str, Callable[[], Any]], numbers: Any) -> dict[str, Timing]:
        known = [row.keys() for row in json.loads(output.read_text())["rows"]]
        assert all({"perplexity", "flops"} <= row and "time_ms" not in row for row in known)
        _, *twins = calls.values()
        shapes = [call().logits.shape for call in twins]
        rounds.append((shapes, len(list(numbers))))
        return {name: Timing((place, 10.0 + place, 30.0)) for place, name in enumerate(calls)}

    monkeypatch.setattr(evaluate, "transform", uncompiled)
    monkeypatch.setattr(evaluate, "alternate", alternate)
    rows = measured(output, settings).to_dict()["rows"]
    assert rounds == [([(3, 16, 97)] * 2, WARM_UP_ROUNDS), ([(3, 16, 97)] * 2, 3)]
    assert [row.get("time_ms") for row in rows] == [None, 11.0, 12.0]
    assert [row["dense_time_ms"] for row in rows[1:]] == [10.0] * 2
    assert [row["time_spread_ms"] for row in rows[1:]] == [14.5, 14.0]
    assert rows[1]["time_saved"] == pytest.approx(1 - 11 / 10)
    assert measured(output, settings).to_dict()["rows"] == rows == json.loads(output.read_text())["rows"]
    assert len(rounds) == 2


def test_results_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    output.write_text(json.dumps({"settings": {"length": 8}, "rows": []}))
    with pytest.raises(InputError, match=r"holds results of other settings \(.*length.*\); name another file"):
        measured(output)
    output.write_text("no JSON")
    with pytest.raises(InputError, match="holds no results of this command"):
        measured(output)
    assert output.read_text() == "no JSON"


def test_results_of_another_dtype_or_text_are_not_mixed(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    written = measured(output, configs={}).to_dict()
    others: dict[str, Any] = {"dtype": torch.bfloat16, "text": OTHER, "calibration": TEXT}
    for name, other in others.items():
        with pytest.raises(InputError, match=rf"holds results of other settings \({name}\); name another file"):
            measured(output, configs={}, **{name: other})
    assert json.loads(output.read_text()) == written


@pytest.mark.usefixtures("transformed")
def test_other_configs_are_added_to_what_a_file_holds(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    settings = dataclasses.replace(SETTINGS, batches=1, causal=False, calibration_batches=0)
    first, second = ({name: CONFIGS[name]} for name in CONFIGS)
    _, found = measured(output, settings, first).rows
    both = measured(output, settings, second)
    assert [row.name for row in both.rows] == ["dense", *second, *first]
    assert both.rows[2] == found
    assert json.loads(output.read_text()) == both.to_dict()
    with pytest.raises(InputError, match=r"holds results of other configs \(pp 0.4\); name another file"):
        measured(output, settings, {"pp 0.4": CONFIGS["full-batch 0.4"]})
    assert json.loads(output.read_text()) == both.to_dict()


@pytest.mark.parametrize("bad", [{"length": 1}, {"batch": 0}, {"repeats": 2, "lowering": "eager"}])
def test_bad_settings_raise(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Settings(**bad)


def test_too_little_text_raises() -> None:
    with pytest.raises(InputError, match="1000 batches need 3000 windows, but the text has"):
        measured(settings=Settings(length=16, batch=3, batches=1000, lowering="eager"))


def test_the_command_needs_a_tokenizer(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("<doc id=1>\n" + TEXT + "\n</doc>\n")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(["config:llama", "--text", str(text), "--calibration", str(text)])
    with pytest.raises(InputError, match="has no tokenizer to read a text with"):
        command.run(args)
    assert command._read(text) == TEXT + "\n"


def test_rows_that_go_by_the_history_have_a_name_and_a_curve_of_their_own() -> None:
    plain, remembered = (dict(command._configs(["pp"], [0.2, 0.4], below)) for below in (0, 100))
    assert list(plain) == ["pp 0.2", "pp 0.4"]
    assert list(remembered) == ["pp 0.2 history_below=100", "pp 0.4 history_below=100"]
    assert {config.history_below for config in remembered.values()} == {100}
    configs = [config.to_dict() for config in (*plain.values(), *remembered.values())]
    assert [evaluate._variant(config) for config in configs] == ["pp"] * 2 + ["pp history_below=100"] * 2


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is not None, reason="matplotlib is installed")
def test_a_plot_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"pip install 'ppgraph\[plot\]'"):
        evaluate.Comparison({}, [evaluate.Row("dense", None)]).plot(tmp_path / "plot.png")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(["none", "--text", "none", "--calibration", "none", "--plot", str(tmp_path / "plot.png")])
    with pytest.raises(InputError, match=r"pip install 'ppgraph\[plot\]'"):  # before anything is measured
        command.run(args)


def test_padding_of_lm_eval_is_found() -> None:
    ids = torch.tensor([[3, 0, 4, 0, 0], [0, 0, 0, 0, 0], [1, 2, 3, 4, 5]])
    assert real_tokens(ids).tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no questions"),
        ("{", "1 is no JSON"),
        ('{"query": "a"}', r"1 has \['query'\], expected a question with"),
    ],
)
def test_bad_tasks_raise(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_task(path)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_zero_shot_says_what_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text('{"query": "Question: a", "choices": ["b", "c"], "gold": 1}')
    with pytest.raises(InputError, match=r"pip install 'ppgraph\[eval\]'"):
        zero_shot(llama(2), Letters(), [path])


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval, of the extra [eval]")
def test_questions_are_asked_as_lm_eval_asks() -> None:
    from lm_eval.api.task import ConfigurableTask

    asked = [{"query": "Question: a", "choices": ["b", "c"], "gold": 1}]
    task = ConfigurableTask(config=task_config("mine", asked))
    requests = task.construct_requests(asked[0], task.doc_to_text(asked[0]), metadata=("mine", 0, 1))
    assert [request.args for request in requests] == [
        ("Question: a\nAnswer:", " b"),
        ("Question: a\nAnswer:", " c"),
    ]
