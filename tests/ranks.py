"""What each rank of `tests/test_distributed.py` runs: `torchrun -m tests.ranks FOLDER CHECK[:ARGUMENT...]...`.

Checks are the functions of `CHECKS`; one that fails ends the job, after one that doesn't FOLDER holds a file that says
so. The test has saved models there.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.fx import GraphModule
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

import ppgraph
from ppgraph.errors import NothingToPruneError
from ppgraph.passes import Site
from ppgraph.sharding import Share
from ppgraph.state import History
from tests.reference import Reference, masked, masked_dense_logits

LAYERS = 2
PRUNING: dict[str, Any] = {"ratio": 0.4, "skip_layers": 0, "width_multiple": 8}
# transformers has no plan for OPT, and its attention takes the number of heads from the config.
PLANS: dict[str, dict[str, str]] = {
    "opt": {
        **{f"model.decoder.layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"},
        "model.decoder.layers.*.self_attn.out_proj": "rowwise",
        "model.decoder.layers.*.fc1": "colwise",
        "model.decoder.layers.*.fc2": "rowwise",
    }
}


def spread(folder: Path) -> Any:
    """The saved model over all ranks."""
    plan = PLANS.get(folder.name, "auto")
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan=plan)).eval()
    for module in model.modules():
        if folder.name == "opt" and hasattr(module, "num_heads"):
            module.num_heads //= distributed.get_world_size()
    return model


def whole(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def pruned_by(model: Any, how: str, **changed: Any) -> Any:
    """`model` as the backend of `torch.compile` prunes it, or its twin of `transform` with a lowering."""
    if how == "backend":
        model.compile(backend="ppgraph", options=PRUNING | changed)
        return model
    return ppgraph.transform(model, lowering=how, **PRUNING | changed)


@functools.cache
def running(folder: Path) -> Any:
    """A saved model over all ranks, pruned: the same one for all checks that take it."""
    return pruned_by(spread(folder), "eager")


def texts(samples: int, length: int, padded: bool = False) -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(1000 * samples + length)
    ids = torch.randint(3, 97, (samples, length), generator=numbers)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


CALIBRATION = [texts(4, 12), texts(3, 9, padded=True)]
BATCHES = [texts(4, 16), texts(25, 9, padded=True), texts(5, 20, padded=True)]


def of_all_ranks(own: Any) -> list[Any]:
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, own)
    return found


def union(selection: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What all ranks keep: each as much of a block as the others, and no channel is kept by two."""
    parts = of_all_ranks(dict(selection))
    assert all(len({len(part[name]) for part in parts}) == 1 for name in selection)
    joined = {name: torch.cat([part[name] for part in parts]).sort().values for name in selection}
    assert all(len(kept) == len(kept.unique()) for kept in joined.values())
    return joined


def collectives(module: GraphModule) -> list[str]:
    """The collectives of a graph, in order."""
    found = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
    return [name for name in found if name.startswith("_c10d_functional.") and "wait_tensor" not in name]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def close(inputs: Mapping[str, Tensor], found: Tensor, expected: Tensor) -> bool:
    real = inputs["attention_mask"].bool()
    return relative(found[real], expected[real]) < 1e-5


def exits(pruned: Any) -> dict[str, str]:
    return {site.name: site.exit[0].rpartition(".")[0] for site in pruned.ppgraph.sites if site.exit}


def require_no_new_collectives(pruned: Any, dense: int | None = None) -> None:
    """Rewritten graphs have the collectives of those that were captured, as many as the `dense` model runs."""
    for record in pruned.ppgraph.graphs:
        assert collectives(record.captured)
        assert collectives(record.rewritten) == collectives(record.captured)
        assert dense in (None, len(collectives(record.rewritten)))


def collectives_run(model: Any) -> int:
    """How many collectives a call runs."""
    with torch.no_grad(), CommDebugMode() as seen:
        model(**BATCHES[0])
    return int(seen.get_total_counts())


def require_as_expected(inputs: Mapping[str, Tensor], pruned: Any, output: Any, expected: Any) -> None:
    """The logits of the reference, and its selections."""
    kept = union(pruned.ppgraph.selection())
    assert kept.keys() == expected.selection.keys()
    assert all(torch.equal(kept[name], expected.selection[name]) for name in kept)
    assert close(inputs, output.logits, expected.logits)


def as_the_reference(folder: Path, family: str) -> None:
    """Three stateful batches and a step as by the eager reference that lets each rank choose among its own units."""
    dense, ranks = whole(folder / family), distributed.get_world_size()
    pruned = running(folder / family)
    pruned.ppgraph.history.reset()
    reference = Reference(dense, ranks=ranks, **PRUNING)
    for inputs in BATCHES:
        output = pruned(**inputs)
        require_as_expected(inputs, pruned, output, reference(**inputs))
    kept = union(pruned.ppgraph.selection())
    longer = {name: torch.cat([values, values[:, -1:]], dim=1) for name, values in BATCHES[-1].items()}
    step = {"input_ids": longer["input_ids"][:, -1:], "attention_mask": longer["attention_mask"]}
    found = pruned(**step, past_key_values=output.past_key_values).logits[:, 0]
    expected = masked_dense_logits(dense, kept, **longer, exits=exits(pruned))[:, -1]
    assert relative(found, expected) < 1e-5
    require_no_new_collectives(pruned, dense=collectives_run(spread(folder / family)))
    saved = folder / f"reference-{family}-{ranks}"
    pruned.ppgraph.history.save(saved)
    for name, values in load_file(next(saved.glob("*.safetensors"))).items():
        if name != "seen":
            held = reference.history[name]
            torch.testing.assert_close(values[: len(held)], held, rtol=1e-4, atol=1e-6)


def remembers(folder: Path, family: str) -> None:
    """Batches below `history_below`, on both sides of a larger one, as by the reference."""
    ranks, config = distributed.get_world_size(), PRUNING | {"history_below": 70}
    pruned = ppgraph.transform(spread(folder / family), lowering="eager", **config)
    reference = Reference(whole(folder / family), ranks=ranks, **config)
    ppgraph.calibrate(pruned, CALIBRATION, progress=False)
    reference.calibrate(CALIBRATION)
    for inputs in (BATCHES[0], BATCHES[1], BATCHES[0]):
        require_as_expected(inputs, pruned, pruned(**inputs, use_cache=False), reference(**inputs))
    assert {graph.phase for graph in pruned.ppgraph.graphs} == {"calibrate", "history", "prefill"}
    require_no_new_collectives(pruned)


def exact(folder: Path, family: str, how: str) -> None:
    """Calibrated, stateful over three batches, decoding, and dense at ratio 0: as the whole model on one device."""
    dense = whole(folder / family)
    pruned = pruned_by(spread(folder / family), how)
    ppgraph.calibrate(pruned, CALIBRATION, progress=False)
    for inputs in BATCHES:
        logits = logits_of(pruned, inputs)
        kept = union(pruned.ppgraph.selection())
        assert set(kept) == {site.name for site in pruned.ppgraph.sites if not site.refused}, "some are dense"
        assert close(inputs, logits, masked_dense_logits(dense, kept, **inputs, exits=exits(pruned)))
        assert all(torch.equal(logits, other) for other in of_all_ranks(logits))
    found = pruned.generate(**BATCHES[2], max_new_tokens=5, do_sample=False, pad_token_id=0)
    with masked(dense, union(pruned.ppgraph.selection()), exits(pruned)):
        expected = dense.generate(**BATCHES[2], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(found, expected)
    require_no_new_collectives(pruned)
    model = spread(folder / family)
    expected = logits_of(model, BATCHES[1])
    logits = logits_of(pruned_by(model, how, ratio=0.0), BATCHES[1])
    assert torch.equal(logits, expected) if how == "eager" else relative(logits, expected) < 1e-5


def logits_of(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


def starts(folder: Path, family: str) -> None:
    """Calibrate, run a batch, and save the history."""
    pruned = pruned_by(spread(folder / family), "eager")
    ppgraph.calibrate(pruned, CALIBRATION, progress=False)
    pruned(**BATCHES[0])
    pruned.ppgraph.history.save(folder / f"of-{distributed.get_world_size()}")


def goes_on(folder: Path, family: str, before: str) -> None:
    """What another number of ranks has saved loads before the first call, and the next batch is chosen by it."""
    reference = Reference(whole(folder / family), ranks=int(before), **PRUNING)
    reference.calibrate(CALIBRATION)
    reference(**BATCHES[0])
    reference.ranks = distributed.get_world_size()
    pruned = pruned_by(spread(folder / family), "eager")
    pruned.ppgraph.history.load(folder / f"of-{before}")
    require_as_expected(BATCHES[1], pruned, pruned(**BATCHES[1]), reference(**BATCHES[1]))


def overflows(folder: Path, family: str) -> None:
    """What is not finite in the last channels of one rank keeps the batch out of the history of all."""
    model = spread(folder / family)
    weight = model.model.layers[-1].mlp.up_proj.weight
    assert isinstance(weight, DTensor)
    if distributed.get_rank() == 0:
        weight.to_local().data.fill_(torch.inf)
    pruned = pruned_by(model, "eager")
    for action in (lambda: ppgraph.calibrate(pruned, CALIBRATION, progress=False), lambda: pruned(**BATCHES[1])):
        found = of_all_ranks(_error(action))
        assert all("NaN or infinity at model.layers.1.mlp" in text for text in found[:1]), found
        assert all("NaN or infinity at channels of another rank" in text for text in found[1:]), found
        assert not any(bool(pruned.ppgraph.history[name].any()) for name in pruned.ppgraph.history)


def refuses(folder: Path, family: str, where: str, reason: str) -> None:
    """Blocks whose plan gathers channels stay dense, with the reason; a model of nothing else raises."""
    pruned = ppgraph.transform(spread(folder / family), lowering="eager", **PRUNING)
    try:
        refused = {site.name: site.reason for site in pruned.ppgraph.sites if site.refused}
    except NothingToPruneError as error:
        refused = {where: str(error)}
    else:
        logits = pruned(**BATCHES[2], use_cache=False).logits
        kept = union(pruned.ppgraph.selection())
        assert kept
        assert close(BATCHES[2], logits, masked_dense_logits(whole(folder / family), kept, **BATCHES[2]))
    assert refused
    for name, why in refused.items():
        assert where in name
        assert reason.replace("_", " ") in why


def held(share: Share | None, width: int, seed: int) -> History:
    """A history of one site with random numbers, the same on each rank."""
    numbers = torch.Generator().manual_seed(seed)
    values = torch.rand(9, width, generator=numbers)
    history = History(ppgraph.PruneConfig())
    own = values if share is None else values[:, share.channels]
    site = Site("layers.0.mlp", "mlp", 0, width=own.shape[1], units=own.shape[1])
    history.declare([site], torch.device("cpu"), {} if share is None else {site.name: share})
    history.reserve(9)
    history["layers.0.mlp"][:9] = own
    history.seen[:9] = torch.randint(1, 5, (9,), generator=numbers)
    return history


def histories(folder: Path) -> None:
    """A saved history loads under another number of ranks, channels shared unevenly or not."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for width in (8, 7):
        share = Share(mesh, width)
        spread_out, alone = held(share, width, 0), held(None, width, 0)
        spread_out.allocation = {"layers.0.mlp": 5}
        spread_out.save(folder / f"of-ranks-{width}")
        other = held(None, width, 1)
        other.load(folder / f"of-ranks-{width}")
        assert torch.equal(other["layers.0.mlp"], alone["layers.0.mlp"])
        assert torch.equal(other.seen, alone.seen)
        assert other.allocation == {"layers.0.mlp": 5}
        again = held(share, width, 1)
        again.load(folder / f"of-ranks-{width}")
        assert torch.equal(again["layers.0.mlp"], spread_out["layers.0.mlp"])
        kept = of_all_ranks(again.kept_here())
        assert sum(part["layers.0.mlp"] for part in kept) >= 5
    for error in of_all_ranks(_error(lambda: spread_out.save(folder / "of-ranks-7" / "ppgraph.json"))):
        assert "cannot save the history" in error


def averages(folder: Path) -> None:
    """Histories of replicas become their mean, weighed by the samples that each has seen."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    parts = [held(None, 8, seed) for seed in range(ranks)]
    for number, part in enumerate(parts):
        part.seen[5:] = 0  # what only prefills have moved: replicas that hold something count alike
        part["layers.0.mlp"][7:9] *= number == 0
    own = parts[rank]
    seen = torch.stack([part.seen[:5] for part in parts])[..., None]
    values = torch.stack([part["layers.0.mlp"][:9] for part in parts])
    expected = torch.cat([(seen * values[:, :5]).sum(0) / seen.sum(0), values[:, 5:7].mean(0), values[0, 7:]])
    own.reserve(200 + 300 * rank)
    for _ in range(2):  # a second time changes nothing
        version = own.version
        own.average()
        assert own.version > version
        torch.testing.assert_close(own["layers.0.mlp"][:9], expected)
        torch.testing.assert_close(own.seen[:5], seen[..., 0].mean(0))
    assert len(set(of_all_ranks(own.positions))) == 1
    assert "differ in their sites" in _error(held(None, 8 + rank, 0).average)
    share = Share(init_device_mesh("cpu", (ranks,)), 8)
    assert "differ in their sites" in _error(held(share, 8, 0).average)


def _error(action: Callable[[], None]) -> str:
    """The text of the error that an action raises."""
    try:
        action()
    except ppgraph.PPGraphError as error:
        return str(error)
    return "no error"


def replicas(folder: Path, family: str) -> None:
    """Replicas that each calibrate on a part of the data hold, once averaged, what one that saw all of it does."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    pruned, alone = (ppgraph.transform(whole(folder / family), lowering="eager", **PRUNING) for _ in range(2))
    batches = [texts(2 + number, 7 + 3 * number, padded=number == 1) for number in range(ranks)]
    for _ in range(2):  # calibration may go on after averaging
        ppgraph.calibrate(pruned, [batches[rank]], progress=False)
        pruned.ppgraph.history.average()
        ppgraph.calibrate(alone, batches, progress=False)
        for name in alone.ppgraph.history:
            found, expected = pruned.ppgraph.history[name], alone.ppgraph.history[name]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def allocated(folder: Path, family: str) -> None:
    """FLAP's one threshold over all layers is that of the whole model; each rank keeps its portion."""
    dense = whole(folder / family)
    pruned = ppgraph.transform(spread(folder / family), lowering="eager", method="flap", **PRUNING)
    reference = Reference(dense, flap=True, score="flap", ranks=distributed.get_world_size(), **PRUNING)
    ppgraph.calibrate(pruned, CALIBRATION, progress=False)
    reference.calibrate(CALIBRATION)
    output = pruned(**BATCHES[2], use_cache=False)
    require_as_expected(BATCHES[2], pruned, output, reference(**BATCHES[2]))
    pruned.ppgraph.history.save(folder / f"flap-{family}")
    again = ppgraph.transform(spread(folder / family), lowering="eager", method="flap", **PRUNING)
    again.ppgraph.history.load(folder / f"flap-{family}")
    assert torch.equal(again(**BATCHES[2], use_cache=False).logits, output.logits)
    least_squares = {"compensation": "least-squares", "observed": "second-moment"}
    for field in ({"allocation": "least-loss"}, least_squares, {"method": "spread"}):
        other = ppgraph.transform(spread(folder / family), lowering="eager", **field, **PRUNING)
        assert "several ranks" in _error(lambda other=other: ppgraph.calibrate(other, CALIBRATION, progress=False))


def dies(folder: Path, family: str) -> None:
    """One rank ends, and the others wait for it in the collectives of the pruned model."""
    pruned = running(folder / family)
    if distributed.get_rank() == 1:
        os._exit(3)
    pruned(**BATCHES[0])


CHECKS: dict[str, Callable[..., None]] = {
    check.__name__: check
    for check in (
        as_the_reference,
        remembers,
        exact,
        starts,
        goes_on,
        overflows,
        refuses,
        histories,
        averages,
        replicas,
        allocated,
        dies,
    )
}


def main() -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", timeout=timedelta(minutes=10))
    folder, *calls = sys.argv[1:]
    for call in calls:
        name, *arguments = call.split(":")
        CHECKS[name](Path(folder), *arguments)
        if distributed.get_rank() == 0:
            (Path(folder) / f"{name}-is-fine").touch()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
