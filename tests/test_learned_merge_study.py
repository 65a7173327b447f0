"""The study's own arithmetic: what it says follows from the figures, and folders hold what the suites hold."""

from __future__ import annotations

import learned_merge_study as study
import pytest
import torch
from study import suites

from hf_fuse import registry
from hf_fuse.merge.learn_recipe import load_learn_recipe


def run(shift: float) -> dict:
    """Figures of a seed: all models score 0.6, but a few."""
    rows = {label: study.Row([0.5, 0.7]) for label in study.FAMILIES}
    rows[study.EXPERTS] = study.Row([1.0, 1.0])
    rows["RegMean"] = study.Row([0.6, 0.8], "note")
    rows["Fisher"] = study.Row([0.5 + shift, 0.7 + shift])
    rows[study.ORACLE] = study.Row([0.9, 0.7])
    path = {"start": (1.0, 0.6), "stop": (0.9, 0.6), "end": (0.25 + shift, 0.3)}
    return {"rows": rows, "paths": dict.fromkeys(study.STARTS, path), "tasks": ["a", "b"], "unit": "accuracy"}


def test_what_is_said_follows_from_the_figures() -> None:
    said = study.findings("toy", [run(-0.1), run(0.1)])
    assert said[0] == f"toy: ahead of {study.TUNED}, in points: RegMean (+10.0)."
    assert said[1].startswith(f"toy: neither ahead of nor behind {study.TUNED}, in points: mean (+0.0), Fisher (+0.0)")
    assert not any("behind task" in sentence for sentence in said[2:])
    assert said[2] == (
        "toy: AdaMerging from tuned takes the entropy from 1.00 to 0.25 and the score from 0.600 to 0.300; with its "
        "stop to 0.600."
    )
    assert said[-1].endswith("worth +20.0 points more than the tuned one.")
    assert study.findings("toy", [run(-0.1), run(-0.2)])[2].startswith(f"toy: behind {study.TUNED}")


def test_the_table_holds_means_over_seeds() -> None:
    by = {line[0]: line[1:] for line in study.table([run(-0.1), run(0.1)])}
    assert by["RegMean"] == ("inputs", "0.700 ± 0.000", "70%", "0.600", "note")
    assert by["Fisher"][1] == "0.600 ± 0.141" and by["Fisher"][4] == ""


def test_folders_hold_the_models_and_what_they_see(tmp_path) -> None:
    """Pixels that the estimators see are those that the suite scores with, noise beyond black and white included."""
    suite = suites.digit_suites(0, suites.Effort(1, 1, seeds=1, tasks=8, reference=False), ["digits"])[0]
    suite.experts, suite.tasks = suite.experts[-2:], suite.tasks[-2:]
    suite.parts = {task: {part: (x[:9], y[:9]) for part, (x, y) in suite.parts[task].items()} for task in suite.tasks}
    files = study.written(suite, tmp_path, 0)
    models = [{"path": path, "data": files.examples(number, "test")} for number, path in enumerate(files.experts)]
    from hf_fuse.merge.family import open_family

    recipe = {"estimator": "ada_merging", "base_model": files.base, "models": models, "examples": 9}
    noisy = open_family(load_learn_recipe(recipe)).tasks[1]
    batch = noisy.batch(range(9), torch.device("cpu"))
    images, labels = suite.parts["noisy"]["test"]
    order = [int((batch["pixel_values"][k] - images).abs().sum((1, 2, 3)).argmin()) for k in range(9)]
    assert sorted(order) == list(range(9)) and images.abs().max() > 1.5
    torch.testing.assert_close(batch["pixel_values"], images[order], rtol=0, atol=study.PIXELS / 255 + 1e-6)
    assert torch.equal(batch["labels"], labels[order])
    live = type(suite.model).from_pretrained(files.experts[1])
    assert all(torch.equal(value, suite.experts[1][name]) for name, value in live.state_dict().items())


def test_starts_are_within_what_the_estimators_take() -> None:
    for effort in (study.QUICK, study.FULL):
        for name in ("ada_merging", "expert_merging"):
            option = registry.get("learn", name).options["init"]
            assert all(option.check(weight, name) == pytest.approx(weight) for weight in effort.weights)
        assert max(effort.weights) < 1  # Expert Merging's sigmoid
