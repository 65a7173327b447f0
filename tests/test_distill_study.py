"""The study's own arithmetic: its settings exist, its data does not leak, and what it says follows from the figures."""

from __future__ import annotations

import dataclasses
import math

import distill_study as study
import pytest
import torch
from study import distill_digits as digits
from study import distill_text as text
from study.distilling import CHOOSING, FULL, QUICK, Half, Method, Row, best

from hf_fuse import DistillConfig, FuseConfig


@pytest.mark.parametrize("half", study.HALVES.values(), ids=study.HALVES)
def test_every_setting_is_one_that_the_trainers_know(half: Half, tmp_path) -> None:
    assert {len(method.settings) for method in half.methods.values()} == {2}
    for method in half.methods.values():
        for setting in method.settings.values():
            kind = DistillConfig if "objectives" in setting else FuseConfig
            kind(str(tmp_path), use_cpu=True, **setting)
    named = {half.baseline, *(name for pair in half.pairs for name in pair)}
    assert named <= half.methods.keys()
    assert CHOOSING not in range(FULL.seeds)


def test_images_serve_one_purpose_each_and_labels_are_as_wrong_as_said() -> None:
    parts = digits.digit_parts(0)
    assert [len(labels) for _, labels in parts.values()] == [700, 300, 300, 497]
    seen = [{tuple(image.flatten().tolist()) for image in images} for images, _ in parts.values()]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 1797
    labels = parts["train"][1]
    wrong = digits.with_wrong(labels, 0)
    assert (wrong != labels).float().mean() == pytest.approx(digits.WRONG, abs=0.06)
    assert 0 <= wrong.min() <= wrong.max() < 10
    assert torch.equal(wrong, digits.with_wrong(labels, 0))


@pytest.fixture(scope="module")
def small() -> text.Shared:
    """All that a run does once, with hardly trained teachers."""
    return text.shared(dataclasses.replace(QUICK, text_steps=(1, 1, 1), rows=4, held_out=2))


def test_texts_serve_one_purpose_each(small: text.Shared) -> None:
    read = set().union(*small.read.values())
    held_out = {row for parts in small.held_out.values() for rows in parts.values() for row in rows}
    assert len(held_out) == 2 * 2 * 2
    assert len(small.texts) == 2 * 4
    assert not read & set(small.texts)
    assert not (read | set(small.texts)) & held_out


def test_tokenizers_differ_and_score_every_byte(small: text.Shared) -> None:
    row = "for name in names:  # é\n    print('x')"
    ids = {name: tokenizer(row)["input_ids"] for name, tokenizer in small.tokenizers.items()}
    assert len(set(map(tuple, ids.values()))) == 3
    for name, tokenizer in small.tokenizers.items():
        assert tokenizer.decode(ids[name], skip_special_tokens=True) == row
        uniform = text.new_model(text.STUDENT, tokenizer, 0)
        torch.nn.init.zeros_(uniform.lm_head.weight)
        held_out = {"a": {"validation": [row], "test": [row]}}
        expected = math.log2(len(tokenizer)) * (len(ids[name]) - 1) / len(row.encode())
        assert text.scores(uniform, tokenizer, held_out)[1]["a"] == pytest.approx(expected, rel=1e-5)
    assert all("%" in row.setting for row in small.rows.values())


def test_students_leave_their_pivot_alone_and_learn_from_teachers(small: text.Shared) -> None:
    tokenizer = small.tokenizers[text.PIVOTS]
    pivot = text.new_model(text.STUDENT, tokenizer, 0)
    before = {name: value.clone() for name, value in pivot.state_dict().items()}
    weights = {"task": 1.0, "fuse_llm": {"weight": 1.0}}
    none = {"task": 1.0, "fuse_llm": {"weight": 0.0}}
    teachers = list(small.teachers.values())
    learn = lambda setting, asked: text.trained(pivot, tokenizer, small.texts, setting, 2, 0, asked)  # noqa: E731
    alone, taught, unheard = (
        learn({}, []),
        learn({"objectives": weights}, teachers),
        learn({"objectives": none}, teachers),
    )
    assert all(torch.equal(value, before[name]) for name, value in pivot.state_dict().items())
    head = "model.embed_tokens.weight"
    torch.testing.assert_close(alone.state_dict()[head], unheard.state_dict()[head])
    assert not torch.allclose(alone.state_dict()[head], taught.state_dict()[head])


def test_validation_chooses() -> None:
    rows = [Row({"a": 0.5, "b": 0.9}, {"a": 0.9, "b": 0.9}, "one"), Row({"a": 0.8, "b": 0.5}, {}, "other")]
    assert best(rows, lower_is_better=False).setting == "one"
    assert best(rows, lower_is_better=True).setting == "other"


def test_a_stopped_run_goes_on(tmp_path) -> None:
    asked = []

    def prepare(seed, effort):
        def learn(method, setting):
            asked.append((seed, method, setting))
            if len(asked) == 2:
                raise KeyboardInterrupt
            return Row({"a": float(setting)}, {"a": 0.0}, setting)

        return {"reference": Row({"a": 9.0}, {"a": 9.0})}, learn

    methods = {name: Method("", {"1": {}, "2": {}}) for name in ("x", "y")}
    half = Half("x", "", False, methods, "", (), prepare)
    with pytest.raises(KeyboardInterrupt):
        half.chosen(QUICK, tmp_path / "settings.json")
    assert half.chosen(QUICK, tmp_path / "settings.json") == {"x": "2", "y": "2"}
    assert asked == [(CHOOSING, "x", "1"), *[(CHOOSING, "x", "2")] * 2, (CHOOSING, "y", "1"), (CHOOSING, "y", "2")]
    rows = half.rows(0, QUICK, {"x": ("x", "2")}, tmp_path / "0.json")
    assert list(rows) == ["reference", "x"]
    assert half.rows(0, QUICK, {"x": ("x", "2")}, tmp_path / "0.json") == rows
    assert len(asked) == 6
    half.rows(0, FULL, {"x": ("x", "2")}, tmp_path / "0.json")
    half.rows(0, FULL, {"x": ("x", "1")}, tmp_path / "0.json")
    assert len(asked) == 8


def test_what_is_said_follows_from_the_figures() -> None:
    scores = {"the teacher": (0.9, 0.9), "labels alone": (0.5, 0.6), "KD": (0.6, 0.7), "DHKD": (0.5, 0.7),
              "DHKD, one head": (0.4, 0.5)}  # fmt: skip
    runs = [{name: Row({}, {"digits": of[k]}, "s", 0.002) for name, of in scores.items()} for k in range(2)]
    half = dataclasses.replace(digits.HALF, methods={name: Method("", {}) for name in list(scores)[1:]})
    assert study.findings(half, runs) == [
        "digits: ahead of labels alone, by accuracy: KD (+0.100).",
        "digits: neither ahead of nor behind labels alone, by accuracy: DHKD (+0.050).",
        "digits: behind labels alone, by accuracy: DHKD, one head (-0.100).",
        "digits: DHKD is ahead of DHKD, one head (+0.150).",
        "Ahead and behind mean: in 2 of 2 seeds.",
    ]
    assert study.compared(dataclasses.replace(half, lower_is_better=True), runs, "KD", "labels alone", "digits") == (
        "behind", pytest.approx(0.1),
    )  # fmt: skip
    lines = study.table(half, runs)
    assert [line[0] for line in lines] == ["method", "the teacher", "KD", "DHKD", "labels alone", "DHKD, one head"]
    assert lines[3] == ("DHKD", "0.600 ± 0.141", "s", "2")
