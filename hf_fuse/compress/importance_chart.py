"""A chart of how much each layer matters, and which were taken away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_fuse.plots import BAR_COLOUR, FAINT, FAMILY_COLOURS, INK, _checked, _figure, _save

REMOVED_COLOUR = FAMILY_COLOURS[1]


def importance_chart(
    importance: Mapping[str, Sequence[float]],
    removed: Mapping[str, Sequence[int]],
    path: str | Path,
    *,
    ylabel: str = "importance (1 - cosine)",
) -> Path:
    """Draws one panel per kind of part with one bar per layer; removed ones stand out.

    Args:
        importance: kind -> one number per layer.
        removed: kind -> indices of the layers that lost it.
        path: file to write; .png, .svg or .pdf.

    Raises:
        FuseError: unknown file format, or matplotlib is missing.
        OutputError: the file can't be written.
    """
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    path = _checked(path)
    height = max(len(values) for values in importance.values())
    figure = _figure(max(5.0, min(1.5 + 0.3 * height, 24.0)), 0.9 + 2.3 * len(importance))
    panels = figure.subplots(len(importance), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (kind, values) in zip(panels, importance.items()):
        gone = set(removed.get(kind, ()))
        colours = [REMOVED_COLOUR if index in gone else BAR_COLOUR for index in range(len(values))]
        axes.bar(range(len(values)), values, color=colours, width=0.75, zorder=2)
        positive = [value for value in values if value > 0]
        # One layer that matters much more than the rest would press their bars to the ground.
        if len(positive) == len(values) and max(values) > 30 * min(values):
            axes.set_yscale("log")
            axes.set_ylim(min(values) / 2, max(values) * 1.5)
            axes.minorticks_off()
        axes.set_title(kind, fontsize=10, fontweight="bold", color=INK)
        axes.set_ylabel(ylabel, fontsize=8, color=INK)
        axes.grid(axis="y", color=FAINT, linewidth=0.6, zorder=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=20, integer=True))
        axes.set_xlim(-0.6, height - 0.4)
        axes.tick_params(length=0, labelsize=8, labelcolor=INK)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(FAINT)
    panels[-1].set_xlabel("layer", fontsize=9, color=INK)
    handles = [Patch(color=BAR_COLOUR, label="kept"), Patch(color=REMOVED_COLOUR, label="removed")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return _save(figure, path)
