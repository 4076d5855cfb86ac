"""`explain`: what pruning would do to a model, before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ppgraph import _torch
from ppgraph.config import PruneConfig
from ppgraph.errors import PPGraphError
from ppgraph.inspect.dump import observers
from ppgraph.inspect.flops import (
    Sizes,
    WeightBytes,
    Work,
    count_flops,
    count_gathered_bytes,
    count_weight_bytes,
    uncounted_products,
)
from ppgraph.inspect.rates import Rates, break_even_samples, predicted_speedup
from ppgraph.inspect.report import flops_totals, site_columns, status_columns, title, uncounted_note
from ppgraph.inspect.tables import Column, Table, binary_prefix, count, decimal_prefix, number, size, why_dense
from ppgraph.passes import PRUNE, PassResult, Program, Site, run_passes
from ppgraph.passes.base import shape_of
from ppgraph.passes.find_sites import Ancestry, Block
from ppgraph.runtime import Phase, Runtime
from ppgraph.transform import Pruning, check_inputs, require_causal_lm

MISSING = "-"


@dataclass(frozen=True)
class SiteCost:
    """A site with the work of its block; None for a block that could not be followed."""

    site: Site
    flops: Work | None
    weights: WeightBytes | None

    def to_dict(self) -> dict[str, Any]:
        """The site's public fields, `flops` and `weight_bytes`."""
        return self.site.to_dict() | {
            "flops": self.flops.to_dict() if self.flops else None,
            "weight_bytes": self.weights.to_dict() if self.weights else None,
        }


@dataclass(frozen=True)
class Explanation:
    """What `explain` gives: `str()` is a table, `to_dict()` all of it, HTML shows in notebooks.

    `flops`, `weights` and `gathered_bytes` are of the whole model on one prefill of `batch` = [samples, tokens].
    `uncounted` names products that the FLOPs leave out because nobody said what they cost. `rates` are those measured
    on the model's device; None on one that runs nothing ("meta").
    """

    config: PruneConfig
    batch: tuple[int, int]
    costs: tuple[SiteCost, ...]
    flops: Work
    weights: WeightBytes
    gathered_bytes: int
    uncounted: dict[str, int]
    rates: Rates | None

    @property
    def sites(self) -> tuple[Site, ...]:
        """One record a block, in order."""
        return tuple(cost.site for cost in self.costs)

    @property
    def speedup_limit(self) -> float:
        """Dense FLOPs over those of probe and pruned model, which no measured speedup is expected to exceed."""
        return self.flops.speedup

    @property
    def predicted_speedup(self) -> float:
        """The speedup of the products with gathering the weights counted in, at the device's measured rates.

        Scores and the history are not counted, nor is what a compiler fuses differently. Without rates it is
        `speedup_limit`.
        """
        return predicted_speedup(self.flops, self.gathered_bytes, self.rates) if self.rates else self.speedup_limit

    @property
    def break_even_samples(self) -> int | None:
        """From how many samples of this length on pruning is predicted to save time; None if none, or without rates."""
        if self.rates is None:
            return None
        return break_even_samples(self.flops, self.batch[0], self.config.probe_batch, self.gathered_bytes, self.rates)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        return {
            "config": self.config.to_dict(),
            "batch": list(self.batch),
            "sites": [cost.to_dict() for cost in self.costs],
            "flops": self.flops.to_dict(),
            "uncounted": self.uncounted,
            "speedup_limit": self.speedup_limit,
            "predicted_speedup": self.predicted_speedup,
            "break_even_samples": self.break_even_samples,
            "rates": self.rates.to_dict() if self.rates else None,
            "weight_bytes": self.weights.to_dict(),
            "gathered_bytes": self.gathered_bytes,
        }

    def __str__(self) -> str:
        return self._table().text()

    def _repr_html_(self) -> str:
        return self._table().html()

    def _table(self) -> Table:
        samples, tokens = self.batch
        return Table(
            title=f"{title(self.config, self.sites)} on {samples} samples of {tokens} tokens",
            columns=[
                *site_columns(self.sites),
                *_flops_columns(self.costs),
                *_weight_columns(self.costs),
                *status_columns(self.sites, html_only=True),
                Column("entry", [", ".join(site.entry) for site in self.sites], html_only=True),
                Column("exit", [", ".join(site.exit) for site in self.sites], html_only=True),
            ],
            totals=self._totals(),
            notes=[*why_dense(self.sites), *uncounted_note(self.uncounted)],
        )

    def _totals(self) -> list[tuple[str, str]]:
        return [
            *flops_totals(self.flops),
            ("weights", f"{size(self.weights.dense)} dense, {size(self.weights.pruned)} pruned"),
            ("gathered weights", f"{size(self.gathered_bytes)} a batch, read once and written once"),
            *self._predictions(),
        ]

    def _predictions(self) -> list[tuple[str, str]]:
        limit = f"{self.speedup_limit:.2f} by FLOPs alone"
        if self.rates is None:
            return [("speedup", f"at most {limit}")]
        rates = self.rates
        measured = f"{count(rates.flops_per_second, 'FLOP/s')} and {size(rates.bytes_per_second)}/s, measured here"
        samples, tokens = self.break_even_samples, self.batch[1]
        return [
            ("speedup", f"about {self.predicted_speedup:.2f} predicted ({measured}); {limit}"),
            ("break-even", f"from {samples} x {tokens} tokens on" if samples else "at no batch of this length"),
        ]


def explain(model: nn.Module, config: PruneConfig | None = None, **inputs: Any) -> Explanation:
    """Say what pruning would do to `model` on a batch of these inputs, and why not to some blocks.

    The model is captured and rewritten as `transform` would at its first call, but neither run nor compiled.

    Args:
        model: A causal language model of transformers in eval mode.
        config: What to prune; the default config when None.
        **inputs: The model's inputs, such as `input_ids` [B, S] and `attention_mask`; what is neither a parameter
            of its forward nor a tensor is a field of `PruneConfig` that replaces that of `config`.

    Raises:
        NothingToPruneError: not one block can be rewritten.
        UnsupportedModelError: no causal language model, one in training mode, or a refusal with `strict`.
        ConfigError: a bad field.
        InputError: no token ids or embeddings, or inputs that a pruned model refuses.
    """
    require_causal_lm(model)
    arguments, overrides = _split(model, inputs)
    config = (config or PruneConfig()).replace(**overrides)
    check_inputs(model, arguments)
    runtime = _ExplainingRuntime(config)
    try:
        Pruning(model, runtime).run("prefill", arguments)
    except _Explained:
        weight = next(model.parameters())
        return replace(runtime.explanation, rates=Rates.measured(weight.device, weight.dtype))
    raise AssertionError("the capture ended without a graph")


class _Explained(PPGraphError):
    """Ends a capture once its graph has been explained. A PPGraphError, which Dynamo's backend call hands on."""


class _ExplainingRuntime(Runtime):
    """Explains the graph that it is given to compile, as `explanation`."""

    explanation: Explanation

    def compile(
        self, module: GraphModule, phase: Phase | None = None, positional: Sequence[str] = ()
    ) -> Callable[..., Sequence[Any]]:
        self.explanation = _explanation(module, self)
        raise _Explained


def _split(model: nn.Module, keywords: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keywords for the model's forward, and those for its `PruneConfig`."""
    known = inspect.signature(type(model).forward).parameters
    arguments = {name: value for name, value in keywords.items() if name in known or isinstance(value, torch.Tensor)}
    return arguments, {name: value for name, value in keywords.items() if name not in arguments}


def _explanation(module: GraphModule, runtime: Runtime) -> Explanation:
    """Measure a graph from Dynamo, rewrite it, and measure it again."""
    program = runtime.analyse(module)
    sizes = Sizes.of_first_call(program.graph)
    samples, tokens, *_ = shape_of(program.stream)
    uncounted = uncounted_products(program.graph.nodes)
    dense = _measure(program, sizes)
    with _torch.graph_world(_torch.fake_mode_of(_torch.placeholder_values(module))):
        _watch(program)
        run_passes(program, [step for step in PRUNE if step.name not in program.applied])
    pruned = _measure(program, sizes)
    return Explanation(
        config=runtime.config,
        batch=(sizes(samples), sizes(tokens)),
        costs=tuple(SiteCost(site, *_compared(dense, pruned, site.name)) for site in program.sites),
        flops=_work(dense.whole, pruned.whole),
        weights=WeightBytes(dense.whole.weight_bytes, pruned.whole.weight_bytes),
        gathered_bytes=count_gathered_bytes(program.graph.nodes, sizes),
        uncounted=uncounted,
        rates=None,
    )


def _watch(program: Program) -> None:
    """Let graph dumps see the rewriting; what is analysed by now they see as it stands."""
    program.observer = observers("explain")
    if program.observer is not None:
        program.observer(program, "captured", PassResult(), 0.0)
        refused = [f"{site.name}: {site.reason}" for site in program.sites if site.refused]
        program.observer(program, "find_sites", PassResult(refused=refused), 0.0)


@dataclass(frozen=True)
class _Measured:
    """FLOPs of a model and of a probe, and the bytes of weights read."""

    model: int
    probe: int
    weight_bytes: int

    @classmethod
    def of(cls, nodes: Sequence[Node], sizes: Sizes) -> _Measured:
        flops = count_flops(nodes, sizes)
        return cls(flops["model"], flops["probe"], count_weight_bytes(nodes, sizes))


@dataclass(frozen=True)
class _Measurement:
    """A graph measured as a whole and by site."""

    whole: _Measured
    blocks: dict[str, _Measured]


def _measure(program: Program, sizes: Sizes) -> _Measurement:
    ancestry = Ancestry(program)
    blocks: dict[str, _Measured] = {}
    for site in program.sites:
        block: Block | None = program.analysis[site.name]
        if block is not None:
            nodes = ancestry.between(block.stream, _exit_of(program, site, block))
            blocks[site.name] = _Measured.of(list(nodes), sizes)
    return _Measurement(_Measured.of(ancestry.nodes, sizes), blocks)


def _exit_of(program: Program, site: Site, block: Block) -> Node:
    """The site's exit linear as it is now: the dense one, or what stands in its place."""
    exit_linear: Node = program.shared.get(("exit", site.name), block.exit_linear)
    return exit_linear


def _compared(dense: _Measurement, pruned: _Measurement, name: str) -> tuple[Work | None, WeightBytes | None]:
    if name not in dense.blocks:
        return None, None
    before, after = dense.blocks[name], pruned.blocks[name]
    return _work(before, after), WeightBytes(before.weight_bytes, after.weight_bytes)


def _work(dense: _Measured, pruned: _Measured) -> Work:
    return Work(dense.model, pruned.probe, pruned.model)


def _flops_columns(costs: Sequence[SiteCost]) -> list[Column]:
    prefix, divisor = decimal_prefix(max((cost.flops.dense for cost in costs if cost.flops), default=0))
    made = []
    for part in ("dense", "pruned", "probe"):
        values = [getattr(cost.flops, part) if cost.flops else None for cost in costs]
        made.append(_numbers(f"{prefix}FLOP\n{part}", values, divisor))
    return made


def _weight_columns(costs: Sequence[SiteCost]) -> list[Column]:
    prefix, divisor = binary_prefix(max((cost.weights.dense for cost in costs if cost.weights), default=0))
    made = []
    for part in ("dense", "pruned"):
        values = [getattr(cost.weights, part) if cost.weights else None for cost in costs]
        made.append(_numbers(f"{prefix}B\n{part}", values, divisor))
    return made


def _numbers(header: str, values: Sequence[int | None], divisor: float) -> Column:
    cells = [MISSING if value is None else number(value / divisor) for value in values]
    return Column(header, cells, is_number=True)
