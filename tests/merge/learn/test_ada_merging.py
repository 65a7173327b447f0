"""AdaMerging: what it minimises, what it refuses to be fooled by, and what it writes."""

import json

import pytest
import torch
import yaml
from tiny_models import load_weights
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_fuse
from hf_fuse import cli
from hf_fuse.errors import CheckpointError, FuseError, RecipeError
from hf_fuse.merge.coefficients import read_coefficients

from .families import recipe_of, saved_classifiers, saved_writers, unlabelled
from .learn_cases import TEXTS, written_texts

FAST = {"steps": 6, "learning_rate": 0.05, "check_every": 3, "collapse": 1.0}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    root = tmp_path_factory.mktemp("ada")
    base, *models = saved_classifiers(root)
    return recipe_of("ada_merging", base, models, unlabelled(root)) | {"parameters": FAST}


def learned(recipe, folder, **parameters):
    hf_fuse.learn(recipe | {"parameters": recipe["parameters"] | parameters}, folder)
    return read_coefficients(str(folder)), json.loads((folder / "history.json").read_text())


def entropy(folder):
    """Mean over the texts, by transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0].log_softmax(-1) for text in TEXTS]
    return -sum((row.exp() * row).sum().item() for row in rows) / len(rows)


def test_entropy_falls_and_the_merge_is_the_model_that_was_looked_at(case, tmp_path):
    found, history = learned(case, tmp_path / "c")
    assert found.facts["steps"] == 6 and not found.facts["stopped by collapse"]
    assert found.facts["entropy after"] < found.facts["entropy before"]
    assert found.heads == ["classifier.bias", "classifier.weight"]
    assert all(0 <= value <= 1 for values in found.values for (value,) in values.values())
    merging = yaml.safe_load((tmp_path / "c" / "merge.yaml").read_text())
    for number, model in enumerate(merging["models"]):
        merged = hf_fuse.merge(merging | {"heads": model["path"]}, tmp_path / f"merged-{number}")
        name = model["path"]
        assert entropy(merged) == pytest.approx(history[-1]["entropy"][name], rel=1e-4)
    assert (tmp_path / "c" / "coefficients.png").read_bytes().startswith(b"\x89PNG")


def test_one_step_follows_the_gradient_of_the_summed_entropies(case, tmp_path):
    """The first step of Adam is lr times the sign of the gradient; it must be that of the mean entropies' sum."""
    step = {"steps": 1, "learning_rate": 1e-3, "granularity": "task", "check_every": 1}
    recipe = case | {"batch_size": 100}
    found, history = learned(recipe, tmp_path / "c", **step)
    moved = [next(iter(values.values()))[0] - 0.3 for values in found.values]
    assert [abs(round(value, 6)) for value in moved] == [1e-3, 1e-3]
    assert sum(history[1]["entropy"].values()) < sum(history[0]["entropy"].values())


def test_collapse_stops_it(case, tmp_path):
    free, _ = learned(case, tmp_path / "free", learning_rate=0.3, steps=24, clamp=False)
    found, history = learned(case, tmp_path / "c", learning_rate=0.3, steps=24, clamp=False, collapse=0.02)
    assert not free.facts["stopped by collapse"] and free.facts["steps"] == 24
    assert found.facts["stopped by collapse"] and found.facts["steps"] < 24
    limits = {name: 0.98 * value for name, value in history[0]["entropy of the mean"].items()}
    assert any(history[-1]["entropy of the mean"][name] < limit for name, limit in limits.items())
    for row in history[:-1]:
        assert all(row["entropy of the mean"][name] >= limit for name, limit in limits.items())
    assert found.facts["steps"] == history[-2]["step"]


def test_granularities(case, tmp_path):
    for granularity, count in (("task", 1), ("block", 3), ("tensor", None)):
        found, _ = learned(case, tmp_path / granularity, granularity=granularity)
        for values in found.values:
            numbers = {value for (value,) in values.values()}
            assert len(numbers) == count if count else len(numbers) > 10


def test_ties_with_all_kept_and_one_model_is_the_same(case, tmp_path):
    one = case | {"models": case["models"][:1]}
    plain, _ = learned(one, tmp_path / "plain")
    ties, _ = learned(one, tmp_path / "ties", ties=True, density=1.0)
    assert ties.method == "ties_task_arithmetic" and ties.parameters == {"density": 1.0}
    for name, values in plain.values[0].items():
        assert ties.values[0][name] == pytest.approx(values, abs=1e-6)
    trimmed, history = learned(case, tmp_path / "trimmed", ties=True)
    merging = yaml.safe_load((tmp_path / "trimmed" / "merge.yaml").read_text())
    assert merging["parameters"]["density"] == 0.2
    merged = hf_fuse.merge(merging, tmp_path / "merged")
    assert entropy(merged) == pytest.approx(history[-1]["entropy"][case["models"][0]["path"]], rel=1e-4)
    assert trimmed.values != plain.values


def test_with_a_merged_head(case, tmp_path):
    base, *models = saved_classifiers(tmp_path, (4, 4, 4))
    recipe = recipe_of("ada_merging", base, models, unlabelled(tmp_path), heads="merged", parameters=FAST)
    found, _ = learned(recipe, tmp_path / "c")
    assert found.heads == [] and "classifier.weight" in found.values[0]
    merged = load_weights(hf_fuse.merge(tmp_path / "c" / "merge.yaml", tmp_path / "merged"))
    states = [load_weights(folder) for folder in (base, *models)]
    name = "classifier.weight"
    expected = states[0][name] + sum(
        found.values[k][name][0] * (states[k + 1][name] - states[0][name]) for k in range(2)
    )
    torch.testing.assert_close(merged[name], expected)


def test_same_seed_same_bytes_and_the_command_line(case, tmp_path, capsys):
    recipe = tmp_path / "learn.yaml"
    recipe.write_text(yaml.safe_dump(case))
    cli.app(["learn", str(recipe), "--output", str(tmp_path / "c"), "--parameters.steps", "2"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "coefficients:" in shown and "stopped by collapse: False" in shown and "merge.yaml" in shown
    learned(case, tmp_path / "d", steps=2)
    assert (tmp_path / "c" / "coefficients.json").read_bytes() == (tmp_path / "d" / "coefficients.json").read_bytes()
    record = yaml.safe_load((tmp_path / "c" / "fuse_recipe.yaml").read_text())
    hf_fuse.learn(record, tmp_path / "e")
    assert (tmp_path / "c" / "coefficients.json").read_bytes() == (tmp_path / "e" / "coefficients.json").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": {"step": 3}}, "no parameter 'step'.*'steps'"),
        ({"parameters": {"learning_rate": 0}}, "learning_rate is 0"),
        ({"models": []}, "key 'models' is missing"),
        ({"base_model": None}, "key 'base_model' is missing"),
        ({"data": "x.jsonl"}, "Move data to the models"),
        ({"control": "x.jsonl"}, "control has no meaning"),
        ({"model": "x"}, "Say base_model and models"),
        ({"device": "auto"}, "several devices"),
        ({"parameters": {"granularity": "block", "blocks": "("}}, "not a regular expression"),
        ({"parameters": {"granularity": "block", "blocks": "mixer"}}, "'mixer', which is in no tensor's name"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_left(case, tmp_path, change, message):
    with pytest.raises(FuseError, match=message):
        hf_fuse.learn(case | change, tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_models_that_do_not_go_together(case, tmp_path):
    first, second = case["models"]
    with pytest.raises(RecipeError, match="has no data"):
        hf_fuse.learn(case | {"models": [first, {"path": second["path"]}]}, tmp_path / "c")
    with pytest.raises(RecipeError, match="for the second time"):
        hf_fuse.learn(case | {"models": [first, first]}, tmp_path / "c")
    torch.manual_seed(0)
    wide = AutoModelForSequenceClassification.from_pretrained(first["path"]).config
    wide.intermediate_size = 40
    AutoModelForSequenceClassification.from_config(wide).save_pretrained(tmp_path / "wide")
    with pytest.raises(CheckpointError, match="do not fit together"):
        hf_fuse.learn(case | {"models": [first, second | {"path": str(tmp_path / "wide")}]}, tmp_path / "c")
    writer, _ = saved_writers(tmp_path / "writers", models=0)
    with pytest.raises(CheckpointError, match=r"different architectures .*bert.*llama|different.*llama.*bert"):
        hf_fuse.learn(case | {"models": [first, second | {"path": str(writer)}]}, tmp_path / "c")
    rows = written_texts(tmp_path / "rows.jsonl", labels=3)
    hf_fuse.learn(
        case | {"models": [first | {"data": str(rows)}, second]} | {"parameters": {"steps": 1}}, tmp_path / "f"
    )
    with pytest.raises(FuseError, match="no such file"):
        hf_fuse.learn(case | {"models": [first | {"data": "nowhere.jsonl"}, second]}, tmp_path / "c")
    with pytest.raises(RecipeError, match="looks at one model"):
        hf_fuse.learn({"estimator": "fisher", "model": first["path"], "data": str(rows), "models": [first]}, tmp_path)
