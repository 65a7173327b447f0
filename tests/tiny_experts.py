"""Tiny mixtures of experts of three makes, and text that their tokenizer knows."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as t
from tiny_models import HEADS, VOCABULARY, WIDTH, WORDS, save_tokenizer

EXPERTS = 4
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
SWITCH = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 4, "d_ff": 24, "num_heads": HEADS, "num_layers": 2,
    "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": EXPERTS,
    "initializer_factor": 1.0, "decoder_start_token_id": 3, "pad_token_id": 3, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**SHAPE, num_local_experts=EXPERTS)),
    "qwen_moe": lambda: t.Qwen2MoeForCausalLM(
        t.Qwen2MoeConfig(
            **SHAPE, num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
        )
    ),
    "switch": lambda: t.SwitchTransformersForConditionalGeneration(t.SwitchTransformersConfig(**SWITCH)),
}  # fmt: skip
IDS = torch.arange(4, 16)[None]


def new_experts(kind: str) -> t.PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[kind]().eval()


def save_experts(model: t.PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def write_text(path: Path) -> Path:
    random = torch.Generator().manual_seed(0)
    path.write_text(" ".join(WORDS[i] for i in torch.randint(len(WORDS), (400,), generator=random)))
    return path


def logits_of(model: t.PreTrainedModel) -> torch.Tensor:
    extra = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(IDS, **extra).logits


def stock(folder: Path) -> t.PreTrainedModel:
    config = t.AutoConfig.from_pretrained(folder)
    loader = t.AutoModelForSeq2SeqLM if config.is_encoder_decoder else t.AutoModelForCausalLM
    return loader.from_pretrained(folder).eval()
