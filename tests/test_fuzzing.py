"""A short profile of the fuzzer, always the same cases; `tests/reliability/fuzz.py` runs thousands of others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, reject, settings

from tests import fuzzing
from tests.fuzzing import Batch, Case, Discarded, cases, check


@pytest.mark.filterwarnings("ignore")  # of families' own code, which differs from family to family
@settings(
    max_examples=3,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],  # a failure prints its case; tests/reliability/fuzz.py shrinks
    suppress_health_check=list(HealthCheck),
)
@given(case=cases(most_batches=3))
def test_random_cases_equal_the_masked_dense_model(case: Case) -> None:
    try:
        check(case)
    except Discarded:
        reject()


CASE = Case("llama", (Batch(3, 9, "left"), Batch(2, 12, "right", 1)), {"skip_layers": 0, "width_multiple": 8})


@pytest.mark.filterwarnings("ignore")
def test_mpt_goes_on_from_a_cache_with_padding_and_its_bias_by_position() -> None:
    """The bias covers the whole context: how many of its columns lie before the tokens is known only when it runs."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
    config = {"method": "full-batch", "ratio": 0.9, "skip_layers": 0, "blocks": ("attention",), "decode": "dense"}
    turns = Batch(samples=4, length=24, padding="holes", seed=431, turns=(3,))
    assert check(Case("mpt", (turns,), config, sizes, attention="eager", cache="dynamic", seed=70)) == 2


@pytest.mark.filterwarnings("ignore")
def test_phi3_of_one_head_turns_all_of_it_and_joins_an_empty_rest() -> None:
    """The rest is a slice of the fused projection without any channels: nothing of it can be said to be narrowed."""
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8, "hidden_size": 8}
    sizes = {**heads, "intermediate_size": 16, "num_hidden_layers": 1}
    config = {"ratio": 0.5, "skip_layers": 0, "rescale_ratio": False, "width_multiple": 8}
    assert check(Case("phi3", (Batch(samples=2, length=4),), config, sizes, mask="none")) == 1


@pytest.mark.filterwarnings("ignore")
def test_gpt_neox_of_two_heads_keeps_all_keys_of_a_chunk_into_a_static_cache() -> None:
    """Its queries, keys and values are views of one product; keys are narrowed elsewhere, but here they stay whole."""
    sizes = {"num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = {"method": "full-batch", "ratio": 0.6, "skip_layers": 0, "width_multiple": 1}
    turns = Batch(samples=2, length=2, turns=(3,))
    assert check(Case("gpt_neox (sequential)", (turns,), config, sizes, mask="none", cache="static")) == 2


@pytest.mark.filterwarnings("ignore")
def test_a_call_of_which_dynamo_captures_not_even_the_dense_model_is_discarded() -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    turns = Batch(samples=2, length=2, turns=(1,))
    with pytest.raises(Discarded, match="PendingUnbackedSymbolNotFound"):
        check(Case("mpt", (turns,), {"ratio": 0.5, "skip_layers": 0}, sizes, attention="eager", cache="static"))


def test_a_case_prints_as_the_program_that_runs_it() -> None:
    assert repr(CASE) == (
        "Case(family='llama', batches=(Batch(samples=3, length=9, padding='left'), "
        "Batch(length=12, padding='right', seed=1)), config={'skip_layers': 0, 'width_multiple': 8})"
    )
    assert eval(repr(CASE), {"Case": Case, "Batch": Batch}) == CASE  # noqa: S307
    assert repr(CASE) in fuzzing.repro(CASE)


@pytest.mark.parametrize("wrong", ["logits", "history", "selection"])
def test_what_is_wrong_is_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge can fail: by a logit, a number of the history, and a choice that differ."""
    judge = fuzzing.Judge(CASE)
    call = fuzzing.Judge._call

    def tampered(self: fuzzing.Judge, model: object, inputs: dict[str, torch.Tensor], cache: object) -> torch.Tensor:
        logits = call(self, model, inputs, cache)
        if model is self.pruned and wrong == "logits":
            logits[-1, -1, 5] += 0.01
        elif model is self.pruned and wrong == "history":
            self.pruned.ppgraph.history["model.layers.0.mlp"][3] *= 1.01
        elif model is self.pruned:
            kept = self.pruned.ppgraph.runtime.selection.channels["model.layers.0.mlp"]
            kept[0] = (kept[0] + 1) % 96
        return logits

    monkeypatch.setattr(fuzzing.Judge, "_call", tampered)
    with pytest.raises(AssertionError, match={"logits": "logits are off", "history": "history of"}.get(wrong)):
        judge.run(CASE.batches[0])


def test_every_field_of_the_config_is_drawn() -> None:
    drawn: set[str] = set()

    @settings(max_examples=100, derandomize=True, database=None, phases=[Phase.generate])
    @given(config=fuzzing.configs(3))
    def draw(config: dict[str, object]) -> None:
        drawn.update(config)

    draw()
    assert drawn >= {field for field in fuzzing.ppgraph.config.field_names() if field != "strict"}
