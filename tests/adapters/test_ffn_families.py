"""MixLoRA on every family of feed-forward layers that transformers has."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers as t
from checks_adapters import move, take_factors
from peft import LoraConfig, get_peft_model

from hf_fuse import MixLoraConfig
from hf_fuse.adapters.experts import FeedForwardExperts, LinearExperts
from hf_fuse.adapters.ffn_families import FAMILIES, computes, family_of
from hf_fuse.adapters.routed_layer import routed_layers

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = SIZES | {"vocab_size": 40, "max_position_embeddings": 32, "pad_token_id": 0}
HEADS = TEXT | {"num_key_value_heads": 2, "head_dim": 8}
IMAGE = SIZES | {"image_size": 8, "patch_size": 4}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "pad_token_id": 0,
      "decoder_start_token_id": 0}  # fmt: skip
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 40}

WHOLE = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**HEADS)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**HEADS)),
    "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**HEADS)),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**TEXT, num_key_value_heads=2)),
    "phi": lambda: t.PhiForCausalLM(t.PhiConfig(**TEXT)),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT)),
    "gptj": lambda: t.GPTJForCausalLM(t.GPTJConfig(**GPT, rotary_dim=4)),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**TEXT)),
    "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(**T5)),
    "t5_gated": lambda: t.T5ForConditionalGeneration(t.T5Config(**T5, feed_forward_proj="gated-gelu")),
    "distilbert": lambda: t.DistilBertModel(
        t.DistilBertConfig(vocab_size=40, dim=16, hidden_dim=24, n_layers=1, n_heads=2, max_position_embeddings=32)
    ),
    "vit": lambda: t.ViTModel(t.ViTConfig(**IMAGE)),
    "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**IMAGE, mlp_ratio=2)),
    "dinov2_gated": lambda: t.Dinov2Model(t.Dinov2Config(**IMAGE, mlp_ratio=2, use_swiglu_ffn=True)),
    "clip": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**IMAGE)),
}
APART = {
    "bert": lambda: t.BertModel(t.BertConfig(**TEXT)),
    "roberta": lambda: t.RobertaModel(t.RobertaConfig(**TEXT)),
    "opt": lambda: t.OPTForCausalLM(
        t.OPTConfig(hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=40,
                    max_position_embeddings=32, word_embed_proj_dim=16)
    ),
    "bloom": lambda: t.BloomModel(t.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=40)),
}  # fmt: skip


def output(model) -> torch.Tensor:
    model.eval()
    ids = torch.randint(1, 40, (2, 5), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids}
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    elif model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("name", [*WHOLE, *APART])
def test_family(name):
    torch.manual_seed(0)
    model = {**WHOLE, **APART}[name]()
    base = output(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        adapted = get_peft_model(model, MixLoraConfig(r=2, num_experts=3))
    torch.testing.assert_close(output(adapted), base, rtol=1e-4, atol=1e-5)
    kinds = [type(layer.experts["default"]) for layer in routed_layers(adapted)]
    assert (FeedForwardExperts if name in WHOLE else LinearExperts) in kinds
    assert (FeedForwardExperts in kinds) != (LinearExperts in kinds)
    assert any("router of its own" in str(warning.message) for warning in told) == (name in APART)
    assert not torch.allclose(output(move(adapted)), base, atol=1e-3)
    assert torch.equal(output(adapted.unload()), base)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("name", WHOLE)
def test_one_expert_is_lora(name):
    torch.manual_seed(0)
    model = WHOLE[name]()
    mixed = get_peft_model(copy.deepcopy(model), MixLoraConfig(r=2, lora_alpha=3, num_experts=1, top_k=1))
    targets = [
        f"{layer.key}.{part}".rstrip(".")
        for layer in routed_layers(mixed)
        for part in getattr(layer.experts["default"], "targets", {"": ""}).values()
    ]
    base = output(model)
    plain = move(get_peft_model(model, LoraConfig(r=2, lora_alpha=3, target_modules=targets)))
    take_factors(mixed, plain)
    torch.testing.assert_close(output(mixed), output(plain), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(output(mixed), base, atol=1e-3)


def test_dropout_of_the_layer_stays():
    for name, kept in (("t5", True), ("gpt2", True), ("llama", False)):
        torch.manual_seed(0)
        model = get_peft_model(WHOLE[name](), MixLoraConfig(r=2, num_experts=3, lora_dropout=0.0))
        layer = next(x for x in routed_layers(model) if isinstance(x.experts["default"], FeedForwardExperts)).train()
        x = torch.randn(1, 4, 16)
        assert torch.equal(layer(x), layer(x)) != kept, name


def test_layer_that_computes_something_else():
    class Scaled(torch.nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.fc1, self.fc2 = torch.nn.Linear(4, 6), torch.nn.Linear(6, 4)
            self.act, self.factor = torch.nn.GELU(), factor

        def forward(self, x):
            return self.fc2(self.act(self.fc1(x)) * self.factor)

    for factor, same in ((1.0, True), (1.5, False)):
        assert computes(Scaled(factor), family_of(Scaled(factor))) == same

    normed = Scaled(1.0)
    normed.norm = torch.nn.LayerNorm(6)
    assert family_of(normed) is None


def test_families_do_not_overlap():
    names = [frozenset(family.projections.values()) for family in FAMILIES]
    assert not any(one <= other for one in names for other in names if one is not other)


@pytest.mark.parametrize("use_dora", [False, True])
def test_t5_in_half_precision_keeps_its_output_projection_in_full(use_dora):
    torch.manual_seed(0)
    model = WHOLE["t5"]().bfloat16()
    for name, module in model.named_modules():
        if name.endswith(".wo"):
            module.float()
    base = output(model)
    adapted = get_peft_model(model, MixLoraConfig(r=2, num_experts=3, use_dora=use_dora))
    assert output(adapted).dtype == base.dtype
    torch.testing.assert_close(output(adapted), base, rtol=2e-2, atol=2e-2)
