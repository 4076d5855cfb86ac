"""What all tests share."""

from __future__ import annotations

import gc
import logging

import pytest
import torch
import torch._dynamo.guards

from ppgraph import _torch, kernels, runtime
from ppgraph.replay import Replayed
from tests.test_replay import Recorder

# The models of tests are tiny: what takes time is capturing graphs, in Python. One thread each for several workers.
torch.set_num_threads(1)
# Capturing makes millions of objects: collecting garbage as often as Python does by default takes a tenth of the time.
gc.set_threshold(100_000, 20, 100)
# And their attention has so few scores that torch's kernel would do all of it.
kernels.FEW_SCORES = 0
# Dynamo collects garbage after each of its compilations, and measures how long its guards take once it has emptied the
# processor's caches for that.
torch._dynamo.config.run_gc_after_compile = False
torch._dynamo.guards.profile_guard_manager = lambda *args: 0.0
# pytest 9.2 adds its handlers to loggers that do not propagate, to torch's structured trace among them. While anything
# handles that, torch and ppgraph write every graph out at every stage, which takes a fifth of the time.
logging.getLogger("torch.__trace").addHandler = lambda handler: None


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ppgraph")
    group.addoption("--thorough", action="store_true", help="all families whole, four ranks, real weights: takes hours")
    group.addoption("--write-families", action="store_true", help="write what the tests find to the tables of families")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """What records in the place of CUDA graphs; nothing is compiled."""
    made = Recorder()
    monkeypatch.setattr(_torch, "wants_cuda_graphs", lambda options, device: True)
    monkeypatch.setattr(_torch, "lower_with_inductor", lambda module, options: module)
    monkeypatch.setattr(runtime, "Replayed", lambda step, written: Replayed(step, written, made))
    return made


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests marked `gpu` where there is no CUDA, and `thorough` where those are not asked for."""
    wanted = {"gpu": torch.cuda.is_available(), "thorough": config.getoption("--thorough")}
    unwanted = [mark for mark, is_wanted in wanted.items() if not is_wanted]
    left_out = [item for item in items if any(item.get_closest_marker(mark) for mark in unwanted)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
