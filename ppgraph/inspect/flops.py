"""FLOPs and weight bytes of an ATen graph, read off its shapes.

Counted as `torch.utils.flop_counter` counts: matrix products, convolutions and attention (causal or not), two FLOPs a
multiply-add; everything else is free. Before dispatch those are `linear`, `matmul` or fused attention, which all
reduce to the formula of `mm`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils.flop_counter import mm_flop

from ppgraph._torch import expression, hint
from ppgraph.passes.base import shape_of, target_name
from ppgraph.passes.operators import is_linear, is_product, is_view, linear_bias, linear_weight

aten = torch.ops.aten

Shape = tuple[int, ...]
Formula = Callable[[Shape, list[Shape]], int]


@dataclass(frozen=True)
class Work:
    """FLOPs of one batch: `dense` unpruned, `probe`, and `pruned` for what remains of the model without its probe."""

    dense: int
    probe: int
    pruned: int

    @property
    def probe_share(self) -> float:
        """The probe's share of the dense FLOPs."""
        return self.probe / self.dense if self.dense else 0.0

    @property
    def speedup(self) -> float:
        """Dense FLOPs over those of probe and pruned model: what no measured speedup is expected to exceed."""
        done = self.probe + self.pruned
        return self.dense / done if done else 1.0

    def to_dict(self) -> dict[str, float]:
        """The three counts as floats."""
        return {"dense": float(self.dense), "probe": float(self.probe), "pruned": float(self.pruned)}


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the weights that products multiply with: all of them, and what is left after selection."""

    dense: int
    pruned: int

    def to_dict(self) -> dict[str, int]:
        """Both counts."""
        return {"dense": self.dense, "pruned": self.pruned}


class Sizes:
    """Numbers for a graph's symbolic sizes.

    Symbols that nobody gave, such as the length of a cache, have the value of the call that the graph was captured for.
    """

    def __init__(self, known: Mapping[Any, int]) -> None:
        self._known = known
        self._sizes: dict[Any, int] = {}

    @classmethod
    def of_first_call(cls, graph: Graph) -> Sizes:
        """The sizes of the call that `graph` was captured for."""
        return cls(_first_values(graph))

    @classmethod
    def of_batch(cls, graph: Graph, taken: tuple[Any, Any], batch: tuple[int, int]) -> Sizes | None:
        """The sizes of a batch of [samples, tokens], which `graph` calls the two `taken`; None if it takes others."""
        known = _first_values(graph)
        given: dict[Any, int] = {}
        for size, value in zip(taken, batch, strict=True):
            formula = expression(size)
            # Dynamo gives sizes of 1 graphs of their own: what is symbolic is at least 2.
            if formula.is_Symbol and value > 1 and given.setdefault(formula, value) == value:
                continue
            if not formula.is_Integer or int(formula) != value:
                return None
        return cls(known | given)

    def __call__(self, size: Any) -> int:
        if not isinstance(size, torch.SymInt):
            return int(size)
        formula = expression(size)
        if formula not in self._sizes:
            self._sizes[formula] = int(formula.subs(self._known))
        return self._sizes[formula]

    def shape(self, node: Node) -> Shape:
        """The shape of a node's tensor."""
        return tuple(self(size) for size in shape_of(node))

    def nbytes(self, node: Node) -> int:
        """Bytes of a node's tensor, were it contiguous."""
        itemsize: int = node.meta["val"].dtype.itemsize
        return prod(self.shape(node)) * itemsize


def count_flops(nodes: Iterable[Node], sizes: Sizes) -> Counter[str]:
    """FLOPs of `nodes` by whose they are: `"probe"`, or `"model"` for everything that is no probe."""
    counts: Counter[str] = Counter()
    for node in nodes:
        formula = _formula(node)
        if formula is not None:
            operands = [sizes.shape(operand) for operand in node.args if isinstance(operand, Node)]
            counts["probe" if _is_probe(node) else "model"] += formula(sizes.shape(node), operands)
    return counts


def uncounted_products(nodes: Iterable[Node]) -> dict[str, int]:
    """Operators that multiply but for which there is no formula (custom ones, say), with how often they occur."""
    names = (target_name(node) for node in nodes if is_product(node) and _formula(node) is None)
    return dict(sorted(Counter(names).items()))


def count_weight_bytes(nodes: Iterable[Node], sizes: Sizes) -> int:
    """Bytes of weights and biases that the linears among `nodes` multiply with, probes left out.

    Packed weights count at their packed size.
    """
    read: set[Node] = set()
    for node in nodes:
        if is_linear(node) and not _is_probe(node):
            operands = (linear_weight(node)[0], linear_bias(node))
            read.update(operand for operand in operands if operand is not None and _is_weight(operand))
    return sum(sizes.nbytes(node) for node in read)


def count_gathered_bytes(nodes: Iterable[Node], sizes: Sizes) -> int:
    """Bytes of weights that `select_weights` packs for one batch: read once and written once. No FLOPs show them."""
    return sum(
        sizes.nbytes(node)
        for node in nodes
        if node.target is aten.index_select.default
        and node.meta.get("ppgraph_pass") == "select_weights"
        and _is_weight(node)
    )


def _inputs(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _first_values(graph: Graph) -> dict[Any, int]:
    """What each symbol was when the graph was captured."""
    found: dict[Any, int] = {}
    for node in _inputs(graph):
        value = node.meta["val"]
        for size in (value, *shape_of(node)):
            if isinstance(size, torch.SymInt) and expression(size).is_Symbol:
                known = hint(size)
                assert known is not None  # inputs had sizes
                found[expression(size)] = known
    return found


def _is_probe(node: Node) -> bool:
    return node.meta.get("ppgraph_pass") == "insert_probe"


def _is_weight(node: Node) -> bool:
    """Whether this is a weight or bias as the model has it, packed or rearranged; no activation, cache or index."""
    while is_view(node) or node.target is aten.index_select.default:
        source = node.args[0]
        if not isinstance(source, Node):
            return False
        node = source
    shape = shape_of(node)
    if node.op != "placeholder" or not 1 <= len(shape) <= 2 or not node.meta["val"].is_floating_point():
        return False
    return not any(isinstance(size, torch.SymInt) for size in shape)


def _formula(node: Node) -> Formula | None:
    target = node.target
    return FORMULAS.get(target.overloadpacket) if isinstance(target, torch._ops.OpOverload) else None


def _sums(results: int, terms: int) -> int:
    """FLOPs of `results` numbers that are each a sum of `terms` products."""
    return int(mm_flop((results, terms), (terms, 1)))


def _matmul(out: Shape, operands: list[Shape]) -> int:
    return _sums(prod(out), operands[0][-1])


def _addmm(out: Shape, operands: list[Shape]) -> int:
    return _sums(prod(out), operands[1][-1])


def _convolution(out: Shape, operands: list[Shape]) -> int:
    """Each result sums over its group's channels and the kernel, which is what the weight [O, I, ...] has after O."""
    return _sums(prod(out), prod(operands[1][1:]))


def _attention(out: Shape, operands: list[Shape]) -> int:
    """Scores and weighted values for query [..., S, d], key [..., K, d], value [..., K, v]; key heads may be shared."""
    query, key = operands[:2]
    return _sums(prod(query[:-1]) * key[-2], query[-1]) + _sums(prod(out), key[-2])


FORMULAS: dict[Any, Formula] = {
    **dict.fromkeys((aten.linear, aten.matmul, aten.mm, aten.bmm, aten.mv, aten.dot), _matmul),
    **dict.fromkeys((aten.addmm, aten.baddbmm), _addmm),
    **dict.fromkeys((aten.conv1d, aten.conv2d, aten.convolution), _convolution),
    aten.scaled_dot_product_attention: _attention,
}
