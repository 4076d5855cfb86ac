"""A slow, plain, eager reading of Probe Pruning: the judge of the tests. It shares nothing with ppgraph.

Read it next to `method.md`; the step numbers below are that page's. It is written for clarity, not for speed.

Layout. A batch arrives in *columns*: sample `b` has real tokens where `attention_mask[b, column] == 1`.
Everything here works on *aligned positions* instead: `j = column - off[b]`, with `off[b]` the first real
column of the sample, so that left-, right- and unpadded batches of the same texts look the same from the
embedding on. `real[b, j]` says whether there is a token. Places that are not real are never read: attention
runs one sample at a time, over its real tokens alone, and statistics leave them out. Logits go back to
columns at the very end (0 at padding).

    B samples, S positions, D hidden size, C width of a site (channels that enter its exit linear),
    units: what is kept or dropped as a whole: query heads (`unit_size` = head size channels) or channels (1).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# ----------------------------------------------------------------------------------------------------
# What differs between model types: an adapter for the model, a block for each site
# ----------------------------------------------------------------------------------------------------


class Block(ABC):
    """One site: residual R -> X = norm(R) -> Y = exit_input(X) -> R + exit(Y)."""

    site: str  # name of the module that holds the exit linear
    kind: str  # "attention" or "mlp"
    layer: int
    units: int  # number of query heads, or of channels
    unit_size: int  # channels of a unit: the head size, or 1

    @property
    def width(self) -> int:
        return self.units * self.unit_size

    @abstractmethod
    def norm(self, residual: Tensor) -> Tensor:
        """X of R."""

    @abstractmethod
    def exit_weight(self) -> Tensor:
        """W [D, C] of the exit linear, whatever the orientation in which the model stores it."""

    @abstractmethod
    def exit_bias(self) -> Tensor | None:
        """Bias [D] of the exit linear."""

    @abstractmethod
    def exit_input(self, x: Tensor, positional: Sequence[Tensor], units: Tensor) -> Tensor:
        """Y [T, len(units) * unit_size] of the given units, for T tokens of ONE sample in their order.

        `x` [T, D] is the normalised input, `positional` what `Adapter.positional` gave at the same T tokens.
        A token sees itself and those before it in `x`, so a probe passes only the tokens that it probes.
        """

    def channels(self, units: Tensor) -> Tensor:
        """The channels of these units, e.g. heads 0 and 2 of size 4 -> 0 1 2 3 8 9 10 11."""
        heads = [torch.arange(u * self.unit_size, (u + 1) * self.unit_size) for u in units.tolist()]
        return torch.cat([torch.arange(0), *heads])

    def exit(self, y: Tensor, units: Tensor) -> Tensor:
        """The exit linear on the kept channels: its other columns are not there. The bias is whole."""
        return F.linear(y, self.exit_weight()[:, self.channels(units)], self.exit_bias())

    def join(self, residual: Tensor, added: Tensor) -> Tensor:
        """The residual that the next block sees."""
        return residual + added


class Adapter(ABC):
    """A model as embedding, blocks in order (each added to the residual), head."""

    blocks: list[Block]
    layers: int

    @abstractmethod
    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """The residual [B, S, D] that enters the first block."""

    @abstractmethod
    def positional(self, residual: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        """Tensors [B, S, ...] that blocks need at each token beside X (rotary cos and sin), possibly none."""

    @abstractmethod
    def head(self, residual: Tensor) -> Tensor:
        """Logits [B, S, V] of the last residual."""

    def positions(self, mask: Tensor) -> Tensor:
        """The dense model's own position ids [B, S] when it is given none: columns, padding or not."""
        return torch.arange(mask.shape[1]).expand(mask.shape)


def rows(linear: nn.Linear, index: Tensor, x: Tensor) -> Tensor:
    """An entry linear that has only these rows (and bias entries)."""
    return F.linear(x, linear.weight[index], None if linear.bias is None else linear.bias[index])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [T, hd]: pairs (i, i + hd/2) are turned."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """One head of one sample: q, k, v [T, hd] -> [T, hd]. Softmax in fp32, as transformers' eager one."""
    scores = (q @ k.T) * scaling
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    weights = torch.softmax(scores.masked_fill(future, -math.inf), dim=-1, dtype=torch.float32).to(q.dtype)
    return weights @ v


class LlamaAttentionBlock(Block):
    """MHA and GQA: units are query heads; K and V are whole, each query head reads its own KV head."""

    kind = "attention"

    def __init__(self, name: str, layer: int, module: Any) -> None:
        self.site, self.layer = f"{name}.self_attn", layer
        self.layernorm, self.attention = module.input_layernorm, module.self_attn
        self.unit_size = self.attention.head_dim
        self.units = self.attention.q_proj.out_features // self.unit_size
        self.query_heads_per_kv_head = self.units // (self.attention.k_proj.out_features // self.unit_size)

    def norm(self, residual: Tensor) -> Tensor:
        return self.layernorm(residual)

    def exit_weight(self) -> Tensor:
        return self.attention.o_proj.weight

    def exit_bias(self) -> Tensor | None:
        return self.attention.o_proj.bias

    def exit_input(self, x: Tensor, positional: Sequence[Tensor], units: Tensor) -> Tensor:
        cos, sin = positional
        queries = rows(self.attention.q_proj, self.channels(units), x).split(self.unit_size, dim=-1)
        keys = self.attention.k_proj(x).split(self.unit_size, dim=-1)
        values = self.attention.v_proj(x).split(self.unit_size, dim=-1)
        outputs = []
        for query, head in zip(queries[: len(units)], units.tolist(), strict=True):  # of no rows, split makes a piece
            kv = head // self.query_heads_per_kv_head
            q, k = rotate(query, cos, sin), rotate(keys[kv], cos, sin)
            outputs.append(causal_attention(q, k, values[kv], self.unit_size**-0.5))
        return torch.cat([x.new_zeros(len(x), 0), *outputs], dim=-1)


class LlamaMlpBlock(Block):
    """Gated MLP: units are its channels."""

    kind = "mlp"

    def __init__(self, name: str, layer: int, module: Any) -> None:
        self.site, self.layer = f"{name}.mlp", layer
        self.layernorm, self.mlp = module.post_attention_layernorm, module.mlp
        self.unit_size, self.units = 1, self.mlp.down_proj.in_features

    def norm(self, residual: Tensor) -> Tensor:
        return self.layernorm(residual)

    def exit_weight(self) -> Tensor:
        return self.mlp.down_proj.weight

    def exit_bias(self) -> Tensor | None:
        return self.mlp.down_proj.bias

    def exit_input(self, x: Tensor, positional: Sequence[Tensor], units: Tensor) -> Tensor:
        return self.mlp.act_fn(rows(self.mlp.gate_proj, units, x)) * rows(self.mlp.up_proj, units, x)


class LlamaAdapter(Adapter):
    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers = len(model.model.layers)
        self.blocks = []
        for layer, module in enumerate(model.model.layers):
            name = f"model.layers.{layer}"
            self.blocks += [LlamaAttentionBlock(name, layer, module), LlamaMlpBlock(name, layer, module)]

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.model.model.embed_tokens(input_ids)

    def positional(self, residual: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        return self.model.model.rotary_emb(residual, position_ids=position_ids)

    def head(self, residual: Tensor) -> Tensor:
        return self.model.lm_head(self.model.model.norm(residual))


class OptAttentionBlock(Block):
    """MHA with biases. Before attention the norm, or after it (`post`), then on what the next block sees."""

    kind = "attention"

    def __init__(self, name: str, layer: int, module: Any) -> None:
        self.site, self.layer = f"{name}.self_attn", layer
        self.layernorm, self.attention = module.self_attn_layer_norm, module.self_attn
        self.post = not module.do_layer_norm_before
        self.unit_size, self.units = self.attention.head_dim, self.attention.num_heads

    def norm(self, residual: Tensor) -> Tensor:
        return residual if self.post else self.layernorm(residual)

    def join(self, residual: Tensor, added: Tensor) -> Tensor:
        return self.layernorm(residual + added) if self.post else residual + added

    def exit_weight(self) -> Tensor:
        return self.attention.out_proj.weight

    def exit_bias(self) -> Tensor | None:
        return self.attention.out_proj.bias

    def exit_input(self, x: Tensor, positional: Sequence[Tensor], units: Tensor) -> Tensor:
        channels, module = self.channels(units), self.attention
        q, k, v = (
            rows(linear, channels, x).split(self.unit_size, dim=-1)
            for linear in (module.q_proj, module.k_proj, module.v_proj)
        )
        heads = [causal_attention(*head, self.unit_size**-0.5) for head in zip(q, k, v, strict=True)]
        return torch.cat(heads, dim=-1)


class OptMlpBlock(Block):
    """Plain MLP with biases, which lies on the layer itself."""

    kind = "mlp"

    def __init__(self, name: str, layer: int, module: Any) -> None:
        self.site, self.layer = f"{name}.fc2", layer
        self.module, self.post = module, not module.do_layer_norm_before
        self.unit_size, self.units = 1, module.fc2.in_features

    def norm(self, residual: Tensor) -> Tensor:
        return residual if self.post else self.module.final_layer_norm(residual)

    def join(self, residual: Tensor, added: Tensor) -> Tensor:
        return self.module.final_layer_norm(residual + added) if self.post else residual + added

    def exit_weight(self) -> Tensor:
        return self.module.fc2.weight

    def exit_bias(self) -> Tensor | None:
        return self.module.fc2.bias

    def exit_input(self, x: Tensor, positional: Sequence[Tensor], units: Tensor) -> Tensor:
        return self.module.activation_fn(rows(self.module.fc1, units, x))


class OptAdapter(Adapter):
    def __init__(self, model: Any) -> None:
        self.model, self.decoder = model, model.model.decoder
        self.layers = len(self.decoder.layers)
        self.blocks = []
        for layer, module in enumerate(self.decoder.layers):
            name = f"model.decoder.layers.{layer}"
            self.blocks += [OptAttentionBlock(name, layer, module), OptMlpBlock(name, layer, module)]

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        embedded = self.decoder.embed_tokens(input_ids)
        if self.decoder.project_in is not None:
            embedded = self.decoder.project_in(embedded)
        table = self.decoder.embed_positions
        return embedded + table.weight[position_ids + table.offset]

    def positional(self, residual: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        return ()

    def head(self, residual: Tensor) -> Tensor:
        for last in (self.decoder.final_layer_norm, self.decoder.project_out, self.model.lm_head):
            residual = residual if last is None else last(residual)
        return residual

    def positions(self, mask: Tensor) -> Tensor:
        """Real tokens are counted, padding is not; at padding -1, which the table has a row for."""
        return mask.cumsum(dim=1) * mask - 1


class Gpt2AttentionBlock(Block):
    """MHA from one fused projection whose weight is stored in x out: [q | k | v], each [head, dim]."""

    kind = "attention"

    def __init__(self, name: str, layer: int, module: Any) -> None:
        self.site, self.layer = f"{name}.attn", layer
        self.layernorm, self.attention = module.ln_1, module.attn
        self.unit_size, self.units = self.attention.head_dim, self.attention.num_heads

    def norm(self, residual: Tensor) -> Tensor:
        return self.layernorm(residual)

    def exit_weight(self) -> Tensor:
        return self.attention.c_proj.weight.T

    def exit_bias(self) -> Tensor | None:
        return self.attention.c_proj.bias

    def exit_input(self, x: Tensor, positional: Sequence[Tensor], units: Tensor) -> Tensor:
        fused, channels = self.attention.c_attn, self.channels(units)
        parts = []
        for start in (0, self.width, 2 * self.width):
            part = x @ fused.weight[:, start + channels] + fused.bias[start + channels]
            parts.append(part.split(self.unit_size, dim=-1))
        heads = [causal_attention(*head, self.attention.scaling) for head in zip(*parts, strict=True)]
        return torch.cat(heads, dim=-1)


class Gpt2MlpBlock(Block):
    """Plain MLP, weights stored in x out."""

    kind = "mlp"

    def __init__(self, name: str, layer: int, module: Any) -> None:
        self.site, self.layer = f"{name}.mlp", layer
        self.layernorm, self.mlp = module.ln_2, module.mlp
        self.unit_size, self.units = 1, len(self.mlp.c_proj.weight)

    def norm(self, residual: Tensor) -> Tensor:
        return self.layernorm(residual)

    def exit_weight(self) -> Tensor:
        return self.mlp.c_proj.weight.T

    def exit_bias(self) -> Tensor | None:
        return self.mlp.c_proj.bias

    def exit_input(self, x: Tensor, positional: Sequence[Tensor], units: Tensor) -> Tensor:
        return self.mlp.act(x @ self.mlp.c_fc.weight[:, units] + self.mlp.c_fc.bias[units])


class Gpt2Adapter(Adapter):
    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers = len(model.transformer.h)
        self.blocks = []
        for layer, module in enumerate(model.transformer.h):
            name = f"transformer.h.{layer}"
            self.blocks += [Gpt2AttentionBlock(name, layer, module), Gpt2MlpBlock(name, layer, module)]

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.model.transformer.wte(input_ids) + self.model.transformer.wpe(position_ids)

    def positional(self, residual: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        return ()

    def head(self, residual: Tensor) -> Tensor:
        return self.model.lm_head(self.model.transformer.ln_f(residual))


ADAPTERS: dict[str, type[Any]] = {  # by config.model_type
    "llama": LlamaAdapter,
    "opt": OptAdapter,
    "gpt2": Gpt2Adapter,
}

# ----------------------------------------------------------------------------------------------------
# The formulas, one function each
# ----------------------------------------------------------------------------------------------------


def share(count: int, fraction: float) -> int:
    """The ceiling of count * fraction, in exact decimal arithmetic: 20 * 0.05 gives 1."""
    return math.ceil(count * Fraction(str(fraction)))


def top(values: Tensor, k: int) -> Tensor:
    """Indices of the k highest values, ascending. Of equal values the one with the lower index wins."""
    return torch.sort(values, descending=True, stable=True).indices[:k].sort().values


def spread_rows(real: Tensor, fraction: Fraction) -> list[tuple[int, int]]:
    """(sample, place) of that share of the batch's tokens, one at each end of as many equal stretches."""
    rows = real.nonzero().tolist()
    wanted = math.ceil(len(rows) * fraction)
    return [tuple(rows[math.ceil(Fraction(len(rows) * (i + 1), wanted)) - 1]) for i in range(wanted)]


def filled_up(rows: list[tuple[int, int]], real: Tensor, fraction: Fraction) -> list[tuple[int, int]]:
    """These and the first other places, as many in all as `spread_rows` gives of a batch without padding."""
    others = [(b, j) for b in range(real.shape[0]) for j in range(real.shape[1]) if (b, j) not in rows]
    return rows + others[: math.ceil(real.numel() * fraction) - len(rows)]


def log_error(x: Tensor, errors: Tensor, steps: int = 3) -> tuple[Tensor, Tensor]:
    """What predicts log(error) of inputs [D], up to a constant: the least squares solution from x [n, D], errors [n].

    Not the whole one, but the best of what `steps` products with Z'Z make of Z't (what as many steps of conjugate
    gradients arrive at). Gives it with the centre of x.
    """
    if not len(x):
        return torch.zeros(x.shape[1], dtype=torch.float64), torch.zeros(x.shape[1], dtype=torch.float64)
    centre = x.double().mean(dim=0)
    z, t = x.double() - centre, (errors.double() + 1e-6).log()
    t = t - t.mean()
    basis = [z.T @ t]
    while len(basis) < steps:
        basis.append(z.T @ (z @ (basis[-1] / basis[-1].norm().clamp(min=1e-300))))
    space = torch.linalg.qr(torch.stack(basis, dim=1)).Q
    return space @ torch.linalg.lstsq(z @ space, t[:, None], driver="gelsd").solution[:, 0], centre


def probed_places(n: Tensor, real: Tensor, probe_batch: float, probe_tokens: float) -> tuple[Tensor, Tensor]:
    """Step 1: (samples, tokens) to probe, from the residual norms n [B, S]. Tokens are chosen first."""
    n = torch.where(real, n, 0.0)
    length = int(real.any(dim=0).sum())
    kept = min(max(share(length, probe_tokens), 2), length)
    tokens = top(n.square().sum(dim=0).sqrt(), kept)
    if kept <= 10:
        tokens[0] = 0  # the attention sink is always probed
    samples = top(n[:, tokens].square().sum(dim=1).sqrt(), share(n.shape[0], probe_batch))
    return samples, tokens


def mean_square(y: Tensor, real: Tensor) -> Tensor:
    """Steps 3 and 8: y [B, S, C] -> [S, C], mean of y^2 over the samples real at the position, or 0."""
    squares = torch.where(real[:, :, None], y.float().square(), 0.0)
    return squares.sum(dim=0) / real.sum(dim=0).clamp(min=1)[:, None]


def fuse(p: Tensor, g: Tensor) -> Tensor:
    """Step 5: probe p [S', C] and history g [S', C] at the probed tokens -> f [C]."""
    a = p / (p + g + 1e-6)
    return (a * p + (1 - a) * g).sum(dim=0)


def ppsp(f: Tensor, weight: Tensor, unit_size: int) -> Tensor:
    """Step 6: a score per unit, the Euclidean norm of f[c] * W[:, c]^2 over the unit's channels."""
    channel = f.float() * weight.float().pow(4).sum(dim=0).sqrt()
    return channel.view(-1, unit_size).square().sum(dim=1).sqrt() if unit_size > 1 else channel


def wanda_sp(f: Tensor, weight: Tensor, unit_size: int) -> Tensor:
    """Wanda-sp: a score per unit, the sum of sqrt(f[c]) * sum_i |W[i, c]| over the unit's channels."""
    channel = f.float().sqrt() * weight.float().abs().sum(dim=0)
    return channel.view(-1, unit_size).sum(dim=1)


def flap(f: Tensor, weight: Tensor, unit_size: int) -> Tensor:
    """FLAP: a score per unit, the mean of f[c] * sum_i W[i, c]^2 over the unit's channels."""
    channel = f.float() * weight.float().pow(2).sum(dim=0)
    return channel.view(-1, unit_size).mean(dim=1)


SCORES = {"ppsp": ppsp, "wanda-sp": wanda_sp, "flap": flap}


class Fluctuation:
    """What FLAP remembers of one site: mean and variance [positions, C] of y, and the samples behind them."""

    def __init__(self, width: int) -> None:
        self.mean, self.variance = torch.zeros(0, width), torch.zeros(0, width)
        self.count = torch.zeros(0, dtype=torch.long)

    def add(self, y: Tensor, real: Tensor) -> None:
        """One group of samples y [B, S, C]: running mean, then the variance around it over samples and positions."""
        missing = max(y.shape[1] - len(self.mean), 0)
        self.mean = F.pad(self.mean, (0, 0, 0, missing))
        self.variance = F.pad(self.variance, (0, 0, 0, missing))
        self.count = F.pad(self.count, (0, missing))
        places = real.any(dim=0).nonzero()[:, 0].tolist()
        old_centre = self.mean[places].mean(dim=0)
        for s in places:
            values = y[real[:, s], s].float()
            n = int(self.count[s])
            self.mean[s] = (self.mean[s] * n + values.sum(dim=0)) / (n + len(values))
        new_centre = self.mean[places].mean(dim=0)
        for s in places:
            values = y[real[:, s], s].float()
            n, group = int(self.count[s]), len(values)
            if n > 0:
                spread = ((values - new_centre) * (values - old_centre)).sum(dim=0) / (n + group)
                self.variance[s] = self.variance[s] * ((n - 1) / (n + group - 1)) + spread
            self.count[s] = n + group

    @property
    def centre(self) -> Tensor:
        """m [C]: the mean over all positions that calibration saw."""
        return self.mean[self.count > 0].mean(dim=0)


def flap_allocation(
    blocks: Sequence[Block], scores: Sequence[Tensor], ratio: float, hidden_size: int, length: int
) -> dict[str, int]:
    """Units that each site keeps under FLAP's one threshold over all layers, from channel scores [C] a site."""
    everything = []
    for number, (block, channel) in enumerate(zip(blocks, scores, strict=True)):
        standardised = (channel - channel.mean()) / channel.std()
        unit_scores = standardised.view(-1, block.unit_size).mean(dim=1)
        cost = 1.0
        if block.kind == "attention":
            matrices = 4 if block.query_heads_per_kv_head == 1 else 2
            head = length * hidden_size * block.unit_size * matrices + 2 * length**2 * block.unit_size
            cost = head / (length * hidden_size * 3)
        everything += [(score, cost, number) for score in unit_scores.tolist()]
    everything.sort(key=lambda unit: unit[0])
    total, spent, threshold = sum(cost for _, cost, _ in everything), 0.0, math.inf
    for score, cost, _ in everything:
        spent += cost
        if spent > ratio * total:
            threshold = score
            break
    lost = [
        sum(1 for score, _, of in everything if of == number and score <= threshold) for number in range(len(blocks))
    ]
    return {block.site: block.units - gone for block, gone in zip(blocks, lost, strict=True)}


# ----------------------------------------------------------------------------------------------------
# Columns and aligned positions
# ----------------------------------------------------------------------------------------------------


class Alignment:
    """Moves [B, S, ...] between columns and aligned positions. A row without any token is nowhere real."""

    def __init__(self, mask: Tensor) -> None:
        self.columns = [row.nonzero()[:, 0] for row in mask.bool()]  # real columns of each sample
        self.positions = [columns - columns[:1] for columns in self.columns]  # column - off[b]
        self.real = torch.zeros_like(mask, dtype=torch.bool)
        for b, positions in enumerate(self.positions):
            self.real[b, positions] = True

    def to_positions(self, values: Tensor) -> Tensor:
        aligned = torch.zeros_like(values)
        for b, (columns, positions) in enumerate(zip(self.columns, self.positions, strict=True)):
            aligned[b, positions] = values[b, columns]
        return aligned

    def to_columns(self, aligned: Tensor) -> Tensor:
        values = torch.zeros_like(aligned)
        for b, (columns, positions) in enumerate(zip(self.columns, self.positions, strict=True)):
            values[b, columns] = aligned[b, positions]
        return values


# ----------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------


@dataclass
class Result:
    logits: Tensor  # [B, S, V], by column; 0 at padding
    selection: dict[str, Tensor]  # pruned sites only: kept channels of the exit linear's input, ascending
    dense: dict[str, tuple[Tensor, Tensor]]  # by site: tokens [B, S] that kept all, by column, and others' channels


class Reference:
    """Probe Pruning around a dense model, which stays untouched. Stateful: each call moves `history` on."""

    def __init__(
        self,
        model: Any,
        *,
        ratio: float,
        probe_batch: float = 0.05,
        probe_tokens: float = 0.5,
        probe_choice: str = "largest",
        dense_tokens: float = 0.0,
        dense_below: int = 0,
        history_below: int = 0,
        history_momentum: float = 0.99,
        skip_layers: int = 3,
        rescale_ratio: bool = True,
        width_multiple: int = 64,
        blocks: Sequence[str] = ("attention", "mlp"),
        statistics: str = "fused",
        score: str = "ppsp",
        flap: bool = False,
        ranks: int = 1,
    ) -> None:
        if statistics not in ("fused", "probe", "history") or score not in SCORES:
            raise ValueError(f"unknown statistics {statistics!r} or score {score!r}")
        if model.training:
            raise ValueError("the model must be in eval mode")
        self.adapter: Adapter = ADAPTERS[model.config.model_type](model)
        self.probe_batch, self.probe_tokens, self.probe_choice = probe_batch, probe_tokens, probe_choice
        self.dense_tokens, self.dense_below, self.history_below = dense_tokens, dense_below, history_below
        self.history_momentum, self.skip_layers = history_momentum, skip_layers
        self.width_multiple = width_multiple
        self.pruned_kinds, self.statistics, self.score = tuple(blocks), statistics, SCORES[score]
        self.ranks = ranks  # of tensor parallelism: each chooses among its own part of a block's units
        self.flap = flap  # the method as a whole: variance, global threshold, compensation
        self.fluctuation: dict[str, Fluctuation] = {}
        self.allocated: dict[str, int] = {}
        layers = self.adapter.layers
        self.ratio = ratio  # r' of step 7
        if rescale_ratio and layers > skip_layers:
            self.ratio = round(ratio * layers / (layers - skip_layers), 2)
        if not 0 <= self.ratio < 1:
            raise ValueError(f"the ratio {ratio} becomes {self.ratio} for the layers that are not skipped")
        # By site: g of step 4 [positions, C], and how many calibration samples are behind it [positions].
        self.history: dict[str, Tensor] = {}
        self.calibrated: dict[str, Tensor] = {}

    # Step 7: how many units stay

    def kept_units(self, block: Block) -> int:
        if block.layer < self.skip_layers or block.kind not in self.pruned_kinds:
            return block.units
        own = block.units // self.ranks
        kept = own - int(self.ratio * own)
        if block.site in self.allocated:
            kept = math.ceil(Fraction(self.allocated[block.site], self.ranks))
        if block.kind == "mlp":
            kept = min(math.ceil(Fraction(kept, self.width_multiple)) * self.width_multiple, own)
        return kept * self.ranks

    def is_pruned(self, block: Block) -> bool:
        return self.kept_units(block) < block.units

    def dense_share(self, block: Block) -> Fraction:
        """Of the tokens, those that keep all channels: no more than leave the others 3/5 of what is kept on average."""
        share, kept = Fraction(str(self.dense_tokens)), Fraction(self.kept_units(block), block.units)
        leaves_enough = Fraction(2, 5) * kept / (1 - Fraction(3, 5) * kept)
        return max(min(share, leaves_enough), self.probed_share())

    def others_kept(self, block: Block) -> int:
        """Channels of the tokens that don't keep all of them: on average as many are kept as step 7 says."""
        kept, dense = self.kept_units(block), self.dense_share(block)
        exact = (kept - dense * block.units) / (1 - dense)
        return min(max(round(exact / self.width_multiple), 1) * self.width_multiple, kept)

    def chosen(self, block: Block, scores: Tensor, kept: int | None = None) -> Tensor:
        """The units with the highest scores (`kept_units` unless told how many), of each rank's part as many."""
        own, kept = block.units // self.ranks, (kept or self.kept_units(block)) // self.ranks
        parts = [top(scores[start : start + own], kept) + start for start in range(0, block.units, own)]
        return torch.cat(parts)

    def may_prune(self, block: Block) -> bool:
        return block.layer >= self.skip_layers and block.kind in self.pruned_kinds

    # FLAP

    def compensation(self, block: Block, units: Tensor) -> Tensor:
        """W·m [D] over the channels that these units leave out."""
        dropped = torch.ones(block.width, dtype=torch.bool)
        dropped[block.channels(units)] = False
        return block.exit_weight()[:, dropped] @ self.fluctuation[block.site].centre[dropped]

    def allocate(self) -> None:
        blocks = [block for block in self.adapter.blocks if self.may_prune(block)]
        seen = [self.fluctuation[block.site].count > 0 for block in blocks]
        scores = [
            self.fluctuation[block.site].variance[known].sum(dim=0) * block.exit_weight().float().pow(2).sum(dim=0)
            for block, known in zip(blocks, seen, strict=True)
        ]
        hidden_size = blocks[0].exit_weight().shape[0]
        self.allocated = flap_allocation(blocks, scores, self.ratio, hidden_size, int(seen[0].sum()))

    # Steps 4 and 8: the history

    def history_at(self, block: Block, tokens: Tensor) -> Tensor:
        """G [len(tokens), C], 0 at positions never seen."""
        g = torch.zeros(len(tokens), block.width)
        known = self.history.get(block.site, torch.zeros(0, block.width))
        for i, j in enumerate(tokens.tolist()):
            if j < len(known):
                g[i] = known[j]
        return g

    def grow_history(self, block: Block, real: Tensor) -> Tensor:
        """Makes the site's history reach the last real position; returns the positions with a real token."""
        seen = real.any(dim=0).nonzero()[:, 0]
        length = int(seen[-1]) + 1 if len(seen) else 0
        g = self.history.get(block.site, torch.zeros(0, block.width))
        count = self.calibrated.get(block.site, torch.zeros(0, dtype=torch.long))
        missing = max(length - len(g), 0)
        self.history[block.site] = torch.cat([g, torch.zeros(missing, block.width)])
        self.calibrated[block.site] = torch.cat([count, torch.zeros(missing, dtype=torch.long)])
        return seen

    def update_history(self, block: Block, y: Tensor, real: Tensor, units: Tensor) -> None:
        """Step 8: moving average, of the channels that ran, of y [B, S, kept channels] of full inference."""
        m, mean, channels = self.history_momentum, mean_square(y, real), block.channels(units)
        seen = self.grow_history(block, real)
        g = self.history[block.site]
        for j in seen.tolist():
            g[j, channels] = m * g[j, channels] + (1 - m) * mean[j]

    def calibrate_history(self, block: Block, y: Tensor, real: Tensor) -> None:
        """Step 4: running mean over samples, each position with its own count, all channels."""
        mean, samples = mean_square(y, real), real.sum(dim=0)
        seen = self.grow_history(block, real)
        g, count = self.history[block.site], self.calibrated[block.site]
        for j in seen.tolist():
            before, new = int(count[j]), int(samples[j])
            g[j] = (before * g[j] + new * mean[j]) / (before + new)
            count[j] = before + new

    # Steps 1 - 7: which units stay, for this batch

    def fused_statistic(
        self,
        block: Block,
        residual: Tensor,
        x: Tensor,
        positional: Sequence[Tensor],
        real: Tensor,
        everything: bool = False,
    ) -> Tensor:
        """F [C] of steps 1 - 5; of all samples and tokens where full inference shows `everything`."""
        if self.flap:
            known = self.fluctuation[block.site].variance
            return known[: int(real.any(dim=0).sum())].sum(dim=0)
        if self.statistics == "history":
            length = int(real.any(dim=0).sum())
            return self.history_at(block, torch.arange(length)).sum(dim=0)
        if self.probe_choice == "spread" and block.kind == "mlp":
            return self.averaged_statistic(block, x, positional, real, Fraction(1) if everything else None)
        n = residual.float().square().sum(dim=-1).sqrt()
        if everything:
            samples, tokens = torch.arange(len(real)), real.any(dim=0).nonzero()[:, 0]
        else:
            samples, tokens = probed_places(n, real, self.probe_batch, self.probe_tokens)
        probe = [t[samples][:, tokens] for t in (x, real, *positional)]
        y = self.full_exit_input(block, probe[0], probe[2:], probe[1], torch.arange(block.units))
        p = mean_square(y, probe[1])
        if self.statistics == "probe":
            return p.sum(dim=0)
        return fuse(p, self.history_at(block, tokens))

    def remembered_statistic(self, block: Block) -> Tensor:
        """F [C] of a prompt that goes by the history alone: of all positions."""
        return (self.fluctuation[block.site].variance if self.flap else self.history[block.site]).sum(dim=0)

    def averaged_statistic(
        self,
        block: Block,
        x: Tensor,
        positional: Sequence[Tensor],
        real: Tensor,
        fraction: Fraction | None = None,
    ) -> Tensor:
        """F [C] where single rows are probed: their average, fused with the average of the history."""
        rows, units = spread_rows(real, fraction or self.probed_share()), torch.arange(block.units)
        y = torch.cat(
            [x.new_zeros(0, block.width)]
            + [block.exit_input(x[b, [j]], [t[b, [j]] for t in positional], units) for b, j in rows]
        )
        p = y.float().square().sum(dim=0, keepdim=True) / max(len(y), 1)
        if self.statistics == "probe":
            return p.sum(dim=0)
        places = real.any(dim=0).nonzero()[:, 0]
        g = self.history_at(block, places).sum(dim=0, keepdim=True) / max(len(places), 1)
        return fuse(p, g)

    def probed_share(self) -> Fraction:
        """Of the rows, where single rows are probed."""
        if self.dense_tokens:
            return Fraction(str(self.dense_tokens)) / 3
        return Fraction(str(self.probe_batch)) * Fraction(str(self.probe_tokens))

    # Tokens that keep all channels

    def tokens_kept_whole(
        self, block: Block, residual: Tensor, x: Tensor, positional: Sequence[Tensor], real: Tensor, units: Tensor
    ) -> Tensor:
        """[B, S] by place: the probed rows, and those that are predicted to be worst off with these units alone."""
        every, rows = torch.arange(block.units), spread_rows(real, self.probed_share())
        errors = []
        for b, j in rows:
            arguments = x[b, [j]], [t[b, [j]] for t in positional]
            whole = block.exit(block.exit_input(*arguments, every), every)
            narrow = block.exit(block.exit_input(*arguments, units), units)
            errors.append((whole - narrow).float().norm() / (residual[b, j].float().norm() + 1e-6))
        direction, centre = log_error(x[[b for b, _ in rows], [j for _, j in rows]], torch.tensor(errors))
        dense = torch.zeros_like(real)
        for b, j in filled_up(rows, real, self.probed_share()):
            dense[b, j] = True
        predicted = (x.double() - centre) @ direction
        predicted = predicted.masked_fill(dense, -math.inf)
        left = math.ceil(real.numel() * self.dense_share(block)) - int(dense.sum())
        worst = self.worst(predicted[real], min(left, int((real & ~dense).sum())))
        places = real.nonzero()[worst]
        dense[places[:, 0], places[:, 1]] = True
        return dense & real

    def worst(self, predicted: Tensor, count: int) -> Tensor:
        """Indices of the highest predictions."""
        return top(predicted, count)

    # One pass

    def full_exit_input(
        self, block: Block, x: Tensor, positional: Sequence[Tensor], real: Tensor, units: Tensor
    ) -> Tensor:
        """Y [B, S, kept channels], sample by sample over the real tokens; 0 elsewhere."""
        y = x.new_zeros(*x.shape[:2], len(units) * block.unit_size)
        for b in range(len(x)):
            if real[b].any():
                y[b, real[b]] = block.exit_input(x[b, real[b]], [t[b, real[b]] for t in positional], units)
        return y

    def run(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, calibrating: bool
    ) -> Result:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        alignment = Alignment(mask)
        real = alignment.real
        if position_ids is None:
            position_ids = self.adapter.positions(mask)
        position_ids = position_ids.expand(input_ids.shape)
        residual = self.adapter.embed(input_ids, position_ids)
        positional = [alignment.to_positions(t) for t in self.adapter.positional(residual, position_ids)]
        residual = alignment.to_positions(residual)
        selection: dict[str, Tensor] = {}
        kept_whole: dict[str, tuple[Tensor, Tensor]] = {}
        for block in self.adapter.blocks:
            x = block.norm(residual)
            pruned = self.is_pruned(block) and not calibrating
            runs_dense = pruned and input_ids.numel() < self.dense_below
            remembered = pruned and not runs_dense and input_ids.numel() < self.history_below
            units = torch.arange(block.units)
            if pruned:
                if remembered:
                    f = self.remembered_statistic(block)
                else:
                    f = self.fused_statistic(block, residual, x, positional, real, runs_dense)
                scores = self.score(f, block.exit_weight(), block.unit_size)
                kept = self.chosen(block, scores)
                selection[block.site] = block.channels(kept)
                units = units if runs_dense else kept
            pruned = pruned and not runs_dense
            differs = pruned and not remembered and self.dense_tokens and block.kind == "mlp" and real.numel() > 1
            if differs:
                units = self.chosen(block, scores, self.others_kept(block))
            y = self.full_exit_input(block, x, positional, real, units)
            if (pruned or runs_dense) and not remembered and self.statistics == "fused":
                self.update_history(block, y, real, units)
            if calibrating and self.flap and self.may_prune(block):
                self.fluctuation.setdefault(block.site, Fluctuation(block.width)).add(y, real)
            elif calibrating and self.is_pruned(block):
                self.calibrate_history(block, y, real)
            added = block.exit(y, units) + (self.compensation(block, units) if pruned and self.flap else 0)
            if differs:
                dense = self.tokens_kept_whole(block, residual, x, positional, real, units)
                every = torch.arange(block.units)
                added[dense] = block.exit(self.full_exit_input(block, x, positional, real, every), every)[dense]
                kept_whole[block.site] = alignment.to_columns(dense), units
            residual = block.join(residual, added)
        return Result(alignment.to_columns(self.adapter.head(residual)), selection, kept_whole)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Dense passes that fill the history: dicts of input_ids, maybe attention_mask, position_ids.

        A second call carries the running mean on, with the counts of the first.
        """
        if self.statistics == "probe":
            return
        for batch in batches:
            with batch["input_ids"].device:
                self.run(batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids"), True)
        if self.flap:
            self.allocate()

    @torch.no_grad()
    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Result:
        with input_ids.device:
            return self.run(input_ids, attention_mask, position_ids, False)


# ----------------------------------------------------------------------------------------------------
# The second judge: the dense model itself, dropped channels zeroed
# ----------------------------------------------------------------------------------------------------

EXIT_NAMES = ("o_proj", "down_proj", "out_proj", "c_proj", "fc2")


def find_exit(model: nn.Module, site: str) -> nn.Module:
    """The exit linear: the one direct child of the site's module with a known exit name."""
    children = dict(model.get_submodule(site).named_children())
    found = [name for name in EXIT_NAMES if name in children]
    if len(found) != 1:
        raise ValueError(f"{site}: want one of {EXIT_NAMES} among {sorted(children)}; or pass exits={{site: path}}")
    return children[found[0]]


@contextmanager
def masked(
    model: nn.Module,
    selection: Mapping[str, Tensor],
    exits: Mapping[str, str] | None = None,
    dense: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> Iterator[None]:
    """Within it, each exit linear of the dense model reads 0 on the channels not selected.

    `exits` maps a site to the path of its exit linear where the name does not tell; `dense` a site to the tokens [B, S]
    that keep all channels, and the channels of the others.
    """

    def keep_only(kept: Tensor, whole: Tensor | None) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            dropped = torch.ones(args[0].shape[-1], dtype=torch.bool, device=args[0].device)
            dropped[kept] = False
            if whole is not None:
                dropped = dropped & ~whole.reshape(*args[0].shape[:-1], 1)
            return (args[0].masked_fill(dropped, 0), *args[1:])

        return hook

    handles = []
    try:
        for site, kept in selection.items():
            path = (exits or {}).get(site)
            exit_linear = model.get_submodule(path) if path else find_exit(model, site)
            whole, kept = (dense or {}).get(site, (None, kept))
            handles.append(exit_linear.register_forward_pre_hook(keep_only(kept, whole)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def masked_dense_logits(
    model: Any,
    selection: Mapping[str, Tensor],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    exits: Mapping[str, str] | None = None,
    dense: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    **kwargs: Any,
) -> Tensor:
    """Logits of the untouched dense model within `masked`; `kwargs` go to the model."""
    with masked(model, selection, exits, dense):
        return model(input_ids, attention_mask=attention_mask, use_cache=False, **kwargs).logits
