"""The scores: how much a channel matters, from statistics of its values and the weights it meets.

A score has a part that depends only on the weights (computed once), a part for each channel and a rule that gathers
the channels of a head. The latter two add nodes to the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.fx import Node

    from ppgraph.passes.base import Builder

aten = torch.ops.aten


@dataclass(frozen=True)
class Score:
    """`weight_term`: exit weight [D, C] -> [C] fp32. `channels`: f [C], term [C] -> [C]. `units`: [U, r] -> [U]."""

    weight_term: Callable[[torch.Tensor], torch.Tensor]
    channels: Callable[[Builder, Node, Node], Node]
    units: Callable[[Builder, Node], Node]


def _fourth_powers(weight: torch.Tensor) -> torch.Tensor:
    """sqrt(sum_i W[i,c]^4), which is the norm of the squared column; fp32, because W^4 underflows in fp16."""
    return weight.float().square().square().sum(0).sqrt()


def _absolute_sum(weight: torch.Tensor) -> torch.Tensor:
    return weight.float().abs().sum(0)


def _norm(build: Builder, channels: Node) -> Node:
    return build(aten.linalg_vector_norm.default, channels, 2, [1])  # type: ignore[no-any-return]


def _total(build: Builder, channels: Node) -> Node:
    return build.sum(channels, 1)


SCORES: dict[str, Score] = {
    "ppsp": Score(_fourth_powers, lambda build, f, term: build.mul(f, term), _norm),
    "wanda-sp": Score(_absolute_sum, lambda build, f, term: build.mul(build(aten.sqrt.default, f), term), _total),
}
