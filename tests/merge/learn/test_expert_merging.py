"""Expert Merging: imitation of every model on its own prompts, without labels."""

import json
from pathlib import Path

import pytest
import tiny_adapters
import torch
from tiny_models import load_weights, save_tokenizer, transformers_family
from transformers import AutoModelForCausalLM

import hf_fuse
from hf_fuse.errors import RecipeError
from hf_fuse.merge import learned_output
from hf_fuse.merge.coefficients import read_coefficients

from .families import recipe_of, saved_classifiers, saved_images, saved_writers, unlabelled


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    root = tmp_path_factory.mktemp("expert")
    base, models = saved_writers(root / "models", "llama")
    return recipe_of("expert_merging", base, models, unlabelled(root), examples=6, batch_size=3)


def learned(recipe, folder, **parameters):
    hf_fuse.learn(recipe | {"parameters": parameters}, folder)
    return read_coefficients(str(folder)), json.loads((folder / "history.json").read_text())


def test_loss_falls_and_only_matrices_of_layers_are_learned(case, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(learned_output, "coefficient_chart", lambda models, *_, **__: drawn.append(models))
    found, history = learned(case, tmp_path / "c", regularization=0.0)
    losses = [row["loss"] for row in history]
    assert losses[-1] < 0.99 * losses[0] and found.facts["loss after"] == losses[-1]
    for model in found.values:
        zero = {name for name, (value,) in model.items() if value == 0}
        assert zero == {name for name in model if "layers" not in name or "norm" in name}
        assert all(0 <= value <= 1 for (value,) in model.values())
    assert {name for shown in drawn[0].values() for name in shown} == set(found.values[0]) - zero
    everything, _ = learned(case, tmp_path / "d", tensors="all", epochs=1)
    assert all(value for model in everything.values for (value,) in model.values())
    merged = load_weights(hf_fuse.merge(tmp_path / "c" / "merge.yaml", tmp_path / "merged"))
    base = load_weights(Path(case["base_model"]))
    assert torch.equal(merged["lm_head.weight"], base["lm_head.weight"])


def test_one_model_with_coefficient_one_has_nothing_to_learn(case, tmp_path):
    """Where only matrices of layers differ, the merged model is the model: no loss, and no gradient to leave by."""
    base, state = load_weights(Path(case["base_model"])), load_weights(Path(case["models"][0]["path"]))
    model = tmp_path / "model"
    mixed = {n: state[n] if "layers" in n and "norm" not in n else values for n, values in base.items()}
    live = AutoModelForCausalLM.from_pretrained(case["base_model"])
    live.load_state_dict(mixed)
    live.save_pretrained(model)
    save_tokenizer(model)
    recipe = case | {"models": [case["models"][0] | {"path": str(model)}]}
    found, history = learned(
        recipe, tmp_path / "c", init=1.0, parametrization="identity", weight_decay=0.0, epochs=1, learning_rate=1e-4
    )
    assert history[0]["loss"] == pytest.approx(0, abs=1e-6)
    _, from_far = learned(recipe, tmp_path / "d", init=0.5, parametrization="identity", epochs=1)
    assert from_far[0]["loss"] > 1e-4
    with pytest.raises(RecipeError, match="a sigmoid is between 0 and 1"):
        learned(recipe, tmp_path / "e", init=1.0)


def test_strong_regularization_keeps_them_together(case, tmp_path):
    spreads = []
    for weight in (0.0, 100.0):
        found, _ = learned(case, tmp_path / f"{weight}", regularization=weight, learning_rate=0.1, epochs=3)
        rows = [torch.tensor([value for (value,) in model.values() if value]) for model in found.values]
        spreads.append(sum((row - row.mean()).abs().mean().item() for row in rows))
    assert spreads[1] < 0.2 * spreads[0]


def test_chunks_by_importance(case, tmp_path):
    found, history = learned(case, tmp_path / "c", chunk_budget=1.5, regularization=0.0, epochs=2)
    plain, rows = learned(case, tmp_path / "plain", regularization=0.0, epochs=2)
    counts = {name: len(values) for name, values in found.values[0].items()}
    matrices = {name for name in counts if "layers" in name and "norm" not in name}
    assert max(counts.values()) > 1 and sum(counts[name] for name in matrices) <= 1.5 * len(matrices) + len(matrices)
    assert {name for name, count in counts.items() if count > 1} <= matrices
    assert history[: len(rows)] == rows and history[len(rows)]["loss"] == pytest.approx(rows[-1]["loss"], rel=1e-5)
    assert history[-1]["loss"] < rows[-1]["loss"]
    base, one, two = (load_weights(Path(f)) for f in (case["base_model"], *(m["path"] for m in case["models"])))
    merged = load_weights(hf_fuse.merge(tmp_path / "c" / "merge.yaml", tmp_path / "merged"))
    name = max(counts, key=counts.get)
    pieces = [
        torch.tensor_split(weights[name].flatten() - base[name].flatten(), counts[name]) for weights in (one, two)
    ]
    expected = torch.cat([
        found.values[0][name][c] * pieces[0][c] + found.values[1][name][c] * pieces[1][c] for c in range(counts[name])
    ])  # fmt: skip
    torch.testing.assert_close(merged[name].flatten() - base[name].flatten(), expected, rtol=1e-4, atol=1e-6)


def test_adapters_classifiers_and_images(tmp_path):
    base, _ = tiny_adapters.save(tmp_path, tiny_adapters.llama())
    save_tokenizer(base)
    adapters = []
    for seed in (1, 2):
        adapters.append(tmp_path / f"adapter-{seed}")
        tiny_adapters.train(tiny_adapters.llama(), seed, target_modules=["q_proj", "up_proj"]).save_pretrained(
            adapters[-1]
        )
    texts = unlabelled(tmp_path)
    recipe = recipe_of("expert_merging", base, adapters, texts, examples=6)
    found, history = learned(recipe, tmp_path / "a", regularization=0.0, epochs=2)
    assert history[-1]["loss"] < history[0]["loss"]
    merging = tmp_path / "a" / "merge.yaml"
    hf_fuse.merge(merging, tmp_path / "merged")
    folder = hf_fuse.merge(merging, tmp_path / "adapter", overrides={"output_kind": "adapter"})
    assert (folder / "adapter_config.json").exists()
    with pytest.raises(RecipeError, match="none of the models"):
        hf_fuse.plan(merging, overrides={"models": [str(adapters[0]), str(tmp_path / "merged")]})
    assert found.models[0][1] != found.models[1][1]
    first, *others = saved_classifiers(tmp_path / "classifiers")
    _, history = learned(recipe_of("expert_merging", first, others, texts), tmp_path / "b", epochs=2)
    assert history[-1]["loss"] < history[0]["loss"]
    vit = transformers_family("vit", tmp_path / "vit")
    recipe = recipe_of("expert_merging", vit.base, vit.tuned, saved_images(tmp_path), examples=8)
    _, history = learned(recipe, tmp_path / "d", epochs=2, regularization=0.0)
    assert history[-1]["loss"] < history[0]["loss"]
