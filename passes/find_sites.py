"""Find the prunable blocks: linears that write into the residual stream, and the channels that enter them.

No names: an addition belongs to the residual stream when one operand reaches the other only through matrix products.
The products met first on the way back from the other operand end a block; those with a weight parameter are exit
linears. Names are read to label a site and to number its layer.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from ppgraph._torch import expression, quotient
from ppgraph.config import kept_heads, layer_ratio, rounded_up
from ppgraph.passes.base import Kind, PassResult, Program, Refusal, Site, same_size, shape_of, target_name
from ppgraph.passes.channels import Narrowing, NarrowingPlanner, weight_parameter
from ppgraph.passes.operators import (
    before_products,
    is_attention_softmax,
    is_collective,
    is_fused_attention,
    is_linear,
    is_product,
    is_rescaling,
    is_reshape,
    linear_activations,
    linear_bias,
    linear_weight,
    mixes_tokens,
)
from ppgraph.passes.token_axes import ProbePlan, plan_probe

aten = torch.ops.aten

EXCHANGED = (
    "it exchanges channels between ranks inside of the block; pruning needs a plan that keeps them on one rank, from "
    "the entry linears to the exit linear"
)


@dataclass(frozen=True)
class Block:
    """Where a site lies in the graph.

    `stream` is the residual stream [B, S, D] that enters the block, `exit_input` the activations [..., C] that the
    `exit_linear` multiplies, `region` all nodes between the two, `weight` the exit weight's placeholder with its input
    channels along `weight_dim`.
    """

    stream: Node
    exit_linear: Node
    exit_input: Node
    region: frozenset[Node]
    weight: Node
    weight_dim: int
    narrowing: Narrowing
    probe: ProbePlan


@dataclass(frozen=True)
class Branch:
    """What is added to the residual stream: by which addition, to which stream, and what is added."""

    addition: Node
    stream: Node
    added: Node


class FindSites:
    """Lists the sites of a program, planned but not yet changed, with a reason for each that stays dense."""

    name = "find_sites"
    requires: tuple[str, ...] = ()

    def __call__(self, program: Program) -> PassResult:
        ancestry = Ancestry(program)
        drafts: list[tuple[Site, Block | None]] = []
        branches = residual_branches(program, ancestry)
        for branch in branches:
            for product in closing_products(branch, ancestry):
                draft = _draft(program, branch, product, ancestry)
                if draft is not None:
                    drafts.append(draft)
        drafts = _with_widths(program, _with_unique_names(program, drafts))
        for site, block in drafts:
            program.sites.append(site)
            program.analysis[site.name] = block
        if branches:
            program.shared["last stream"] = branches[-1].addition
            program.cuts |= _streams_into_layers(program) | {branches[-1].addition}
        return PassResult(refused=[f"{site.name}: {site.reason}" for site, _ in drafts if site.refused])


def _streams_into_layers(program: Program) -> set[Node]:
    """The residual stream that enters the first block of each layer, as the addition before it made it."""
    streams: dict[int, Node] = {}
    for site in program.sites:
        block: Block | None = program.analysis[site.name]
        if block is not None:
            streams.setdefault(site.layer, _before_conversions(block.stream))
    return set(streams.values())


def _before_conversions(node: Node) -> Node:
    """The value of the same dtype that a node converts; the last layer's addition has no such node behind it."""
    while node.target is aten.to.dtype and node.args[0].meta["val"].dtype == node.meta["val"].dtype:  # type: ignore[union-attr]
        node = node.all_input_nodes[0]
    return node


class Ancestry:
    """Which nodes a node depends on, as bit sets over the graph's order."""

    def __init__(self, program: Program) -> None:
        self.nodes = list(program.graph.nodes)
        self.index = {node: index for index, node in enumerate(self.nodes)}
        self.of: dict[Node, int] = {}
        for node in self.nodes:
            bits = 1 << self.index[node]
            for operand in node.all_input_nodes:
                bits |= self.of[operand]
            self.of[node] = bits

    def depends(self, node: Node, on: Node) -> bool:
        return bool(self.of[node] >> self.index[on] & 1)

    def between(self, start: Node, end: Node) -> frozenset[Node]:
        """All nodes on a path from `start` to `end`, both included."""
        first, last = self.index[start], self.index[end]
        bits = self.of[end]
        return frozenset(
            node for node in self.nodes[first : last + 1] if bits >> self.index[node] & 1 and self.of[node] >> first & 1
        )


def products_found(program: Program) -> str:
    """The operators that mix channels or tokens, with their counts: what a model without blocks is made of."""
    mixers = (node for node in program.graph.nodes if is_product(node) or mixes_tokens(node))
    counts = Counter(target_name(node) for node in mixers)
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items())) or "no matrix product"


def residual_branches(program: Program, ancestry: Ancestry) -> list[Branch]:
    """All additions to the residual stream, in order."""
    branches: dict[Node, Branch] = {}
    scores = _attention_scores(program)
    for node in program.graph.nodes:
        if node.target not in (aten.add.Tensor, aten.add_.Tensor) or len(shape_of(node)) < 2 or node in scores:
            continue
        operands = [operand for operand in node.args[:2] if isinstance(operand, Node) and _same_shape(operand, node)]
        if len(operands) != 2:
            continue
        for carried, added in (operands, reversed(operands)):
            stream = _stream_of(carried, added, branches, ancestry)
            if stream is not None:
                branches[node] = Branch(node, stream, added)
                break
    return list(branches.values())


def _attention_scores(program: Program) -> set[Node]:
    """What is softmaxed without a matrix product in between: a mask that all layers add is no residual stream."""
    scores: set[Node] = set()
    for node in program.graph.nodes:
        if is_attention_softmax(node):
            scores.update(before_products(node))
    return scores


def _same_shape(left: Node, right: Node) -> bool:
    first, second = shape_of(left), shape_of(right)
    return len(first) == len(second) and all(same_size(a, b) for a, b in zip(first, second, strict=True))


def _stream_of(carried: Node, added: Node, branches: dict[Node, Branch], ancestry: Ancestry) -> Node | None:
    """The stream that `added` was computed from: `carried`, or what earlier additions carried on to it."""
    while True:
        if ancestry.depends(added, carried):
            return carried if carried not in before_products(added) else None
        if carried in branches:
            branch = branches[carried]
            carried = next(operand for operand in branch.addition.args[:2] if operand is not branch.added)  # type: ignore[assignment]
        elif (rescaled := _rescaled(carried)) is not None:
            carried = rescaled
        else:
            return None


def _rescaled(node: Node) -> Node | None:
    """What a node treats element by element, or multiplies with one number a channel; None for all else."""
    if is_rescaling(node):
        return node.all_input_nodes[0]
    if node.target not in (aten.mul.Tensor, aten.mul_.Tensor):
        return None
    whole = [operand for operand in node.all_input_nodes if len(shape_of(operand)) > 1]
    return whole[0] if len(whole) == 1 and _same_shape(whole[0], node) else None


def closing_products(branch: Branch, ancestry: Ancestry) -> list[Node]:
    """The last matrix products on every path from the stream to what is added to it."""
    found = [
        node for node in before_products(branch.added) if is_product(node) and ancestry.depends(node, branch.stream)
    ]
    later = [node for node in found if not _is_first(node, branch.stream, ancestry)]
    ends = [
        node for node in found if not any(_goes_round(node, other, ancestry) for other in later if other is not node)
    ]
    return sorted(ends, key=ancestry.index.__getitem__)


def _is_first(product: Node, stream: Node, ancestry: Ancestry) -> bool:
    """Whether a linear multiplies the stream itself, with no product before it: a gate or a router, but no exit."""
    between = ancestry.between(stream, linear_activations(product)) if is_linear(product) else frozenset({product})
    return not any(map(is_product, between - {stream}))


def _goes_round(detour: Node, product: Node, ancestry: Ancestry) -> bool:
    """Whether a product comes, by way of another, from what `product` multiplies: an adapter beside a linear."""
    if not (is_linear(detour) and is_linear(product)) or ancestry.depends(detour, product):
        return False
    start, end = linear_activations(product), linear_activations(detour)
    return ancestry.depends(end, start) and any(is_product(node) for node in ancestry.between(start, end) - {start})


def _draft(program: Program, branch: Branch, product: Node, ancestry: Ancestry) -> tuple[Site, Block | None] | None:
    """A site for this product; None for a first-layer product such as a router, which has no channels to drop."""
    parameter = weight_parameter(program, product)
    stream = unflattened(branch.stream)
    is_shared = is_linear(product) and not ancestry.depends(linear_weight(product)[0], stream)
    operand = linear_activations(product) if is_shared else product
    region = ancestry.between(stream, operand)
    if is_shared and not any(is_product(node) for node in region):
        return None
    attention = [node for node in region if is_fused_attention(node) or is_attention_softmax(node)]
    kind: Kind = "attention" if attention else "mlp"
    name, layer = _label(program, product, parameter, region)
    site = Site(name=name, kind=kind, layer=layer, exit=_names(program, product, parameter))
    if parameter is None:
        return replace(site, reason=str(Refusal(product, _why_no_exit(product))), refused=True), None
    mixer = next((node for node in region if mixes_tokens(node)), None)
    if mixer is not None and not attention:
        reason = str(Refusal(mixer, "it mixes neighbouring tokens, so a probe of some of them can't run this block"))
        return replace(site, reason=reason, refused=True), None
    width, last = shape_of(operand)[-1], max(attention, key=ancestry.index.__getitem__, default=None)
    site = replace(site, width=width, units=_units(kind, width, stream, last))
    try:
        _require_samples_first(program, stream)
        narrowing = NarrowingPlanner(program, product, operand, region, ancestry.index).run(site.block)
        if attention and not any(node in narrowing.axes for node in attention):
            raise (narrowing.stops[0] if narrowing.stops else Refusal(operand, "its channels don't come out by head"))
        probe = plan_probe(stream, operand, region)
    except Refusal as refusal:
        exchange = min(filter(is_collective, region), key=ancestry.index.__getitem__, default=None)
        reason = str(refusal if exchange is None else Refusal(exchange, EXCHANGED))
        return replace(site, reason=reason, refused=True), None
    entry = [
        name for linear in narrowing.entries for name in _names(program, linear, weight_parameter(program, linear))
    ]
    block = Block(stream, product, operand, region, *linear_weight(product), narrowing, probe)
    rows = sum(layout.channels.shape[1] for entry in narrowing.entries.values() for layout in entry.narrowed.values())
    unit_macs = shape_of(stream)[-1] * (rows + site.block)
    return replace(site, entry=tuple(entry), unit_macs=unit_macs, channel_dim=block.weight_dim), block


def _require_samples_first(program: Program, stream: Node) -> None:
    """Raise Refusal where the model keeps tokens ahead of samples, which would be taken for one another."""
    if program.batch is None or all(map(same_size, shape_of(stream)[:2], program.batch)):
        return
    if all(map(same_size, shape_of(stream)[:2], reversed(program.batch))):
        raise Refusal(stream, "the residual stream is [tokens, samples, hidden]; pruning needs samples ahead of tokens")


def _why_no_exit(product: Node) -> str:
    stacked = [shape_of(weight) for weight in _weights_near(product) if len(shape_of(weight)) == 3]
    if stacked:
        return (
            f"its weight {list(stacked[0])} is a stack of experts that tokens choose from; pruning needs a linear with "
            "one weight for all tokens"
        )
    return "the block does not end in a linear with a weight parameter, as pruning needs"


def unflattened(stream: Node) -> Node:
    """The residual stream [B, S, D] where the model flattens it to [B·S, D] before a block."""
    while len(shape_of(stream)) == 2 and is_reshape(stream):
        source = stream.args[0]
        if not isinstance(source, Node) or not same_size(shape_of(source)[-1], shape_of(stream)[-1]):
            break
        stream = source
    return stream


def _units(kind: Kind, width: int, stream: Node, attention: Node | None) -> int:
    """Query heads of the attention [B, H, S, D] or [B·H, S, D] that a block runs, or the channels themselves."""
    if kind == "mlp" or attention is None:
        return width
    shape = shape_of(attention)
    heads = expression(shape[-3])
    if len(shape) == 3:
        heads = quotient(heads, expression(shape_of(stream)[0])) or heads
    return int(heads) if heads.is_Integer and width % int(heads) == 0 else width


def _names(program: Program, linear: Node, weight: Node | None) -> tuple[str, ...]:
    nodes = [weight, linear_bias(linear)]
    return tuple(program.parameters[node] for node in nodes if node is not None and node in program.parameters)


def _label(program: Program, product: Node, parameter: Node | None, region: frozenset[Node]) -> tuple[str, int]:
    """A site's name (the module that holds its exit linear) and layer number (the first number in that name)."""
    if parameter is None:
        nearest = [operand for operand in _weights_near(product) if operand in program.parameters]
        parameter = nearest[0] if nearest else None
    if parameter is None:
        inside = {operand for node in region for operand in node.all_input_nodes if operand in program.parameters}
        parameter = min(inside, key=lambda node: program.parameters[node], default=None)
    if parameter is None:
        return product.name, 0
    module = program.parameters[parameter].rpartition(".")[0]
    holder = module.rpartition(".")[0] if is_linear(product) else module
    number = re.search(r"\.(\d+)(?:\.|$)", f".{module}")
    return holder or module, int(number.group(1)) if number else 0


def _weights_near(node: Node) -> list[Node]:
    """Placeholders that a product multiplies with, seen through casts and views."""
    found: list[Node] = []
    for operand in node.all_input_nodes:
        while operand.op == "call_function" and len(operand.all_input_nodes) == 1 and not is_product(operand):
            operand = operand.all_input_nodes[0]
        if operand.op == "placeholder":
            found.append(operand)
    return found


def _with_unique_names(program: Program, drafts: list[tuple[Site, Block | None]]) -> list[tuple[Site, Block | None]]:
    """Sites whose exit linear sits on the layer itself take that linear's name; leftovers are numbered."""
    named: list[tuple[Site, Block | None]] = []
    taken: dict[str, int] = {}
    for site, block in drafts:
        name = site.name
        if re.search(r"\.\d+$", name) and site.exit:
            name = site.exit[0].rpartition(".")[0]
        taken[name] = taken.get(name, 0) + 1
        if taken[name] > 1:
            name = f"{name}#{taken[name]}"
        named.append((replace(site, name=name), block))
    return named


def _with_widths(program: Program, drafts: list[tuple[Site, Block | None]]) -> list[tuple[Site, Block | None]]:
    """Decide what each site keeps."""
    config = program.config
    layers = len({site.layer for site, _ in drafts})
    if not any(not site.refused for site, _ in drafts):
        return drafts
    ratio = layer_ratio(config, layers)
    first_layers = set(sorted({site.layer for site, _ in drafts})[: config.skip_layers])
    decided: list[tuple[Site, Block | None]] = []
    for site, block in drafts:
        if site.refused:
            decided.append((site, block))
            continue
        skipped = site.layer in first_layers
        kept = _kept_units(program, site, ratio) * site.block
        reason = _reason_for_dense(program, site, kept, skipped)
        site = replace(
            site,
            kept=site.width if reason else kept,
            status="dense" if reason else "pruned",
            reason=reason,
            candidate=not skipped and site.kind in config.blocks,
        )
        decided.append((site, block))
    return decided


def _kept_units(program: Program, site: Site, ratio: float) -> int:
    """As allocated, or the same share of every layer; MLP widths rounded up."""
    if program.allocation is None:
        share = kept_heads(site.units, ratio)
    else:
        share = min(max(program.allocation.get(site.name, site.units), 0), site.units)
    return share if site.kind == "attention" else rounded_up(share, program.config.width_multiple, site.units)


def _reason_for_dense(program: Program, site: Site, kept: int, skipped: bool) -> str:
    config: Any = program.config
    if skipped:
        return f"one of the first {config.skip_layers} layers (skip_layers)"
    if site.kind not in config.blocks:
        return f"blocks={config.blocks} leaves {site.kind} dense"
    if kept >= site.width and program.allocation is not None:
        return f"allocation={config.allocation!r} removes nothing of {site.width} channels"
    if kept >= site.width:
        return f"ratio={config.ratio} removes nothing of {site.width} channels"
    return ""
