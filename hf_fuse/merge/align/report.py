"""What an alignment did, for people: a table, a file of figures, and a chart by layer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fuse.merge.align.alignment import Alignment, Matched
from hf_fuse.merge.align.pair import Pair

if TYPE_CHECKING:
    from rich.console import Console

RESULTS, CHART, PATH_CHART = "align_results.json", "alignment.png", "path.png"


@dataclass(frozen=True)
class Aligned:
    """The result of :func:`hf_fuse.align`.

    Attributes:
        output: the folder.
        method: its name.
        found: maps and groups.
        difference: of the logits of the aligned model from those before, relative to the largest; None: not compared.
    """

    output: Path
    method: str
    found: Alignment
    difference: float | None

    def summary(self, pair: Pair) -> str:
        moved, reference = (one.repo_id or one.folder.name for one in (pair.moved, pair.reference))
        if self.found.fused:
            return f"{moved} fused with {reference}."
        if pair.moved is pair.reference:
            return f"{moved} with its units in another order. It computes the same."
        return f"{moved} with its units in the order of {reference}'s. It computes the same."

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "output_is": "merged" if self.found.fused else "aligned",
            "logits_differ_by": self.difference,
            "measure": self.found.measure,
            "groups": [vars(group) for group in self.found.groups],
            **self.found.facts,
        }

    def print(self, console: Console) -> None:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column in ("units", "groups", "number", "moved", f"{self.found.measure or 'fit'} before", "after"):
            table.add_column(column, justify="left" if column == "units" else "right")
        for kind, groups in kinds(self.found.groups).items():
            figures = [_mean(group.before for group in groups), _mean(group.after for group in groups)]
            total, moved = sum(group.units for group in groups), sum(group.moved for group in groups)
            shown = ["" if value is None else f"{value:.4f}" for value in figures]
            table.add_row(kind, str(len(groups)), str(total), str(moved), *shown)
        console.print(table)
        for name, value in self.found.facts.items():
            if isinstance(value, (int, float)):
                print(f"{name.replace('_', ' ')}: {value:.4g}")
        same = "not compared" if self.difference is None else f"the same to {self.difference:.1g} of the largest logit"
        print(f"{'merged' if self.found.fused else 'aligned'}: {self.output}\nfunction of the aligned model: {same}")


def kinds(groups: Iterable[Matched]) -> dict[str, list[Matched]]:
    """Groups by what they are, without the layers' numbers: residual, attention, feed-forward."""
    found: dict[str, list[Matched]] = {}
    for group in groups:
        kind = re.sub(r"^(encoder\.layer|layers|h)\.\d+\.", "", group.group)
        kind = re.sub(r"\.block\.\d+\.|\.", " ", kind).replace("inner", "feed-forward")
        found.setdefault(kind, []).append(group)
    return found


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def draw(result: Aligned, path: Path) -> None:
    """A panel for every kind of group with two bars per layer, before and after; nothing where there is nothing to
    compare, or no matplotlib (the extra ``plot``)."""
    try:
        import matplotlib.ticker as ticker
    except ImportError:
        return
    from hf_fuse.plots import BAR_COLOUR, FAINT, INK, _figure, _save

    if any(group.before is None for group in result.found.groups):
        return
    found = kinds(result.found.groups)
    height = max(map(len, found.values()))
    panels = {kind: (groups, "layer") for kind, groups in found.items() if len(groups) > 1}
    if alone := {kind: groups[0] for kind, groups in found.items() if len(groups) == 1}:
        panels = {"whole model": (list(alone.values()), "")} | panels
    figure = _figure(max(5.0, min(1.5 + 0.45 * height, 24.0)), 0.9 + 2.1 * len(panels))
    for axes, (title, (groups, xlabel)) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items()):
        for shift, when, colour in ((-0.2, "before", "#999999"), (0.2, "after", BAR_COLOUR)):
            heights = [getattr(group, when) for group in groups]
            places = [number + shift for number in range(len(groups))]
            axes.bar(places, heights, 0.38, color=colour, zorder=2, label=when)
        axes.set_title(title, fontsize=10, fontweight="bold", color=INK, parse_math=False)
        axes.grid(axis="y", color=FAINT, linewidth=0.6, zorder=0)
        axes.axhline(0, color=FAINT, linewidth=1, zorder=1)
        axes.set_xlabel(xlabel, fontsize=8, color=INK)
        if xlabel:
            axes.xaxis.set_major_locator(ticker.MaxNLocator(nbins=20, integer=True))
            axes.set_xlim(-0.6, len(groups) - 0.4)
        else:
            axes.set_xticks(range(len(groups)), list(alone), parse_math=False)
            axes.set_xlim(-1.0, len(groups))
        axes.tick_params(length=0, labelsize=8, labelcolor=INK)
        for spine in axes.spines.values():
            spine.set_visible(False)
    figure.supylabel(result.found.measure, fontsize=9, color=INK)
    bars = figure.axes[0].get_legend_handles_labels()
    figure.legend(*bars, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    _save(figure, path)
