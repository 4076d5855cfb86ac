"""`dense_tokens`: which tokens keep all channels, and where they can not. `test_exactness` judges results."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ppgraph
from ppgraph import _torch
from ppgraph.errors import ConfigError
from ppgraph.passes import PRUNE
from ppgraph.passes.dense_tokens import predicted_errors
from ppgraph.passes.insert_score import InsertScore
from tests.passes.graphs import HIDDEN, SITE, SMALL, ByPosition, Flattened, Mlp, Residual, captured, hidden
from tests.test_exactness import SIZES, batch, llama

SOME = SMALL.replace(probe_choice="spread", statistics="probe", dense_tokens=0.5)


def test_errors_whose_logarithm_is_linear_are_ranked_from_a_few_tokens() -> None:
    numbers = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 3, generator=numbers)
    errors = (inputs @ torch.tensor([1.0, -2.0, 0.5])).exp()
    real = torch.arange(20) < 18
    wrong = torch.where(real, errors[:20], 1e6)  # padding has no say
    predicted = predicted_errors(inputs[:20], wrong, real, inputs)
    assert torch.equal(predicted.argsort(), errors.argsort())


def test_equal_errors_and_no_tokens_predict_nothing() -> None:
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(predicted_errors(inputs[:3], torch.ones(3), None, inputs), torch.zeros(5))
    nobody = torch.zeros(3, dtype=torch.bool)
    assert torch.equal(predicted_errors(inputs[:3], torch.ones(3), nobody, inputs), torch.zeros(5))


@pytest.mark.parametrize("block", [Mlp(), Flattened()], ids=["mlp", "flattened"])
def test_half_of_the_tokens_run_on_all_channels_and_the_others_on_fewer(block: nn.Module) -> None:
    graph = captured(Residual(block), config=SOME.replace(ratio=0.25))
    program = graph.apply(*PRUNE)
    assert program.results["others", SITE].meta["val"].shape == (6,), "12 channels, 9 kept: half keep all, half 6"
    assert program.results[SITE].meta["val"].shape == (9,)
    widths = {node.meta["val"].shape[-1] for node in graph.calls.values() if "linear" in node.name}
    assert widths == {6, 12, HIDDEN}


class Product(Mlp):
    """The exit's weight is read transposed by a plain product of flattened tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = torch.relu(self.up(x)).reshape(-1, 12)
        return torch.mm(inner, self.down.weight.t()).view(x.shape)


class Stored(Mlp):
    """The exit's weight is stored in x out, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Parameter(torch.empty(12, HIDDEN))
        del self.down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(torch.ones(HIDDEN), torch.relu(self.up(x)).reshape(-1, 12), self.out).view(x.shape)


@pytest.mark.parametrize("block", [Mlp(bias=True), Product(), Stored()], ids=["linear", "mm", "addmm"])
def test_tokens_keep_all_channels_or_those_of_the_others_however_the_weight_lies(block: nn.Module) -> None:
    graph = captured(Residual(block), config=SOME.replace(ratio=0.25, dense_tokens=0.25))
    program = graph.apply(*PRUNE)
    x = hidden(4, 6)
    state = [torch.arange(1.0, 13) if item.constant is None else item.constant for item in program.state_inputs]
    found = graph.results(x, state=state)
    others, rows = found["others", SITE], found["dense", SITE]
    assert (len(others), len(rows)) == (HIDDEN, 6), "as many channels as the exit has outputs"
    kept = torch.zeros(12).index_fill(0, others, 1.0).repeat(24, 1)
    kept[rows] = 1
    masked = torch.relu(block.up(x)) * kept.view(4, 6, 12)
    expected = masked @ block.out + 1 if isinstance(block, Stored) else block.down(masked)
    torch.testing.assert_close(graph.output(x, state=state), x + expected)


def test_a_block_that_does_not_act_on_rows_alone_keeps_the_same_channels_for_all_tokens() -> None:
    graph = captured(Residual(ByPosition()), config=SOME)
    graph.apply(*PRUNE[:2])
    outcome = InsertScore()(graph.program)
    assert ("others", SITE) not in graph.program.results
    (refusal,) = outcome.refused
    assert refusal.startswith(f"{SITE} keeps the same channels for all tokens: ")
    assert "broadcasts over a part of" in refusal


def test_a_compensation_with_a_constant_is_refused() -> None:
    config = {"probe_choice": "spread", "dense_tokens": 0.3, "observed": "fluctuation", "compensation": "mean"}
    pruned = ppgraph.transform(llama(2), lowering="eager", **config, **SIZES)
    ppgraph.calibrate(pruned, [batch(4, 12)], progress=False)
    with pytest.raises(ConfigError, match=r"dense_tokens=0.3 with compensation='mean', which adds a constant"):
        pruned(**batch(4, 12), use_cache=False)


def test_which_tokens_a_prompt_kept_whole_is_known_after_a_step_of_decoding() -> None:
    pruned = ppgraph.transform(llama(2), lowering="eager", config=SOME.replace(ratio=0.25, width_multiple=8))
    first = pruned(**batch(3, 8), use_cache=True)
    ((name, (tokens, others)),) = pruned.ppgraph.dense_tokens().items()
    assert tokens.shape == (3, 8)
    assert int(tokens.sum()) == 12
    pruned(input_ids=torch.full((3, 1), 7), past_key_values=first.past_key_values)
    again, kept = pruned.ppgraph.dense_tokens()[name]
    assert torch.equal(again, tokens)
    assert torch.equal(kept, others)


def test_of_a_batch_of_known_size_all_tokens_may_be_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch, "lower_with_inductor", lambda module, options: module)
    torch._dynamo.reset()
    model = llama(2)
    options = {"ratio": 0.1, "probe_choice": "spread", "dense_tokens": 0.8, "statistics": "probe", "blocks": ["mlp"]}
    compiled = torch.compile(model, backend="ppgraph", dynamic=False, options=SIZES | options | {"width_multiple": 1})
    inputs = batch(2, 2)
    with torch.no_grad():
        found, expected = (run(**inputs, use_cache=False).logits for run in (compiled, model))
    torch.testing.assert_close(found, expected)
