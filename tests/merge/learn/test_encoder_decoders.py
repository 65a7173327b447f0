"""Learning about models that read one text and write another."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import WORDS, changed, load_weights, save_weights
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import hf_fuse
from hf_fuse.errors import FuseError

from .families import recipe_of
from .learn_cases import saved

PAIRS = [
    (" ".join(WORDS[start : start + 2 + start % 4]), " ".join(reversed(WORDS[start : start + 1 + start % 3])))
    for start in range(10)
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    rows = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in PAIRS]
    (folder / "pairs.jsonl").write_text("\n".join(rows))
    for name in ("base", "tuned-1", "tuned-2"):
        file = saved("t5", folder / name) / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"decoder_start_token_id": 1}))
    for number in (1, 2):
        tuned = folder / f"tuned-{number}"
        save_weights(tuned, changed(load_weights(folder / "base"), number, scale=0.1))
    return folder


@pytest.fixture(scope="module")
def model(root):
    return AutoModelForSeq2SeqLM.from_pretrained(root / "base").eval()


def encoded(root):
    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    return [tuple(torch.tensor([tokenizer(text)["input_ids"]]) for text in pair) for pair in PAIRS]


def learned(root, estimator, folder, **more):
    models = [root / "tuned-1", root / "tuned-2"]
    return hf_fuse.learn(recipe_of(estimator, root / "base", models, root / "pairs.jsonl", **more), folder)


def coefficients(folder):
    return json.loads((folder / "coefficients.json").read_text())


def test_fisher_is_of_what_is_written_given_what_is_read(root, model, tmp_path):
    recipe = {"estimator": "fisher", "model": str(root / "base"), "data": str(root / "pairs.jsonl")}
    found = load_file(
        hf_fuse.learn(recipe | {"parameters": {"labels": "given"}}, tmp_path / "f") / "fisher.safetensors"
    )
    squares = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for ids, labels in encoded(root):
        model.zero_grad()
        (model(input_ids=ids, labels=labels).loss * labels.numel()).backward()
        for name, value in model.named_parameters():
            squares[name] += value.grad**2 / len(PAIRS)
    for name in ("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight", "decoder.final_layer_norm.weight"):
        torch.testing.assert_close(found[name], squares[name], rtol=1e-3, atol=1e-5)


def test_gram_of_cross_attention_is_of_what_was_read(root, model, tmp_path):
    recipe = {"estimator": "gram", "model": str(root / "base"), "data": str(root / "pairs.jsonl"), "batch_size": 4}
    found = load_file(hf_fuse.learn(recipe, tmp_path / "g") / "gram.safetensors")
    seen = {"decoder.block.0.layer.1.EncDecAttention.k": [], "decoder.block.1.layer.2.DenseReluDense.wo": []}
    for name, rows in seen.items():
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0][0].detach()))
    for ids, labels in encoded(root):
        model(input_ids=ids, labels=labels)
    for name, rows in seen.items():
        rows_ND = torch.cat(rows)
        torch.testing.assert_close(found[f"{name}.weight"], rows_ND.T @ rows_ND / len(rows_ND), rtol=1e-4, atol=1e-5)


def test_an_expert_imitates_itself(root, tmp_path):
    options = {"init": 1.0, "parametrization": "identity", "tensors": "all", "epochs": 1, "regularization": 0.0}
    recipe = recipe_of("expert_merging", root / "base", [root / "tuned-1"], root / "pairs.jsonl", parameters=options)
    facts = coefficients(hf_fuse.learn(recipe, tmp_path / "same"))["facts"]
    assert facts["loss before"] < 1e-9
    facts = coefficients(learned(root, "expert_merging", tmp_path / "two", parameters={"init": 0.1}))["facts"]
    assert facts["loss after"] < 0.9 * facts["loss before"]


def test_supervised_and_by_entropy(root, tmp_path):
    made = learned(root, "atlas_merging", tmp_path / "atlas", parameters={"epochs": 2, "learning_rate": 0.05})
    history = json.loads((made / "history.json").read_text())
    assert sum(history[-1]["loss"].values()) < sum(history[0]["loss"].values())
    facts = coefficients(learned(root, "ada_merging", tmp_path / "ada", parameters={"steps": 6}))["facts"]
    assert facts["entropy after"] < facts["entropy before"]
    merged = hf_fuse.merge(made / "merge.yaml", tmp_path / "merged")
    assert AutoModelForSeq2SeqLM.from_pretrained(merged).shared.weight.isfinite().all()


def test_what_is_read_is_meddled_with(root, tmp_path):
    few = {"mask_steps": 4, "steps": 2, "check_every": 1, "perturbation_rate": 1.0}
    made = learned(root, "defense_aware", tmp_path / "mask", parameters=few)
    history = json.loads((made / "history.json").read_text())
    assert any(row.get("changed predictions") for row in history)


def test_texts_are_read_to_the_middle_and_chats_refused(root, tmp_path):
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": " ".join(WORDS)}))
    hf_fuse.learn(
        {"estimator": "gram", "model": str(root / "base"), "data": str(tmp_path / "texts.jsonl")}, tmp_path / "g"
    )
    chat = [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "dog"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat}))
    with pytest.raises(FuseError, match="is an encoder-decoder. Give it texts in the columns prompt"):
        hf_fuse.learn(
            {"estimator": "gram", "model": str(root / "base"), "data": str(tmp_path / "chats.jsonl")}, tmp_path / "no"
        )
    config = json.loads((root / "base" / "config.json").read_text())
    other = shutil.copytree(root / "base", tmp_path / "other")
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 8}))
    with pytest.raises(FuseError, match="but the model embeds ids below 8 only"):
        hf_fuse.learn({"estimator": "gram", "model": str(other), "data": str(root / "pairs.jsonl")}, tmp_path / "no")
    (tmp_path / "holes.jsonl").write_text('{"prompt": "cat", "completion": ""}')
    with pytest.raises(FuseError, match="row 1: has no completion"):
        hf_fuse.learn(
            {"estimator": "gram", "model": str(root / "base"), "data": str(tmp_path / "holes.jsonl")}, tmp_path / "no"
        )
