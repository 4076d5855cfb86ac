"""How selections behave over a model's batches: how often each unit is kept, and how much consecutive batches share."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ppgraph.passes.base import Site


def jaccard(left: torch.Tensor, right: torch.Tensor) -> float:
    """Size of the intersection over that of the union of two vectors of distinct indices; 1 if both are empty."""
    common = int(torch.isin(left, right).sum())
    union = len(left) + len(right) - common
    return common / union if union else 1.0


@dataclass(frozen=True)
class SelectionSummary:
    """One site's selections: `kept_share` [units] fp32 of its batches, and mean Jaccard overlap with the batch before.

    `overlap` is None before the second batch.
    """

    site: Site
    batches: int
    kept_share: torch.Tensor
    overlap: float | None

    @property
    def always(self) -> float:
        """Share of the units that every batch kept."""
        return float((self.kept_share == 1).float().mean())

    @property
    def never(self) -> float:
        """Share of the units that no batch kept."""
        return float((self.kept_share == 0).float().mean())


class SelectionStatistics:
    """Counts of the selections that prefills make, updated with a few operators a batch and no synchronisation.

    All sites share flat tensors: `_counts` [all channels] int32, and the previous batch's mask [all channels].
    """

    def __init__(self) -> None:
        self.batches = 0
        self._layout: tuple[object, ...] = ()

    def add(self, channels: Mapping[str, torch.Tensor], sites: Sequence[Site]) -> None:
        """Take in one batch: {site name: kept channels [C'] int64}. Other sites or another device start over."""
        if not channels:
            return
        with torch.inference_mode(False), torch.no_grad():
            self._lay_out(channels, {site.name: site for site in sites})
            kept = torch.cat(list(channels.values())) + self._offsets
            self._counts[kept] += 1
            if self.batches:
                common = torch.zeros_like(self._overlaps).index_add_(0, self._owner, self._previous[kept].float())
                self._overlaps += common / (2 * self._kept - common).clamp(min=1)
            self._previous.zero_()
            self._previous[kept] = True
            self.batches += 1

    def summaries(self) -> list[SelectionSummary]:
        """One for each site that prunes, in order; none before the first batch."""
        if not self.batches:
            return []
        shares = (self._counts.float() / self.batches).cpu()
        overlaps = (self._overlaps / max(self.batches - 1, 1)).tolist() if self.batches > 1 else itertools.repeat(None)
        split = shares.split([site.width for site in self._sites])
        return [
            SelectionSummary(site, self.batches, share[:: site.block].clone(), overlap)
            for site, share, overlap in zip(self._sites, split, overlaps, strict=False)
        ]

    def _lay_out(self, channels: Mapping[str, torch.Tensor], sites: Mapping[str, Site]) -> None:
        device = next(iter(channels.values())).device
        layout = (device, *((name, len(kept)) for name, kept in channels.items()))
        if layout == self._layout:
            return
        self._layout, self._sites, self.batches = layout, [sites[name] for name in channels], 0
        starts = list(itertools.accumulate((site.width for site in self._sites), initial=0))
        lengths = torch.tensor([len(kept) for kept in channels.values()], device=device)
        self._offsets = torch.tensor(starts[:-1], device=device).repeat_interleave(lengths)
        self._owner = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
        self._kept = lengths.float()
        self._overlaps = torch.zeros(len(lengths), device=device)
        self._counts = torch.zeros(starts[-1], dtype=torch.int32, device=device)
        self._previous = torch.zeros(starts[-1], dtype=torch.bool, device=device)
