"""Two image classifiers trained apart on digits: what lies between them gets better, and PLeaS mends the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as t
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import hf_fuse
from hf_fuse.errors import FuseError
from hf_fuse.merge.align.path import barrier

from .align_cases import saved, written_digits, written_texts

STEPS, TRAIN = 150, 1400


@pytest.fixture(scope="module")
def digits():
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels).float().view(-1, 1, 8, 8) * 15 / 255, torch.tensor(labels)


def trained(folder, digits, seed):
    pixels, labels = digits
    torch.manual_seed(seed)
    config = t.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
        num_channels=1, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = t.ViTForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=STEPS)
    for _ in range(STEPS):
        rows = torch.randint(TRAIN, (64,))
        optimizer.zero_grad()
        cross_entropy(model(pixels[rows]).logits, labels[rows]).backward()
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def apart(tmp_path_factory, digits):
    folder = tmp_path_factory.mktemp("apart")
    data = written_digits(folder / "digits.parquet", rows=200, classes=10)
    models = [trained(folder / name, digits, seed) for seed, name in enumerate(("one", "other"))]
    return {"reference": str(models[0]), "model": str(models[1]), "data": str(data)}


def accuracy(folder, digits):
    model = t.ViTForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return (model(digits[0][TRAIN:]).logits.argmax(-1) == digits[1][TRAIN:]).float().mean().item()


@pytest.mark.parametrize("method", ["weight_matching", "activation_matching"])
def test_the_barrier_falls(apart, tmp_path, method):
    made = hf_fuse.align(apart | {"method": method, "path": 3, "examples": 200, "batch_size": 100}, tmp_path / "out")
    facts = json.loads((made.output / "align_results.json").read_text())
    assert facts["barrier_after"] < 0.8 * facts["barrier_before"], facts
    (_, start), _, (_, end) = facts["paths"]["before"]
    assert [facts["paths"]["after"][0][1], facts["paths"]["after"][2][1]] == pytest.approx([start, end], rel=1e-3)
    assert (made.output / "path.png").exists() and (made.output / "alignment.png").exists()


def test_pleas_comes_near_the_parents_where_their_mean_fails(apart, digits, tmp_path, no_charts):
    models = [apart["reference"], apart["model"]]
    mean = hf_fuse.merge({"method": "linear", "models": models}, tmp_path / "mean")
    recipe = apart | {"method": "pleas", "examples": 200, "batch_size": 100}
    made = hf_fuse.align(recipe | {"parameters": {"width": 0.5}}, tmp_path / "out")
    parents = sum(accuracy(model, digits) for model in models) / 2
    assert accuracy(mean, digits) < parents - 0.2
    assert accuracy(made.output, digits) > parents - 0.1
    assert t.AutoConfig.from_pretrained(made.output).intermediate_size == 96


def test_the_study_runs(monkeypatch, no_charts):
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "recipes")
    from models_trained_apart import ROWS, main

    found = main(["--pairs", "1", "--steps", "2", "--examples", "10"])
    assert found.keys() == {"models", "mean", *ROWS} and all(0 <= value <= 1 for (value,) in found.values())


def test_a_barrier_is_what_rises_above_the_line_between_the_ends():
    assert barrier([(0.0, 1.0), (0.5, 4.0), (1.0, 2.0)]) == 2.5
    assert barrier([(0.0, 1.0), (0.5, 0.5), (1.0, 2.0)]) == 0


def test_a_path_without_a_loss_or_a_model_to_go_to_is_refused(apart, tmp_path):
    texts = str(written_texts(tmp_path / "texts.jsonl"))
    bert = str(saved("bert", tmp_path / "bert"))
    for recipe, message in [
        (apart | {"method": "pleas", "path": 5}, "pleas writes no model to go to"),
        (apart | {"method": "weight_matching", "path": 2}, "takes 3 points at least"),
        ({"method": "weight_matching", "model": bert, "reference": bert, "path": 5}, "path watches the models on data"),
        (
            {"method": "weight_matching", "model": bert, "reference": bert, "path": 5, "data": texts},
            "the loss of BertForMaskedLM is not known",
        ),
    ]:
        with pytest.raises(FuseError, match=message):
            hf_fuse.align(recipe, tmp_path / "out")
