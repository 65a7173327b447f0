"""Whole merges on disk: what comes out loads with transformers and holds the numbers it should."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_fuse
from hf_fuse.checkpoint.reader import open_checkpoint
from hf_fuse.errors import CheckpointError, RecipeError


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    """A base and two fine-tunes, four layers, saved by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("llamas")
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(root / "base")
    start = {name: t.clone() for name, t in model.state_dict().items()}
    for k, shards in enumerate(("1GB", "30KB")):
        torch.manual_seed(k + 1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(start[name] + 0.02 * torch.randn_like(parameter))
        model.save_pretrained(root / f"m{k}", max_shard_size=shards)
    return root


def weights(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def logits(folder, ids=((1, 4, 2, 3),)):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.tensor(ids)).logits


def test_sharded_and_single_inputs_and_sharded_output(llamas, tmp_path):
    recipe = {"method": "linear", "models": [str(llamas / "m0"), str(llamas / "m1")], "max_shard_size": "20KB"}
    out = hf_fuse.merge(recipe, tmp_path / "out")
    a, b, merged = weights(llamas / "m0"), weights(llamas / "m1"), weights(out)
    assert merged.keys() == a.keys() and len(list(out.glob("*.safetensors"))) > 3
    for name in a:
        torch.testing.assert_close(merged[name], (a[name] + b[name]) / 2)
    assert logits(out).isfinite().all()


def test_gradients_and_filters_follow_depth(llamas, tmp_path):
    """The classic SLERP recipe: attention and MLP move in opposite directions over depth."""
    t = [
        {"filter": "self_attn", "value": [0, 1]},
        {"filter": "*.mlp.*", "value": [1, 0.25]},
        {"value": 0.5},
    ]
    recipe = {
        "method": "linear",
        "models": [{"path": str(llamas / "m0"), "weight": t}, {"path": str(llamas / "m1"), "weight": 0}],
        "parameters": {"normalize": False},
    }
    merged, a = weights(hf_fuse.merge(recipe, tmp_path / "out")), weights(llamas / "m0")

    def factor(name):
        return (merged[name] / a[name]).median().item()

    for layer, (attention, mlp) in enumerate([(0, 1), (1 / 3, 0.75), (2 / 3, 0.5), (1, 0.25)]):
        assert factor(f"model.layers.{layer}.self_attn.q_proj.weight") == pytest.approx(attention, abs=1e-6)
        assert factor(f"model.layers.{layer}.mlp.up_proj.weight") == pytest.approx(mlp, abs=1e-6)
    assert factor("model.embed_tokens.weight") == factor("lm_head.weight") == 0.5


def test_lists_outside_the_layers(llamas, tmp_path):
    recipe = {"method": "passthrough", "models": [str(llamas / "m0")], "parameters": {"scale": [2, 4]}}
    a = weights(llamas / "m0")
    ours = weights(hf_fuse.merge(recipe, tmp_path / "ours"))
    assert torch.equal(ours["model.embed_tokens.weight"], 2 * a["model.embed_tokens.weight"])
    assert torch.equal(ours["lm_head.weight"], 4 * a["lm_head.weight"])
    theirs = weights(hf_fuse.merge(recipe | {"dialect": "mergekit"}, tmp_path / "theirs"))
    assert torch.equal(theirs["lm_head.weight"], 2 * a["lm_head.weight"])


def test_stacked_layers_load_as_a_taller_model(llamas, tmp_path):
    m0, m1 = str(llamas / "m0"), str(llamas / "m1")
    recipe = {
        "method": "passthrough",
        "slices": [
            {"sources": [{"model": m0, "layers": [0, 3]}]},
            {"sources": [{"model": m1, "layers": [1, 4], "parameters": {"scale": 1.0}}]},
        ],
    }
    out = hf_fuse.merge(recipe, tmp_path / "out")
    merged, a, b = weights(out), weights(llamas / "m0"), weights(llamas / "m1")
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 6
    for name in a:
        if ".layers.0." in name:
            rest = name.split(".layers.0.")[1]
            for layer, (source, index) in enumerate([(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]):
                assert torch.equal(merged[f"model.layers.{layer}.{rest}"], source[f"model.layers.{index}.{rest}"])
    assert torch.equal(merged["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    for name in ("model.norm.weight", "lm_head.weight"):
        assert torch.equal(merged[name], b[name])
    assert logits(out).isfinite().all()


def test_slices_merge_different_depths_with_a_base(llamas, tmp_path):
    m0, m1, base = (str(llamas / name) for name in ("m0", "m1", "base"))
    recipe = {
        "method": "task_arithmetic",
        "base_model": base,
        "slices": [
            {"sources": [{"model": m0, "layers": [0, 2]}, {"model": m1, "layers": [2, 4], "weight": [1, 0]}],
             "parameters": {"lambda": 0.5}},
        ],
    }  # fmt: skip
    merged = weights(hf_fuse.merge(recipe, tmp_path / "out"))
    a, b, start = (weights(llamas / name) for name in ("m0", "m1", "base"))
    name, other = "model.layers.{}.mlp.down_proj.weight".format, "model.layers.{}.mlp.down_proj.weight".format
    expected = start[name(0)] + 0.5 * ((a[name(0)] - start[name(0)]) + (b[other(2)] - start[name(0)]))
    torch.testing.assert_close(merged[name(0)], expected)
    torch.testing.assert_close(merged[name(1)], start[name(1)] + 0.5 * (a[name(1)] - start[name(1)]))
    assert not any(".layers.2." in key for key in merged)


def test_layer_lists_in_the_config_follow_the_layers(llamas, tmp_path):
    from hf_fuse.merge.carry import output_config

    config = {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"], "architectures": ["X"], "auto_map": {"x": "y"}}
    layers = [(config, 0), (config, 2), (config, 2), (config, 1)]
    made = output_config(config, out_dtype="BF16", layers=layers, vocab_size=None, special_ids={}, tied=None)
    assert made["layer_types"] == ["a", "c", "c", "b"] and made["num_hidden_layers"] == 4
    assert made["dtype"] == "bfloat16" and "auto_map" not in made and config["num_hidden_layers"] == 3


def test_out_dtype_is_said_in_the_config(llamas, tmp_path):
    recipe = {"method": "linear", "models": [str(llamas / "m0")], "out_dtype": "bfloat16"}
    out = hf_fuse.merge(recipe, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert {t.dtype for t in weights(out).values()} == {torch.bfloat16}


@pytest.fixture(scope="module")
def adapters(llamas, tmp_path_factory):
    """Two LoRA adapters on the base, and the same two merged into full models by PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("adapters")
    for k, targets in enumerate((["q_proj", "v_proj"], ["q_proj", "down_proj"])):
        model = AutoModelForCausalLM.from_pretrained(llamas / "base")
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
        torch.manual_seed(10 + k)
        peft = get_peft_model(model, config)
        peft.save_pretrained(root / f"lora{k}")
        peft.merge_and_unload().save_pretrained(root / f"full{k}")
    return root


@pytest.mark.parametrize("method", ["task_arithmetic", "linear", "ties"])
def test_adapters_merge_like_the_models_they_stand_for(llamas, adapters, tmp_path, method):
    def run(names, out):
        recipe = {"method": method, "base_model": str(llamas / "base"), "models": [str(adapters / n) for n in names]}
        return weights(hf_fuse.merge(recipe, tmp_path / out))

    lazy, full = run(("lora0", "lora1"), "lazy"), run(("full0", "full1"), "full")
    assert lazy.keys() == full.keys()
    for name in lazy:
        torch.testing.assert_close(lazy[name], full[name], atol=1e-6, rtol=1e-5)


def test_adapter_on_top_of_a_model(llamas, adapters, tmp_path):
    recipe = {"method": "linear", "models": [{"path": str(llamas / "base"), "adapter": str(adapters / "lora0")}]}
    merged, full = weights(hf_fuse.merge(recipe, tmp_path / "out")), weights(adapters / "full0")
    for name in full:
        torch.testing.assert_close(merged[name], full[name], atol=1e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    """Two models that share most tokens at different ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("vocabularies")
    words = {"a": ["<unk>", "def", "class", "return", "x"], "b": ["<unk>", "class", "def", "x", "return", "yield"]}
    for name, vocabulary in words.items():
        backend = Tokenizer(models.BPE({w: i for i, w in enumerate(vocabulary)}, [], unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
        tokenizer.add_special_tokens({"additional_special_tokens": [f"<{name}>"]})
        torch.manual_seed(ord(name))
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, tie_word_embeddings=False,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.mark.parametrize("source", ["base", "union"])
def test_embeddings_are_aligned_by_token(vocabularies, tmp_path, source):
    from transformers import AutoTokenizer

    a, b = (weights(vocabularies / name) for name in "ab")
    recipe = {"method": "linear", "models": [str(vocabularies / "a"), str(vocabularies / "b")], "tokenizer": source}
    with pytest.raises(CheckpointError, match="tokenizer: base or tokenizer: union"):
        hf_fuse.plan({**recipe, "tokenizer": None})
    out = hf_fuse.merge(recipe, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    old = [AutoTokenizer.from_pretrained(vocabularies / name).get_vocab() for name in "ab"]
    vocabulary = tokenizer.get_vocab()
    assert set(vocabulary) == set(old[0]) | (set(old[1]) if source == "union" else set())
    for matrix in ("model.embed_tokens.weight", "lm_head.weight"):
        merged = weights(out)[matrix]
        for token, row in vocabulary.items():
            own = [state[matrix][ids[token]] for state, ids in zip((a, b), old) if token in ids]
            expected = own[0] if len(own) == 1 else (own[0] + own[1]) / 2
            torch.testing.assert_close(merged[row], expected)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == weights(out)["lm_head.weight"].shape[0]
    assert logits(out).shape[-1] == len(vocabulary)


def test_the_stored_recipe_makes_the_same_bytes(llamas, tmp_path):
    recipe = {
        "method": "dare_ties",
        "base_model": str(llamas / "base"),
        "models": [str(llamas / "m0"), {"path": str(llamas / "m1"), "weight": 0.5}],
        "parameters": {"density": 1e-1},
        "seed": 7,
        "output": str(tmp_path / "first"),
    }
    first = hf_fuse.merge(recipe)
    again = hf_fuse.merge(first / "fuse_recipe.yaml", tmp_path / "again")
    for file in first.iterdir():
        if file.name != "README.md":  # whose title is the folder's name
            assert file.read_bytes() == (again / file.name).read_bytes(), file.name


def test_other_architectures_by_their_names_alone(tmp_path):
    """BERT, T5, ViT and CLIP: no table of architectures is needed to merge by tensor name."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        CLIPConfig,
        CLIPModel,
        CLIPTextConfig,
        CLIPVisionConfig,
        T5Config,
        T5ForConditionalGeneration,
        ViTConfig,
        ViTForImageClassification,
    )  # fmt: skip

    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**small, "image_size": 8, "patch_size": 4}
    made = {
        "bert": lambda: BertForSequenceClassification(BertConfig(vocab_size=50, **small)),
        "t5": lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
        ),
        "vit": lambda: ViTForImageClassification(ViTConfig(**vision)),
        "clip": lambda: CLIPModel(
            CLIPConfig(
                text_config=CLIPTextConfig(vocab_size=50, **small).to_dict(),
                vision_config=CLIPVisionConfig(**vision).to_dict(),
                projection_dim=8,
            )
        ),
    }
    for name, build in made.items():
        states = []
        for k in range(3):
            torch.manual_seed(k)
            model = build()
            model.save_pretrained(tmp_path / f"{name}{k}")
            states.append(weights(tmp_path / f"{name}{k}"))
        recipe = {
            "method": "task_arithmetic",
            "base_model": str(tmp_path / f"{name}0"),
            "models": [str(tmp_path / f"{name}1"), str(tmp_path / f"{name}2")],
            "parameters": {"lambda": [0.2, 0.4]},
        }
        out = hf_fuse.merge(recipe, tmp_path / f"{name}-out")
        loaded, info = type(model).from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], name
        merged = weights(out)
        for key, tensor in merged.items():
            difference = (states[1][key] - states[0][key]) + (states[2][key] - states[0][key])
            step = merged[key] - states[0][key]
            if tensor.is_floating_point() and difference.abs().sum() > 0:
                factor = (step * difference).sum() / difference.square().sum()
                assert 0.19 < factor < 0.41, (name, key)


def test_head_that_no_model_ties_differently_is_merged_once(tmp_path):
    """A tied model stored with both names: one result under both."""
    from transformers import LlamaConfig, LlamaForCausalLM

    for k in range(2):
        torch.manual_seed(k)
        config = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                             num_attention_heads=2, tie_word_embeddings=True)  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(tmp_path / f"m{k}")
        state = load_file(tmp_path / f"m{k}" / "model.safetensors")
        save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()},
                  tmp_path / f"m{k}" / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    recipe = {
        "method": "dare_linear", "base_model": str(tmp_path / "m0"), "models": [str(tmp_path / "m1")],
        "parameters": {"density": 0.5},
    }  # fmt: skip
    merged = weights(hf_fuse.merge(recipe, tmp_path / "out"))
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])


def test_huge_index_of_experts_plans_in_linear_time(tmp_path):
    """Many small tensors, as in a model with per-expert names."""
    state = {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight": torch.ones(2, 2)
        for layer in range(20) for expert in range(64) for name in ("w1", "w2", "w3")
    }  # fmt: skip
    for k in range(2):
        (tmp_path / f"m{k}").mkdir()
        save_file({n: t * (k + 1) for n, t in state.items()}, tmp_path / f"m{k}" / "model.safetensors")
    recipe = {
        "method": "linear",
        "models": [str(tmp_path / "m0"), str(tmp_path / "m1")],
        "parameters": {"weight": [1, 1]},
    }
    merged = weights(hf_fuse.merge(recipe, tmp_path / "out"))
    assert len(merged) == 3840 and all((t == 1.5).all() for t in merged.values())


def test_slices_out_of_range_and_unequal(llamas, tmp_path):
    def piece(low, high, name="m0"):
        return {"model": str(llamas / name), "layers": [low, high]}

    with pytest.raises(RecipeError, match=r"slices\.0\.sources\.0.*has 4 layers"):
        hf_fuse.plan({"method": "passthrough", "slices": [{"sources": [piece(2, 5)]}]})
    with pytest.raises(RecipeError, match="equally many"):
        hf_fuse.plan({"method": "linear", "slices": [{"sources": [piece(0, 2), piece(0, 3, "m1")]}]})


def test_open_checkpoint_of_an_output(llamas, tmp_path):
    out = hf_fuse.merge({"method": "linear", "models": [str(llamas / "m0")]}, tmp_path / "out")
    assert open_checkpoint(str(out)).architecture == "LlamaForCausalLM"
