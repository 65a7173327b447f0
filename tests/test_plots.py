"""Charts: what is drawn, that every word is inside the picture and none on top of a bar, and the errors."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from hf_fuse import plots
from hf_fuse.errors import FuseError, OutputError
from hf_fuse.plots import bar_chart, heat_map

LONG = "some-organisation/Llama-3.2-3B-Instruct-fine-tuned-with-a-rather-long-name-v2.1-checkpoint-12000"
MODELS = {
    "base": {"source": 8.67, "docs": 5.97},
    "expert-source": {"source": 7.97, "docs": 6.63},
    "merged-task_arithmetic-0.5": {"source": 8.55, "docs": 5.76},
}
FAMILIES = {"base": "base", "expert-source": "expert", "merged-task_arithmetic-0.5": "merge"}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, laid out."""
    figures = []
    save = plots._save

    def keep(figure, path):
        figures.append(figure)
        result = save(figure, path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            figure.draw_without_rendering()
        return result

    monkeypatch.setattr(plots, "_save", keep)
    return figures


def bars(axes):
    return [patch for patch in axes.patches if patch.get_height() == pytest.approx(0.72)]


def words(figure):
    """All visible, non-empty texts of a figure, tick labels in sight included."""
    from matplotlib.text import Text

    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    hidden = {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for shown in [axis._update_ticks() if axes.get_visible() else []]
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        for label in (tick.label1, tick.label2)
        if tick not in shown
    }
    return [text for text in found if text not in hidden]


def assert_every_word_is_inside(figure):
    width, height = figure.bbox.size
    texts = words(figure)
    assert texts
    for text in texts:
        box = text.get_window_extent()
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, text.get_text()


def test_bars_show_the_values_and_mark_the_best(tmp_path, drawn):
    path = bar_chart(
        MODELS, path=tmp_path / "new" / "bars.png", title="Perplexity", ylabel="nats", lower_is_better=True
    )
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    (figure,) = drawn
    source, docs = figure.axes
    assert [source.get_title(), docs.get_title()] == ["source", "docs"]
    assert [round(bar.get_width(), 2) for bar in bars(source)] == [8.67, 7.97, 8.55]
    assert [bar.get_linewidth() > 0 for bar in bars(source)] == [False, True, False]
    assert [bar.get_linewidth() > 0 for bar in bars(docs)] == [False, False, True]
    assert [label.get_text() for label in source.get_yticklabels()] == list(MODELS)
    assert {"8.67", "7.97", "8.55"} <= {text.get_text() for text in source.texts}
    # The first model is on top, and bars begin at zero.
    assert source.get_ylim()[0] > source.get_ylim()[1] and source.get_xlim()[0] == 0
    assert_every_word_is_inside(figure)


def test_the_best_is_the_largest_when_higher_is_better(tmp_path, drawn):
    bar_chart(MODELS, path=tmp_path / "bars.png", title="Accuracy", ylabel="share")
    assert [bar.get_linewidth() > 0 for bar in bars(drawn[0].axes[0])] == [True, False, False]


def test_a_single_bar_is_not_the_best_of_anything(tmp_path, drawn):
    bar_chart({"one": {"a": 1.0}}, path=tmp_path / "bars.png", title="t", ylabel="y")
    assert [bar.get_linewidth() for bar in bars(drawn[0].axes[0])] == [0]


def test_families_have_colours_and_a_legend_that_covers_nothing(tmp_path, drawn):
    bar_chart(MODELS, path=tmp_path / "bars.png", title="Perplexity", ylabel="nats", families=FAMILIES)
    (figure,) = drawn
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["base", "expert", "merge", "best"]
    assert legend.get_title().get_text() == "nats"
    assert len({bar.get_facecolor() for bar in bars(figure.axes[0])}) == 3
    box = legend.get_window_extent()
    for axes in figure.axes:
        assert not box.overlaps(axes.get_tightbbox()), "the legend lies on a panel"
    assert_every_word_is_inside(figure)


def test_many_models_with_long_names_stay_apart(tmp_path, drawn):
    values = {
        f"{LONG}-{index}": {f"data set {group}": index + group + 1.0 for group in range(6)} for index in range(24)
    }
    bar_chart(values, path=tmp_path / "bars.png", title=LONG, ylabel="y")
    (figure,) = drawn
    assert len(figure.axes) == 8 and sum(axes.get_visible() for axes in figure.axes) == 6
    assert_every_word_is_inside(figure)
    labels = figure.axes[0].get_yticklabels()
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.y0)
    assert all(lower.y1 <= upper.y0 + 1 for lower, upper in zip(boxes, boxes[1:])), "names lie on each other"
    # Shortened in the middle: beginning and end still tell the models apart.
    assert len({label.get_text() for label in labels}) == 24


def test_tick_labels_of_neighbouring_panels_do_not_touch(tmp_path, drawn):
    bar_chart({"a": dict.fromkeys("wxyz", 10.0)}, path=tmp_path / "bars.png", title="t", ylabel="y")
    boxes = sorted(
        (label.get_window_extent() for axes in drawn[0].axes for label in axes.get_xticklabels()), key=lambda b: b.x0
    )
    assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:]))


@pytest.mark.parametrize(("values", "scale"), [((1.0, 29.0), "linear"), ((1.0, 31.0), "log"), ((-1.0, 50.0), "linear")])
def test_values_of_very_different_sizes_get_a_logarithmic_axis(tmp_path, drawn, values, scale):
    bar_chart({str(v): {"a": v} for v in values}, path=tmp_path / "bars.png", title="t", ylabel="y")
    axes = drawn[0].axes[0]
    assert axes.get_xscale() == scale
    assert ("log scale" in axes.get_xlabel()) == (scale == "log")


def test_missing_and_infinite_values_leave_a_mark_instead_of_a_bar(tmp_path, drawn):
    values = {"a": {"x": 1.0}, "b": {"x": math.nan}, "c": {"x": math.inf}, "d": {"y": 2.0}}
    bar_chart(values, path=tmp_path / "bars.png", title="t", ylabel="y", lower_is_better=True)
    x = drawn[0].axes[0]
    assert len(bars(x)) == 1
    assert [text.get_text() for text in x.texts] == ["1.00", "nan", "inf", "–"]


def test_names_are_text_not_formulas(tmp_path, drawn):
    names = ["a_b$x^2$c", "$\\undefined$", "モデル", "bell\x07"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bar_chart(
            {name: {name: 1.0} for name in names}, path=tmp_path / "b.png", title=names[1], ylabel=names[1],
            families=dict(zip(names, names)),
        )  # fmt: skip
        heat_map(np.eye(4), row_labels=names, column_labels=names, path=tmp_path / "h.png", title=names[1])
    assert [label.get_text() for label in drawn[0].axes[0].get_yticklabels()] == [*names[:3], "bell?"]


def test_heat_map_writes_numbers_that_can_be_read(tmp_path, drawn):
    matrix = [[1.0, -0.9], [-0.001, math.nan]]
    path = heat_map(
        matrix, row_labels=["a", "b"], column_labels=["c", "d"], path=tmp_path / "h.png", title="Cosine",
        value_range=(-1, 1), diverging=True,
    )  # fmt: skip
    assert path.read_bytes().startswith(b"\x89PNG")
    axes, bar = drawn[0].axes
    assert [text.get_text() for text in axes.texts] == ["1.00", "-0.90", "0.00", "nan"]
    # White on the dark ends, dark on the pale middle.
    assert [text.get_color() for text in axes.texts] == ["white", "white", plots.INK, plots.INK]
    assert axes.images[0].get_clim() == (-1, 1)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert_every_word_is_inside(drawn[0])


def test_a_diverging_scale_is_symmetric_and_a_plain_one_is_that_of_the_data(tmp_path, drawn):
    shared = {"row_labels": ["a"], "column_labels": ["b", "c"], "path": tmp_path / "h.png", "title": "t"}
    heat_map([[-1.0, 3.0]], diverging=True, **shared)
    heat_map([[-1.0, 3.0]], annotate=False, **shared)
    heat_map([[2.0, 2.0]], **shared)
    assert [figure.axes[0].images[0].get_clim() for figure in drawn] == [(-3, 3), (-1, 3), (2, 3)]
    assert not drawn[1].axes[0].texts


@pytest.mark.parametrize("shape", [(9, 9), (120, 3), (3, 60), (1, 1)])
def test_heat_maps_of_any_shape_keep_their_labels(tmp_path, drawn, shape):
    rows, columns = ([f"{LONG[:60]}.{index}" for index in range(count)] for count in shape)
    heat_map(
        np.arange(shape[0] * shape[1]).reshape(shape), row_labels=rows, column_labels=columns,
        path=tmp_path / "h.png", title=LONG,
    )  # fmt: skip
    assert_every_word_is_inside(drawn[0])
    boxes = sorted((label.get_window_extent() for label in drawn[0].axes[0].get_yticklabels()), key=lambda b: b.y0)
    assert all(lower.y1 <= upper.y0 + 2 for lower, upper in zip(boxes, boxes[1:]))


@pytest.mark.parametrize(("suffix", "start"), [(".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")])
def test_formats(tmp_path, suffix, start):
    path = bar_chart(MODELS, path=str(tmp_path / f"bars{suffix}"), title="t", ylabel="y")
    assert isinstance(path, Path) and path.read_bytes().startswith(start)


def test_the_same_values_give_the_same_bytes(tmp_path):
    first, second = (bar_chart(MODELS, path=tmp_path / f"{n}.png", title="t", ylabel="y").read_bytes() for n in "ab")
    assert first == second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": {}, "path": "b.png"}, "nothing to draw"),
        ({"values": {"a": {}}, "path": "b.png"}, "nothing to draw"),
        ({"values": MODELS, "path": "b.bmp"}, r"b\.bmp: charts are written as \.png, \.svg, \.pdf"),
        ({"values": MODELS, "path": "b"}, "Give the file one of these endings"),
    ],
)
def test_bar_chart_errors(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FuseError, match=message):
        bar_chart(**arguments, title="t", ylabel="y")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[1.0, 2.0]], r"shape \[1, 2\], expected \[2, 2\]"),
        ([[1.0, 2.0], [3.0]], "unequal length"),
        ([["a", "b"], ["c", "d"]], "no numbers"),
        ([1.0, 2.0], r"shape \[2\]"),
    ],
)
def test_heat_map_errors(tmp_path, matrix, message):
    with pytest.raises(FuseError, match=message):
        heat_map(matrix, row_labels=["a", "b"], column_labels=["c", "d"], path=tmp_path / "h.png", title="t")


def test_an_empty_matrix_is_refused(tmp_path):
    with pytest.raises(FuseError, match="at least one cell"):
        heat_map(np.zeros((0, 0)), row_labels=[], column_labels=[], path=tmp_path / "h.png", title="t")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file.bars\.png: the chart can't be written"):
        bar_chart(MODELS, path=tmp_path / "file" / "bars.png", title="t", ylabel="y")


def test_without_matplotlib_the_message_says_what_to_install(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(FuseError, match=r'pip install "hf-fuse\[plot\]"'):
        bar_chart(MODELS, path=tmp_path / "b.png", title="t", ylabel="y")
    with pytest.raises(FuseError, match=r'pip install "hf-fuse\[plot\]"'):
        heat_map([[1.0]], row_labels=["a"], column_labels=["b"], path=tmp_path / "h.png", title="t")


def test_no_global_state_of_matplotlib_is_touched(tmp_path):
    program = (
        "import sys; import hf_fuse.plots as plots; assert 'matplotlib' not in sys.modules\n"
        f"plots.bar_chart({MODELS!r}, path={str(tmp_path / 'b.png')!r}, title='t', ylabel='y')\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.00"), (-0.001, "0.00"), (7.314, "7.31"), (123.46, "123.5"), (1204.4, "1,204"), (3.1e7, "3.1e+07"),
     (1e-5, "1.0e-05"), (-2.5, "-2.50"), (math.inf, "inf")],
)  # fmt: skip
def test_numbers_in_charts(value, text):
    assert plots._number(value) == text


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("short", ["short"]),
        ("organisation/model-name", ["organisation/", "model-name"]),
        ("two words and more", ["two words and", "more"]),
        ("", [""]),
        ("a" * 20, ["a" * 12, "a" * 8]),
        ("begin" + "x" * 60 + "end", ["beginxxxxxxx", "xxxxxxxxxxxx", "xxxx…xxxend"]),
    ],
)
def test_names_are_broken_at_their_joints(name, lines):
    assert plots._wrapped(name, 13).split("\n") == lines
