"""Mutations: a random sample of small changes to the passes; the tests must fail for each.

    pip install cosmic-ray
    python -m tests.reliability.mutation --sample 60

The changes are those of cosmic-ray, made in a copy of the work tree. `|` is left alone: in this code it stands almost
only in annotations, which nothing evaluates. Only the tests named by `--tests` run, so the share that is found is a
lower bound of what `make test` would find. Survivors are printed with their diffs, and stay in the result. Started
again with the same folder, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import WorkerOutcome, WorkResult

from tests.reliability import likely_first, record

TESTS = ("tests/passes", "tests/test_exactness.py", "tests/test_reference.py", "tests/test_cache.py")
CONFIG = """\
[cosmic-ray]
module-path = "passes"
timeout = {timeout}
excluded-modules = []
test-command = "env PYTHONPATH={copy} {original}={root} {python} -m pytest -qx -p no:cacheprovider -p {plugin} {tests}"

[cosmic-ray.distributor]
name = "local"
"""


def copied(folder: Path) -> Path:
    """The tracked files of the work tree, in a folder of their own; over what a run that was killed has left there."""
    copy = folder / "tree"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=record.ROOT, capture_output=True, check=True)  # noqa: S607
    for name in filter(None, files.stdout.decode().split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).unlink(missing_ok=True)
        shutil.copy2(record.ROOT / name, copy / name, follow_symlinks=False)
    return copy


def sampled(session: Path, sample: int, seed: int) -> int:
    """Leave a random sample of the mutations to do. Returns how many there are of those that count."""
    with use_db(str(session), WorkDB.Mode.open) as database:
        items = sorted(database.work_items, key=lambda item: str(item.mutations))
        counted = [item for item in items if "BitOr" not in item.mutations[0].operator_name]
        chosen = {item.job_id for item in random.Random(seed).sample(counted, min(sample, len(counted)))}  # noqa: S311
        left_out = [item.job_id for item in items if item.job_id not in chosen]
        skipped = WorkResult(worker_outcome=WorkerOutcome.SKIPPED)
        database.set_multiple_results(left_out, skipped)
    return len(counted)


def found(session: Path) -> dict[str, Any]:
    """How many of the mutations that ran were killed, and the diffs of the others."""
    with use_db(str(session), WorkDB.Mode.open) as database:
        done = [pair for pair in database.completed_work_items if pair[1].worker_outcome != WorkerOutcome.SKIPPED]
    survivors = [(item.mutations[0].operator_name, result.diff) for item, result in done if not result.is_killed]
    diffs = [{"operator": operator, "diff": diff} for operator, diff in survivors]
    return {"run": len(done), "killed": len(done) - len(survivors), "survivors": diffs}


def main() -> None:
    """Runs until the sample is done; Ctrl-C ends it with what was found so far."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sample", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tests", nargs="+", default=list(TESTS))
    parser.add_argument("--timeout", type=float, default=900, help="seconds for the tests of one mutation")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "ppgraph-mutation"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    copy, config, session = copied(options.folder), options.folder / "config.toml", options.folder / "session.sqlite"
    settings = {"timeout": options.timeout, "copy": copy, "python": sys.executable, "tests": " ".join(options.tests)}
    first = {"original": likely_first.ORIGINAL, "root": record.ROOT, "plugin": likely_first.__name__}
    config.write_text(CONFIG.format(**settings, **first))
    program, start = [sys.executable, "-m", "cosmic_ray.cli"], time.monotonic()
    # Tests that fail without a mutation would kill every one.
    subprocess.run([*program, "baseline", str(config)], cwd=copy, check=True)
    if not session.exists():
        subprocess.run([*program, "init", str(config), str(session)], cwd=copy, check=True)
    mutations = sampled(session, options.sample, options.seed)
    try:
        subprocess.run([*program, "exec", str(config), str(session)], cwd=copy, check=True)
    except KeyboardInterrupt:
        print("interrupted: what was found so far is kept")
    result = {"mutations": mutations, "seed": options.seed, "tests": options.tests, **found(session)}
    result = {"program": "tests/reliability/mutation.py", **result, "seconds": round(time.monotonic() - start)}
    record.write(f"mutation-seed{options.seed}", result)
    for survivor in result["survivors"]:
        print(survivor["diff"])
    print(f"{result['killed']} of {result['run']} killed")


if __name__ == "__main__":
    main()
