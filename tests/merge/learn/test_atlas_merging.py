"""aTLAS: labelled, unlabelled and unlearning; what it starts from and what it may use."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import load_weights, transformers_family
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_fuse
from hf_fuse.errors import CheckpointError, RecipeError
from hf_fuse.merge.coefficients import read_coefficients

from .families import recipe_of, saved_classifiers, saved_images, saved_writers, unlabelled
from .learn_cases import TEXTS, written_texts

FAST = {"epochs": 2, "learning_rate": 0.05}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    root = tmp_path_factory.mktemp("atlas")
    return root, *saved_classifiers(root, (4, 4, 4))


@pytest.fixture(scope="module")
def tasks(family):
    """Every model has labelled data, and the head is merged too."""
    root, base, *models = family
    return recipe_of("atlas_merging", base, models, written_texts(root / "rows.jsonl", 4), heads="merged")


@pytest.fixture(scope="module")
def target(family):
    root, base, *models = family
    return recipe_of("atlas_merging", base, models, None, data=str(written_texts(root / "rows.jsonl", 4)))


def learned(recipe, folder, **parameters):
    hf_fuse.learn(recipe | {"parameters": FAST | parameters}, folder)
    return read_coefficients(str(folder)), json.loads((folder / "history.json").read_text())


def loss_of(folder):
    """Mean over the texts, whose labels go round, by transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0].log_softmax(-1) for text in TEXTS]
    return -sum(row[k % 4].item() for k, row in enumerate(rows)) / len(rows)


def test_many_numbers_do_better_than_the_best_one(tasks, tmp_path):
    found, history = learned(tasks, tmp_path / "c", epochs=5)
    assert history[0]["epoch"] == 0 and found.facts["epoch that counts"] > 0
    best = history[found.facts["epoch that counts"]]
    merged = loss_of(hf_fuse.merge(tmp_path / "c" / "merge.yaml", tmp_path / "merged"))
    assert merged == pytest.approx(next(iter(best["loss"].values())), rel=1e-4)
    one = {
        "method": "task_arithmetic",
        "base_model": tasks["base_model"],
        "models": [m["path"] for m in tasks["models"]],
    }
    scales = [loss_of(hf_fuse.merge(one | {"parameters": {"weight": w}}, tmp_path / f"{w}")) for w in (0, 0.2, 0.5, 1)]
    assert scales[0] == pytest.approx(next(iter(history[0]["loss"].values())), rel=1e-4), "0 is the base"
    assert merged < min(scales) - 0.02


def test_a_target_of_its_own_keeps_the_base_s_head(target, tmp_path):
    found, history = learned(target, tmp_path / "c")
    assert found.heads and set(history[0]["accuracy"]) == {"data"}
    merged = hf_fuse.merge(tmp_path / "c" / "merge.yaml", tmp_path / "merged")
    head = load_weights(merged)["classifier.weight"]
    assert torch.equal(head, load_weights(Path(target["base_model"]))["classifier.weight"])
    best = history[found.facts["epoch that counts"]]
    assert loss_of(merged) == pytest.approx(best["loss"]["data"], rel=1e-4)


def test_chunks_budget_and_matrices(target, tmp_path):
    target = target | {"examples": 8}
    plain, _ = learned(target, tmp_path / "plain", epochs=1)
    parts, _ = learned(target, tmp_path / "parts", chunks=3, epochs=1)
    assert parts.cut == "scattered"
    assert all(len(values) == 3 for model in parts.values for values in model.values() if len(values) > 1)
    assert parts.facts["learned numbers"] == 3 * plain.facts["learned numbers"]
    hf_fuse.merge(tmp_path / "parts" / "merge.yaml", tmp_path / "merged")
    single, _ = learned(target, tmp_path / "single", budget=1, epochs=1)
    first, second = single.values
    assert all(first[name] == [0.0] or second[name] == [0.0] for name in first)
    assert single.facts["learned numbers"] * 2 == plain.facts["learned numbers"]
    matrices, _ = learned(target, tmp_path / "matrices", tensors="matrices", epochs=1)
    shapes = {name: values.dim() for name, values in load_weights(Path(target["base_model"])).items()}
    for model in matrices.values:
        assert {name for name, (value,) in model.items() if value} == {n for n in model if shapes[n] > 1}


def test_unlearning_keeps_the_control(tmp_path):
    base, models = saved_writers(tmp_path / "models", models=1)
    rows = written_texts(tmp_path / "target.jsonl")
    control = tmp_path / "control.jsonl"
    control.write_text("\n".join(json.dumps({"text": " ".join(reversed(text.split()))}) for text in TEXTS))
    recipe = recipe_of("atlas_merging", base, models, rows, control=str(control), examples=12)
    found, history = learned(recipe, tmp_path / "c", goal="negate", learning_rate=0.3)
    first, best = history[0], history[found.facts["epoch that counts"]]
    assert best["accuracy"]["control"] >= 0.95 * first["accuracy"]["control"]
    forgotten = next(name for name in best["loss"] if name != "control")
    assert best["epoch"] > 0 and best["loss"][forgotten] > first["loss"][forgotten]
    assert best["loss"][forgotten] - best["loss"]["control"] > first["loss"][forgotten] - first["loss"]["control"]
    other = recipe | {"control": None}
    with pytest.raises(RecipeError, match="goal: negate needs one data"):
        learned(other, tmp_path / "d", goal="negate")
    with pytest.raises(RecipeError, match="control has no meaning for goal: add"):
        learned(recipe, tmp_path / "d")


def test_unlabelled_examples_of_texts_and_images(target, family, tmp_path):
    root = family[0]
    found, history = learned(target | {"data": str(unlabelled(root))}, tmp_path / "c", goal="unlabelled")
    assert any(value for model in found.values for (value,) in model.values()) and len(history) == 3
    vit = transformers_family("vit", tmp_path / "vit")
    images = recipe_of("atlas_merging", vit.base, vit.tuned, None, data=str(saved_images(tmp_path)), examples=8)
    found, _ = learned(images, tmp_path / "d", goal="unlabelled", epochs=1)
    assert any(value for model in found.values for (value,) in model.values())


def test_what_is_wrong_is_said(target, tasks, family, tmp_path):
    root = family[0]
    for change, parameters, message in (
        ({"data": str(unlabelled(root))}, {}, "have no column label"),
        ({"data": None}, {}, "give either data"),
        ({}, {"chunks": 2, "granularity": "block"}, "need granularity: tensor"),
        ({}, {"budget": 0}, "budget is 0"),
        ({"models": tasks["models"]}, {}, "give either data"),
    ):
        with pytest.raises(RecipeError, match=message):
            learned(target | change, tmp_path / "c", **parameters)
    other = saved_classifiers(tmp_path / "other", (7,))[0]
    with pytest.raises(CheckpointError, match="do not fit together"):
        learned(tasks | {"models": [tasks["models"][0], {**tasks["models"][1], "path": str(other)}]}, tmp_path / "c")
