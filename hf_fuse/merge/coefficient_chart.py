"""A chart of learned coefficients over the depth of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_fuse.merge.parameters import is_at_the_end, layer_of, stacks
from hf_fuse.plots import BAR_COLOUR, FAINT, INK, _checked, _figure, _save, _wrapped

BEFORE, AFTER = "in", "out"


def coefficient_chart(models: Mapping[str, Mapping[str, Sequence[float]]], path: str | Path, *, title: str) -> Path:
    """Draws one panel per model: a dot per tensor or chunk, and a line through the mean of each layer.

    Args:
        models: model -> tensor -> its coefficients. Embeddings stand before the layers, heads and final norms after.
        path: file to write; .png, .svg or .pdf.

    Raises:
        FuseError: unknown file format, or matplotlib is missing.
        OutputError: the file can't be written.
    """
    path = _checked(path)
    places, names = _places(next(iter(models.values())))
    figure = _figure(max(5.5, min(2.0 + 0.3 * len(names), 24.0)), 0.9 + 1.7 * len(models))
    panels = figure.subplots(len(models), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    for axes, (model, tensors) in zip(panels, models.items()):
        found: dict[int, list[float]] = {}
        for name, values in tensors.items():
            found.setdefault(places[name], []).extend(values)
        positions = sorted(found)
        dots = [(position, value) for position in positions for value in found[position]]
        axes.scatter(*zip(*dots), s=12, color=BAR_COLOUR, alpha=0.5, linewidths=0, zorder=2)
        means = [sum(found[position]) / len(found[position]) for position in positions]
        axes.plot(positions, means, color=INK, linewidth=1.5, marker="o", markersize=3, zorder=3)
        axes.set_title(_wrapped(model, 80, lines=1), fontsize=10, fontweight="bold", color=INK, parse_math=False)
        axes.set_ylabel("coefficient", fontsize=8, color=INK)
        axes.axhline(0, color=INK, linewidth=0.8, zorder=1)
        axes.grid(axis="y", color=FAINT, linewidth=0.6, zorder=0)
        axes.tick_params(length=0, labelsize=8, labelcolor=INK)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(FAINT)
    step = -(-len(names) // 24)  # more names than that would run into each other
    shown = [place for place, name in enumerate(names) if name in (BEFORE, AFTER) or place % step == 0]
    panels[-1].set_xticks(shown, [names[place] for place in shown])
    panels[-1].set_xlabel("layer (dots: merged tensors; line: mean)", fontsize=9, color=INK)
    panels[-1].set_xlim(-0.6, len(names) - 0.4)
    figure.suptitle(title, fontsize=12, fontweight="bold", color=INK, parse_math=False)
    return _save(figure, path)


def _places(tensors: Mapping[str, object]) -> tuple[dict[str, int], list[str]]:
    """Where each tensor stands on the axis, and what the places are called."""
    heights = stacks(tensors)
    first, names = {}, [BEFORE]
    for stack, height in heights.items():
        first[stack] = len(names)
        names += [str(layer) for layer in range(height)]
    names.append(AFTER)
    places = {}
    for name in tensors:
        found = layer_of(name)
        outside = len(names) - 1 if is_at_the_end(name) else 0
        places[name] = first[found[0]] + found[1] if found else outside
    return places, names
