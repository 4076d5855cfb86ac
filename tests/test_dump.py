"""Graph dumps: the files, the page that shows them, and what tlparse is given."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import ppgraph
from ppgraph import _torch
from ppgraph.loading import load_model

VOID = {"meta", "input", "br", "link"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-quic"]  # fmt: skip


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dump of one prefill and of the calibration before it."""
    root = tmp_path_factory.mktemp("dump")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PPGRAPH_DUMP", str(root))
        model, _ = load_model("config:llama")
        del model.model.layers[2:]
        pruned = ppgraph.transform(model, lowering="eager", width_multiple=8, skip_layers=1)
        ids = torch.randint(500, (3, 16))
        ppgraph.calibrate(pruned, [ids], progress=False)
        pruned(ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return root


def page_data(path: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])  # type: ignore[no-any-return]


def test_each_graph_has_a_folder_with_one_file_a_stage_that_changed_it(dumped: Path) -> None:
    assert sorted(path.name for path in dumped.iterdir()) == ["01-calibrate", "02-prefill", "index.html"]
    assert sorted(path.name for path in (dumped / "02-prefill").glob("*.py")) == [
        "00_captured.py",
        "02_insert_probe.py",
        "03_insert_score.py",
        "04_select_weights.py",
        "07_reuse_probe.py",
        "08_update_history.py",
        "09_attach_results.py",
    ]
    assert sorted(path.name for path in (dumped / "01-calibrate").glob("*.py"))[1] == "02_observe_channels.py"
    overview = (dumped / "index.html").read_text()
    assert 'href="01-calibrate/index.html"' in overview
    assert 'href="02-prefill/index.html"' in overview


def test_files_are_python_with_shapes_source_lines_and_authors(dumped: Path) -> None:
    captured = (dumped / "02-prefill" / "00_captured.py").read_text()
    compile(captured, "00_captured.py", "exec")
    assert 'linear: "f32[B, S, 64]"' in captured
    assert "model_layers_0_self_attn_q_proj_weight" in captured
    assert "modeling_llama.py:" in captured
    assert "inserted by" not in captured
    probed = (dumped / "02-prefill" / "02_insert_probe.py").read_text()
    compile(probed, "02_insert_probe.py", "exec")
    inserted = [line for line in probed.splitlines() if line.endswith("# inserted by insert_probe")]
    data = page_data(dumped / "02-prefill" / "index.html")
    assert len(inserted) == data["stages"][2]["added"]
    assert not any(line in captured for line in inserted)


class Checker(HTMLParser):
    """Fails where tags don't nest; collects what a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag, f"</{tag}> at {self.getpos()}"


def test_page_is_well_formed_and_loads_nothing(dumped: Path) -> None:
    pages = list(dumped.rglob("*.html"))
    assert len(pages) == 3
    for path in pages:
        checker = Checker()
        checker.feed(path.read_text())
        assert checker.open_tags == [], path
        assert not any("//" in reference for reference in checker.references), path


def test_page_data_tells_the_history_of_every_node(dumped: Path) -> None:
    data = page_data(dumped / "02-prefill" / "index.html")
    nodes, stages = data["nodes"], data["stages"]
    assert [stage["name"] for stage in stages][:3] == ["captured", "find_sites", "insert_probe"]
    for number, stage in enumerate(stages):
        alive = {node for node, item in enumerate(nodes) if item["born"] <= number < (item["died"] or 99)}
        assert set(stage["order"]) == alive
    assert not any("= None" in code or "inserted by" in code for node in nodes for _, code in node["code"])
    gone = [node for node in nodes if node["died"] is not None and node["author"] is None]
    assert {stages[node["died"]]["name"] for node in gone} == {"select_weights", "reuse_probe", "attach_results"}
    assert {node["layer"] for node in nodes} == {None, 0, 1}
    by_author = {stages[node["author"]]["name"] for node in nodes if node["author"] is not None}
    assert by_author == {"insert_probe", "insert_score", "select_weights", "reuse_probe", "update_history"}


def test_refusals_reach_the_page_with_their_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPGRAPH_DUMP", str(tmp_path))
    model, _ = load_model("config:mixtral")
    del model.model.layers[2:]
    ppgraph.explain(model, input_ids=torch.randint(500, (2, 16)), skip_layers=0, width_multiple=8)
    data = page_data(tmp_path / "01-explain" / "index.html")
    refused = [site for site in data["sites"] if site["refused"]]
    assert [site["kind"] for site in refused] == ["mlp", "mlp"]
    names = {node["name"] for node in data["nodes"]}
    assert all(site["reason"].split(" (")[0] in names for site in refused)
    assert len(data["stages"][1]["refused"]) == 2


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PPGRAPH_DUMP", str(tmp_path / "file"))
    model, _ = load_model("config:llama")
    del model.model.layers[1:]
    with pytest.raises(ppgraph.PPGraphError, match=r"cannot write graph dumps to .*file"):
        ppgraph.explain(model, input_ids=torch.randint(500, (2, 16)), skip_layers=0)


def test_tlparse_is_given_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, str] = {}

    def record(kind: str, metadata_fn: Any, payload_fn: Any) -> None:
        given[metadata_fn()["name"]] = payload_fn()

    monkeypatch.setattr(_torch, "trace_structured", record)
    model, _ = load_model("config:llama")
    del model.model.layers[1:]
    ppgraph.explain(model, input_ids=torch.randint(500, (2, 16)), skip_layers=0, width_multiple=8)
    assert "ppgraph_explain_insert_probe" in given
    assert "# inserted by insert_probe" in given["ppgraph_explain_insert_probe"]


def test_torch_still_traces_structured_artifacts(tmp_path: Path) -> None:
    """Canary of `_torch.trace_artifact`: what is handed over arrives in the log that tlparse reads."""
    script = "from ppgraph import _torch; _torch.trace_artifact('ppgraph_canary', lambda: 'a text')"
    env = {"TORCH_TRACE": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "ppgraph_canary" in written
    assert "a text" in written


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package chromium)")
@pytest.mark.parametrize(
    ("fragment", "expected"),
    [
        ("", ["insert probe", "keeps 2 of 8 heads", 'class="node probe', 'class="node gone strong']),
        ("#layer=0", ["one of the first 1 layers (skip_layers)", 'class="node model']),
        ("#view=code", ['class="plus', 'class="minus', "# inserted by insert_score"]),
    ],
    ids=["graph", "dense-layer", "code"],
)
def test_page_draws_itself_in_a_browser(dumped: Path, tmp_path: Path, fragment: str, expected: list[str]) -> None:
    page = (dumped / "02-prefill" / "index.html").as_uri() + fragment
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path}", "--enable-logging=stderr", "--dump-dom", page]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    assert 'data-ready="1"' in done.stdout
    for text in expected:
        assert text in done.stdout
