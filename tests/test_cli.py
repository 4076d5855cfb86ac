"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import ppgraph
from ppgraph.cli import COMMANDS, main
from ppgraph.loading import load_model

SMALL = ["--batch", "2", "--length", "16", "--width-multiple", "8", "--skip-layers", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers with a tokenizer that knows a few words."""
    target = tmp_path_factory.mktemp("model")
    model, _ = load_model("config:llama")
    del model.model.layers[2:]
    model.config.num_hidden_layers = 2
    model.save_pretrained(target)
    words = {word: number for number, word in enumerate(["[UNK]", "a", "graph", "is", "pruned"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))  # noqa: S106
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(target)  # noqa: S106
    return target


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=["ppgraph", *COMMANDS])
def test_help_answers_without_loading_torch(command: list[str]) -> None:
    script = (
        "import runpy, sys\n"
        f"sys.argv = ['ppgraph', *{command!r}, '--help']\n"
        "try: runpy.run_module('ppgraph', run_name='__main__')\n"
        "except SystemExit as end: print('code', end.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "code 0 False", done.stdout + done.stderr
    assert "ppgraph explain " in done.stdout if not command else f"ppgraph {command[0]} " in done.stdout


def test_every_field_of_the_config_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["explain", "--help"])
    shown = capsys.readouterr().out
    for field in ppgraph.PruneConfig().to_dict():
        assert f"--{field.replace('_', '-')}" in shown


def test_explain_prints_a_table_and_talks_on_stderr(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "explain", str(folder), *SMALL)
    assert code == 0
    assert out.startswith("2 of 4 blocks pruned")
    assert "one of the first 1 layers (skip_layers)" in out
    assert "loading" in err


def test_explain_prints_json_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "explain", str(folder), *SMALL, "--json", "--ratio", "0.3", "--blocks", "mlp")
    found: dict[str, Any] = json.loads(out)
    assert found["config"]["ratio"] == 0.3
    assert found["batch"] == [2, 16]
    assert [site["kind"] for site in found["sites"] if site["status"] == "pruned"] == ["mlp"]


def test_calibrate_saves_a_history_that_loads(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a graph is pruned " * 40)
    out = tmp_path / "history"
    code, _, _ = run(capsys, "calibrate", str(folder), *SMALL, "--text", str(text), "--out", str(out))
    assert code == 0
    model, _ = load_model(folder)
    pruned = ppgraph.transform(model, width_multiple=8, skip_layers=1, lowering="eager")
    pruned.ppgraph.history.load(out)
    assert torch.equal(pruned.ppgraph.history.seen[:16], torch.full((16,), 10.0))  # 160 words, 5 batches of 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["explain", "no/such/model"], "no folder or .gguf file 'no/such/model'"),
        (["explain", "config:llama", "--ratio", "2"], "ratio must be in [0, 1), found 2.0"),
        (["explain", "config:llama", "--length", "9999"], "longer than the model's context of 512 tokens"),
        (["calibrate", "config:llama", "--text", "x", "--out", "y"], "config:llama has no tokenizer"),
    ],
)
def test_errors_are_one_line_and_exit_with_1(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (1, "")
    assert said in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("ppgraph: error: ")


def test_a_text_shorter_than_a_batch_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("a graph")
    code, _, err = run(
        capsys, "calibrate", str(folder), *SMALL, "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")
    )
    assert code == 1
    assert "has 2 tokens, one batch needs 2 x 16" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["prune"], ["explain"], ["bench", "config:llama", "--repeats", "0"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: ppgraph" in capsys.readouterr().err
