"""The study's own arithmetic: its settings exist, its data does not leak, and what it says follows from the figures."""

from __future__ import annotations

import distill_study as study
import pytest
import torch

from hf_fuse import DistillConfig, FuseConfig


def test_every_setting_is_one_that_the_trainers_know(tmp_path) -> None:
    for name, method in study.methods().items():
        assert len(method.settings) == study.FULL.settings, name
        for setting in method.settings.values():
            kind = DistillConfig if "objectives" in setting else FuseConfig
            kind(str(tmp_path), use_cpu=True, **setting)


def test_images_serve_one_purpose_each_and_labels_are_as_wrong_as_said() -> None:
    parts = study.digit_parts(0)
    assert [len(labels) for _, labels in parts.values()] == [700, 300, 300, 497]
    seen = [{tuple(image.flatten().tolist()) for image in images} for images, _ in parts.values()]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 1797
    labels = parts["train"][1]
    wrong = study.with_wrong(labels, 0)
    assert (wrong != labels).float().mean() == pytest.approx(study.WRONG, abs=0.06)
    assert 0 <= wrong.min() <= wrong.max() < 10
    assert torch.equal(wrong, study.with_wrong(labels, 0))


def test_validation_chooses_and_test_images_are_shown() -> None:
    class Constant(torch.nn.Module):
        def __init__(self, answer: int) -> None:
            super().__init__()
            self.answer = answer

        def forward(self, images):
            logits = torch.nn.functional.one_hot(torch.full((len(images),), self.answer), 3).float()
            return type("Output", (), {"logits": logits})

    images = torch.zeros(4, 1)
    parts = {"validation": (images, torch.tensor([1, 1, 1, 0])), "test": (images, torch.tensor([1, 0, 0, 0]))}
    method = study.Method("labels", {"zero": {"answer": 0}, "one": {"answer": 1}})
    row = study.best(method, lambda setting: (Constant(**setting), 0.5), parts, study.FULL)
    assert row == study.Row(0.25, "one", 0.5)
    assert study.best(method, lambda setting: (Constant(**setting), 0.5), parts, study.QUICK).setting == "zero"


def test_what_is_said_follows_from_the_figures() -> None:
    scores = {
        "the teacher": (0.9, 0.9), study.LABELS: (0.5, 0.6), "KD": (0.6, 0.7), "DHKD": (0.5, 0.7),
        "DHKD, one head": (0.4, 0.5),
    }  # fmt: skip
    runs = [{"digits": {name: study.Row(of[k], "", 0.0) for name, of in scores.items()}} for k in range(2)]
    assert study.findings(runs) == [
        f"digits: ahead of {study.LABELS}, in points of accuracy: KD (+10.0).",
        f"digits: neither ahead of nor behind {study.LABELS}, in points of accuracy: DHKD (+5.0).",
        f"digits: behind {study.LABELS}, in points of accuracy: DHKD, one head (-10.0).",
        "digits: DHKD is ahead of its ablation with one head (+15.0).",
        "Ahead and behind mean: in 2 of 2 seeds.",
    ]
