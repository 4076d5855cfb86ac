"""What runs between Dynamo and the rewritten graphs of one model: rewriting, lowering, state in and out."""

from __future__ import annotations

import copy
import functools
import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch.fx import Graph, GraphModule

from ppgraph import _torch
from ppgraph.capture import capture
from ppgraph.config import PruneConfig, layer_ratio
from ppgraph.errors import (
    DecodeError,
    GraphError,
    MethodError,
    NonFiniteError,
    NothingToPruneError,
    UnsupportedModelError,
)
from ppgraph.inspect import rates as device_rates
from ppgraph.inspect.dump import observers
from ppgraph.interrupts import interrupts_held_back
from ppgraph.kernels import highest_by_sorting
from ppgraph.lowering import Compiled, lower, written_inputs
from ppgraph.methods import ALLOCATIONS, SCORES, Candidate, require_consistent
from ppgraph.passes import ANALYSE, CALIBRATE, CHOOSE, PRUNE, REUSE, Pass, Program, Site, run_passes
from ppgraph.passes.base import Packing, StateInput, same_size, shape_of
from ppgraph.passes.find_sites import products_found
from ppgraph.passes.operators import is_attention_softmax, is_fused_attention
from ppgraph.replay import Replayed
from ppgraph.selections import SelectionStatistics
from ppgraph.sharding import Share, local_values, share_of
from ppgraph.state import History

log = logging.getLogger("ppgraph")

Phase = Literal["prefill", "choose", "history", "calibrate", "reuse", "dense"]
# The phases of prompts, whose calls choose what steps of decoding keep.
CHOOSING: tuple[Phase, ...] = ("prefill", "choose", "history")
# The attribute by which caches, and the tensors in them, carry the selection of the prefill that filled them.
SELECTION = "_ppgraph_selection"
# The attribute by which caches that count on the device carry what they counted: the tensor, its version, the number.
LENGTH = "_ppgraph_length"

_PASSES: dict[Phase, tuple[Pass, ...]] = {
    "prefill": PRUNE,
    "choose": CHOOSE,
    "history": REUSE,
    "calibrate": CALIBRATE,
    "reuse": REUSE,
    "dense": ANALYSE,
}


@dataclass(frozen=True)
class GraphRecord:
    """One graph of a model: as `captured`, as `rewritten`, for which `phase`, with which input shapes.

    `batch` are the sizes, symbolic or not, of samples and tokens; `seconds` is what rewriting and lowering took.
    `sites` are the blocks as this graph has them: one may refuse what another can rewrite.
    """

    phase: Phase
    captured: GraphModule
    rewritten: GraphModule
    shapes: dict[str, tuple[str, ...]]
    batch: tuple[Any, Any]
    seconds: float
    sites: tuple[Site, ...] = ()

    def sizes(self, samples: int, tokens: int) -> dict[Any, int]:
        """What the graph's symbols stand for in a batch of that shape."""
        formulas = [_torch.expression(size) for size in self.batch]
        return {formula: value for formula, value in zip(formulas, (samples, tokens), strict=True) if formula.is_Symbol}


@dataclass(frozen=True)
class Selection:
    """What one prompt chose: {site name: kept channels [C'] int64}. `owner` names the runtime it is for.

    `by_token` holds, of sites whose tokens differ, which rows of the batch (of `shape` [B, S], flattened) kept all
    channels, and what the others kept. Caches that a pruned model fills carry a selection, so that each generation
    decodes with its own.
    """

    owner: str
    channels: dict[str, torch.Tensor]
    by_token: dict[str, tuple[torch.Tensor, torch.Tensor]]
    shape: tuple[int, int]

    @functools.cached_property
    def sites(self) -> frozenset[str]:
        """The names of the sites that were pruned."""
        return frozenset(self.channels)


@dataclass
class Call:
    """What a graph's inputs don't say about the call: positions already in the cache, and the selection to reuse.

    `ran` tells afterwards that a rewritten graph ran it.
    """

    start: int = 0
    selection: Selection | None = None
    ran: bool = False


@dataclass
class Runtime:
    """Everything that the graphs of one pruned model share.

    The history's lock is held during a call: threads on one model take turns, and the history moves in the order of
    their calls.
    """

    config: PruneConfig
    lowering: str = "inductor"
    options: Mapping[str, Any] = field(default_factory=dict)
    sites: list[Site] | None = None
    selection: Selection | None = None
    graphs: list[GraphRecord] = field(default_factory=list)
    last_shape: tuple[int, int] | None = None
    call: Call = field(default_factory=Call)
    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        require_consistent(self.config)
        self.history = History(self.config)
        self.statistics = SelectionStatistics()
        self.shares: dict[str, Share] = {}
        self._terms: dict[str, tuple[tuple[int, int], torch.Tensor]] = {}
        self._packed: dict[str, tuple[Selection, Sequence[int], torch.Tensor]] = {}
        # What was read last: steps ask for the same again and again.
        self._last_packed: tuple[Packing, Selection, Sequence[int], Sequence[torch.Tensor]] | None = None
        self._by_history: tuple[int, Mapping[str, torch.Tensor], Selection] | None = None
        self._smallest_batch: float = math.inf  # tokens of the smallest one looked at; 0 once a warning is out

    @property
    def lock(self) -> threading.RLock:
        """What a call holds: nobody else moves, saves or loads the history meanwhile."""
        return self.history.lock

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        """The same state for a copied model; its graphs are compiled anew."""
        made = Runtime(self.config, self.lowering, dict(self.options), self.sites)
        made.shares = dict(self.shares)
        made.history = copy.deepcopy(self.history, memo)
        if self.selection is not None:
            made.keep_selection(dict(self.selection.channels), self.selection.by_token, self.selection.shape)
        return made

    def compile(self, module: GraphModule, phase: Phase | None = None, positional: Sequence[str] = ()) -> Compiled:
        """Rewrite and lower a graph from Dynamo; the result takes the same inputs and gives the same outputs.

        Without a `phase` the graph tells: one token that attends to more than itself is a step of decoding. A prompt
        has the phase of its size (`PruneConfig.dense_below`, `history_below`).
        `positional` are the names of arguments that were given by position.
        """
        start = time.perf_counter()
        values = _torch.placeholder_values(module)
        with _torch.graph_world(_torch.fake_mode_of(values)):
            program, _ = capture(module, self.config, positional)
            program.allocation = self.history.kept_here()
            code = _torch.traced_code() if phase is None else None
            phase = phase or self.phase_of(is_decoding_step(program), program.batch)
            program.observer = observers(phase)
            captured = _copy(program.module)
            outputs = len(program.output().args[0])  # type: ignore[arg-type]
            if phase in ("reuse", "history"):
                program.shared["selectable"] = self._selectable(phase)
            self._adopt(run_passes(program, _PASSES[phase]), phase)
            rewritten = _copy(program.module)
            lowered = self._lower(program, phase)
        seconds = time.perf_counter() - start
        batch = shape_of(program.stream)[:2]
        record = GraphRecord(phase, captured, rewritten, _input_shapes(captured), batch, seconds, tuple(program.sites))
        self.graphs.append(record)
        log.info("%s graph %d: rewritten and lowered in %.1f s", phase, len(self.graphs), seconds)
        return GraphRunner(self, program, lowered, outputs, phase, code)

    def warn_below_break_even(self, samples: int, tokens: int, weight: torch.Tensor) -> None:
        """Say once that a batch is predicted to take longer than dense, at rates measured with `weight`'s dtype."""
        if tokens == 1 or samples * tokens >= self._smallest_batch:
            return
        from ppgraph.inspect.report import BatchCost  # which needs this module

        self._smallest_batch = samples * tokens
        cost, rates = BatchCost.of(self), device_rates.once_measured(weight.device, weight.dtype)
        if cost is None or rates is None:
            return
        speedup = device_rates.predicted_speedup(cost.flops, cost.gathered_bytes, rates)
        if speedup < 1:
            self._smallest_batch = 0
            log.warning(
                "pruning is predicted to slow this batch of %d x %d tokens down (%.2f of dense's speed): the probe and "
                "the selection of weights take longer than what they save. Larger batches pay: `ppgraph explain` names "
                "the break-even, and PruneConfig(dense_below=tokens) lets prompts below it run dense, "
                "PruneConfig(history_below=tokens) on what calibration says, packed once",
                samples, tokens, speedup,
            )  # fmt: skip

    def phase_of(self, is_step: bool, batch: tuple[Any, Any] | None) -> Phase:
        """The phase of a call: a step's is what the config does with those, a prompt's depends on its size.

        `batch` are samples and tokens; asked of symbolic sizes, the answer becomes a guard of their graph.
        """
        steps: dict[str, Phase] = {"reuse": "reuse", "dense": "dense", "probe": "prefill"}
        if is_step:
            return steps[self.config.decode]
        by_history = self.config.history_below if self.config.ratio else 0  # without, nothing is observed
        limits: dict[Phase, int] = {"choose": self.config.dense_below, "history": by_history}
        for phase, limit in limits.items():
            if batch is not None and limit and bool(batch[0] * batch[1] < limit):
                return phase
        return "prefill"

    def analyse(self, module: GraphModule) -> Program:
        """Find the sites of a graph from Dynamo without rewriting it."""
        with _torch.graph_world(_torch.fake_mode_of(_torch.placeholder_values(module))):
            program, _ = capture(module, self.config)
            program.allocation = self.history.kept_here()
            self._adopt(run_passes(program, ANALYSE), "dense")
        return program

    def keep_selection(
        self,
        channels: dict[str, torch.Tensor],
        by_token: dict[str, tuple[torch.Tensor, torch.Tensor]],
        shape: tuple[int, int],
    ) -> None:
        """Remember what a prefill chose, as a `Selection` has it."""
        self.selection = Selection(self.name, channels, by_token, shape)

    def selection_to_reuse(self) -> Selection:
        """The selection for a step of decoding: the call's own, or the last one.

        Raises:
            DecodeError: no prefill has chosen anything yet, or another model's did.
        """
        selection = self.call.selection or self.selection
        if selection is None:
            raise DecodeError(
                "a decoding step before any prefill: there is no selection to reuse; run the prompt through this model "
                'first, or use PruneConfig(decode="dense")'
            )
        if selection.owner != self.name:
            raise DecodeError(
                "this cache was filled by another pruned model; decode with that one, or run the prompt here"
            )
        return selection

    def _selectable(self, phase: Phase) -> frozenset[str]:
        """The names of the sites that a graph which takes its selection can prune."""
        if phase == "reuse":
            return self.selection_to_reuse().sites
        with _torch.unset_fake_temporarily():
            return self.history.require_observed()

    def selection_by_history(self, sites: Iterable[Site], terms: Mapping[str, torch.Tensor]) -> Selection:
        """What the history alone says that `sites` keep, with the weight terms of their scores, {site name: [C]}.

        It is the same object, whose packed weights are kept, until the history or a weight changes.
        """
        known, version = self._by_history, self.history.version
        if known is None or known[0] != version or not _are_same(known[1], terms):
            self.history.require_observed()
            with torch.inference_mode(False), torch.no_grad():
                channels = {site.name: self._kept_by_history(site, terms[site.name]) for site in sites}
            known = self._by_history = (version, terms, Selection(self.name, channels, {}, (0, 0)))
        return known[2]

    def _kept_by_history(self, site: Site, term: torch.Tensor) -> torch.Tensor:
        """The channels [C'] of the site's units with the highest scores, from all positions together."""
        channels = SCORES[self.config.score].channels(self.history[site.name].sum(0), term)
        units = highest_by_sorting(self._unit_scores(site, channels), site.kept_units)
        return (units.unsqueeze(1) * site.block + torch.arange(site.block, device=units.device)).flatten()

    def weight_term(self, site: str, weight: torch.Tensor, dim: int) -> torch.Tensor:
        """The part of a site's score that only its exit weight decides, [C] fp32; kept until the weight changes."""
        version = (weight.data_ptr(), _version(weight))
        known = self._terms.get(site)
        if known is None or known[0] != version:
            with torch.inference_mode(False), torch.no_grad():
                term = self._weight_term((weight.detach() if dim == 1 else weight.detach().t()).float())
            known = self._terms[site] = (version, term)
        return known[1]

    def _weight_term(self, weight: torch.Tensor) -> torch.Tensor:
        """The configured score's weight term of an exit weight [D, C] fp32."""
        name = self.config.score
        term = SCORES[name].weight_term(weight)
        if not isinstance(term, torch.Tensor) or term.shape != weight.shape[1:]:
            found = list(term.shape) if isinstance(term, torch.Tensor) else term
            raise MethodError(f"score {name!r}: weight_term must have shape [{weight.shape[1]}], found {found}")
        return term.float().contiguous()

    def allocate(
        self,
        sites: Sequence[Site],
        parameter: Callable[[str], torch.Tensor],
        losses: Callable[[Sequence[Candidate]], Mapping[str, torch.Tensor]],
    ) -> None:
        """Decide what each of a model's `sites` keeps from what calibration observed; later captures follow.

        Of a model that is spread over ranks the whole decides, and each rank keeps its portion: every rank calls this.

        `parameter` gives a model's parameter by name, `losses` the loss curves of candidates where they are asked for.
        """
        allocation = ALLOCATIONS[self.config.allocation]
        if allocation is None or self.config.ratio == 0:
            return
        ratio = layer_ratio(self.config, len({site.layer for site in sites}))
        candidates = [self._candidate(site, parameter(site.exit[0])) for site in sites if site.candidate]
        if allocation.by_loss:
            self._refuse_spread_gradients()
            found = losses(candidates)
            candidates = [replace(candidate, losses=found[candidate.site.name]) for candidate in candidates]
        self.history.allocation = dict(allocation.allocate(candidates, ratio))

    def _candidate(self, site: Site, weight: torch.Tensor) -> Candidate:
        known = self.history.seen > 0
        memory = {tensor: value[known] for tensor, value in self.history.memory(site.name).items()}
        term = self.weight_term(site.name, weight, site.channel_dim)
        share = self.shares.get(site.name)
        if share is not None:
            memory = {tensor: share.whole(value) for tensor, value in memory.items()}
            site, term = replace(site, width=share.total, units=share.total // site.block), share.whole(term)
        scores = SCORES[self.config.score].channels(next(iter(memory.values())).sum(0), term)
        step = self.config.width_multiple if site.kind == "mlp" else 1
        return Candidate(site, scores, memory, step)

    def _refuse_spread_gradients(self) -> None:
        if self.shares:
            raise UnsupportedModelError(
                f"allocation={self.config.allocation!r} needs gradients of the loss, which ppgraph does not take "
                f"through channels on several ranks, as those of {next(iter(self.shares))} are; calibrate on one "
                "device and load that history here, or use allocation='global'"
            )

    def order_of(self, candidate: Candidate) -> torch.Tensor:
        """A candidate's units, the least important first: [U] int64."""
        return torch.sort(self._unit_scores(candidate.site, candidate.scores), stable=True).indices

    def _unit_scores(self, site: Site, channels: torch.Tensor) -> torch.Tensor:
        """Scores of a site's units [U] by those of its channels [C]."""
        return channels if site.block == 1 else SCORES[self.config.score].units(channels.view(site.units, site.block))

    def packed_weights(
        self, packing: Packing, inputs: Sequence[torch.Tensor], selection: Selection
    ) -> Sequence[torch.Tensor]:
        """Weights indexed by a selection; those of the last selection are kept, so memory holds one packed copy."""
        versions, last = [_version(value) for value in inputs], self._last_packed
        if last is not None and last[0] is packing and last[1] is selection and last[2] == versions:
            return last[3]
        self._last_packed = None  # until all is known to be filled
        filled = self._filled(packing, inputs, versions, selection)
        self._last_packed = (packing, selection, versions, filled)
        return filled

    def _filled(
        self, packing: Packing, inputs: Sequence[torch.Tensor], versions: Sequence[int], selection: Selection
    ) -> Sequence[torch.Tensor]:
        """The packed weights: those that a graph, this or another, has filled, or all of them filled anew."""
        states = [[versions[place] for place in places] for places in packing.made_of]
        held = [self._packed.get(content) for content in packing.contents]
        current = [
            one[2]
            for one, state in zip(held, states, strict=True)
            if one is not None and one[0] is selection and one[1] == state
        ]
        if len(current) == len(held):
            return current
        for content in packing.contents:
            self._packed.pop(content, None)  # which may be interrupted
        memory = packing.allocate(inputs[0].device, [None if one is None else one[2] for one in held])
        with torch.inference_mode(False), torch.no_grad():
            filled: Sequence[torch.Tensor] = packing.module(*inputs, *memory)
        entries = zip(packing.contents, states, filled, strict=True)
        self._packed |= {content: (selection, state, tensor) for content, state, tensor in entries}
        return filled

    @property
    def packed_bytes(self) -> int:
        """Memory of the packed weights that decoding reads."""
        return sum(tensor.nbytes for _, _, tensor in self._packed.values())

    def _adopt(self, program: Program, phase: Phase) -> None:
        """Check and remember what the analysis found, and tell what stays dense in this graph."""
        refused = [site for site in program.sites if site.refused]
        reasons = "\n".join(f"  {site.name}: {site.reason}" for site in refused)
        if len(refused) == len(program.sites):
            found = f"{len(refused)} blocks, none of which can be rewritten:\n{reasons}"
            if not refused:
                found = f"none that adds to a residual stream, only {products_found(program)}"
            raise NothingToPruneError(
                f"nothing to prune: expected attention or MLP blocks that end in a linear layer, found {found}"
            )
        if refused and self.config.strict:
            raise UnsupportedModelError(f"strict=True, and these blocks can't be rewritten:\n{reasons}")
        known = {site.name for site in self.sites or () if site.refused}
        for site in refused:
            if site.name not in known:
                where = "" if self.sites is None else f" in a {phase} graph"
                log.warning("%s stays dense%s: %s", site.name, where, site.reason)
        if self.sites is None:
            self.sites = list(program.sites)
        self.shares |= shares_of(program)
        observed = program.observed_sites
        if observed and self.config.needs_history:
            with _torch.unset_fake_temporarily():
                self.history.declare(observed, _device(program), self.shares)

    def _lower(self, program: Program, phase: Phase) -> Compiled:
        if self.lowering == "eager":
            return program.module
        if phase in ("prefill", "calibrate"):
            return lower(program, self.options)
        program.cuts.clear()  # a step of one token, or a small prompt, is over sooner than the calls that cuts make
        # Nobody has recorded what chooses by itself, or what ranks exchange, yet.
        is_recorded = phase != "choose" and not program.sharded
        if not is_recorded or not _torch.wants_cuda_graphs(self.options, _device(program)):
            return lower(program, self.options)
        written = written_inputs(program)  # lowering takes the graph
        return Replayed(lower(program, self.options), written)


class GraphRunner:
    """Calls one lowered graph: adds the state to its inputs and takes the selection from its outputs."""

    def __init__(
        self, runtime: Runtime, program: Program, lowered: Compiled, outputs: int, phase: Phase, code: Any
    ) -> None:
        self._phase, self._code = phase, code
        self._cached = cached_input(program)
        self._runtime, self._lowered, self._outputs = runtime, lowered, outputs
        self._state_inputs = program.state_inputs
        self._results = list(program.results)
        self._sites = {site.name: site for site in program.pruned_sites}
        self._checked = program.checked
        self._allocation, self._selects = program.allocation, phase not in ("dense", "calibrate")
        self._moves_history = phase == "calibrate" or (phase in ("prefill", "choose") and runtime.config.moves_history)
        self._constants: dict[int, torch.Tensor] = {}
        self._packing = program.packing
        self._takes_shares = bool(program.sharded)
        placeholders = program.placeholders()
        self._parameter_places = {placeholders.index(node) for node in program.parameters}
        self._units_of: dict[str, tuple[Selection, torch.Tensor]] = {}
        self._packing_places = [placeholders.index(node) for node in program.packing.inputs] if program.packing else []
        blocks = {name: program.analysis[name] for name in self._sites}
        self._weights = {name: (placeholders.index(block.weight), block.weight_dim) for name, block in blocks.items()}
        stream = program.stream
        self._batch = [_size_from_inputs(program, shape_of(stream)[dim]) for dim in (0, 1)]
        self._device = _device(program)

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        runtime = self._runtime
        if self._takes_shares:
            inputs = tuple(local_values(inputs))
        with runtime.lock:
            if self._code is None:
                return self._call(inputs)
            cache = cache_of(_torch.arguments_of(self._code))
            runtime.call = self._call_from(inputs, cache)
            outputs = self._call(inputs)
            self._hand_on(runtime.call.selection or runtime.selection, cache, [*inputs, *outputs])
            return outputs

    def _call_from(self, inputs: Sequence[Any], cache: Any) -> Call:
        """Without a wrapper around the model, the cache says where a call goes on and with what selection.

        A cache that the model made itself is not seen; then the keys and values in it carry the selection.
        """
        if self._phase != "reuse":
            start = inputs[self._cached[0]].shape[self._cached[1]] if self._cached else 0
            return Call(start if cache is None else cached_length(cache))
        marks = [getattr(value, SELECTION, None) for value in (cache, *inputs)]
        selection = next((mark for mark in marks if mark is not None), None)
        if selection is None:
            raise DecodeError(
                "this KV cache carries no selection to decode with: expected one that this model filled with a prompt "
                "of two tokens or more, passed as an argument if it is reordered or cropped in between. Run the prompt "
                'through this model, or use the option decode="dense" or ppgraph.transform'
            )
        return Call(selection=selection)

    def _hand_on(self, selection: Selection | None, cache: Any, values: Sequence[Any]) -> None:
        """Let the cache, and keys and values that enter or leave the graph, carry the selection that goes with them."""
        if selection is None or not self._selects:
            return
        tensors = [value for place, value in enumerate(values) if place not in self._parameter_places]
        for value in (cache, *(value for value in tensors if isinstance(value, torch.Tensor) and value.dim() == 4)):
            if value is not None:
                setattr(value, SELECTION, selection)

    def _call(self, inputs: Sequence[Any]) -> Sequence[Any]:
        runtime = self._runtime
        if self._selects and runtime.history.kept_here() != self._allocation:
            raise GraphError(
                "calibration (or a loaded history) changed how many units each block keeps, and this graph was "
                "captured before that; call torch.compiler.reset(), then the model again"
            )
        samples, length = (size(inputs) for size in self._batch)
        runtime.call.ran = True
        if self._phase == "history":
            runtime.call.selection = self._selection_by_history(inputs)
        with interrupts_held_back():  # the graph moves one site's history after the other
            if any(item.role in ("history", "seen") for item in self._state_inputs):
                runtime.history.reserve(runtime.call.start + length)
            outputs = self._lowered(*self._with_states(inputs, length))
            if self._moves_history:
                runtime.history.version += 1
            self._keep(dict(zip(self._results, outputs[self._outputs :], strict=True)), (samples, length))
        if self._phase == "prefill" and self._weights:
            runtime.warn_below_break_even(samples, length, inputs[next(iter(self._weights.values()))[0]])
        return outputs[: self._outputs]

    def _with_states(self, inputs: Sequence[Any], length: int) -> list[Any]:
        """The model's own inputs and what the graph takes beside them, in order; packed weights are the last."""
        values = list(inputs)
        packed: Sequence[torch.Tensor] = ()
        for index, item in enumerate(self._state_inputs):
            if item.role == "packed":
                packed = packed or self._packed(values)
                values.append(packed[int(item.site)])
            else:
                values.append(self._state(index, item, inputs, length))
        return values

    def _state(self, index: int, item: StateInput, inputs: Sequence[Any], length: int) -> torch.Tensor:
        runtime = self._runtime
        if item.role == "history":
            return runtime.history.rows(item.site, runtime.call.start, length, item.tensor)
        if item.role == "moment":
            return runtime.history.moment(item.site, item.tensor)
        if item.role == "centre":
            return runtime.history.centre(item.site, item.tensor)
        if item.role == "seen":
            return runtime.history.seen[runtime.call.start : runtime.call.start + length]
        if item.role == "weight_term":
            return self._weight_term(item.site, inputs)
        if item.role == "units":
            return self._units(item.site)
        if index not in self._constants:
            assert item.constant is not None
            self._constants[index] = item.constant.to(self._device)
        return self._constants[index]

    def _weight_term(self, site: str, inputs: Sequence[Any]) -> torch.Tensor:
        place, dim = self._weights[site]
        return self._runtime.weight_term(site, inputs[place], dim)

    def _selection_by_history(self, inputs: Sequence[Any]) -> Selection:
        terms = {site: self._weight_term(site, inputs) for site in self._sites}
        return self._runtime.selection_by_history(self._sites.values(), terms)

    def _units(self, site: str) -> torch.Tensor:
        """The kept units [U'] of the selection to reuse, in the same memory for every selection."""
        selection = self._runtime.selection_to_reuse()
        known = self._units_of.get(site)
        if known is None or known[0] is not selection:
            if site not in selection.channels:
                raise DecodeError(
                    f"the prompt's graph left {site} dense, while this step's graph prunes it; expected graphs that "
                    "agree. Decode with ppgraph.transform, which compiles a step for each"
                )
            block = self._sites[site].block
            with torch.inference_mode(False), torch.no_grad():
                units = selection.channels[site][::block] // block
                known = self._units_of[site] = (selection, units if known is None else known[1].copy_(units))
        return known[1]

    def _packed(self, values: Sequence[Any]) -> Sequence[torch.Tensor]:
        assert self._packing is not None
        needed = [values[place] for place in self._packing_places]
        return self._runtime.packed_weights(self._packing, needed, self._runtime.selection_to_reuse())

    def _keep(self, results: dict[Any, torch.Tensor], shape: tuple[int, int]) -> None:
        finite = results.pop("finite", None)
        if finite is not None and not bool(finite.all()):
            bad = [name for name, fine in zip(self._checked, finite.tolist(), strict=True) if not fine]
            raise NonFiniteError(
                f"this batch gave NaN or infinity at {bad[0]} ({len(bad)} of {len(self._checked)} sites); "
                "expected finite activations. The history and the last selection stay as they were; check the weights, "
                "the inputs and the dtype (fp16 overflows at 65504)"
            )
        self._runtime.last_shape = shape
        rows = {name[1]: results.pop(name) for name in [*results] if name[0] == "dense"}
        by_token = {site: (dense, results.pop(("others", site))) for site, dense in rows.items()}
        if self._phase == "history":
            self._runtime.selection = self._runtime.call.selection
        elif results:
            self._runtime.keep_selection(results, by_token, shape)
            self._runtime.statistics.add(results, self._runtime.sites or [])
        elif self._phase in CHOOSING:
            # The config removes nothing: steps that go on from here have that to keep to.
            self._runtime.keep_selection({}, {}, shape)


def shares_of(program: Program) -> dict[str, Share]:
    """This rank's share of the channels of each site whose exit weight is spread over ranks, by name."""
    blocks = {site.name: program.analysis[site.name] for site in program.sites if not site.refused}
    spread = {name: block for name, block in blocks.items() if block.weight in program.sharded}
    shares = {name: share_of(program.sharded[block.weight], block.weight_dim) for name, block in spread.items()}
    return {name: share for name, share in shares.items() if share is not None}


def _are_same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(left[name] is tensor for name, tensor in right.items())


def is_decoding_step(program: Program) -> bool:
    """Whether a graph runs one token that attends to more keys than itself."""
    for node in program.graph.nodes:
        if is_fused_attention(node):
            query, key = shape_of(node.args[0])[-2], shape_of(node.args[1])[-2]
            return query == 1 and not same_size(key, 1)
        if is_attention_softmax(node):
            query, key = shape_of(node)[-2:]
            return query == 1 and not same_size(key, 1)
    return False


def cached_input(program: Program) -> tuple[int, int] | None:
    """Which input, along which dimension, holds the keys of earlier calls; None when the graph joins none."""
    placeholders = program.placeholders()
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.cat.default and node.args[0][0] in placeholders:
            past = node.args[0][0]
            if len(shape_of(past)) == 4:
                return placeholders.index(past), int(node.args[1]) % 4
    return None


def cache_of(values: Iterable[Any]) -> Any:
    """The KV cache among a model's arguments or outputs; None without one."""
    return next((value for value in values if hasattr(value, "get_seq_length") and hasattr(value, "layers")), None)


def cached_length(cache: Any) -> int:
    """How many tokens a KV cache holds.

    Static caches count in a tensor. To read it waits for the device, in each step of decoding; so what is known since
    `note_length` is not read again, unless somebody else has counted in between.
    """
    count = cache.get_seq_length()
    if not isinstance(count, torch.Tensor):
        return int(count)
    known: tuple[torch.Tensor, int, int] | None = getattr(cache, LENGTH, None)
    if known is not None and known[0] is count and known[1] == count._version:
        return known[2]
    return int(count)


def note_length(cache: Any, length: int) -> None:
    """Remember what a KV cache holds now."""
    count = cache.get_seq_length()
    if isinstance(count, torch.Tensor) and not count.is_inference():
        setattr(cache, LENGTH, (count, count._version, length))


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _copy(module: GraphModule) -> GraphModule:
    graph = Graph()
    output = graph.graph_copy(module.graph, {}, return_output_node=True)
    assert isinstance(output, tuple)
    graph.output(output[0])
    return GraphModule(module, graph)


def _input_shapes(module: GraphModule) -> dict[str, tuple[str, ...]]:
    nodes = [node for node in module.graph.nodes if node.op == "placeholder"]
    return {node.name: tuple(str(size) for size in shape_of(node)) for node in nodes if shape_of(node)}


def _device(program: Program) -> torch.device:
    device: torch.device = program.stream.meta["val"].device
    return device


def _size_from_inputs(program: Program, size: Any) -> Callable[[Sequence[Any]], int]:
    """How to read a size of the batch off a graph's inputs."""
    if not isinstance(size, torch.SymInt):
        return lambda inputs: int(size)
    for known, read in _torch.sizes_of_inputs([node.meta["val"] for node in program.placeholders()]):
        if same_size(known, size):
            return read
    raise UnsupportedModelError(
        f"expected how many samples and tokens there are to be sizes of the model's inputs, found {size}, which only "
        "running tells. A model that counts the tokens that it has seen in a static cache may need "
        "attn_implementation='sdpa', or a dynamic cache"
    )
