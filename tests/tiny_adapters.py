"""Tiny models with LoRA adapters on disk, and what the adapters mean as dense numbers."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model

from hf_fuse.checkpoint.adapter import BoundAdapter, open_adapter
from hf_fuse.checkpoint.reader import TORCH_NAMES, FilePool, TensorInfo, open_checkpoint


def llama(layers: int = 2, hidden: int = 16, seed: int = 0, tied: bool = False, **changes):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 2 + 4, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=40, max_position_embeddings=32, tie_word_embeddings=tied, **changes,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


def bert(head: type = transformers.BertForSequenceClassification):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=40,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    return head(config)


def vit():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4,
    )  # fmt: skip
    return transformers.ViTModel(config, add_pooling_layer=False)


def t5():
    """Encoder, decoder and head share one embedding."""
    torch.manual_seed(0)
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=40)
    return transformers.T5ForConditionalGeneration(config)


def clip():
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tower | {"vocab_size": 40, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    vision = tower | {"image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    return transformers.CLIPModel(config)


def wav2vec():
    """Has 1-d convolutions."""
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, conv_dim=(8, 8),
        conv_stride=(2, 2), conv_kernel=(3, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        vocab_size=10,        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return transformers.Wav2Vec2Model(config)


def train(model, seed: int = 7, **settings):
    """A PEFT model whose every trainable number has moved away from its start."""
    peft = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, "lora_dropout": 0.0} | settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return peft


def save(folder: Path, model, peft=None, **kwargs) -> tuple[Path, Path]:
    base, adapter = folder / "base", folder / "adapter"
    model.save_pretrained(base)
    if peft is not None:
        peft.save_pretrained(adapter, **kwargs)
    return base, adapter


def numbers(info: TensorInfo) -> torch.Tensor:
    raw = torch.empty(info.nbytes, dtype=torch.uint8)
    pool = FilePool()
    pool.read(info, 0, memoryview(raw.numpy()))
    pool.close()
    return raw.view(getattr(torch, TORCH_NAMES[info.dtype])).reshape(info.shape)


def dense(bound: BoundAdapter, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    shape = bound.low_rank[name].shape
    out = torch.full((math.prod(shape),), math.nan, dtype=dtype)
    bound.delta(name, 0, out.numel(), out)
    return out.view(shape)


def adapted(bound: BoundAdapter) -> dict[str, torch.Tensor]:
    infos = {**bound.base.tensors, **bound.replaced}
    return {n: numbers(i) + (dense(bound, n) if n in bound.low_rank else 0) for n, i in infos.items()}


def bind(base: Path, adapter: Path, **kwargs) -> BoundAdapter:
    return open_adapter(adapter, "the-adapter").bind(open_checkpoint(str(base)), **kwargs)
