"""Defense-aware merging: the gradient of its mask, its perturbations, and the merge that it writes."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import load_weights, transformers_family

import hf_fuse
from hf_fuse.errors import FuseError, RecipeError
from hf_fuse.merge.coefficients import read_coefficients
from hf_fuse.merge.columns import columns
from hf_fuse.merge.family import open_family
from hf_fuse.merge.learn.defense_aware import ElementMask, Perturbation, _entropy
from hf_fuse.merge.learn_recipe import load_learn_recipe

from .families import recipe_of, saved_classifiers, saved_images, unlabelled

FAST = {"mask_steps": 2, "steps": 3, "learning_rate": 0.05, "mask_rate": 0.1, "check_every": 3, "collapse": 1.0}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    root = tmp_path_factory.mktemp("defense")
    base, *models = saved_classifiers(root)
    return recipe_of("defense_aware", base, models, unlabelled(root)) | {"parameters": FAST}


def test_the_mask_gets_the_gradient_that_finite_differences_show(case):
    family = open_family(load_learn_recipe(case))
    layout, count = columns(family.units, "tensor")
    mask = ElementMask(family.units, layout, 0.5, seed=0, rate=0.1)
    coefficients = torch.full((len(family.models), count), 0.4)
    batches = [task.batch(range(8), family.device) for task in family.tasks]

    def draw():
        mask.random.manual_seed(7)
        mask.draw()

    with family.contraction(layout, count, change=mask.change, watch=mask.watch) as contraction:

        def loss() -> torch.Tensor:
            contraction.write(coefficients, everything=True)
            return sum(_entropy(family, task, batch) for task, batch in zip(family.tasks, batches))

        draw()
        contraction.write(coefficients)
        with mask.watching(coefficients):
            for task, batch in zip(family.tasks, batches):
                _entropy(family, task, batch).backward()
        found = {name: mask._to_logits(name, logits.grad) for name, logits in mask.logits.items()}
        assert len(found) == len(family.units) > 10
        compared = 0
        for name, gradient in found.items():
            if gradient.abs().max() > 1e-3 and compared < 4:
                place, compared = int(gradient.abs().argmax()), compared + 1
                values = []
                for change in (0.2, -0.4):
                    mask.logits[name][place] += change
                    draw()
                    with torch.no_grad():
                        values.append(loss().item())
                mask.logits[name][place] += 0.2
                assert (values[0] - values[1]) / 0.4 == pytest.approx(gradient[place].item(), rel=0.1, abs=2e-4), name
        assert compared


def test_a_mask_of_ones_is_adamerging(case, tmp_path, monkeypatch):
    monkeypatch.setattr(ElementMask, "draw", lambda self: None)
    hf_fuse.learn(case, tmp_path / "masked", overrides={"parameters.mask_steps": 0})
    shared = {name: value for name, value in FAST.items() if not name.startswith("mask")}
    plain = case | {"estimator": "ada_merging", "parameters": shared | {"clamp": False}}
    hf_fuse.learn(plain, tmp_path / "plain")
    one, other = (read_coefficients(str(tmp_path / name)) for name in ("masked", "plain"))
    assert one.values == other.values and (one.method, other.method) == ("masked_task_arithmetic", "task_arithmetic")
    assert all(
        torch.equal(mask, torch.ones_like(mask)) for mask in load_file(tmp_path / "masked/mask.safetensors").values()
    )


def test_the_written_recipe_merges_inside_the_mask(case, tmp_path):
    hf_fuse.learn(case, tmp_path / "learned")
    mask, found = load_file(tmp_path / "learned" / "mask.safetensors"), read_coefficients(str(tmp_path / "learned"))
    for name, values in mask.items():
        assert values.mean().item() == pytest.approx(1, abs=1e-4) and values.min() >= 0, name
    merging = yaml.safe_load((tmp_path / "learned" / "merge.yaml").read_text())
    merged = load_weights(hf_fuse.merge(merging, tmp_path / "merged"))
    base, *models = (
        load_weights(Path(folder))
        for folder in [merging["base_model"]["path"], *(m["path"] for m in merging["models"])]
    )
    assert set(mask) == {name for name in base if not name.startswith("classifier")}
    for name, values in mask.items():
        change = sum(of[name][0] * (model[name] - base[name]) for of, model in zip(found.values, models))
        torch.testing.assert_close(merged[name], base[name] + values * change, rtol=1e-4, atol=1e-5)
    history = json.loads((tmp_path / "learned" / "history.json").read_text())
    assert [row["step"] for row in history[:2]] == [0, 1] and "perturbed entropy" in history[0]
    # The same recipe makes the same numbers again.
    hf_fuse.learn(case, tmp_path / "again")
    assert read_coefficients(str(tmp_path / "again")).values == found.values


@pytest.mark.parametrize("kind", ["text", "image"])
def test_a_perturbation_changes_more_and_more_predictions(case, tmp_path, kind):
    if kind == "image":
        family = transformers_family("vit", tmp_path)
        case = recipe_of("defense_aware", family.base, family.tuned, saved_images(tmp_path)) | {"parameters": FAST}
    opened = open_family(load_learn_recipe(case))
    opened.put_head(0)
    attacker = Perturbation(opened, 0.1)
    batch = opened.tasks[0].batch(range(12), opened.device)
    weights = {name: value.clone() for name, value in opened.model.state_dict().items()}
    changed = [attacker.step(batch) for _ in range(25)]
    assert changed[0] == 0 and changed[-1] > 0.2
    assert all(torch.equal(value, weights[name]) for name, value in opened.model.state_dict().items())
    assert all(parameter.grad is None for parameter in opened.model.parameters())


def test_mistakes_get_one_clear_error(case, tmp_path):
    for change, words in (
        ({"parameters": {"temperature": 0}}, "temperature is 0"),
        ({"parameters": {"mask_stepz": 3}}, "Did you mean 'mask_steps'"),
        ({"models": [{"path": model["path"]} for model in case["models"]]}, "has no data"),
    ):
        with pytest.raises(RecipeError, match=words):
            hf_fuse.learn(case | change, tmp_path / "out")
    hf_fuse.learn(case, tmp_path / "learned", overrides={"parameters.mask_steps": 1, "parameters.steps": 1})
    merging = yaml.safe_load((tmp_path / "learned" / "merge.yaml").read_text())
    for model in merging["models"]:
        del model["statistics"]
    with pytest.raises(FuseError, match=r"needs statistics \(mask\)"):
        hf_fuse.merge(merging, tmp_path / "merged")
