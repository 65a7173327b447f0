"""The study's own arithmetic: settings exist, data does not leak, and what it says follows from the figures."""

from __future__ import annotations

import dataclasses
import types

import loss_study as study
import pytest
import torch
from study import losses, small_data, trials
from study.trials import Question, Row

from hf_fuse import FuseConfig
from hf_fuse.objectives import read_objectives


def rows_of(labels: list[int]) -> small_data.Rows:
    return [{"pixel_values": torch.full((1, 8, 8), float(n)), "labels": label} for n, label in enumerate(labels)]


def test_every_setting_is_one_that_the_trainer_knows() -> None:
    known = {field.name for field in dataclasses.fields(FuseConfig)} | {"rows", "start"}
    tables = [
        losses.PLAIN, losses.FEW, losses.NOISY, losses.LONG_TAILED, losses.RARE, losses.MANY_LABELS, losses.STEADY,
        losses.FIRST_FEATURES, losses.COMPATIBLE, losses.FORGETTING, losses.RETRIEVAL,
    ]  # fmt: skip
    for table in tables:
        for method, settings in table.items():
            assert 1 <= len(settings) <= study.FULL.settings, method
            for setting in settings.values():
                assert setting.keys() <= known, method
                read_objectives(setting.get("objectives", {}))


def test_rows_are_cut_and_spoiled_as_said() -> None:
    rows = rows_of([0, 1, 0, 1, 0, 1, 2])
    assert [row["labels"] for row in small_data.few(rows, 2)] == [0, 1, 0, 1, 2]
    assert [row["labels"] for row in small_data.long_tailed(rows, [1, 3, 0])] == [0, 1, 1, 1]
    assert [row["labels"] for row in small_data.one_against_rest(rows, 1)] == [0, 1, 0, 1, 0, 1, 0]
    many = rows_of([n % 10 for n in range(1000)])
    wrong = small_data.with_wrong_labels(many, 0.3, 10, seed=0)
    changed = [one["labels"] != other["labels"] for one, other in zip(many, wrong)]
    assert sum(changed) == pytest.approx(300, abs=45) and {row["labels"] for row in wrong} == set(range(10))
    for row in small_data.in_pairs(rows, 3, 20, seed=0):
        assert row["labels"].sum() in (1, 2) and row["pixel_values"].max() == row["pixel_values"].min()


def test_images_serve_one_purpose_each() -> None:
    source = small_data.digits(0, 1)
    assert [len(rows) for rows in source.parts.values()] == [500, 300, 497]
    seen = [{tuple(row["pixel_values"].flatten().tolist()) for row in rows} for rows in source.parts.values()]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 1297
    assert not any("classifier" in name for name in source.encoder)


def test_validation_chooses_and_test_rows_are_shown(monkeypatch) -> None:
    monkeypatch.setattr(trials, "trained", lambda task, setting, seed, effort: setting["reached"])
    figures = {"first": lambda reached, part: reached[part], "second": lambda reached, part: -reached[part]}
    task = trials.Task(None, [], "validation", "test", figures)
    methods = {
        "one": {"a": {"reached": {"validation": 1, "test": 9}}, "b": {"reached": {"validation": 2, "test": 5}}},
    }
    found = trials.compared(task, methods, 0, trials.FULL)
    assert found == {"first": {"one": Row(5, "b")}, "second": {"one": Row(-5, "b")}}
    assert trials.compared(task, methods, 0, trials.QUICK)["first"]["one"] == Row(9, "a")


def test_figures_are_the_usual_ones() -> None:
    def model(**batch):
        return types.SimpleNamespace(logits=batch["scores"])

    def rows(scores, labels):
        return [{"scores": torch.tensor(s), "labels": label} for s, label in zip(scores, labels)]

    trainer = types.SimpleNamespace(model=model)
    two = rows([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]], [1, 0, 1, 0])
    assert trials.accuracy(trainer, two) == 0.5 and trials.f1(trainer, two) == 0.5
    tail = rows([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], [0, 0, 0, 1])
    assert trials.balanced_accuracy(trainer, tail) == 0.5 and trials.worst_class(trainer, tail) == 0
    sets = rows([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]], [torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 0.0])])
    assert trials.both_found(trainer, sets) == 0.25


def test_what_is_said_follows_from_the_figures() -> None:
    figures = {"plain": (0.5, 0.6), "a": (0.6, 0.7), "b": (0.5, 0.7), "c": (0.4, 0.5), "limit": (1.0, 1.0)}
    runs = [{"q": {name: Row(values[seed], "s") for name, values in figures.items()}} for seed in range(2)]
    asked = {"q": Question("accuracy", "plain", references=("limit",))}
    assert study.findings(runs, asked) == {
        "q": "ahead of plain: a (+0.100); neither: b (+0.050, 1 of 2); behind: c (-0.100)."
    }
    assert study.by_chance(runs, asked).startswith("Of 3 comparisons 1 are ahead and 1 behind in 2 of 2 seeds; ")
    lower = {"q": Question("loss", "plain", lower_is_better=True, references=("limit",))}
    assert study.findings(runs, lower)["q"].startswith("ahead of plain: c (+0.100)")
    assert study.rows_of(runs, "q", asked["q"])[1] == ("limit", "1.000 ± 0.000", "", "", "s")
