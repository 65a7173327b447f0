"""Charts that are written to a file: bars that compare models over data sets, and matrices as heat maps.

Only matplotlib's object interface is used: no window, no global state, no effect on a notebook's own figures. The
colours (Okabe and Ito's palette, ``cividis``, ``PuOr``) can be told apart with every common colour-vision deficiency.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fuse.errors import FuseError, OutputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
BAR_COLOUR = "#56B4E9"
FAMILY_COLOURS = ("#999999", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#0072B2")
INK = "#222222"
FAINT = "#D9D9D9"
# From this ratio of the largest to the smallest bar on, the small ones could not be told apart on a linear axis.
LOG_RATIO = 30


def bar_chart(
    values: Mapping[str, Mapping[str, float]],
    *,
    path: str | Path,
    title: str,
    ylabel: str,
    lower_is_better: bool = False,
    families: Mapping[str, str] | None = None,
) -> Path:
    """Draws one panel per data set with one bar per model; the best bar of each panel stands out.

    Names stand beside the bars instead of in a legend, so thirty models stay as readable as three. A panel whose
    values differ by more than 30 times has a logarithmic axis and says so. A missing value leaves a dash, a value
    that is not finite leaves its name.

    Args:
        values: model -> data set -> value.
        path: file to write; .png, .svg or .pdf. Its folder is made; an existing file is replaced.
        title: above all panels.
        ylabel: what the bars measure, with its unit.
        lower_is_better: which bar is the best.
        families: model -> family. Families get a colour each and a legend below the panels.

    Returns:
        ``path``.

    Raises:
        FuseError: nothing to draw, unknown file format, or matplotlib is missing.
        OutputError: the file can't be written.
    """
    path = _checked(path)
    groups = list(dict.fromkeys(group for by_group in values.values() for group in by_group))
    if not groups:
        raise FuseError(f"{path}: nothing to draw. Expected at least one model with at least one value.")
    names = list(values)
    columns = min(len(groups), 4)
    rows = math.ceil(len(groups) / columns)
    labels = [_wrapped(name, 42, lines=2) for name in names]
    widest = max(len(line) for label in labels for line in label.split("\n"))
    figure = _figure(1.0 + 0.075 * widest + 2.7 * columns, 1.3 + rows * (0.75 + 0.27 * max(len(names), 2)))
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    colours = _family_colours(names, families)
    for axes, group in zip(panels.flat, groups):
        heights = [values[name].get(group) for name in names]
        _draw_bars(axes, heights, [colours[name] for name in names], lower_is_better)
        axes.set_title(_wrapped(group, 30), fontsize=10, fontweight="bold", color=INK, parse_math=False)
    for axes in panels.flat[len(groups) :]:
        axes.set_visible(False)
    for axes in panels[:, 0]:
        axes.set_yticks(range(len(names)), labels, parse_math=False)
        for tick, label in zip(axes.get_yticklabels(), labels):
            tick.set(fontsize=7 if "\n" in label else 9, linespacing=0.95)
    # With sharey the axis is one for all panels: turned over once, so that the first model is on top.
    panels[0, 0].set_ylim(len(names) - 0.4, -0.6)
    figure.suptitle(_wrapped(title, 36 * columns), fontsize=13, fontweight="bold", color=INK, parse_math=False)
    if families:
        _legend(figure, ylabel, names, families, colours)
    else:
        figure.supxlabel(ylabel, fontsize=9, color=INK, parse_math=False)
    return _save(figure, path)


def _draw_bars(axes: Axes, heights: Sequence[float | None], colours: Sequence[str], lower_is_better: bool) -> None:
    """Bars of one panel, each with its value; the best one (several if equal) in an outline and bold."""
    from matplotlib.ticker import MaxNLocator

    finite = [height for height in heights if height is not None and math.isfinite(height)]
    best = (min if lower_is_better else max)(finite) if finite else None
    logarithmic = bool(finite) and min(finite) > 0 and max(finite) / min(finite) > LOG_RATIO
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    if logarithmic:
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xlabel("log scale", fontsize=8, color=INK)
        left, right = low / 3, high * (high / low) ** 0.45
    else:
        span = (max(high, 0.0) - min(low, 0.0)) or 1.0
        left = min(low, 0.0) - (0.3 * span if low < 0 else 0.0)
        right = max(high, 0.0) + (0.3 * span if high > 0 or not low < 0 else 0.0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_xlim(left, right)
    # No tick in the room for the numbers: its label would touch the first one of the next panel.
    axes.set_xticks([tick for tick in axes.get_xticks() if left <= tick <= max(high, 0.0)])
    for row, (height, colour) in enumerate(zip(heights, colours)):
        drawn = height if height is not None and math.isfinite(height) else None
        is_best = drawn is not None and drawn == best and len(finite) > 1
        start = left if logarithmic else 0.0
        if drawn is not None:
            edge = {"edgecolor": INK, "linewidth": 1.8} if is_best else {"linewidth": 0}
            axes.barh(row, drawn - start, left=start, height=0.72, color=colour, zorder=2, **edge)
        negative = drawn is not None and drawn < 0
        axes.annotate(
            "–" if height is None else _number(height),
            (start if drawn is None else drawn, row),
            xytext=(-4 if negative else 4, 0),
            textcoords="offset points",
            ha="right" if negative else "left",
            va="center",
            fontsize=8,
            fontweight="bold" if is_best else "normal",
            color=INK,
            zorder=3,
        )
    if low < 0:
        axes.axvline(0, color=INK, linewidth=0.8, zorder=3)
    axes.grid(axis="x", color=FAINT, linewidth=0.6, zorder=0)
    axes.tick_params(length=0, labelsize=8, labelcolor=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "left" and not low < 0)
        spine.set_color(FAINT)


def heat_map(
    matrix: Sequence[Sequence[float]] | Any,
    *,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    path: str | Path,
    title: str,
    value_range: tuple[float, float] | None = None,
    diverging: bool = False,
    annotate: bool = True,
) -> Path:
    """Draws a matrix as coloured cells.

    Args:
        matrix: numbers ``[R, C]``: nested sequences, numpy array or tensor. NaN leaves a grey cell.
        row_labels: R names, from top to bottom.
        column_labels: C names.
        path: file to write; .png, .svg or .pdf. Its folder is made; an existing file is replaced.
        title: above the matrix.
        value_range: values of the two ends of the colour scale; default: those of the data.
        diverging: white for zero and two opposite colours (for cosines and differences). Without ``value_range`` the
            scale is symmetric.
        annotate: write the numbers into the cells, where they are large enough to hold them.

    Returns:
        ``path``.

    Raises:
        FuseError: an empty or ragged matrix, labels that don't fit it, unknown file format, or matplotlib is missing.
        OutputError: the file can't be written.
    """
    path = _checked(path)
    import numpy as np

    try:
        cells_RC = np.array(matrix, dtype=float)
    except (TypeError, ValueError):
        raise FuseError(f"{path}: the matrix has rows of unequal length or entries that are no numbers.") from None
    expected = (len(row_labels), len(column_labels))
    if cells_RC.ndim != 2 or not cells_RC.size or cells_RC.shape != expected:
        raise FuseError(
            f"{path}: the matrix has shape {list(cells_RC.shape)}, expected {list(expected)} for "
            f"{expected[0]} row labels and {expected[1]} column labels, and at least one cell."
        )
    low, high = _colour_range(cells_RC, value_range, diverging)
    rows, columns = cells_RC.shape
    # Hundreds of rows (one per tensor) leave one line for each name.
    row_names = [_wrapped(name, *((34, 3) if rows <= 24 else (60, 1))) for name in row_labels]
    column_names = [_wrapped(name, 28) for name in column_labels]
    row_width = max(len(line) for name in row_names for line in name.split("\n"))
    column_width = max(len(line) for name in column_names for line in name.split("\n"))
    row_height = max(name.count("\n") + 1 for name in row_names)
    slanted = column_width > 9
    # Cells are large enough for the names and numbers up to the size of a poster; beyond that they shrink.
    cell_height = min(max(0.42, 0.2 * row_height), 60 / rows)
    cell_width = min(0.72 if columns > 3 else 1.0, 60 / columns)
    width = 1.7 + 0.075 * row_width + columns * cell_width + (0.04 * column_width if slanted else 0)
    height = 1.2 + rows * cell_height + (0.055 * column_width if slanted else 0.25)
    figure = _figure(max(width, 4.0), max(height, 2.6))
    axes = figure.subplots()
    import matplotlib

    colours = matplotlib.colormaps["PuOr_r" if diverging else "cividis"].with_extremes(bad=FAINT)
    image = axes.imshow(np.ma.masked_invalid(cells_RC), cmap=colours, vmin=low, vmax=high, aspect="auto")
    _label_cells(axes, row_names, column_names, slanted, (cell_height, cell_width))
    if annotate and min(cell_height / 0.2, cell_width / 0.42) >= 1:
        _write_numbers(axes, cells_RC, image)
    bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 8 / (rows * cell_height)), aspect=25, pad=0.02)
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_visible(False)
    figure.suptitle(_wrapped(title, int(figure.get_figwidth() * 8)), fontsize=12, fontweight="bold", parse_math=False)
    return _save(figure, path)


def _colour_range(cells: Any, value_range: tuple[float, float] | None, diverging: bool) -> tuple[float, float]:
    import numpy as np

    if value_range:
        return value_range
    finite = cells[np.isfinite(cells)]
    if not finite.size:
        return (-1.0, 1.0) if diverging else (0.0, 1.0)
    low, high = float(finite.min()), float(finite.max())
    if diverging:
        high = max(abs(low), abs(high)) or 1.0
        return -high, high
    return (low, high) if high > low else (low, low + 1.0)


def _label_cells(
    axes: Axes, rows: Sequence[str], columns: Sequence[str], slanted: bool, cell: tuple[float, float]
) -> None:
    # Every n-th name where the cells are too small for all of them.
    row_step, column_step = (math.ceil(0.17 / size) for size in cell)
    axes.set_yticks(range(0, len(rows), row_step), rows[::row_step], fontsize=9, parse_math=False)
    slant = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    axes.set_xticks(range(0, len(columns), column_step), columns[::column_step], fontsize=9, parse_math=False, **slant)
    axes.tick_params(length=0)
    # White lines between the cells.
    if len(rows) * len(columns) <= 2500:
        axes.set_xticks([column - 0.5 for column in range(1, len(columns))], minor=True)
        axes.set_yticks([row - 0.5 for row in range(1, len(rows))], minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
        axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _write_numbers(axes: Axes, cells: Any, image: Any) -> None:
    for (row, column), value in _cells(cells):
        if not math.isfinite(value):
            text, colour = _number(value), INK
        else:
            red, green, blue, _ = image.cmap(image.norm(value))
            text, colour = _number(value), INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)


def _cells(cells: Any) -> Iterable[tuple[tuple[int, int], float]]:
    for row in range(cells.shape[0]):
        for column in range(cells.shape[1]):
            yield (row, column), float(cells[row, column])


def _legend(
    figure: Figure, ylabel: str, names: Sequence[str], families: Mapping[str, str], colours: Mapping[str, str]
) -> None:
    from matplotlib.patches import Patch

    shown = dict.fromkeys((families.get(name, ""), colours[name]) for name in names)
    handles = [Patch(color=colour, label=family or "other") for family, colour in shown]
    handles.append(Patch(facecolor="white", edgecolor=INK, linewidth=1.8, label="best"))
    # "outside" lets the constrained layout reserve room: the legend never covers a bar. It carries the axis label too,
    # because the layout would lay a label of the whole figure on top of it.
    legend = figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 5), frameon=False, fontsize=9, title=ylabel
    )
    legend.get_title().set(fontsize=9, color=INK, parse_math=False)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _family_colours(names: Sequence[str], families: Mapping[str, str] | None) -> dict[str, str]:
    if not families:
        return dict.fromkeys(names, BAR_COLOUR)
    order = list(dict.fromkeys(families.get(name, "") for name in names))
    return {name: FAMILY_COLOURS[order.index(families.get(name, "")) % len(FAMILY_COLOURS)] for name in names}


def _number(value: float) -> str:
    """Three or four digits: 0.512, 7.31, 12.8, 1,204, 3.1e+07."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size and (size >= 1e6 or size < 1e-3):
        return f"{value:.1e}"
    text = f"{value:,.{0 if size >= 1000 else 1 if size >= 100 else 2}f}"
    return text.removeprefix("-") if text.strip("-0.") == "" else text


def _wrapped(name: str, width: int, lines: int = 3) -> str:
    """At most ``lines`` lines of about ``width`` characters, broken after ``/ - _ . : @`` and blanks where possible."""
    broken = []
    for part in str(name).split("\n"):
        part = "".join(character if character.isprintable() else "?" for character in part)
        if len(part) > (lines - 0.25) * width:  # the two ends tell long names apart better than the middle
            tail = width // 2
            part = f"{part[: int((lines - 0.25) * width) - tail - 1]}…{part[-tail:]}"
        broken.append("")
        for piece in re.findall(rf"[^/_.:@\s-]{{1,{width - 1}}}[/_.:@\s-]?|.", part):
            if broken[-1] and len(broken[-1]) + len(piece.rstrip()) > width:
                broken.append("")
            broken[-1] += piece
    kept = [line.strip() for line in broken]
    return "\n".join([*kept[: lines - 1], " ".join(kept[lines - 1 :])]).strip()


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    return figure


def _checked(path: str | Path) -> Path:
    """The path, if a chart can be written in its format and matplotlib is there to draw it."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise FuseError(f"{path}: charts are written as {', '.join(FORMATS)}. Give the file one of these endings.")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise FuseError(
            f'{path}: charts need matplotlib, which is not installed. Run: pip install "hf-fuse[plot]"'
        ) from None
    return path


def _save(figure: Figure, path: Path) -> Path:
    import warnings

    drawn = BytesIO()
    # No creation date and no version: the same figures give the same bytes.
    undated = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes; a warning per letter helps nobody.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(drawn, format=path.suffix[1:].lower(), dpi=144, metadata=undated[path.suffix.lower()])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(drawn.getvalue())
    except OSError as error:
        raise OutputError(f"{path}: the chart can't be written ({error.strerror}). Choose another place.") from None
    return path
