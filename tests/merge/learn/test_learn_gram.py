"""The estimator of Gram matrices: what it counts, what it shares, and what RegMean makes of it."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import changed, load_weights, save_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_fuse

from .learn_cases import TEXTS, saved, written_texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gram")


def recipe_of(kind, folder, **options):
    if not (folder / kind).exists():
        saved(kind, folder / kind)
    data = written_texts(folder / f"{kind}.jsonl", labels=4 if kind == "classifier" else None)
    return {"estimator": "gram", "model": str(folder / kind), "data": str(data), "examples": 100} | options


def found(recipe, output):
    file = hf_fuse.learn(recipe, output) / "gram.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    return load_file(file), json.loads(metadata["shared"]), json.loads(metadata["inputs_first"])


def inputs_of(model, name, ids):
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(ids)
    handle.remove()
    return seen[0].flatten(0, -2)


def test_is_the_mean_over_all_tokens_but_padding(folder, tmp_path):
    recipe = recipe_of("llama", folder)
    model = AutoModelForCausalLM.from_pretrained(recipe["model"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(recipe["model"])
    grams, _, _ = found(recipe, tmp_path / "f")
    for name in ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.o_proj", "lm_head"):
        rows = [
            inputs_of(model, name, torch.tensor([[*tokenizer(t)["input_ids"], tokenizer.eos_token_id]])) for t in TEXTS
        ]
        rows_ND = torch.cat(rows).double()
        expected = (rows_ND.T @ rows_ND / len(rows_ND)).float()
        torch.testing.assert_close(grams[f"{name}.weight"], expected, rtol=1e-4, atol=1e-5)


def test_batches_do_not_matter(folder, tmp_path):
    many, _, _ = found(recipe_of("llama", folder, batch_size=7), tmp_path / "many")
    single, _, _ = found(recipe_of("llama", folder, batch_size=1), tmp_path / "single")
    torch.testing.assert_close(many, single, rtol=1e-4, atol=1e-5)


def test_layers_that_read_the_same_share_one(folder, tmp_path):
    grams, shared, inputs_first = found(recipe_of("llama", folder), tmp_path / "f")
    layer = "model.layers.0."
    assert (
        shared[layer + "self_attn.k_proj.weight"]
        == shared[layer + "self_attn.v_proj.weight"]
        == layer + "self_attn.q_proj.weight"
    )
    assert shared[layer + "mlp.up_proj.weight"] == layer + "mlp.gate_proj.weight"
    layers = len({name.split(".")[2] for name in grams if ".layers." in name})
    assert len(grams) == 4 * layers + 1 and len(shared) == 3 * layers and not inputs_first
    assert not shared.keys() & grams.keys()


def test_a_tied_head_has_none_and_gpt2_stores_inputs_first(folder, tmp_path):
    grams, _, _ = found(recipe_of("llama_tied", folder), tmp_path / "tied")
    assert not any("head" in name or "embed" in name for name in grams)
    recipe = recipe_of("gpt2", folder)
    grams, _, inputs_first = found(recipe, tmp_path / "gpt2")
    weights = load_weights(folder / "gpt2")
    assert set(grams) == set(inputs_first) and len(grams) == 8
    assert all(grams[name].shape == (weights[name].shape[0],) * 2 for name in grams)


def test_classifiers(folder, tmp_path):
    grams, shared, _ = found(recipe_of("classifier", folder), tmp_path / "f")
    assert {"classifier.weight", "bert.pooler.dense.weight"} <= grams.keys()
    torch.testing.assert_close(grams["classifier.weight"].diagonal() <= 1, torch.ones(16, dtype=torch.bool))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_regmean_of_them_is_nearer_to_each_models_outputs_than_the_mean(folder, tmp_path, kind):
    """On the inputs of the first layers, which the models share no more than their texts."""
    recipe = recipe_of(kind, folder)
    base = load_weights(folder / kind)
    models, texts = [], [TEXTS[:12], TEXTS[12:]]
    for k in (0, 1):
        path = tmp_path / f"m{k}"
        path.mkdir()
        for file in (folder / kind).glob("*.json"):
            (path / file.name).write_bytes(file.read_bytes())
        save_weights(path, changed(base, k, scale=0.3))
        rows = tmp_path / f"{k}.jsonl"
        rows.write_text("\n".join(json.dumps({"text": text}) for text in texts[k]))
        hf_fuse.learn(recipe | {"model": str(path), "data": str(rows)}, tmp_path / f"gram{k}")
        models.append({"path": str(path), "statistics": str(tmp_path / f"gram{k}")})
    regmean = hf_fuse.merge({"method": "regmean", "models": models, "parameters": {"alpha": 1.0}}, tmp_path / "regmean")
    mean = hf_fuse.merge({"method": "linear", "models": [m["path"] for m in models]}, tmp_path / "mean")
    layer = "model.layers.0.self_attn.q_proj" if kind == "llama" else "transformer.h.0.attn.c_proj"
    errors = dict.fromkeys(("regmean", "mean"), 0.0)
    for model, own in zip(models, texts):
        expert = AutoModelForCausalLM.from_pretrained(model["path"]).eval()
        tokenizer = AutoTokenizer.from_pretrained(model["path"])
        weight = load_weights(tmp_path / model["path"])[layer + ".weight"]
        for text in own:
            ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
            x = inputs_of(expert, layer, ids)
            for name, output in (("regmean", regmean), ("mean", mean)):
                change = load_weights(output)[layer + ".weight"] - weight
                errors[name] += (x @ (change if kind == "gpt2" else change.T)).square().mean().item()
    assert errors["regmean"] < 0.9 * errors["mean"]
