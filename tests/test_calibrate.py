"""Calibration: what the history starts from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

import ppgraph
from ppgraph.errors import InputError, NonFiniteError
from ppgraph.state import History
from tests.reference import Reference
from tests.test_exactness import SIZES, batch, contents, llama

MLP = "model.layers.0.mlp"


def pruned_model(**config: Any) -> LlamaForCausalLM:
    return ppgraph.transform(llama(2), **({"ratio": 0.4, "lowering": "eager"} | SIZES | config))


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def require_equal(history: History, reference: Reference) -> None:
    for name, values in reference.history.items():
        torch.testing.assert_close(history[name][: len(values)], values, rtol=1e-4, atol=1e-6)
        assert not history[name][len(values) :].any()
        assert torch.equal(history.seen[: len(values)].long(), reference.calibrated[name])


@pytest.fixture(scope="module")
def shared() -> LlamaForCausalLM:
    """One pruned model for tests that reset its history: graphs are captured once."""
    return pruned_model()


def test_ragged_and_padded_batches_count_by_position(shared: LlamaForCausalLM) -> None:
    shared.ppgraph.history.reset()
    batches = [batch(4, 12, "left"), batch(3, 9, "right"), batch(2, 20)]
    reference = Reference(llama(2), ratio=0.4, **SIZES)
    reference.calibrate(batches)
    ppgraph.calibrate(shared, batches, progress=False)
    require_equal(shared.ppgraph.history, reference)
    assert shared.ppgraph.history.seen[:20].tolist() == reference.calibrated[MLP].tolist()


def test_a_second_call_adds_to_the_first(shared: LlamaForCausalLM) -> None:
    history = shared.ppgraph.history
    batches = [batch(4, 12, "left"), batch(3, 9, "right")]
    history.reset()
    ppgraph.calibrate(shared, batches, progress=False)
    whole = contents(history)
    history.reset()
    for one in batches:
        ppgraph.calibrate(shared, [one], progress=False)
    assert same(contents(history), whole)


def test_batching_does_not_matter(shared: LlamaForCausalLM) -> None:
    history, ids = shared.ppgraph.history, batch(6, 8)["input_ids"]
    found = []
    for parts in (ids.split(6), ids.split([1, 3, 2])):
        history.reset()
        ppgraph.calibrate(shared, list(parts), progress=False)
        found.append(contents(history))
    for name, values in found[0].items():
        torch.testing.assert_close(found[1][name], values, rtol=1e-5, atol=1e-7)


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(2, 9), st.randoms(use_true_random=False)), min_size=1, max_size=3)
)
def test_the_history_is_the_mean_of_a_float64_replay(shapes: list[tuple[int, int, Any]]) -> None:
    """Random batches with random padding on both sides, against one mean over everything, in double precision."""
    pruned = REPLAYED
    history = pruned.ppgraph.history
    history.reset()
    batches = [padded(*shape) for shape in shapes]
    squares, counts = torch.zeros(9, 128, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)
    for one in batches:
        values = exit_input_of_the_mlp(**one)
        for sample, mask in enumerate(one["attention_mask"]):
            columns = mask.nonzero()[:, 0]
            squares[: len(columns)] += values[sample, columns].double().square()
            counts[: len(columns)] += 1
    ppgraph.calibrate(pruned, batches, progress=False)
    expected = squares / counts.clamp(min=1)[:, None]
    torch.testing.assert_close(history[MLP][:9].double(), expected, rtol=1e-4, atol=1e-8)
    assert history.seen[:9].tolist() == counts.tolist()


REPLAYED = pruned_model()
DENSE = llama(2)


def padded(samples: int, length: int, chance: Any) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[chance.randrange(97) for _ in range(length)] for _ in range(samples)])
    mask = torch.zeros_like(ids)
    for row in mask:
        start = chance.randrange(length)
        row[start : chance.randrange(start, length) + 1] = 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def exit_input_of_the_mlp(**inputs: torch.Tensor) -> torch.Tensor:
    found: list[torch.Tensor] = []
    hook = DENSE.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    DENSE(**inputs, use_cache=False)
    hook.remove()
    return found[0]


def test_calibration_is_dense_and_leaves_the_selection(shared: LlamaForCausalLM) -> None:
    shared(**batch(3, 9), use_cache=False)
    before = shared.ppgraph.selection()
    ppgraph.calibrate(shared, [batch(4, 12)], progress=False)
    assert same(shared.ppgraph.selection(), before)
    graphs = len(shared.ppgraph.graphs)
    ppgraph.calibrate(shared, [batch(5, 10)], progress=False)
    assert len(shared.ppgraph.graphs) == graphs, "one graph serves every batch"


def test_any_iterable_is_consumed_one_batch_at_a_time(shared: LlamaForCausalLM) -> None:
    history = shared.ppgraph.history
    history.reset()
    seen: list[float] = []

    def batches() -> Iterator[torch.Tensor]:
        for samples in (2, 3):
            seen.append(float(history.seen[:1].sum()))
            yield batch(samples, 9)["input_ids"]

    ppgraph.calibrate(shared, batches(), progress=False)
    assert seen == [0, 2]
    assert float(history.seen[0]) == 5


def test_progress_goes_to_stderr_and_only_when_wanted(
    shared: LlamaForCausalLM, capsys: pytest.CaptureFixture[str]
) -> None:
    ppgraph.calibrate(shared, [batch(4, 12)] * 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert "calibrating" in err
    assert "2/2" in err
    ppgraph.calibrate(shared, [batch(4, 12)], progress=False)
    assert capsys.readouterr() == ("", "")


# Bad input: a clear error, and the history as it was before it


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "calibration data is empty: expected at least one batch"),
        (iter(()), "calibration data is empty"),
        (None, "expected batches of token ids to calibrate on, found NoneType"),
        ([torch.zeros(1, 2049, dtype=torch.long)], "longer than the model's context: 2049 tokens, at most 2048"),
        ([torch.zeros(2, 0, dtype=torch.long)], r"a batch without tokens: input_ids has shape \[2, 0\]"),
        (["text"], "calibration batch 0: expected token ids or a mapping of inputs, found str"),
        (
            torch.zeros(2, 5, dtype=torch.long),
            r"calibration batch 0: expected input_ids \[samples, tokens\], found \[5\]",
        ),
        ([{"labels": torch.zeros(2, 5)}], r"expected input_ids \[samples, tokens\], found NoneType"),
        ([torch.full((2, 5), 97)], r"token id 97 \(sample 0, token 0\) is outside of the vocabulary of 97"),
        ([{**batch(2, 5), "attention_mask": torch.tensor([[1] * 5, [0] * 5])}], "hides every token of sample 1"),
    ],
)
def test_bad_batches_are_named_and_change_nothing(shared: LlamaForCausalLM, batches: Any, message: str) -> None:
    ppgraph.calibrate(shared, [batch(3, 9)], progress=False)
    before = contents(shared.ppgraph.history)
    with pytest.raises(InputError, match=message):
        ppgraph.calibrate(shared, batches, progress=False)
    assert same(contents(shared.ppgraph.history), before)


def test_a_dense_model_cannot_be_calibrated() -> None:
    with pytest.raises(InputError, match=r"expected a model from ppgraph.transform .* found LlamaForCausalLM"):
        ppgraph.calibrate(llama(2), [batch(2, 5)], progress=False)


def test_what_came_before_a_bad_batch_counts() -> None:
    """NaN is reported with the batch's number and the site's name; the batches before it stay."""
    pruned = pruned_model()
    good = {"inputs_embeds": pruned.get_input_embeddings()(batch(3, 9)["input_ids"]).detach()}
    bad = {"inputs_embeds": good["inputs_embeds"].clone()}
    bad["inputs_embeds"][1, 4, 7] = math.nan
    ppgraph.calibrate(pruned, [good], progress=False)
    pruned(**good, use_cache=False)
    before, selection = contents(pruned.ppgraph.history), pruned.ppgraph.selection()
    message = r"calibration batch 1: this batch gave NaN or infinity at model.layers.0.self_attn \(2 of 2 sites\)"
    with pytest.raises(NonFiniteError, match=message):
        ppgraph.calibrate(pruned, [good, bad], progress=False)
    after = contents(pruned.ppgraph.history)
    assert float(after["seen"][0]) == float(before["seen"][0]) + 3
    with pytest.raises(NonFiniteError, match=r"this batch gave NaN or infinity at model.layers.0.self_attn"):
        pruned(**bad, use_cache=False)
    assert same(contents(pruned.ppgraph.history), after)
    assert same(pruned.ppgraph.selection(), selection)


def test_a_method_without_history_has_nothing_to_calibrate() -> None:
    pruned = pruned_model(method="full-batch")
    ppgraph.calibrate(pruned, [batch(3, 9)], progress=False)
    assert (len(pruned.ppgraph.history), pruned.ppgraph.history.nbytes) == (0, 0)
    assert pruned(**batch(3, 9), use_cache=False).logits.isfinite().all()
