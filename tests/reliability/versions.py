"""Versions: the tests that tell most, with each torch and transformers, in an environment of its own.

    python -m tests.reliability.versions --torch 2.11.0 2.13.0 newest --transformers 5.17.0 newest

Environments are made with pip, by whatever index it is set up for, below `--folder`; those that are there are used
again. Canaries that fail name the private parts of torch that changed. An environment that pip can't make is listed so.
Started again, it goes on where it stopped: pairs that the result has for this commit are not run again.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.reliability import record

TESTS = (
    "tests/test_torch_canaries.py",
    "tests/test_exactness.py",
    "tests/test_cache.py",
    "tests/test_generate.py",
    "tests/test_state.py",
    "tests/test_fuzzing.py",
    "tests/test_threads.py",
)
NEWEST = "newest"
PACKAGES = ("torch", "transformers")


def requirement(package: str, version: str) -> str:
    """What pip is asked for."""
    return package if version == NEWEST else f"{package}=={version}"


def environment(folder: Path, torch: str, transformers: str) -> tuple[Path, str]:
    """The interpreter of an environment, and why it could not be made (empty where it could)."""
    home = folder / f"torch-{torch}-transformers-{transformers}"
    python = home / "bin" / "python"
    if (home / ".ready").exists():
        return python, installed_here(python)
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    wanted = [requirement("torch", torch), requirement("transformers", transformers)]
    others = ["setuptools", "safetensors", "tabulate", "tqdm", "hypothesis", "pytest", "accelerate", "gguf"]
    install = [str(python), "-m", "pip", "install", "--quiet", "--retries=1", *wanted, *others]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        return python, last_line(done.stderr)
    (home / ".ready").touch()
    return python, installed_here(python)


def installed_here(python: Path) -> str:
    """Install this work tree as it is, for its entry points; why that failed, or nothing."""
    options = ["--quiet", "--retries=1", "--no-deps", "--editable"]
    install = [str(python), "-m", "pip", "install", *options, str(record.ROOT)]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    return last_line(done.stderr) if done.returncode else ""


def last_line(text: str) -> str:
    """What a program said at its end."""
    return (text.strip().splitlines() or ["nothing was said"])[-1].strip("= ")


def installed(python: Path, package: str) -> str:
    """The version that pip chose."""
    program = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([str(python), "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def run_tests(python: Path, minutes: float) -> dict[str, Any]:
    """What pytest found: counts, and the names of the tests that failed."""
    settings = {**os.environ, "PYTHONPATH": str(record.ROOT), "OMP_NUM_THREADS": "1"}
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "-rfE", *TESTS]
    try:
        done = subprocess.run(
            command, cwd=record.ROOT, env=settings, capture_output=True, text=True, check=False, timeout=60 * minutes
        )
    except subprocess.TimeoutExpired:
        return {"found": f"no end after {minutes:g} minutes"}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return {"found": re.sub(r" in [\d.]+s.*", "", last_line(done.stdout)), "failed": failed}


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown, for docs/reliability.md."""
    lines = ["| torch | transformers | tests | what failed |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {row['torch']} | {row['transformers']} | {row['found']} | {', '.join(row.get('failed', [])) or '-'} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """One row for each pair; the table is printed at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--torch", nargs="+", default=["2.11.0", "2.13.0", NEWEST])
    parser.add_argument("--transformers", nargs="+", default=["5.17.0", NEWEST])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "ppgraph-versions"))
    parser.add_argument("--minutes", type=float, default=60, help="the most for one environment's tests")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    commit = record.versions()["commit"]
    rows = [row for row in record.read("versions").get("rows", []) if row["commit"] == commit]
    for asked in itertools.product(options.torch, options.transformers):
        if any(row["asked"] == [*asked] for row in rows):
            continue
        python, problem = environment(options.folder, *asked)
        if problem:
            found = {**dict(zip(PACKAGES, asked, strict=True)), "found": f"no environment: {problem}"}
        else:
            found = {package: installed(python, package) for package in PACKAGES} | run_tests(python, options.minutes)
        rows.append({"asked": [*asked], "commit": commit, **found})
        record.write("versions", {"program": "tests/reliability/versions.py", "rows": rows})
        print(rows[-1], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
