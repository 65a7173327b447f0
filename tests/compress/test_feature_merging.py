"""Iterative Feature Merging: the spec's example, exactness for repeated units, and stock checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as t
from tiny_models import HEADS, VOCABULARY, WIDTH, save_tokenizer

import hf_fuse
from hf_fuse.compress.methods.feature_merging import _narrowed, closest_pairs, clusters_of
from hf_fuse.errors import FuseError

IDS = torch.arange(4, 16)[None]
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip


def _llama() -> t.PreTrainedModel:
    config = t.LlamaConfig(**SHAPE, intermediate_size=24, num_key_value_heads=2, initializer_range=0.3, mlp_bias=True)
    return t.LlamaForCausalLM(config)


def _gpt2() -> t.PreTrainedModel:
    shape = {"n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "n_positions": 64, "initializer_range": 0.3}
    return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **shape))


def _opt() -> t.PreTrainedModel:
    return t.OPTForCausalLM(t.OPTConfig(**SHAPE, ffn_dim=24, word_embed_proj_dim=WIDTH, init_std=0.3))


# Model, and its feed-forward modules: those that make a unit, the one that uses it.
MODELS = {
    "silu": (_llama, lambda m: [((x.mlp.gate_proj, x.mlp.up_proj), x.mlp.down_proj) for x in m.model.layers]),
    "gelu": (_gpt2, lambda m: [((x.mlp.c_fc,), x.mlp.c_proj) for x in m.transformer.h]),
    "relu": (_opt, lambda m: [((x.fc1,), x.fc2) for x in m.model.decoder.layers]),
}


def _save(model: t.PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def _repeat_units(kind: str, model: t.PreTrainedModel, times: float) -> None:
    """Unit 1 becomes unit 0 times a factor, and unit 3 unit 2 times it, with outgoing weights alike or not."""
    with torch.no_grad():
        for producers, consumer in MODELS[kind][1](model):
            for module in producers:
                torch.nn.init.normal_(module.bias, std=0.3)
                weight = module.weight.T if kind == "gelu" else module.weight
                weight[1], weight[3] = times * weight[0], times * weight[2]
                module.bias[1], module.bias[3] = times * module.bias[0], times * module.bias[2]
            if kind == "relu":  # its rule takes the mean of the outgoing weights
                consumer.weight[:, 1], consumer.weight[:, 3] = consumer.weight[:, 0], consumer.weight[:, 2]


@pytest.mark.parametrize("kind", MODELS)
def test_repeated_units_merge_without_loss_under_every_activation(tmp_path, kind):
    torch.manual_seed(0)
    model = MODELS[kind][0]().eval()
    _repeat_units(kind, model, 1.0)
    source = _save(model, tmp_path / "model")
    recipe = {"method": "feature_merging", "model": str(source), "parameters": {"threshold": 1e-6}}
    made = hf_fuse.compress(recipe, tmp_path / "out")
    assert made.facts["possible"] == [2, 2]
    small = t.AutoModelForCausalLM.from_pretrained(made.output).eval()
    torch.testing.assert_close(small(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)
    removed = model.num_parameters() - small.num_parameters()
    per_unit = sum(m.weight.shape[1 if kind != "gelu" else 0] + 1 for m in MODELS[kind][1](model)[0][0]) + WIDTH
    assert removed == 2 * 2 * per_unit


def test_the_spec_s_example():
    """W1 [[1, 0], [1, .1], [0, 3]], b [0, 0, 1], W2 [[1, 1.2, 5]], threshold .1."""
    incoming, outgoing = torch.tensor([[1.0, 0], [1, 0.1], [0, 3]]), torch.tensor([[1.0], [1.2], [5]])
    pairs = closest_pairs(incoming, outgoing, 0.1, 3, homogeneous=True)
    clusters = clusters_of(3, pairs)
    assert pairs == [(0, 1)] and clusters == [[2], [0, 1]]
    stored = {"w1": incoming, "b": torch.tensor([0.0, 0, 1]), "w2": outgoing.T}
    for name, axis, summed, expected in [
        ("w1", 0, True, [[0, 3], [2, 0.1]]),
        ("b", 0, True, [1, 0]),
        ("w2", 1, False, [[5, 1.1]]),
    ]:
        found = _narrowed(name, axis, clusters, summed, stored.__getitem__)
        torch.testing.assert_close(found, torch.tensor(expected), check_dtype=False)


def test_under_the_mean_rule_a_pair_of_pairs_is_the_mean_of_four():
    incoming = torch.tensor([[0.0], [0.1], [0.25], [0.32], [9]])
    pairs = closest_pairs(incoming, torch.zeros(5, 1), 0.1, 3, homogeneous=False)
    assert pairs == [(2, 3), (0, 1), (6, 5)]
    assert clusters_of(5, pairs) == [[4], [0, 1, 2, 3]]


def test_layers_keep_one_width_and_the_share_is_a_limit(tmp_path):
    torch.manual_seed(0)
    source = _save(_llama(), tmp_path / "model")
    recipe = {"method": "feature_merging", "model": str(source), "parameters": {"threshold": 1, "most": 0.25}}
    made = hf_fuse.compress(recipe, tmp_path / "out")
    assert made.facts["possible"] == [6, 6]
    assert t.AutoConfig.from_pretrained(made.output).intermediate_size == 18
    recipe["parameters"] = {"threshold": 0}
    made = hf_fuse.compress(recipe, tmp_path / "same")
    assert (made.output / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_other_feed_forward_layers_are_refused(tmp_path):
    torch.manual_seed(0)
    model = t.MixtralForCausalLM(t.MixtralConfig(**SHAPE, intermediate_size=24, num_key_value_heads=2))
    source = _save(model, tmp_path / "model")
    with pytest.raises(FuseError, match="feed-forward layers"):
        hf_fuse.compress({"method": "feature_merging", "model": str(source)}, tmp_path / "out")
