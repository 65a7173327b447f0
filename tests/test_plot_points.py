"""Points and lines: what is drawn is in the file, what can't be drawn is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hf_fuse.errors import FuseError
from hf_fuse.plot_points import lines, scatter

TEXT = {"title": "Of $this", "xlabel": "length_of_x", "ylabel": "score_of_y"}


def words(path: Path) -> str:
    """matplotlib keeps each text of an .svg in a comment above its outlines."""
    return path.read_text(encoding="utf-8")


def test_scatter_names_points_and_families(tmp_path: Path) -> None:
    points = {"first": (0.1, 1.0), "second_one": (0.5, 2.0), "gone": (math.nan, 1.0)}
    path = scatter(
        points, path=tmp_path / "new" / "points.svg", families={"first": "old", "second_one": "young"}, best="first",
        spread={"first": 0.3}, **TEXT,
    )  # fmt: skip
    text = words(path)
    for wanted in ("first", "second_one", "old", "young", "Of $this", "length_of_x", "score_of_y"):
        assert f"<!-- {wanted} -->" in text
    assert "gone" not in text


def test_crowded_names_give_way_but_never_the_best(tmp_path: Path) -> None:
    points = {f"point-{number}": (1.0, 1.0) for number in range(80)}
    text = words(scatter(points, path=tmp_path / "crowd.svg", best="point-60", **TEXT))
    named = sum(f"<!-- {name} -->" in text for name in points)
    assert 5 < named < 80 and "<!-- point-60 -->" in text


def test_lines_have_a_legend_and_a_logarithmic_axis_where_it_helps(tmp_path: Path) -> None:
    series = {"_one": [(1.0, 2.0), (1e-4, 3.0)], "two": [(1e-2, 1.0), (0.1, math.inf)], "empty": [(math.nan, 1.0)]}
    text = words(lines(series, path=tmp_path / "lines.svg", best=(1.0, 2.0), **TEXT))
    assert "_one" in text and "two" in text and "empty" not in text
    assert "{10^{-4}}" in text or "10^{-4}" in text  # a tick of a logarithmic axis
    flat = words(lines({"": [(0.0, 2.0), (1.0, 3.0)]}, path=tmp_path / "flat.svg", **TEXT))
    assert "10^{" not in flat


def test_same_points_same_bytes(tmp_path: Path) -> None:
    one, two = (scatter({"a": (1, 2), "b": (3, 4)}, path=tmp_path / f"{n}.png", **TEXT) for n in "12")
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("draw", [lambda p: scatter({"a": (math.nan, 1)}, path=p, **TEXT),
                                  lambda p: lines({"a": []}, path=p, **TEXT)])  # fmt: skip
def test_nothing_to_draw(draw, tmp_path: Path) -> None:
    with pytest.raises(FuseError, match="nothing to draw"):
        draw(tmp_path / "x.png")
    with pytest.raises(FuseError, match="charts are written as"):
        draw(tmp_path / "x.gif")
