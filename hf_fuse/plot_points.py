"""Charts of points written to a file: one quantity against another, as named points or as lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fuse.errors import FuseError
from hf_fuse.plots import FAINT, FAMILY_COLOURS, INK, _checked, _figure, _save, _wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[float, float]
# From this ratio of the largest to the smallest on, an axis of positive numbers is logarithmic.
LOG_RATIO = 50
MARKERS = "osD^vP*X"


def scatter(
    points: Mapping[str, Point],
    *,
    path: str | Path,
    title: str,
    xlabel: str,
    ylabel: str,
    families: Mapping[str, str] | None = None,
    best: str | None = None,
    spread: Mapping[str, float] | None = None,
) -> Path:
    """Draws named points, each with its name beside it where there is room.

    Args:
        points: name -> (x, y). Points that are not finite are left out.
        path: file to write; .png, .svg or .pdf. Its folder is made; an existing file is replaced.
        families: name -> family: a colour and a marker each, with a legend below.
        best: name of the point to set off.
        spread: name -> half the length of a vertical bar through the point, in units of y.

    Returns:
        ``path``.

    Raises:
        FuseError: nothing to draw, unknown file format, or matplotlib is missing.
        OutputError: the file can't be written.
    """
    path = _checked(path)
    points = _finite(points)
    if not points:
        raise FuseError(f"{path}: nothing to draw. Expected at least one point with two finite numbers.")
    figure = _figure(9, 6.5)
    axes = figure.subplots()
    groups = list(dict.fromkeys((families or {}).get(name, "") for name in points))
    for number, group in enumerate(groups):
        members = {name: point for name, point in points.items() if (families or {}).get(name, "") == group}
        colour, marker = FAMILY_COLOURS[(number + 2) % len(FAMILY_COLOURS)], MARKERS[number % len(MARKERS)]
        bars = [(spread or {}).get(name, 0.0) for name in members]
        if any(bars):
            axes.errorbar(*zip(*members.values()), yerr=bars, fmt="none", color=colour, linewidth=1, alpha=0.6)
        axes.scatter(*zip(*members.values()), color=colour, marker=marker, linewidths=0, s=45, zorder=3)
        if best in members:
            x, y = members[best]
            axes.scatter([x], [y], color=colour, marker=marker, edgecolors=INK, linewidths=2.0, s=90, zorder=3)
    _scaled(axes, [x for x, _ in points.values()])
    _dressed(axes, title, xlabel, ylabel)
    if len(groups) > 1:
        _legend(figure, axes, groups)
    _name_points(figure, axes, points, best)
    return _save(figure, path)


def lines(
    series: Mapping[str, Sequence[Point]],
    *,
    path: str | Path,
    title: str,
    xlabel: str,
    ylabel: str,
    best: Point | None = None,
    logarithmic: bool | None = None,
) -> Path:
    """Draws one line per series, its points marked, with a legend below if there are several.

    Args:
        series: name -> (x, y) pairs in any order. Points that are not finite are left out.
        path: as in :func:`scatter`.
        best: a point to set off.
        logarithmic: of the x axis; by default where positive numbers span a ratio of 50 or more.

    Returns:
        ``path``.

    Raises:
        FuseError: nothing to draw, unknown file format, or matplotlib is missing.
        OutputError: the file can't be written.
    """
    path = _checked(path)
    kept = {name: sorted(point for point in pairs if _is_finite(point)) for name, pairs in series.items()}
    kept = {name: pairs for name, pairs in kept.items() if pairs}
    if not kept:
        raise FuseError(f"{path}: nothing to draw. Expected at least one point with two finite numbers.")
    figure = _figure(7.5, 5)
    axes = figure.subplots()
    for number, (name, pairs) in enumerate(kept.items()):
        colour = FAMILY_COLOURS[(number + 2) % len(FAMILY_COLOURS)]
        marker = MARKERS[number % len(MARKERS)]
        # A leading underscore would hide the name from the legend.
        axes.plot(*zip(*pairs), color=colour, marker=marker, linewidth=1.6, label=f" {_wrapped(name, 40)}", zorder=2)
    if best is not None and _is_finite(best):
        axes.scatter(*zip(best), s=150, facecolors="none", edgecolors=INK, linewidths=2.0, zorder=4)
    _scaled(axes, [x for pairs in kept.values() for x, _ in pairs], logarithmic)
    _dressed(axes, title, xlabel, ylabel)
    if len(kept) > 1:
        found = figure.legend(loc="outside lower center", ncols=min(len(kept), 3), frameon=False, fontsize=9)
        for text in found.get_texts():
            text.set_parse_math(False)
    return _save(figure, path)


def _finite(points: Mapping[str, Point]) -> dict[str, Point]:
    return {name: point for name, point in points.items() if _is_finite(point)}


def _is_finite(point: Point) -> bool:
    return all(value is not None and math.isfinite(value) for value in point)


def _scaled(axes: Axes, values: Sequence[float], logarithmic: bool | None = None) -> None:
    positive = min(values) > 0
    if logarithmic is None:
        logarithmic = positive and max(values) / min(values) >= LOG_RATIO
    if logarithmic and positive:
        axes.set_xscale("log")
    axes.margins(0.08)


def _dressed(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(_wrapped(title, 80), fontsize=12, fontweight="bold", color=INK, parse_math=False)
    axes.set_xlabel(xlabel, fontsize=10, color=INK, parse_math=False)
    axes.set_ylabel(ylabel, fontsize=10, color=INK, parse_math=False)
    axes.grid(color=FAINT, linewidth=0.6, zorder=0)
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_color(FAINT)


def _legend(figure: Any, axes: Axes, groups: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="", marker=MARKERS[number % len(MARKERS)], label=group or "other",
               color=FAMILY_COLOURS[(number + 2) % len(FAMILY_COLOURS)])
        for number, group in enumerate(groups)
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(groups), 5), frameon=False, fontsize=9)


def _name_points(figure: Any, axes: Axes, points: Mapping[str, Point], best: str | None) -> None:
    """Writes each name at the nearest free place around its point; one that finds none is left out, the best never."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()  # settles the layout: only then are positions known
    pixel = figure.dpi / 72
    at = {name: axes.transData.transform(point) for name, point in points.items()}
    taken = [(x - 4 * pixel, y - 4 * pixel, x + 4 * pixel, y + 4 * pixel) for x, y in at.values()]
    frame = axes.get_window_extent()
    for name in sorted(points, key=lambda name: name != best):
        label = _wrapped(name, 34, lines=1)
        width, height = 4.4 * len(label) * pixel, 9 * pixel
        for dx, dy in _places(width / pixel):
            left, bottom = at[name][0] + dx * pixel, at[name][1] + dy * pixel - height / 2
            box = (left, bottom, left + width, bottom + height)
            inside = frame.x0 <= box[0] and box[2] <= frame.x1 and frame.y0 <= box[1] and box[3] <= frame.y1
            if inside and not any(_overlap(box, other) for other in taken):
                break
        else:
            if name != best:
                continue
            dx, dy = 8, 0
            box = (0.0, 0.0, 0.0, 0.0)
        taken.append(box)
        far = abs(dy) > 12
        axes.annotate(
            label, points[name], xytext=(dx, dy), textcoords="offset points", va="center", fontsize=8, color=INK,
            fontweight="bold" if name == best else "normal", parse_math=False, zorder=4,
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.5, "shrinkA": 0} if far else None,
        )  # fmt: skip


def _places(width: float) -> list[tuple[float, float]]:
    """Offsets of a label's left middle from its point, the near ones first, in points."""
    found = [(7.0, 0.0), (-7.0 - width, 0.0)]
    for distance in range(10, 90, 10):
        for sign in (1, -1):
            found += [(x, sign * float(distance)) for x in (7.0, -width / 2, -7.0 - width)]
    return found


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
