"""Results of the long programs: what ran, with which versions, as JSON in `tests/reliability/results/`."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[2]


def versions() -> dict[str, str]:
    """What a result depends on."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)  # noqa: S607
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": found.stdout.strip(),
    }


def read(name: str) -> dict[str, Any]:
    """An earlier result of that name; empty without one."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write(name: str, result: dict[str, Any]) -> Path:
    """Write a result, with the versions it was found with."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"versions": versions(), **result}, indent=2) + "\n")
    return path
