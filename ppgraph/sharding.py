"""Tensor parallelism as one rank sees it: DTensors taken apart into what this rank holds of them.

A model that transformers has spread over ranks keeps its weights as DTensors. Its own code multiplies with each rank's
share and joins the results by collectives; where it computes on DTensors (embeddings, gathered logits), Dynamo's graph
does too. `localise` rewrites such a graph in terms of shares, so that all that comes after sees plain tensors and the
collectives between them. Nothing here adds a collective to a graph.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.fx import GraphModule, Interpreter, Node

from ppgraph import _torch
from ppgraph.errors import CaptureError, UnsupportedModelError

__all__ = ["Share", "local_value", "local_values", "localise", "require_known_sharding", "share_of"]


@dataclass(frozen=True)
class Share:
    """What this rank holds of a dimension of `total` channels, of which the ranks of `mesh` hold one part each."""

    mesh: DeviceMesh
    total: int

    def __deepcopy__(self, memo: dict[int, Any]) -> Share:
        return self  # a copied model has the same ranks

    @functools.cached_property
    def channels(self) -> torch.Tensor:
        """The numbers that this rank's channels have among all, [C] int64."""
        with _torch.unset_fake_temporarily():
            return self.part(torch.arange(self.total, device=self.mesh.device_type))

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a tensor [..., total] that every rank has: [..., C]. No communication."""
        return distribute_tensor(whole, self.mesh, [Shard(whole.dim() - 1)], src_data_rank=None).to_local()

    def whole(self, part: torch.Tensor) -> torch.Tensor:
        """The parts of all ranks together, [..., C] -> [..., total]. Communicates: every rank of the mesh calls it."""
        shape = torch.Size((*part.shape[:-1], self.total))
        stride = torch.empty(shape, device="meta").stride()
        along = [Shard(part.dim() - 1)]
        placed = DTensor.from_local(part.contiguous(), self.mesh, along, run_check=False, shape=shape, stride=stride)
        return placed.full_tensor()

    def portion(self, number: int) -> int:
        """This rank's portion of a number of the whole's units, rounded up: the same load for ranks of equal parts."""
        return -(-number * len(self.channels) // self.total)

    def on_first_rank(self, action: Callable[[], None]) -> None:
        """Run `action` on the mesh's first rank alone, while the others wait; what it raises is raised on each."""
        group, found = self.mesh.get_group(), [None]
        if self.mesh.get_local_rank() == 0:
            try:
                action()
            except Exception as error:
                found = [error]  # type: ignore[list-item]
        torch.distributed.broadcast_object_list(found, group=group, group_src=0)
        if found[0] is not None:
            raise found[0]


def share_of(weight: DTensor, dim: int) -> Share | None:
    """This rank's share of dimension `dim` of a weight; None where the weight is whole on each rank.

    Raises:
        UnsupportedModelError: the weight is spread in another way.
    """
    if all(place.is_replicate() for place in weight.placements):
        return None
    if weight.device_mesh.ndim != 1 or not weight.placements[0].is_shard(dim):
        raise UnsupportedModelError(
            f"an exit weight {list(weight.shape)} is spread as {weight.placements} over {weight.device_mesh}; expected "
            f"one dimension of ranks that share its dimension {dim}, as the rowwise style of transformers does"
        )
    return Share(weight.device_mesh, weight.shape[dim])


def local_value(value: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    with torch.no_grad():
        return value.to_local() if isinstance(value, DTensor) else value


def local_values(values: Iterable[Any]) -> list[Any]:
    """A graph's inputs as `localise` leaves them: shares for DTensors, and no device meshes."""
    return [local_value(value) if isinstance(value, DTensor) else value for value in values if _is_value(value)]


def _is_value(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, torch.SymInt, torch.SymFloat, int, float))


def require_known_sharding(model: nn.Module) -> None:
    """Raise UnsupportedModelError for models spread over ranks in a way that a captured graph does not show."""
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise UnsupportedModelError(
            f"{type(model).__name__} is sharded by FSDP, which gathers weights with hooks that a captured graph does "
            'not have; expected tensor parallelism, DistributedConfig(tp_plan="auto") of transformers, or whole weights'
        )
    if getattr(model, "_pp_stage", None) is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is cut into stages of layers (pp_size), which ranks run one after another with "
            'calls that a captured graph does not have; expected tensor parallelism, DistributedConfig(tp_plan="auto")'
        )
    spread = getattr(model, "_tp_size", None) or 1
    if spread > 1 and not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise UnsupportedModelError(
            f"{type(model).__name__} is spread over {spread} ranks, but no weight is a DTensor, which would say what "
            "part of it a rank holds; this transformers is too old for that (5.24 is fine)"
        )


def localise(module: GraphModule) -> dict[Node, DTensor]:
    """Rewrite Dynamo's graph so that it takes and computes what this rank holds; call inside `_torch.graph_world`.

    Inputs that are device meshes go. The graph computes the same, by the same collectives.

    Returns the fake DTensors of those inputs that were some, by placeholder.

    Raises:
        CaptureError: the graph gives a DTensor as a result, or computes on them in an order that can't be kept.
    """
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    sharded = {node: _value(node) for node in inputs if isinstance(_value(node), DTensor)}
    if not sharded:
        return {}
    for island in _islands(module):
        _replace(module, island)
    for node in inputs:
        if not _is_value(_value(node)):
            module.graph.erase_node(node)
    for node, value in sharded.items():
        node.meta["example_value"] = local_value(value)
    try:
        module.graph.lint()
    except RuntimeError as error:
        raise CaptureError(
            f"this model computes on DTensors in a way that can't be told apart by rank ({error}); expected the "
            "inference path of transformers: call it within torch.no_grad()"
        ) from error
    module.recompile()
    return sharded


def _value(node: Node) -> Any:
    return node.meta.get("example_value")


def _islands(module: GraphModule) -> list[list[Node]]:
    """Calls on DTensors, grouped by the DTensors that pass between them: what they mean is told only as a whole.

    (The masked lookup of an embedding keeps its mask in the placement of its result.)
    """
    group: dict[Node, list[Node]] = {}
    for node in module.graph.nodes:
        if node.op in ("placeholder", "output") or not _is_on_dtensors(node):
            continue
        joined = [node]
        for source in node.all_input_nodes:
            if source in group and isinstance(_value(source), DTensor) and group[source] is not joined:
                joined = [*group[source], *joined]
        group.update(dict.fromkeys(joined, joined))
    islands = {id(island): island for island in group.values()}
    return list(islands.values())


def _is_on_dtensors(node: Node) -> bool:
    return any(isinstance(_value(used), DTensor) for used in (node, *node.all_input_nodes))


def _replace(module: GraphModule, island: Sequence[Node]) -> None:
    """Put plain operators on this rank's shares in the place of an island's calls."""
    results = [node for node in island if any(user not in island for user in node.users)]
    if any(isinstance(_value(node), DTensor) for node in results):
        raise CaptureError(f"{results[0].name} leaves the model as a DTensor; expected a plan that gathers its results")
    last = island[-1]
    if last.target == "to_local" and last.args[0].op == "placeholder":  # type: ignore[union-attr]
        last.replace_all_uses_with(last.args[0])  # type: ignore[arg-type]
        module.graph.erase_node(last)
        return
    operands = dict.fromkeys(source for node in island for source in node.all_input_nodes if source not in island)
    given = [operand for operand in operands if _is_value(_value(operand))]
    name = f"on_shares_{last.name}"
    module.add_submodule(name, _on_shares(module, island, list(operands), results))
    with module.graph.inserting_after(last):
        call = module.graph.call_module(name, tuple(given))
    call.meta = {key: value for key, value in last.meta.items() if key != "example_value"}
    for place, node in enumerate(results):
        with module.graph.inserting_after(call):
            picked = module.graph.call_function(operator.getitem, (call, place))
        node.replace_all_uses_with(picked)
    for node in reversed(island):
        module.graph.erase_node(node)


def _on_shares(module: GraphModule, island: Sequence[Node], operands: list[Node], results: list[Node]) -> GraphModule:
    """An island as a graph of plain operators: from its operands' shares to its results."""
    values = [_value(operand) for operand in operands]

    def run(*shares: Any) -> list[Any]:
        left, known = iter(shares), {}
        for operand, value in zip(operands, values, strict=True):
            known[operand] = _wrapped(next(left), value) if _is_value(value) else value
        interpreter = Interpreter(module)
        for node in island:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = getattr(interpreter, node.op)(node.target, args, kwargs)
        return [known[node] for node in results]

    with torch.no_grad():
        return _torch.trace_below_autograd(run, local_values(values))


def _wrapped(share: Any, value: Any) -> Any:
    """The DTensor that `value` is, made of a share of it; other values as they are."""
    if not isinstance(value, DTensor):
        return share
    mesh, places = value.device_mesh, value.placements
    return DTensor.from_local(share, mesh, places, run_check=False, shape=value.shape, stride=value.stride())
