"""The chart of a selection: how many texts have which score, and which of them were kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hf_fuse.plots import FAINT, FAMILY_COLOURS, INK, _checked, _figure, _save

BINS = 60


def score_chart(scores: np.ndarray, kept: np.ndarray, *, title: str, path: str | Path) -> Path:
    """Draws a stacked histogram; scores beyond the outermost thousandths are counted in the outermost bars.

    Args:
        scores: [N]; those that are not finite are left out.
        kept: [N], whether the text was kept.

    Raises:
        FuseError: unknown file format, or matplotlib is missing.
    """
    path = _checked(path)
    finite = np.isfinite(scores)
    low, high = np.quantile(scores[finite], [0.001, 0.999])
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    shown = np.clip(scores, edges[0], edges[-1])
    figure = _figure(7.5, 4)
    axes = figure.subplots()
    axes.hist(
        [shown[kept & finite], shown[~kept & finite]], edges, stacked=True, color=[FAMILY_COLOURS[2], FAINT],
        label=["kept", "left out"],
    )  # fmt: skip
    axes.set_title(title, fontsize=11, color=INK, parse_math=False)
    axes.set_xlabel("score", color=INK)
    axes.set_ylabel("texts", color=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False)
    return _save(figure, path)
