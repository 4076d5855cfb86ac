"""Some tokens keep all channels: the probed ones, and those for which the kept channels are predicted to do worst.

What the kept channels get wrong is far from even over tokens: with 40 % pruned, a tenth of them has a fifth to half of
the squared error of a block. The probe tells it for its own tokens, by running the exit linear both ways; the logarithm
of the error is close to linear in the block's normed input, so a few steps of conjugate gradients from the probed
tokens predict it for all others.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.fx import Node

from ppgraph.config import dense_share
from ppgraph.errors import ConfigError
from ppgraph.passes.base import Builder, PassResult, Program, Site
from ppgraph.passes.find_sites import Block
from ppgraph.passes.insert_probe import Probe, padding_of, single_rows
from ppgraph.passes.operators import linear_activations, weight_operand
from ppgraph.passes.rows import OtherRows, by_row, replace_exit, rows_last
from ppgraph.passes.select_weights import sort_topologically
from ppgraph.passes.token_axes import Prober, Sampling

aten = torch.ops.aten

# More steps fit the probed tokens' noise: 1, 3, 6, 12 steps gave perplexities of 50.8, 47.6, 47.9, 48.1
# (docs/explorations.md).
STEPS = 3
TINY = 1e-6
# Padding runs dense only where there are no other tokens; a probed token never twice.
LAST = -1e30


def predicted_errors(probed: Tensor, errors: Tensor, real: Tensor | None, inputs: Tensor) -> Tensor:
    """How badly off each token will be, up to a constant: [N] fp32.

    Least squares of the logarithm of `errors` [n] on the block's inputs at these tokens, `probed` [n, D], by a few
    steps of conjugate gradients from 0. `real` [n] tells which of them count, `inputs` [N, D] are those of all tokens.
    """
    weight = torch.ones_like(errors) if real is None else real.float()
    count = weight.sum().clamp(min=1)
    probed = probed.float()
    centre = (weight @ probed) / count
    centred = (probed - centre) * weight.unsqueeze(1)
    target = (errors + TINY).log()
    target = (target - (weight @ target) / count) * weight
    solution = torch.zeros_like(centre)
    rest = centred.t() @ target
    direction = rest
    energy = rest @ rest
    for _ in range(STEPS):
        image = centred @ direction
        step = energy / (image @ image).clamp(min=TINY)
        solution = solution + step * direction
        rest = rest - step * (centred.t() @ image)
        before, energy = energy, rest @ rest
        direction = rest + energy / before.clamp(min=TINY) * direction
    # The centre only adds a constant.
    return (inputs @ solution.to(inputs.dtype)).float()


class DenseTokens:
    """Runs the tokens that keep all channels apart from the others, and puts the results together behind the exit.

    Which rows of the batch those are, [n], is a result of the graph: `("dense", name)`, for each site that has some.
    """

    name = "dense_tokens"
    requires: tuple[str, ...] = ("insert_score", "select_weights")

    def __call__(self, program: Program) -> PassResult:
        outcome = PassResult()
        for site in program.scored_sites:
            if ("others", site.name) in program.results:
                build = Builder(program, program.shared["exit", site.name], self.name)
                _split(program, build, site)
                outcome.inserted += build.inserted
        sort_topologically(program.graph)
        return outcome


def _split(program: Program, build: Builder, site: Site) -> None:
    block: Block = program.analysis[site.name]
    probe: Probe = program.shared["probe", site.name]
    exit_linear, narrowed = program.shared["exit", site.name], program.shared["narrowed", site.name]
    _, channels = program.shared["kept", site.name]
    whole = _whole_weight(build, block, exit_linear)
    _, constant = program.shared.get(("compensation", site.name), (None, None))
    if constant is not None:
        raise ConfigError(
            f"dense_tokens={program.config.dense_tokens} with compensation={program.config.compensation!r}, which adds "
            "a constant to the results of all tokens; expected one that only changes the exit's weight"
        )

    def dense(y: Node) -> Node:
        return build.copy(exit_linear, {narrowed: y} | whole)

    probed = by_row(build, probe.y)
    probed_result = dense(probed)
    narrow_result = build.copy(exit_linear, {narrowed: build.select(probed, 1, channels)})
    sampling = _worst(program, build, site, (probed_result, narrow_result))
    y = by_row(build, Prober(block.probe, build, sampling, {}).run())
    rows = build(aten.cat.default, [probe.sampling.rows, sampling.rows])
    count = build(operator.add, probe.sampling.sample_count, sampling.sample_count)
    others = OtherRows(build, block.stream, rows_last(build, block.stream, rows, count))
    other = others.of(narrowed)
    others.require_no_other_users(exit_linear)
    narrow = [] if other is None else [other]  # none is left of a few tokens whose number is known
    products = [*(build.copy(exit_linear, {narrowed: piece}) for piece in narrow), probed_result, dense(y)]
    kept = build.select(build(aten.cat.default, [probed, y]), 1, channels)
    replace_exit(program, site, others, products, [*narrow, kept])
    program.results["dense", site.name] = rows


def _whole_weight(build: Builder, block: Block, exit_linear: Node) -> dict[Node, Node]:
    """What the exit linear reads as its weight -> the whole weight, laid out alike."""
    place, dim = weight_operand(exit_linear)
    selected = exit_linear.args[place]
    assert isinstance(selected, Node)
    return {selected: block.weight if block.weight_dim == dim else build(aten.t.default, block.weight)}


def _worst(program: Program, build: Builder, site: Site, results: tuple[Node, Node]) -> Sampling:
    """The rows beside the probe's that are predicted to be worst off."""
    block: Block = program.analysis[site.name]
    probe: Probe = program.shared["probe", site.name]
    stream, sampling = block.stream, probe.sampling
    samples, length = build.size(stream, 0), build.size(stream, 1)
    total = build(operator.mul, samples, length)
    wanted = build.share_of(total, dense_share(site.kept, site.width, program.config.dense_tokens))
    count = build(operator.sub, wanted, sampling.sample_count)
    entry = next(iter(block.narrowing.entries))
    inputs = by_row(build, linear_activations(entry))
    columns = build(aten.reshape.default, sampling.columns, [-1])
    residual = build(aten.index.Tensor, stream, [sampling.samples, columns])
    whole, narrow = results
    wrong = build(aten.to.dtype, build.sub(whole, narrow), torch.float32)
    wrong = build(aten.linalg_vector_norm.default, wrong, 2, [-1])
    norms = build(aten.linalg_vector_norm.default, build(aten.to.dtype, residual, torch.float32), 2, [-1])
    errors = build(aten.div.Tensor, wrong, build(aten.add.Scalar, norms, TINY))
    real = None if sampling.real is None else build(aten.reshape.default, sampling.real, [-1])
    probed = by_row(build, linear_activations(probe.linears[entry]))
    predicted = build.inline("dense tokens", predicted_errors, probed, errors, real, inputs)
    padding = padding_of(program, build, stream)
    if padding is not None:
        predicted = build.where(build(aten.reshape.default, padding.by_column, [-1]), predicted, LAST)
    predicted = build(aten.index_fill.int_Scalar, predicted, 0, sampling.rows, -torch.inf)
    rows = build.highest(predicted, count)
    at = build(aten.floor_divide.default, rows, length), build(aten.remainder.Scalar, rows, length)
    return single_rows(build, samples, at, rows, count)
