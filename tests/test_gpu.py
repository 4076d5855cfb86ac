"""What Inductor makes of the rewritten graphs on a GPU."""

from __future__ import annotations

import pytest
import torch

import ppgraph
from tests.fuzzing import real_tokens
from tests.reference import masked_dense_logits
from tests.test_exactness import FOUR, SIZES, llama, relative
from tests.test_generate import OPTIONS, model, prompts

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")]


def on_gpu(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.cuda() for name, value in inputs.items()}


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_compiled_batches_equal_the_masked_dense_model(kv_heads: int, dtype: torch.dtype, tolerance: float) -> None:
    dense = llama(kv_heads).cuda().to(dtype)
    pruned = ppgraph.transform(dense, ratio=0.4, **SIZES)
    eager = ppgraph.transform(dense, ratio=0.4, lowering="eager", **SIZES)
    for inputs in map(on_gpu, FOUR):
        logits, expected = pruned(**inputs, use_cache=False).logits, eager(**inputs, use_cache=False).logits
        masked = masked_dense_logits(dense, pruned.ppgraph.selection(), **inputs)
        real = real_tokens(inputs)
        assert relative(logits[real], masked[real]) < tolerance
        if dtype == torch.float32:
            assert relative(logits[real], expected[real]) < tolerance
    if dtype == torch.float32:
        history, wanted = pruned.ppgraph.history, eager.ppgraph.history
        for name in wanted:
            torch.testing.assert_close(history[name], wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_generate_gives_the_tokens_of_the_eager_graphs(cache: str) -> None:
    dense = model(2).cuda()
    inputs = on_gpu(prompts(3, 11, padded=True))
    wanted = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    expected = ppgraph.transform(dense, **OPTIONS).generate(**inputs, **wanted)
    found = ppgraph.transform(dense, **{**OPTIONS, "lowering": "inductor"}).generate(**inputs, **wanted)
    assert torch.equal(found, expected)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[torch.cuda.CUDAGraph]:
    """The CUDA graphs that were replayed."""
    found: list[torch.cuda.CUDAGraph] = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (found.append(graph), replay(graph)))
    return found


def test_steps_are_replayed_as_cuda_graphs(replays: list[torch.cuda.CUDAGraph]) -> None:
    dense = model(2, layers=1).cuda()
    wanted = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
    eager = ppgraph.transform(dense, **OPTIONS)
    pruned = ppgraph.transform(dense, **{**OPTIONS, "lowering": {"triton.cudagraphs": True}})
    for prompt in (prompts(3, 11, padded=True), prompts(3, 11, padded=False)):
        before = len(replays)
        inputs = on_gpu(prompt)
        assert torch.equal(pruned.generate(**inputs, **wanted), eager.generate(**inputs, **wanted))
        assert len(replays) >= before + 10


def test_small_prompts_by_the_history_are_replayed_as_cuda_graphs(replays: list[torch.cuda.CUDAGraph]) -> None:
    dense, inputs = llama(2).cuda(), on_gpu(FOUR[0])
    logits = []
    for lowering in ("eager", {"triton.cudagraphs": True}):
        pruned = ppgraph.transform(dense, ratio=0.4, lowering=lowering, history_below=10_000, **SIZES)
        ppgraph.calibrate(pruned, [on_gpu(FOUR[1])], progress=False)
        logits.append([pruned(**inputs, use_cache=False).logits for _ in range(4)])
    for found, expected in zip(*logits, strict=True):
        assert relative(found, expected) < 1e-5
    assert len(replays) == 3
