"""Programs of a few nodes, captured from tiny modules with a symbolic batch and sequence, and ways to run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional as F

from ppgraph import _torch
from ppgraph.capture import capture
from ppgraph.config import PruneConfig
from ppgraph.passes import Pass, PassResult, Program, run_passes

aten = torch.ops.aten

HIDDEN = 8
SMALL = PruneConfig(ratio=0.5, skip_layers=0, width_multiple=1)


class Mlp(nn.Module):
    """`down(relu(up(x)))`, 12 channels."""

    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 12, bias=bias), nn.Linear(12, HIDDEN, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.relu(self.up(x)))


class Flattened(Mlp):
    """An MLP on [samples times tokens, hidden], as some families run theirs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)


class Fused(Mlp):
    """Gate and up in one projection, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 24, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class ByPosition(Mlp):
    """Something before the exit is the same for all samples, but not for all tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.relu(self.up(x)) * torch.arange(x.shape[1]).unsqueeze(1))


class Attention(nn.Module):
    """Causal attention, 4 query heads of size 2; `kv_heads` key and value heads."""

    def __init__(self, kv_heads: int = 4) -> None:
        super().__init__()
        self.q, self.o = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(HIDDEN, 2 * kv_heads, bias=False) for _ in range(2))

    def projected(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, [samples, heads, tokens, 2] each."""
        query, key, value = (
            projection(x).view(x.shape[0], x.shape[1], -1, 2).transpose(1, 2) for projection in (self.q, self.k, self.v)
        )
        return query, key, value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.projected(x)
        gqa = key.shape[1] != query.shape[1]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=gqa)
        return self.o(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))


class Residual(nn.Module):
    """`x + block(x)`: the smallest thing with a residual stream. The block is `layers.0.block`."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"block": block})])

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        del attention_mask  # an input that only the passes read
        for layer in self.layers:
            x = x + layer["block"](x)
        return x


class MaskedResidual(Residual):
    """As `Residual`, with a mask that the graph reads, as models do, so that it is one of its inputs."""

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        assert attention_mask is not None
        return super().forward(x * attention_mask.to(x.dtype).unsqueeze(-1))


SITE = "layers.0.block"


def hidden(samples: int = 3, tokens: int = 5) -> torch.Tensor:
    """A residual stream [samples, tokens, HIDDEN]."""
    return torch.randn(samples, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))


@dataclass
class Captured:
    """A module's program. Passes run in the graph's own world of fake values; results are real tensors."""

    module: nn.Module
    program: Program
    mode: _torch.FakeTensorMode

    def apply(self, *passes: Pass) -> Program:
        """Run passes on the program."""
        with _torch.graph_world(self.mode):
            return run_passes(self.program, passes)

    @property
    def calls(self) -> dict[str, Node]:
        """The graph's calls by name."""
        return {node.name: node for node in self.program.graph.nodes if node.op == "call_function"}

    def values(self, *inputs: torch.Tensor, state: Sequence[Any] = ()) -> dict[Node, Any]:
        """Run the graph on a stream and maybe a mask; the value of each node. `state` fills inputs passes added."""
        parameters = dict(self.module.named_parameters())
        placeholders = self.program.placeholders()
        own = len(placeholders) - len(self.program.state_inputs)
        given: dict[Node, Any] = dict(zip(placeholders[own:], state, strict=True))
        stream, mask = (*inputs, None)[:2]
        sizes: dict[Any, int] = {}
        for node in placeholders[:own]:
            if node in self.program.parameters:
                given[node] = parameters[self.program.parameters[node]].detach()
            elif isinstance(node.meta["val"], torch.Tensor):
                given[node] = mask if node is self.program.token_mask else stream
                sizes |= zip(map(_torch.expression, node.meta["val"].shape), given[node].shape, strict=True)
        for node in placeholders[:own]:
            if isinstance(node.meta["val"], torch.SymInt):
                given[node] = sizes[_torch.expression(node.meta["val"])]
        interpreter = Interpreter(self.program.module, garbage_collect_values=False)
        with torch.no_grad():
            interpreter.run(*(given[node] for node in placeholders))
        return dict(interpreter.env)

    def results(self, *inputs: torch.Tensor, state: Sequence[Any] = ()) -> dict[str, torch.Tensor]:
        """What the passes made results of the graph, by name."""
        found = self.values(*inputs, state=state)
        return {name: found[node] for name, node in self.program.results.items()}

    def output(self, *inputs: torch.Tensor, state: Sequence[Any] = ()) -> torch.Tensor:
        """The module's own result, as the graph computes it now."""
        result: torch.Tensor = self.values(*inputs, state=state)[self.program.output().args[0][0]]
        return result


def captured(module: nn.Module, *inputs: torch.Tensor, config: PruneConfig = SMALL) -> Captured:
    """Capture `module`, its weights set by a fixed seed, with batch and sequence as symbols."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    found: list[Captured] = []

    def backend(graph: GraphModule, _: list[Any]) -> GraphModule:
        mode = _torch.fake_mode_of(_torch.placeholder_values(graph))
        with _torch.graph_world(mode):
            found.append(Captured(module, capture(graph, config)[0], mode))
        return graph

    torch._dynamo.reset()
    given = inputs or (hidden(),)
    for value in given:
        for dim in (0, 1):
            torch._dynamo.maybe_mark_dynamic(value, dim)
    compiled = torch.compile(module.eval(), backend=backend, fullgraph=True)
    with torch.no_grad():
        compiled(**dict(zip(("x", "attention_mask"), given, strict=False)))
    return found[0]


@dataclass
class Expose:
    """A pass that makes nodes results of the graph, so that they are kept and can be looked at."""

    pick: Callable[[Program], dict[str, Node]]
    name: str = "expose"
    requires: tuple[str, ...] = ()

    def __call__(self, program: Program) -> PassResult:
        program.results |= self.pick(program)
        return PassResult()


def targets(program: Program, author: str | None = None) -> list[str]:
    """Names of the operators called, in order; only those that a pass added when `author` is given."""
    return [
        str(node.target.overloadpacket.__name__ if hasattr(node.target, "overloadpacket") else node.target.__name__)
        for node in program.graph.nodes
        if node.op == "call_function" and author in (None, node.meta.get("ppgraph_pass"))
    ]
