"""Every Python block of README.md and docs/ runs, on a small model; links lead somewhere; the reference is current."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import ppgraph
from ppgraph import loading, runtime
from ppgraph.loading import load_model

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[int, str]]:
    """The Python blocks of a page, each with its first line's number."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in BLOCK.finditer(text)]


def model_of(layers: int) -> Any:
    model, _ = load_model("config:llama")
    del model.model.layers[layers:]
    model.config.num_hidden_layers = layers
    return model


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are rewritten and run, but Inductor is left out; of two layers the first stays dense."""
    monkeypatch.setattr(runtime, "lower", lambda program, options: program.module)
    monkeypatch.setitem(loading._SMALL_SIZES, "num_hidden_layers", 2)
    defaults = {field.name: field.default for field in dataclasses.fields(ppgraph.PruneConfig)}
    shallow = tuple({**defaults, "skip_layers": 1}.values())
    monkeypatch.setattr(ppgraph.PruneConfig.__init__, "__defaults__", shallow)


@pytest.fixture
def names() -> Iterator[dict[str, Any]]:
    """What pages may use without making it themselves."""
    ids = torch.randint(500, (4, 16))
    yield {
        "model": model_of(2),
        "shallow_model": model_of(1),
        "input_ids": ids,
        "mask": torch.ones_like(ids),
        "inputs": {"input_ids": ids[:2]},
        "batches": [ids, ids[:2]],
    }
    torch._dynamo.reset()


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_python_blocks_run(page: Path, names: dict[str, Any]) -> None:
    for line, source in blocks(page):
        code = compile("\n" * line + source, str(page), "exec")  # a failure shows the page's own line
        exec(code, names)  # noqa: S102


@pytest.mark.usefixtures("uncompiled")
def test_notebook_runs() -> None:
    notebook = json.loads((ROOT / "examples" / "inspect.ipynb").read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)  # noqa: S102
    assert names["report"].selections[0].batches == 4
    torch._dynamo.reset()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_is_current() -> None:
    made = load_script(ROOT / "docs" / "make_reference.py").reference()
    assert (ROOT / "docs" / "reference.md").read_text(encoding="utf-8") == made, "run: python docs/make_reference.py"
    for name in ppgraph.__all__:
        assert name in made
