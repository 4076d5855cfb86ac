"""Models spread over ranks, and replicas: what `tests/ranks.py` checks, run by torchrun over gloo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ppgraph
from tests.test_exactness import llama
from tests.test_families import Family

# Of four heads a rank loses one, of two none.
HEADS = {"num_attention_heads": 16, "head_dim": 8}
MODELS = {
    "llama": Family("llama", {**HEADS, "num_key_value_heads": 8}),
    "mha": Family("llama", {**HEADS, "num_key_value_heads": 16}),
    "qwen3": Family("qwen3", {**HEADS, "num_key_value_heads": 8}),
    "opt": Family("opt", {"num_attention_heads": 16}),
    "phi3": Family("phi3"),
    "olmo2": Family("olmo2"),
    "mixtral": Family("mixtral", {**HEADS, "num_key_value_heads": 8}),
}
ROOT = Path(__file__).parents[1]
# A hang is told from slow machines by this many seconds.
TIMEOUT_S = 900


def run(folder: Path, ranks: int, *checks: str) -> str:
    """Run checks on a number of ranks; the text of what went wrong, empty where nothing did."""
    for name in {part for check in checks for part in check.split(":")[1:2]}:
        MODELS[name].model("sdpa").save_pretrained(folder / name)  # type: ignore[operator]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    program = ["-m", "tests.ranks", str(folder), *checks]
    done = subprocess.run(
        [*torchrun, *program], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    return done.stderr if done.returncode else ""


def test_two_ranks_do_as_one_device_and_the_job_ends_when_one_of_them_dies(tmp_path: Path) -> None:
    checks = ("histories", "averages", "as_the_reference:llama")
    error = run(tmp_path, 2, *checks, "dies:llama")
    fine = {check for check in checks if (tmp_path / f"{check.split(':')[0]}-is-fine").exists()}
    assert fine == set(checks), error
    assert "exitcode  : 3" in error


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["eager", "inductor"])
@pytest.mark.parametrize("family", ["llama", "mha", "qwen3", "opt", "mixtral"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_spread_model_is_the_whole_model_masked(tmp_path: Path, ranks: int, family: str, how: str) -> None:
    assert run(tmp_path, ranks, f"exact:{family}:{how}") == ""


@pytest.mark.thorough
def test_a_spread_model_through_the_backend(tmp_path: Path) -> None:
    assert run(tmp_path, 2, "exact:llama:backend") == ""


@pytest.mark.thorough
@pytest.mark.parametrize("ranks", [2, 4])
def test_small_prompts_go_by_each_ranks_own_history(tmp_path: Path, ranks: int) -> None:
    assert run(tmp_path, ranks, "remembers:llama") == ""


@pytest.mark.thorough
def test_a_history_goes_on_under_another_number_of_ranks(tmp_path: Path) -> None:
    assert run(tmp_path, 2, "starts:llama") == ""
    assert run(tmp_path, 1, "starts:llama", "goes_on:llama:2") == ""
    assert run(tmp_path, 4, "goes_on:llama:1", "goes_on:llama:2") == ""


@pytest.mark.thorough
def test_a_batch_that_one_rank_cannot_count_is_counted_by_none(tmp_path: Path) -> None:
    assert run(tmp_path, 2, "overflows:llama") == ""


@pytest.mark.thorough
def test_four_ranks_do_as_one_device(tmp_path: Path) -> None:
    models = ("llama", "mha", "opt")
    assert run(tmp_path, 4, "histories", "averages", *(f"as_the_reference:{model}" for model in models)) == ""


@pytest.mark.thorough
def test_methods_that_decide_over_all_layers_and_replicas(tmp_path: Path) -> None:
    assert run(tmp_path, 2, "allocated:mha", "replicas:llama") == ""


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("family", "where", "reason"),
    [("phi3", "", "exchanges_channels_between_ranks"), ("olmo2", "self_attn", "exchanges_channels_between_ranks")],
)
def test_plans_that_gather_channels_leave_those_blocks_dense(
    tmp_path: Path, family: str, where: str, reason: str
) -> None:
    assert run(tmp_path, 2, f"refuses:{family}:{where}:{reason}") == ""


def test_pipeline_stages_are_refused() -> None:
    model = llama()
    model._pp_stage = object()  # as `apply_pipeline_parallelism` of transformers leaves it
    with pytest.raises(ppgraph.PPGraphError, match=r"cut into stages of layers \(pp_size\)"):
        ppgraph.transform(model)


def test_a_spread_that_cannot_be_seen_is_refused() -> None:
    model = llama()
    model._tp_size = 2  # as older versions of transformers spread models: by plain tensors
    with pytest.raises(ppgraph.PPGraphError, match="spread over 2 ranks, but no weight is a DTensor"):
        ppgraph.transform(model)
