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
    """Groups by what they are, without the layers' numbers: residual, attention, inner."""
    found: dict[str, list[Matched]] = {}
    for group in groups:
        found.setdefault(re.sub(r"^.*\.\d+\.", "", group.group), []).append(group)
    return found


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def draw(result: Aligned, path: Path) -> None:
    """Before and after by layer, one line each for every kind of group; nothing where there is nothing to compare, or
    no matplotlib (the extra ``plot``)."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return
    from hf_fuse.plot_points import lines

    series: dict[str, list[tuple[float, float]]] = {}
    for kind, groups in kinds(result.found.groups).items():
        if any(group.before is None for group in groups):
            return
        for when in ("before", "after"):
            points = [(float(number), getattr(group, when)) for number, group in enumerate(groups)]
            if len(points) == 1:  # one for the whole model: level through all layers
                points = [(x, points[0][1]) for x in (0.0, float(_height(result.found.groups)))]
            series[f"{kind}, {when}"] = points
    title = f"{result.method}: fit by layer"
    lines(series, path=path, title=title, xlabel="layer", ylabel=result.found.measure)


def _height(groups: Iterable[Matched]) -> int:
    return max(max(len(one) for one in kinds(groups).values()) - 1, 1)
