"""Weight matching: the spec's example, exact recovery of every family, and the same function in every case."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as t
from tiny_models import digests, load_weights, save_weights

import hf_fuse
from hf_fuse.merge.align.maps import carried, inverse
from hf_fuse.merge.align.matching import assign
from hf_fuse.merge.align.spaces import Part

from .align_cases import MODELS, saved, shuffled, written_texts

pytestmark = pytest.mark.usefixtures("no_charts")


def test_the_spec_s_example():
    """Hidden units of B lie in the order 2, 0, 1 of A's: similarities, the order found, and B put back."""
    first, second = torch.tensor([[1.0, 0], [0, 1], [1, 1]]), torch.tensor([[1.0, 2, 3]])
    order = torch.tensor([2, 0, 1])
    moved_first, moved_second = first[order], second[:, order]
    similarity_ab = first @ moved_first.T + second.T @ moved_second
    assert similarity_ab.tolist() == [[4, 2, 2], [7, 2, 5], [11, 4, 7]]
    found = assign(similarity_ab.T)
    assert found.tolist() == [1, 2, 0] and inverse(found).tolist() == order.tolist()
    units = (Part("x", 0, 3, False),)
    assert torch.equal(carried(moved_first, (units, ()), {"x": found}), first)
    assert torch.equal(carried(moved_second, ((), units), {"x": found}), second)


@pytest.mark.parametrize("kind", MODELS)
def test_a_shuffled_copy_is_put_back_bit_for_bit(tmp_path, kind):
    source = saved(kind, tmp_path / "model")
    copy, _ = shuffled(source, tmp_path / "copy")
    assert any(not torch.equal(value, load_weights(copy)[name]) for name, value in load_weights(source).items())
    made = hf_fuse.align({"method": "weight_matching", "model": str(copy), "reference": str(source)}, tmp_path / "out")
    assert made.difference < 1e-5
    assert made.to_dict()["cosine_after"] == pytest.approx(1.0)
    found = load_weights(made.output)
    for name, value in load_weights(source).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


def align(model, reference, output, **recipe):
    return hf_fuse.align(
        {"method": "weight_matching", "model": str(model), "reference": str(reference)} | recipe, output
    )


def test_equal_models_stay_as_they_are(tmp_path):
    source = saved("llama", tmp_path / "model")
    state = load_weights(source)
    for name in ("gate_proj", "up_proj"):  # two equal neurons: either order is as good
        state[f"model.layers.0.mlp.{name}.weight"][3] = state[f"model.layers.0.mlp.{name}.weight"][7]
    state["model.layers.0.mlp.down_proj.weight"][:, 3] = state["model.layers.0.mlp.down_proj.weight"][:, 7]
    save_weights(source, state)
    made = align(source, source, tmp_path / "out")
    assert sum(group.moved for group in made.found.groups) == 0
    assert digests(made.output)["model.safetensors"] == digests(source)["model.safetensors"]


@pytest.mark.parametrize("residual", [True, False])
def test_strangers_come_nearer_and_compute_what_they_did(tmp_path, residual):
    models = [saved("gpt2", tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    made = align(models[1], models[0], tmp_path / "out", parameters={"residual": residual})
    facts = made.to_dict()
    assert facts["cosine_after"] > facts["cosine_before"] + 0.02 and facts["logits_differ_by"] < 1e-5
    attention = [group for group in made.found.groups if "attention" in group.group]
    assert all(group.after > group.before for group in attention)
    assert ("residual" in made.found.maps) == residual
    ids = torch.arange(4, 16)[None]
    before, after = (t.AutoModelForCausalLM.from_pretrained(one).eval()(ids).logits for one in (models[1], made.output))
    torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-4)


def test_half_precision_shards_and_other_classes(tmp_path):
    """What can't be compared, a classifier's rows for other classes, does not count; the bytes move as they are."""
    source = saved("bert_classifier", tmp_path / "model")
    copy, _ = shuffled(source, tmp_path / "copy")
    state = {name: value.bfloat16() for name, value in load_weights(copy).items()}
    state |= {"classifier.weight": torch.randn(7, 16).bfloat16(), "classifier.bias": torch.randn(7).bfloat16()}
    (copy / "model.safetensors").unlink()
    save_weights(copy, state, shards=3)
    labels = {str(k): f"LABEL_{k}" for k in range(7)}
    config = {"dtype": "bfloat16", "id2label": labels, "label2id": {name: int(k) for k, name in labels.items()}}
    (copy / "config.json").write_text(json.dumps(json.loads((copy / "config.json").read_text()) | config))
    made = align(copy, source, tmp_path / "out", max_shard_size="4KB")
    assert len(list(made.output.glob("model-*.safetensors"))) > 1
    found = load_weights(made.output)
    for name, value in load_weights(source).items():
        if not name.startswith("classifier"):
            assert found[name].dtype == torch.bfloat16
            torch.testing.assert_close(found[name], value.bfloat16(), rtol=0, atol=0, msg=name)


def test_a_path_of_a_language_model(tmp_path):
    models = [saved("llama", tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    data = str(written_texts(tmp_path / "texts.jsonl"))
    facts = align(models[1], models[0], tmp_path / "out", data=data, path=3).to_dict()
    model = t.AutoModelForCausalLM.from_pretrained(models[0]).eval()
    tokenizer = t.AutoTokenizer.from_pretrained(models[0])
    total = count = 0
    for line in Path(data).read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"], return_tensors="pt")["input_ids"]
        ids = torch.cat([ids, torch.tensor([[2]])], 1)  # the end is learnt, too
        total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert facts["paths"]["before"][0][1] == pytest.approx(total / count, rel=1e-3)
    assert facts["barrier_after"] >= 0
