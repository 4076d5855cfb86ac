"""Figures of how selections behave, drawn with matplotlib (the extra `plot`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ppgraph.errors import InputError
from ppgraph.selections import SelectionSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ppgraph.inspect.report import Report

COLOURS = {"attention": "#c26a00", "mlp": "#5b2fb3"}


def draw(report: Report) -> Figure:
    """Kept share of each head (heat map, layer x head) and channel (curves, one a layer), and overlaps by layer.

    Raises:
        InputError: no batch yet, or matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise InputError("plots need matplotlib; run: pip install 'ppgraph[plot]'") from None
    if not report.selections:
        raise InputError("nothing to plot: no batch has been pruned yet; run the model first")
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    heads, channels, overlaps = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
    _draw_heads(heads, [summary for summary in report.selections if summary.site.kind == "attention"])
    _draw_channels(channels, [summary for summary in report.selections if summary.site.kind == "mlp"])
    _draw_overlaps(overlaps, report)
    batches = report.selections[0].batches
    figure.suptitle(f"{report.config.method}, ratio {report.config.ratio:g}: selections of {batches} batches")
    return figure


def _draw_heads(axes: Axes, summaries: list[SelectionSummary]) -> None:
    axes.set(title="how often each head is kept", xlabel="head", ylabel="layer")
    if not summaries:
        axes.text(0.5, 0.5, "no attention is pruned", ha="center", transform=axes.transAxes)
        return
    widest = max(len(summary.kept_share) for summary in summaries)
    grid = torch.full((len(summaries), widest), float("nan"))
    for row, summary in zip(grid, summaries, strict=True):
        row[: len(summary.kept_share)] = summary.kept_share
    image = axes.imshow(grid.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
    step = -(-len(summaries) // 16)
    axes.set_yticks(range(0, len(summaries), step), [str(summary.site.layer) for summary in summaries[::step]])
    axes.figure.colorbar(image, ax=axes, label="share of batches")


def _draw_channels(axes: Axes, summaries: list[SelectionSummary]) -> None:
    axes.set(title="how often MLP channels are kept", xlabel="channels, most kept first (%)", ylabel="share of batches")
    axes.set_ylim(-0.03, 1.03)
    for number, summary in enumerate(summaries):
        share = summary.kept_share.sort(descending=True).values
        places = torch.linspace(0, 100, len(share))
        shade = 0.25 + 0.75 * (number + 1) / len(summaries)
        label = f"layer {summary.site.layer}" if number in (0, len(summaries) - 1) else None
        axes.plot(places.numpy(), share.numpy(), color=COLOURS["mlp"], alpha=shade, linewidth=1.2, label=label)
    if summaries:
        axes.legend(frameon=False)


def _draw_overlaps(axes: Axes, report: Report) -> None:
    axes.set(title="overlap of selections (Jaccard)", xlabel="layer", ylabel="overlap")
    axes.set_ylim(-0.03, 1.03)
    for kind, colour in COLOURS.items():
        summaries = [summary for summary in report.selections if summary.site.kind == kind]
        layers = [summary.site.layer for summary in summaries]
        before = [summary.overlap for summary in summaries if summary.overlap is not None]
        if before:
            axes.plot(layers, before, marker="o", markersize=4, color=colour, label=f"{kind}, batch before")
        full = report.full_batch_overlap
        if summaries and full:
            values = [full[summary.site.name] for summary in summaries]
            axes.plot(
                layers, values, marker="s", markersize=4, linestyle="--", color=colour, label=f"{kind}, full batch"
            )
        if summaries:
            # Two random selections of k of n units share k/n of each, a Jaccard of k/(2n-k).
            kept, all_units = summaries[0].site.kept_units, summaries[0].site.units
            chance = kept / (2 * all_units - kept)
            axes.axhline(chance, color=colour, linewidth=0.8, linestyle=":", label=f"{kind}, by chance")
    axes.legend(frameon=False, fontsize=8)
