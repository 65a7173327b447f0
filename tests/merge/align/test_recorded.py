"""A recorded order repeats and takes back; what would break the function is found out."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import digests

import hf_fuse
from hf_fuse.errors import FuseError

from .align_cases import saved, shuffled

pytestmark = pytest.mark.usefixtures("no_charts")


@pytest.fixture
def aligned(tmp_path):
    source = saved("llama", tmp_path / "model")
    copy, orders = shuffled(source, tmp_path / "copy")
    recipe = {"method": "weight_matching", "model": str(copy), "reference": str(source)}
    return source, copy, hf_fuse.align(recipe, tmp_path / "aligned").output, orders


def test_an_order_is_taken_back_to_the_same_bytes(aligned, tmp_path):
    source, copy, output, orders = aligned
    found = load_file(output / "alignment" / "maps.safetensors")
    for space, order in orders.items():
        assert order[found[space]].tolist() == list(range(len(order))), space
    recipe = {"method": "recorded", "model": str(output), "parameters": {"alignment": str(output), "inverted": True}}
    back = hf_fuse.align(recipe, tmp_path / "back")
    assert digests(back.output)["model.safetensors"] == digests(copy)["model.safetensors"]
    recipe = {"method": "recorded", "model": str(copy), "parameters": {"alignment": str(output)}}
    again = hf_fuse.align(recipe, tmp_path / "again")
    assert digests(again.output)["model.safetensors"] == digests(output)["model.safetensors"]


def test_the_same_recipe_makes_the_same_bytes(aligned, tmp_path):
    _, _, output, _ = aligned
    again = hf_fuse.align(output / "fuse_recipe.yaml", tmp_path / "aligned-2", overrides={"seed": 0}).output
    one, other = (digests(folder) for folder in (output, again))
    named = ("README.md", "fuse_recipe.yaml")  # the card's title is the folder's name
    assert {name: value for name, value in one.items() if name not in named} == {
        name: value for name, value in other.items() if name not in named
    }


def test_an_order_that_breaks_heads_is_found_out(aligned, tmp_path):
    _, copy, output, _ = aligned
    maps = load_file(output / "alignment" / "maps.safetensors")
    maps["layers.1.query"] = maps["layers.1.query"].roll(1)
    save_file(maps, tmp_path / "broken.safetensors", metadata={"hf_fuse": "alignment"})
    recipe = {
        "method": "recorded",
        "model": str(copy),
        "parameters": {"alignment": str(tmp_path / "broken.safetensors")},
    }
    with pytest.raises(FuseError, match="does not compute what it did before"):
        hf_fuse.align(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    assert hf_fuse.align(recipe | {"verify": False}, tmp_path / "out").difference is None


def test_bad_recipes_are_one_clear_error(aligned, tmp_path):
    source, copy, output, _ = aligned
    other = saved("gpt2", tmp_path / "gpt2")
    good = {"method": "weight_matching", "model": str(copy), "reference": str(source)}
    recorded = {"method": "recorded", "model": str(copy), "parameters": {"alignment": str(source)}}
    config = json.loads((source / "config.json").read_text())
    for recipe, message in [
        (good | {"reference": str(other)}, "models that are built differently can't be matched"),
        (good | {"method": "weight_match"}, "Did you mean 'weight_matching'"),
        (good | {"parameters": {"sweep": 3}}, "Did you mean 'sweeps'"),
        (good | {"parameters": {"sweeps": 0}}, "expected int >= 1"),
        (good | {"data": "texts.jsonl"}, "uses no data"),
        ({"method": "weight_matching", "model": str(copy)}, "the key 'reference' is missing"),
        (good | {"models": [str(copy)]}, "Run it with hf-fuse merge"),
        (recorded, "no recorded alignment found"),
        (recorded | {"reference": str(source)}, "has no reference"),
        (
            recorded | {"model": str(other), "parameters": {"alignment": str(output)}},
            "an alignment of a model of the same",
        ),
        (good | {"device": "cuda:9"}, "cannot be used here"),
    ]:
        with pytest.raises(FuseError, match=message):
            hf_fuse.align(recipe, tmp_path / "out")
    for change, message in [
        ({"architectures": ["MixtralForCausalLM"]}, "which units of MixtralForCausalLM can change places is not known"),
        ({"architectures": ["LlamaModel"]}, "which units of LlamaModel"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "3 heads in 3 groups, which does not fit 16 units"),
        ({"num_key_value_heads": 4}, "key has 8 units, expected 16"),
    ]:
        (source / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(FuseError, match=message):
            hf_fuse.align(good, tmp_path / "out")
    (source / "config.json").write_text(json.dumps(config))
    state = load_file(source / "model.safetensors")
    state["model.layers.0.mlp.router.weight"] = torch.zeros(4, 16)
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FuseError, match=r"tensor model.layers.0.mlp.router.weight is none that"):
        hf_fuse.align(good, tmp_path / "out")
    assert not (tmp_path / "out").exists()
