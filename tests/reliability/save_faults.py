"""Save faults: a save that is killed, runs out of disk or may not write, and files that were cut or changed.

    python -m tests.reliability.save_faults --kills 100 --seed 0

A folder holds history number n while number n + 1 is saved over it. Whatever happens, what loads afterwards must be one
of the two, whole; damaged files must raise HistoryError and leave what was loaded before. Processes are forked and
killed (SIGKILL): at random moments, and at each line of `ppgraph/state.py` that a save runs. POSIX only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ppgraph import state
from ppgraph.config import PruneConfig
from ppgraph.errors import HistoryError
from ppgraph.passes import Site
from ppgraph.state import INDEX, History
from tests.reliability import record

WIDTHS = {"layers.0.mlp": 1000, "layers.0.self_attn": 400, "layers.1.mlp": 1000}
NOBODY = 65534


def history(number: int) -> History:
    """A history in which every number, and the allocation, is `number`."""
    made = History(PruneConfig())
    made.declare([Site(name, "mlp", 0, width=width, units=width, kept=1) for name, width in WIDTHS.items()], CPU)
    made.reserve(1)
    for name in made:
        made[name].fill_(number)
    made.seen.fill_(number)
    made.allocation = {"layers.0.mlp": number}
    return made


CPU = torch.device("cpu")


def number_in(held: History) -> int:
    """Which history this is.

    Raises:
        AssertionError: it is a mixture.
    """
    found = {float(value) for name in held for value in held[name].unique()} | {float(v) for v in held.seen.unique()}
    found |= {float(units) for units in (held.allocation or {}).values()}
    if len(found) != 1:
        raise AssertionError(f"a mixture of histories {sorted(found)}")
    return int(found.pop())


def loaded(folder: Path) -> int:
    """The number of the history in a folder."""
    held = history(0)
    held.load(folder)
    return number_in(held)


def in_child(action: Callable[[], None], *, kill_after: float | None = None) -> int:
    """Run something in a forked process. Returns its wait status."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        except HistoryError:
            code = 3  # refused with a clear error
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def killed_at_random(folder: Path, kills: int, numbers: random.Random) -> Counter[str]:
    """A process saves one history after another until it is killed."""
    found: Counter[str] = Counter()
    history(1).save(folder)
    start = time.perf_counter()
    history(1).save(folder)
    one_save = time.perf_counter() - start
    for _ in range(kills):
        before = loaded(folder)

        def save_on(number: int = before) -> None:
            while True:
                number += 1
                history(number).save(folder)
                (folder / "done").write_text(str(number))

        (folder / "done").write_text(str(before))
        status = in_child(save_on, kill_after=numbers.uniform(0, 3 * one_save))
        if not os.WIFSIGNALED(status):
            raise AssertionError("the process was not killed")
        done, after = int((folder / "done").read_text() or -1), loaded(folder)
        if done >= 0 and after not in (done, done + 1):
            raise AssertionError(f"history {after} where {done} was saved and {done + 1} was being saved")
        found["old" if after == done else "new"] += 1
    return found


def killed_at_each_line(folder: Path) -> Counter[str]:
    """A process dies at the first, second, ... line of `state.py` that a save runs."""
    found: Counter[str] = Counter()
    for line in range(1, 10_000):
        history(1).save(folder)

        def save(last: int = line) -> None:
            left = [last]

            def trace(frame: Any, event: str, argument: Any) -> Any:
                if frame.f_code.co_filename != state.__file__:
                    return None
                left[0] -= event == "line"
                if left[0] <= 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return trace

            new = history(2)
            sys.settrace(trace)
            new.save(folder)

        status = in_child(save)
        after = loaded(folder)
        if after not in (1, 2):
            raise AssertionError(f"history {after} after a kill at line {line}")
        if not os.WIFSIGNALED(status):
            if after != 2 or status != 0:
                raise AssertionError(f"a save that was not killed left history {after}, status {status}")
            return found
        found["old" if after == 1 else "new"] += 1
    raise AssertionError("a save has no end")


def disk_full(folder: Path, steps: int) -> Counter[str]:
    """Writes fail once a file has so many bytes (RLIMIT_FSIZE), as on a disk without room."""
    found: Counter[str] = Counter()
    history(1).save(folder)
    size = max(path.stat().st_size for path in folder.iterdir())
    for limit in range(0, size + size // steps + 1, max(size // steps, 1)):
        history(1).save(folder)

        def save(most: int = limit) -> None:
            new = history(2)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            new.save(folder)

        status, after = in_child(save), loaded(folder)
        if (os.WEXITSTATUS(status), after) not in ((3, 1), (0, 2)):
            raise AssertionError(f"history {after}, status {status} where files may have {limit} bytes")
        if len(list(folder.glob("history-*"))) != 1:
            raise AssertionError("a save that failed left its file behind")
        found["refused, old" if after == 1 else "new"] += 1
    return found


def read_only(folder: Path) -> Counter[str]:
    """A folder that this user may read but not write to, and one that is not there and can't be made."""
    history(1).save(folder)
    folder.chmod(0o555)

    def save(target: Path) -> None:
        new = history(2)
        if os.geteuid() == 0:
            os.setuid(NOBODY)
        new.save(target)

    found: Counter[str] = Counter()
    for target in (folder, folder / "below"):
        status = in_child(lambda target=target: save(target))  # type: ignore[misc]
        if os.WEXITSTATUS(status) != 3 or loaded(folder) != 1:
            raise AssertionError(f"saving to read-only {target} ended with status {status}")
        found["refused, old"] += 1
    folder.chmod(0o755)
    return found


def damaged(folder: Path, cases: int, numbers: random.Random) -> Counter[str]:
    """Files cut at random places, and with one bit flipped: refused, and what was loaded before stays."""
    found: Counter[str] = Counter()
    for _ in range(cases):
        history(1).save(folder)
        index = folder / INDEX
        data = folder / json.loads(index.read_text())["data"]
        path, kind = numbers.choice((index, data)), numbers.choice(("cut", "flipped"))
        content = bytearray(path.read_bytes())
        if kind == "cut":
            content = content[: numbers.randrange(len(content))]
        else:
            content[numbers.randrange(len(content))] ^= 1 << numbers.randrange(8)
        path.write_bytes(content)
        held = history(5)
        try:
            held.load(folder)
            found[f"{path.suffix} {kind}: means the same"] += 1
            expected = 1  # white space of JSON
        except HistoryError:
            found[f"{path.suffix} {kind}: refused"] += 1
            expected = 5
        if number_in(held) != expected:
            raise AssertionError(f"{path} {kind}: history {number_in(held)}")
        path.unlink()
    return found


def main() -> None:
    """Run all faults; the first mixture raises."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--damages", type=int, default=1000)
    parser.add_argument("--disk-steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    numbers, start = random.Random(options.seed), time.monotonic()  # noqa: S311
    result: dict[str, Any] = {"program": "tests/reliability/save_faults.py", "seed": options.seed}
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        parts: dict[str, Callable[[Path], Counter[str]]] = {
            "killed at random": lambda folder: killed_at_random(folder, options.kills, numbers),
            "killed at each line": killed_at_each_line,
            "disk full": lambda folder: disk_full(folder, options.disk_steps),
            "read-only": read_only,
            "damaged": lambda folder: damaged(folder, options.damages, numbers),
        }
        for part, run in parts.items():
            folder = Path(name, part.replace(" ", "-"))
            folder.mkdir()
            result[part] = dict(run(folder))
            print(part, result[part], flush=True)
    result["seconds"] = round(time.monotonic() - start)
    record.write("save_faults", result)


if __name__ == "__main__":
    main()
