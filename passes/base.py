"""What a pass works on and what it is.

A `Program` is one captured graph with what the passes have learnt about it. A pass takes a program, edits its graph
through a `Builder`, and gives back a `PassResult`. All nodes carry their fake value in `meta["val"]`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, Protocol

import torch
from torch.distributed.tensor import DTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Argument
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ppgraph._torch import call_on_fakes, expression, trace
from ppgraph.config import PruneConfig
from ppgraph.errors import MethodError
from ppgraph.kernels import HIGHEST

Kind = Literal["attention", "mlp"]
Role = Literal["history", "moment", "centre", "weight_term", "rows", "seen", "units", "packed"]


class Refusal(Exception):
    """A walk over the graph that can't go on: where, at which operator, and what would be needed."""

    def __init__(self, node: Node, reason: str) -> None:
        self.node = node
        super().__init__(f"{node.name} ({target_name(node)}): {reason}")


@dataclass(frozen=True)
class Site:
    """One prunable block: the channels that enter its exit linear, and what is done about them.

    Public names: `name`, `kind`, `layer`, `width` (channels), `kept` (channels), `entry` and `exit` (parameter
    names), `status` and `reason`. `units` are what is dropped as a whole: query heads, or single MLP channels.
    `unit_macs` are the multiply-adds a token that the linears spend on one unit. `channel_dim` is the dimension of the
    exit weight along which the channels lie. `candidate`: whether an allocation may take units away.
    """

    name: str
    kind: Kind
    layer: int
    width: int = 0
    kept: int = 0
    units: int = 0
    entry: tuple[str, ...] = ()
    exit: tuple[str, ...] = ()
    status: Literal["pruned", "dense"] = "dense"
    reason: str = ""
    refused: bool = False
    candidate: bool = False
    unit_macs: int = 0
    channel_dim: int = 1

    def to_dict(self) -> dict[str, Any]:
        """The public fields and `units` as JSON-ready values."""
        fields = dataclasses.asdict(self)
        del fields["refused"]
        return fields | {"entry": list(self.entry), "exit": list(self.exit)}

    @property
    def block(self) -> int:
        """Channels of one unit: the head size, or 1."""
        return self.width // self.units

    @property
    def kept_units(self) -> int:
        """Heads or channels kept."""
        return self.kept // self.block


@dataclass(frozen=True)
class StateInput:
    """An input added to the graph that the runtime fills in at each call.

    Roles: `history` [S, C] fp32 (a tensor of the history at this batch's positions, mutated), `centre` [C] fp32 (one of
    its means over all positions), `moment` [C, columns] fp32 (mutated by calibration), `weight_term` [C] fp32,
    `rows` (a constant index table), `seen` [S] fp32 (samples that calibration has seen at each position, mutated),
    `units` [U'] (a selection made before) and `packed` (a result of the packing graph; `site` is its number).
    """

    role: Role
    site: str
    constant: torch.Tensor | None = None
    tensor: str = ""


@dataclass(frozen=True)
class Packing:
    """A graph that packs selected weights: it takes some `inputs` of the program, then the tensors that it fills.

    Those are allocated once and filled again for each prompt, so that their addresses stay. `contents` tells each from
    others, in no matter which graph: graphs of a prompt and of a step share what they both read. `made_of` are the
    places of the inputs that each depends on.
    """

    module: GraphModule
    inputs: list[Node]
    packed: list[Node]
    contents: list[str]
    made_of: list[list[int]]

    def allocate(self, device: torch.device, held: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """Memory for the packed weights, new for those that none is `held` of."""
        values = [node.meta["val"] for node in self.packed]
        return [
            torch.empty(tuple(map(int, value.shape)), dtype=value.dtype, device=device) if memory is None else memory
            for value, memory in zip(values, held, strict=True)
        ]


class Observer(Protocol):
    """Is shown a program as it was captured (`stage` "captured") and after each stage, with what that changed.

    It changes nothing. `elapsed_ms` is what the stage took.
    """

    def __call__(self, program: Program, stage: str, outcome: PassResult, elapsed_ms: float) -> None: ...


@dataclass
class Program:
    """One captured graph on its way through the passes.

    `cuts`: nodes behind which a part ends that other layers repeat, so that one compilation can serve them all.
    `token_mask`: the input that says which tokens are real, [B, cached + S] or by query and key [B, H, S, keys].
    `batch`: the sizes B and S of the ids (or embeddings) that the model is given; None where the graph has neither.
    `sharded`: of inputs that are this rank's share of a DTensor, that (fake) DTensor.
    `allocation`: units kept by site name, once an allocation has decided. `checked`: what the result `finite` has a
    flag for, in order: sites, and what other ranks hold. `results`: what the graph also gives, by the name of a site
    (its kept channels), `("dense", site)` and `("others", site)` where tokens differ, or `"finite"`.
    """

    module: GraphModule
    config: PruneConfig
    parameters: dict[Node, str]
    token_mask: Node | None = None
    batch: tuple[Any, Any] | None = None
    sites: list[Site] = field(default_factory=list)
    analysis: dict[str, Any] = field(default_factory=dict)
    state_inputs: list[StateInput] = field(default_factory=list)
    results: dict[Any, Node] = field(default_factory=dict)
    applied: list[str] = field(default_factory=list)
    allocation: Mapping[str, int] | None = None
    checked: list[str] = field(default_factory=list)
    shared: dict[Any, Any] = field(default_factory=dict)
    packing: Packing | None = None
    cuts: set[Node] = field(default_factory=set)
    observer: Observer | None = None
    sharded: dict[Node, DTensor] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        """The graph that passes edit."""
        return self.module.graph

    @property
    def pruned_sites(self) -> list[Site]:
        """The sites that are rewritten, in order."""
        return [site for site in self.sites if site.status == "pruned"]

    @property
    def scored_sites(self) -> list[Site]:
        """The pruned sites that keep anything, and so have something to choose."""
        return [site for site in self.pruned_sites if site.kept]

    @property
    def observed_sites(self) -> list[Site]:
        """The sites that have a history: those that prune, or all that an allocation may choose from."""
        if self.config.allocation == "uniform":
            return self.pruned_sites
        return [site for site in self.sites if site.candidate]

    @property
    def stream(self) -> Node:
        """The residual stream [B, S, D] that enters the first block, once blocks have been found."""
        stream: Node = next(block.stream for block in self.analysis.values() if block is not None)
        return stream

    def placeholders(self) -> list[Node]:
        """The graph's inputs, which stand before everything else."""
        return list(itertools.takewhile(lambda node: node.op == "placeholder", self.graph.nodes))

    def sizes(self) -> dict[Any, tuple[Node, int | None]]:
        """Symbolic sizes that inputs have: the input that is one, or the input and its dimension."""
        if "sizes" not in self.shared:
            found: dict[Any, tuple[Node, int | None]] = {}
            for node in self.placeholders():
                value = node.meta["val"]
                if isinstance(value, torch.SymInt):
                    found.setdefault(expression(value), (node, None))
                for dim, size in enumerate(shape_of(node)):
                    if isinstance(size, torch.SymInt):
                        found.setdefault(expression(size), (node, dim))
            self.shared["sizes"] = found
        sizes: dict[Any, tuple[Node, int | None]] = self.shared["sizes"]
        return sizes

    def add_state_input(self, state_input: StateInput, value: torch.Tensor) -> Node:
        """Append a placeholder whose fake value is `value`."""
        self.state_inputs.append(state_input)
        last = self.placeholders()[-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(f"{state_input.role}_{len(self.state_inputs)}")
        node.meta["val"] = value
        return node

    def state_nodes(self, role: Role) -> list[Node]:
        """The inputs added for a role, in order."""
        count = len(self.state_inputs)
        nodes = self.placeholders()[-count:] if count else []
        return [node for node, item in zip(nodes, self.state_inputs, strict=True) if item.role == role]

    def first_call(self) -> Node:
        """What follows the graph's inputs."""
        return next(node for node in self.graph.nodes if node.op != "placeholder")  # type: ignore[no-any-return]

    def output(self) -> Node:
        """The graph's output node."""
        node: Node = next(iter(reversed(self.graph.nodes)))
        return node


@dataclass
class PassResult:
    """What a pass did: how many nodes it added, and what it refused, as `site: node (operator): reason`."""

    inserted: int = 0
    refused: list[str] = field(default_factory=list)


class Pass(Protocol):
    """A named edit of a program. `requires` names the passes that must have run before."""

    name: str
    requires: tuple[str, ...]

    def __call__(self, program: Program) -> PassResult: ...


class Builder:
    """Adds nodes before `anchor`, each with its fake value, the anchor's stack trace and the author's name.

    Arithmetic on plain numbers is done at once, so that sizes known at compile time stay ints.
    """

    def __init__(self, program: Program, anchor: Node, author: str) -> None:
        self.program, self.anchor, self.author = program, anchor, author
        self.inserted = 0

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nodes: list[Node] = []
        torch.fx.map_arg((args, kwargs), nodes.append)
        if not nodes and not isinstance(target, torch._ops.OpOverload):
            return target(*args, **kwargs)
        with self.program.graph.inserting_before(self.anchor):
            node = self.program.graph.call_function(target, args, kwargs)
        value_args, value_kwargs = torch.fx.map_arg((args, kwargs), lambda used: used.meta["val"])
        node.meta["val"] = self._value(target, value_args, value_kwargs)
        for key in ("stack_trace", "nn_module_stack"):
            if key in self.anchor.meta:
                node.meta[key] = self.anchor.meta[key]
        node.meta["ppgraph_pass"] = self.author
        self.inserted += 1
        return node

    def _value(self, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The fake value of a call. Calls that look alike share one: layers repeat, and symbolic sizes are slow."""
        known = self.program.shared.setdefault("values", {})
        key = (target, signature(args), signature(tuple(kwargs.items())))
        if key not in known:
            known[key] = call_on_fakes(target, args, kwargs)
        return known[key]

    def inline(self, method: str, function: Callable[..., Any], *operands: Any) -> Any:
        """The nodes of plain tensor code on these operands (nodes, numbers, None, or containers of them).

        Code is traced once for operands that look alike: layers repeat.

        Raises:
            MethodError: the code can't be traced, or holds tensors of its own; `method` says whose it is.
        """
        flat, spec = tree_flatten(operands)
        places = [index for index, operand in enumerate(flat) if isinstance(operand, Node)]
        nodes = [flat[index] for index in places]
        values = [value_of(operand) for operand in flat]
        known = self.program.shared.setdefault("traced", {})
        key = (function, str(spec), signature(values))
        if key not in known:
            known[key] = self._traced(method, function, values, places, spec)
        return self._inlined(method, known[key], nodes)

    def _traced(
        self, method: str, function: Callable[..., Any], values: list[Any], places: list[int], spec: TreeSpec
    ) -> torch.fx.GraphModule:
        """The graph of `function` on values of which those at `places` are its inputs."""

        def on_nodes_alone(*given: Any) -> Any:
            filled = list(values)
            for index, value in zip(places, given, strict=True):
                filled[index] = value
            return function(*tree_unflatten(filled, spec))

        try:
            return trace(on_nodes_alone, [values[place] for place in places])
        except Exception as error:
            raise MethodError(
                f"{method} can't be traced into a graph: {type(error).__name__}: {error}; expected tensor code that "
                "reads no values (.item(), if tensor:) and gives the shapes that ppgraph.methods states"
            ) from error

    def _inlined(self, method: str, traced: torch.fx.GraphModule, operands: list[Node]) -> Any:
        given = iter(operands)
        placed: dict[Node, Any] = {}
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                placed[node] = next(given)
            elif node.op == "output":
                return torch.fx.map_arg(node.args[0], placed.__getitem__)
            elif node.target in (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default):
                raise MethodError(f"{method} can't be traced into a graph: it reads a value ({node.target})")
            elif node.op == "call_function":
                args, kwargs = torch.fx.map_arg((node.args, node.kwargs), placed.__getitem__)
                placed[node] = self(node.target, *args, **kwargs)
            else:
                raise MethodError(
                    f"{method} brings a tensor of its own ({node.target}), expected tensors made of its arguments"
                )
        raise AssertionError("a graph without output")

    def copy(self, node: Node, replaced: Mapping[Node, Argument]) -> Node:
        """A second `node`, some of whose operands are `replaced`."""
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda used: replaced.get(used, used))
        assert callable(node.target)
        return self(node.target, *args, **kwargs)  # type: ignore[no-any-return]

    def size(self, node: Node, dim: int) -> Any:
        """Size of a dimension: an int, or the node that computes it."""
        size = node.meta["val"].shape[dim]
        if not isinstance(size, torch.SymInt):
            return size
        sources = self.program.sizes()
        formula = expression(size)
        if _is_computable(formula, sources):
            return self._computed(formula, sources)
        return self(torch.ops.aten.sym_size.int, node, dim)

    def _computed(self, term: Any, sources: dict[Any, tuple[Node, int | None]]) -> Any:
        """The node that computes a formula whose atoms are all in `sources`."""
        if term in sources:
            source, dim = sources[term]
            return source if dim is None else self(torch.ops.aten.sym_size.int, source, dim)
        if term.is_Integer:
            return int(term)
        apply = operator.add if term.is_Add else operator.mul
        parts = [self._computed(part, sources) for part in term.args]
        return functools.reduce(lambda left, right: self(apply, left, right), parts)

    def share_of(self, size: Any, share: float | Fraction) -> Any:
        """`ceil(size * share)` in whole numbers, for an int or a symbolic size."""
        exact = Fraction(str(share))
        scaled = self(operator.add, self(operator.mul, size, exact.numerator), exact.denominator - 1)
        return self(operator.floordiv, scaled, exact.denominator)

    def add(self, left: Any, right: Any) -> Any:
        """`left + right` with broadcasting."""
        return self(torch.ops.aten.add.Tensor, left, right)

    def sub(self, left: Any, right: Any) -> Any:
        """`left - right` with broadcasting."""
        return self(torch.ops.aten.sub.Tensor, left, right)

    def mul(self, left: Any, right: Any) -> Any:
        """`left * right` with broadcasting."""
        return self(torch.ops.aten.mul.Tensor, left, right)

    def sum(self, node: Node, dim: int) -> Node:
        """Sum over one dimension, which goes."""
        return self(torch.ops.aten.sum.dim_IntList, node, [dim])  # type: ignore[no-any-return]

    def where(self, condition: Node, left: Any, right: Any) -> Node:
        """`left` where the condition holds, else `right` (a node or a number)."""
        tensor = isinstance(right, Node) and isinstance(right.meta["val"], torch.Tensor)
        overload = torch.ops.aten.where.self if tensor else torch.ops.aten.where.ScalarOther
        return self(overload, condition, left, right)  # type: ignore[no-any-return]

    def select(self, node: Node, dim: int, index: Node) -> Node:
        """`index_select`: the given indices of one dimension."""
        return self(torch.ops.aten.index_select.default, node, dim, index)  # type: ignore[no-any-return]

    def highest(self, scores: Node, count: Any) -> Node:
        """Indices of the `count` highest of a vector, best first; of equal scores the lower index wins."""
        order = self(torch.ops.aten.sort.stable, scores, stable=True, dim=0, descending=True)
        indices = self(operator.getitem, order, 1)
        if isinstance(count, int):
            return self(torch.ops.aten.slice.Tensor, indices, 0, 0, count)  # type: ignore[no-any-return]
        # A slice to a symbolic end has the size Min(end, size), which every later size would drag along.
        rest = self(operator.sub, self.size(scores, 0), count)
        pieces = self(torch.ops.aten.split_with_sizes.default, indices, [count, rest])
        return self(operator.getitem, pieces, 0)  # type: ignore[no-any-return]

    def highest_in_order(self, scores: Node, count: Any) -> Node:
        """Indices of the `count` highest of a vector, ascending; of equal scores the lower index wins."""
        if scores.meta["val"].device.type == "cpu":
            return self(HIGHEST, scores, count)  # type: ignore[no-any-return]
        return self.in_order_by_rank(scores, count)

    def in_order_by_rank(self, scores: Node, count: Any) -> Node:
        """The same by comparing each with each, which a GPU does in the time of one of the many kernels of a sort.

        With NaN among the scores the indices are in range, and not all of them different.
        """
        aten, device = torch.ops.aten, scores.meta["val"].device
        index = self(aten.arange.default, self.size(scores, 0), device=device)
        own, other = self(aten.unsqueeze.default, scores, 1), self(aten.unsqueeze.default, scores, 0)
        earlier = self(aten.lt.Tensor, self(aten.unsqueeze.default, index, 0), self(aten.unsqueeze.default, index, 1))
        tied = self(aten.logical_and.default, self(aten.eq.Tensor, other, own), earlier)
        better = self(aten.logical_or.default, self(aten.gt.Tensor, other, own), tied)
        rank = self(aten.sum.dim_IntList, better, [1], dtype=torch.int32)
        chosen = self(aten.lt.Scalar, rank, count)
        place = self(aten.clamp_max.default, self(aten.sub.Scalar, self(aten.cumsum.default, chosen, 0), 1), count)
        place = self.where(chosen, place, count)  # a place behind the last for those that are not chosen
        memory = self(aten.zeros.default, [self(operator.add, count, 1)], dtype=torch.int64, device=device)
        filled = self(aten.index_copy.default, memory, 0, place, index)  # Inductor has no kernel for scatter of int64
        pieces = self(aten.split_with_sizes.default, filled, [count, 1])
        return self(operator.getitem, pieces, 0)  # type: ignore[no-any-return]

    def ascending(self, index: Node) -> Node:
        """A vector's elements in ascending order."""
        return self(operator.getitem, self(torch.ops.aten.sort.default, index), 0)  # type: ignore[no-any-return]


def ancestors(nodes: Iterable[Node]) -> set[Node]:
    """Nodes and all that they are made of."""
    found: set[Node] = set()
    left = list(nodes)
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += node.all_input_nodes
    return found


def target_name(node: Node) -> str:
    """`aten.linear` for a call, the kind of node otherwise."""
    if node.op != "call_function":
        return node.op
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target.overloadpacket.__name__}"
    return getattr(target, "__name__", str(target))


def signature(value: Any) -> Any:
    """What decides the fake value of a call on `value`, hashable: tensors and sizes by their formulas."""
    if isinstance(value, torch.Tensor):
        sizes = (*value.shape, *value.stride())
        return (torch.Tensor, value.dtype, value.device, value.dim(), tuple(map(expression, sizes)))
    if isinstance(value, torch.SymInt):
        return (torch.SymInt, expression(value))
    if isinstance(value, (list, tuple)):
        return tuple(map(signature, value))
    return (type(value), value)


def _is_computable(formula: Any, sources: dict[Any, tuple[Node, int | None]]) -> bool:
    """Whether sums and products of known sizes give a formula."""
    if formula in sources or formula.is_Integer:
        return True
    return (formula.is_Add or formula.is_Mul) and all(_is_computable(part, sources) for part in formula.args)


def value_of(operand: Any) -> Any:
    """The fake value of a node; anything else is its own."""
    return operand.meta["val"] if isinstance(operand, Node) else operand


def shape_of(node: Node) -> tuple[Any, ...]:
    """The sizes of a node's tensor, ints where they are known; an empty tuple for anything else."""
    value = node.meta.get("val")
    return tuple(map(_known, value.shape)) if isinstance(value, torch.Tensor) else ()


def _known(size: Any) -> Any:
    """A symbolic size that had turned out to be a number is that number."""
    return int(expression(size)) if isinstance(size, torch.SymInt) and expression(size).is_number else size


def same_size(left: Any, right: Any) -> bool:
    """Whether two sizes are known to be equal, without guarding on it."""
    return bool((expression(left) - expression(right)).expand() == 0)
