"""The history: growth, files, and what may and may not be loaded."""

from __future__ import annotations

import copy
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ppgraph
from ppgraph import state
from ppgraph.config import PruneConfig
from ppgraph.errors import HistoryError, PPGraphError
from ppgraph.passes import Site
from ppgraph.state import GROWTH, INDEX, History
from tests.test_exactness import SIZES, batch, llama

WIDTHS = {"layers.3.mlp": 6, "layers.3.self_attn": 4}
CPU = torch.device("cpu")


def sites(widths: dict[str, int]) -> list[Site]:
    return [Site(name, "mlp", 3, width=width, units=width, kept=width // 2) for name, width in widths.items()]


def history(positions: int = 0, widths: dict[str, int] = WIDTHS, seed: int = 0) -> History:
    made = History(PruneConfig())
    made.declare(sites(widths), CPU)
    made.reserve(positions)
    fill(made, seed)
    return made


def fill(held: History, seed: int) -> None:
    numbers = torch.Generator().manual_seed(seed)
    for name in held:
        held[name].copy_(torch.rand(held[name].shape, generator=numbers))
    held.seen.copy_(torch.randint(0, 9, held.seen.shape, generator=numbers))


def contents(held: History) -> dict[str, torch.Tensor]:
    return {name: held[name].clone() for name in held} | {"seen": held.seen.clone()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_factors_of_replicas_are_no_mean() -> None:
    with pytest.raises(HistoryError, match=r"'low-rank' holds factors .* cannot be averaged; calibrate one replica"):
        History(PruneConfig(method="spread")).average()


# Growth


def test_it_grows_by_whole_steps_and_keeps_what_it_has() -> None:
    held = history(5)
    assert held.positions == GROWTH
    before = contents(held)
    held.reserve(GROWTH)
    assert same(contents(held), before)
    held.reserve(GROWTH + 1)
    assert held.positions == 2 * GROWTH
    for name in held:
        assert torch.equal(held[name][:GROWTH], before[name])
        assert not held[name][GROWTH:].any()


def test_memory_follows_the_longest_batch_and_not_the_context() -> None:
    model = llama(4)
    assert model.config.max_position_embeddings == 2048
    pruned = ppgraph.transform(model, ratio=0.4, lowering="eager", **SIZES)
    assert pruned.ppgraph.history.nbytes == 0
    pruned(**batch(3, 16), use_cache=False)
    channels = sum(site.width for site in pruned.ppgraph.sites if site.status == "pruned")
    assert pruned.ppgraph.history.nbytes == 4 * GROWTH * (channels + 1)
    pruned(**batch(3, 140), use_cache=False)
    assert pruned.ppgraph.history.nbytes == 2 * 4 * GROWTH * (channels + 1)
    pruned(**batch(3, 16), use_cache=False)
    assert pruned.ppgraph.history.positions == 2 * GROWTH


def test_rows_are_a_view_that_graphs_write_through() -> None:
    held = history(5)
    rows = held.rows("layers.3.mlp", 2, 3)
    assert rows.shape == (3, 6)
    rows.fill_(7)
    assert held["layers.3.mlp"][2:5].eq(7).all()


def test_a_site_cannot_change_its_width() -> None:
    held = history(5)
    with pytest.raises(HistoryError, match=r"layers.3.mlp has 8 channels, but the history holds 6 for it"):
        held.declare(sites({"layers.3.mlp": 8}), CPU)


def test_reset_forgets_values_and_frees_memory_but_knows_its_sites() -> None:
    held = history(5)
    held.reset()
    assert (held.positions, held.nbytes) == (0, 0)
    assert held.keys() == list(WIDTHS)
    held.reserve(3)
    assert not any(held[name].any() for name in held)
    assert not held.seen.any()


def test_a_deep_copy_is_independent() -> None:
    held = history(5)
    copied = copy.deepcopy(held)
    fill(copied, 1)
    assert not same(contents(held), contents(copied))


def test_a_history_can_be_sent_to_another_process() -> None:
    held = history(5)
    assert same(contents(pickle.loads(pickle.dumps(held))), contents(held))  # noqa: S301


def test_it_is_fp32_and_no_part_of_the_state_dict() -> None:
    model = llama(4).to(torch.bfloat16)
    keys = list(model.state_dict())
    pruned = ppgraph.transform(model, ratio=0.4, lowering="eager", **SIZES)
    pruned(**batch(3, 16), use_cache=False)
    held = pruned.ppgraph.history
    assert {tensor.dtype for tensor in contents(held).values()} == {torch.float32}
    assert list(pruned.state_dict()) == keys
    assert not {"ppgraph", "history"} & {name for name, _ in pruned.named_buffers()}


def test_all_graphs_of_a_model_write_one_history() -> None:
    pruned = ppgraph.transform(llama(4), ratio=0.4, lowering="eager", history_momentum=0.5, **SIZES)
    name = "model.layers.0.mlp"
    ppgraph.calibrate(pruned, [batch(3, 8)], progress=False)
    calibrated = pruned.ppgraph.history[name].clone()
    assert calibrated[:8].any()
    pruned(**batch(3, 8), use_cache=False)
    after_prefill = pruned.ppgraph.history[name].clone()
    assert not torch.equal(after_prefill, calibrated)
    pruned.to(torch.bfloat16)  # other dtypes have graphs of their own
    pruned(**batch(3, 8), use_cache=False)
    assert len(pruned.ppgraph.graphs) == 3
    assert not torch.equal(pruned.ppgraph.history[name], after_prefill)


# Files


@pytest.mark.parametrize("positions", [0, 5, GROWTH + 1])
def test_what_is_saved_comes_back(tmp_path: Path, positions: int) -> None:
    held = history(positions)
    held.save(tmp_path / "a" / "b")
    other = history(3, seed=1)
    other.load(tmp_path / "a" / "b")
    assert same(contents(other), contents(held))
    assert other.positions == held.positions
    assert not list(tmp_path.rglob("*.pt")) + list(tmp_path.rglob("*.pkl"))


def test_the_files_are_json_and_safetensors_and_old_data_goes(tmp_path: Path) -> None:
    held = history(5)
    for seed in (0, 1):
        fill(held, seed)
        held.save(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text(encoding="utf-8"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([INDEX, index["data"]])
    assert index["sites"] == WIDTHS
    assert index["config"] == PruneConfig().to_dict()
    assert same(load_file(tmp_path / index["data"]), contents(held))


def test_other_files_in_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("not mine")
    held = history(5)
    held.save(tmp_path)
    held.save(tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "not mine"


@pytest.mark.parametrize("at", ["save_file", "_digest", "_replace_text"])
def test_an_interrupted_save_leaves_the_old_history_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    held = history(5)
    held.save(tmp_path)
    before, files = contents(held), sorted(tmp_path.iterdir())
    fill(held, 1)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(state, at, interrupt)
        with pytest.raises(KeyboardInterrupt):
            held.save(tmp_path)
    assert sorted(tmp_path.iterdir()) == files
    other = history()
    other.load(tmp_path)
    assert same(other_contents := contents(other), before), other_contents


def test_a_killed_save_leaves_the_old_history_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the process died before its last step: nobody cleans up."""
    held = history(5)
    held.save(tmp_path)
    before = contents(held)
    fill(held, 1)

    def die(*args: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        patch.setattr(Path, "unlink", lambda *args, **kwargs: None)
        with pytest.raises(SystemExit):
            held.save(tmp_path)
    assert len(list(tmp_path.iterdir())) > 2
    other = history()
    other.load(tmp_path)
    assert same(contents(other), before)
    held.save(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = tmp_path / "file"
    taken.write_text("")
    for folder in (taken, taken / "below"):
        with pytest.raises(HistoryError, match=rf"cannot save the history to {folder}.*choose a folder"):
            history(5).save(folder)
    held = history(5)
    held.save(tmp_path / "old")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(state.tempfile, "mkstemp", refuse)
    with pytest.raises(HistoryError, match="Permission denied"):
        held.save(tmp_path / "old")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into read-only folders")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(HistoryError, match="Permission denied"):
        history(5).save(tmp_path)


# What must not be loaded


Damage = Callable[[Path, Path], None]


def edit(**changes: Any) -> Damage:
    """Another index, with a digest that fits."""

    def damage(index: Path, data: Path) -> None:
        changed = json.loads(index.read_text()) | changes
        index.write_text(json.dumps(changed | {"index_sha256": state.index_digest(changed)}))

    return damage


def rewrite(change: Callable[[dict[str, torch.Tensor]], None]) -> Damage:
    """Other tensors, with a digest that fits: a file that was made wrong, rather than one that broke."""

    def damage(index: Path, data: Path) -> None:
        tensors = load_file(data)
        change(tensors)
        save_file(tensors, data)
        edit(sha256=state._digest(data))(index, data)

    return damage


def flip(index: Path, data: Path) -> None:
    content = bytearray(data.read_bytes())
    content[-3] ^= 1
    data.write_bytes(bytes(content))


def outside(index: Path, data: Path) -> None:
    data.rename(index.parent.parent / "elsewhere.safetensors")
    edit(data="../elsewhere.safetensors")(index, data)


NAME = "layers.3.mlp"

DAMAGES: list[tuple[str, Damage, str]] = [
    ("no folder", lambda index, data: index.parent.rename(index.parent.parent / "moved"), "no history at"),
    ("no index", lambda index, data: index.unlink(), f"no history at .*expected {INDEX} there"),
    ("empty index", lambda index, data: index.write_text(""), r"ppgraph.json is damaged"),
    ("cut index", lambda index, data: index.write_text(index.read_text()[:40]), r"is damaged .*save the history again"),
    ("binary index", lambda index, data: index.write_bytes(b"\xff\xfe\x00"), "is damaged"),
    ("a list", lambda index, data: index.write_text("[]"), "expected an object with format, data"),
    ("no data", lambda index, data: data.unlink(), "data is missing: expected"),
    ("cut data", lambda index, data: data.write_bytes(data.read_bytes()[:-5]), "sha256 differs"),
    ("empty file", lambda index, data: data.write_bytes(b""), "sha256 differs"),
    ("one bit", flip, "sha256 differs"),
    (
        "no safetensors",
        lambda index, data: (data.write_bytes(b"x" * 99), edit(sha256=state._digest(data))(index, data)),
        "is damaged",
    ),  # type: ignore[func-returns-value]
    (
        "another width",  # of an allocation or a config, which nothing else tells
        lambda index, data: index.write_text(index.read_text().replace('"width_multiple": 64', '"width_multiple": 65')),
        r"ppgraph.json is damaged: it is not what was saved \(sha256 differs\)",
    ),  # type: ignore[func-returns-value]
    ("later format", edit(format=99), "has format 99, this version of ppgraph reads 1"),
    ("format of a bool", edit(format=True), r"expected format \(int\), found True"),
    ("no sites", edit(sites=None), r"expected sites \(dict\), found None"),
    ("a path", outside, "names data outside of its folder: '../elsewhere.safetensors'"),
    ("the folder", edit(data=".."), r"names data outside of its folder: '..'"),
    ("absolute path", edit(data="/etc/passwd"), "names data outside of its folder"),
    ("other positions", edit(positions=64), rf"expected {NAME} \(64, 6\), found \(128, 6\)"),
    ("one tensor less", rewrite(lambda tensors: tensors.pop(NAME)), f"expected {NAME} .*found None"),  # type: ignore[arg-type,return-value]
    ("one tensor more", rewrite(lambda tensors: tensors.update(x=torch.ones(1))), "expected x None, found"),
    ("NaN", rewrite(lambda tensors: tensors[NAME].fill_(torch.nan)), f"{NAME} is not finite, non-negative float32"),  # type: ignore[arg-type,return-value]
    ("negative", rewrite(lambda tensors: tensors["seen"].fill_(-1)), "seen is not finite, non-negative"),  # type: ignore[arg-type,return-value]
    ("half", rewrite(lambda tensors: tensors.update({NAME: tensors[NAME].half()})), "float32"),
]


@pytest.mark.parametrize(("damage", "message"), [case[1:] for case in DAMAGES], ids=[case[0] for case in DAMAGES])
def test_a_damaged_history_is_refused_and_nothing_changes(tmp_path: Path, damage: Damage, message: str) -> None:
    folder = tmp_path / "saved"
    history(5).save(folder)
    damage(folder / INDEX, next(folder.glob("*.safetensors")))
    mine = history(7, seed=2)
    before = contents(mine)
    with pytest.raises(HistoryError, match=message) as caught:
        mine.load(folder)
    assert isinstance(caught.value, PPGraphError)
    assert same(contents(mine), before)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"layers.3.mlp": 8, "layers.3.self_attn": 4}, "layers.3.mlp has 6 channels there and 8 here"),
        ({"layers.3.mlp": 6}, "layers.3.self_attn has 4 channels there and none here"),
        (WIDTHS | {"layers.4.mlp": 6}, "layers.4.mlp has no channels there and 6 here"),
        ({"h.3.mlp": 6, "h.3.attn": 4}, "h.3.attn has no channels there and 4 here"),
    ],
    ids=["width", "fewer", "more", "names"],
)
def test_the_history_of_another_model_or_config_is_refused(
    tmp_path: Path, widths: dict[str, int], message: str
) -> None:
    history(5).save(tmp_path)
    mine = history(7, widths, seed=2)
    before = contents(mine)
    with pytest.raises(HistoryError, match=f"another model or config: {message}"):
        mine.load(tmp_path)
    assert same(contents(mine), before)


def test_a_model_takes_up_where_another_left_off(tmp_path: Path) -> None:
    model, inputs = llama(2), batch(4, 12)
    first, second = (ppgraph.transform(model, ratio=0.4, lowering="eager", **SIZES) for _ in range(2))
    ppgraph.calibrate(first, [batch(3, 9)], progress=False)
    first.ppgraph.history.save(tmp_path)
    second.ppgraph.history.load(tmp_path)  # before its first call
    expected = first(**inputs, use_cache=False).logits
    assert torch.equal(second(**inputs, use_cache=False).logits, expected)
    assert same(contents(second.ppgraph.history), contents(first.ppgraph.history))


def test_a_config_with_other_sites_is_refused(tmp_path: Path) -> None:
    model = llama(2, layers=2)
    ppgraph.transform(model, ratio=0.4, lowering="eager", **SIZES).ppgraph.history.save(tmp_path)
    for change in ({"blocks": ("mlp",)}, {"skip_layers": 1}):
        other = ppgraph.transform(model, ratio=0.4, lowering="eager", **(SIZES | change))
        with pytest.raises(HistoryError, match="another model or config"):
            other.ppgraph.history.load(tmp_path)
