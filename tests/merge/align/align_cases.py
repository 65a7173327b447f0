"""Tiny models of every family, and copies of them whose units are in another order but which compute the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t
from tiny_models import HEADS, VOCABULARY, WIDTH, WORDS, load_weights, save_tokenizer, save_weights, seeded

from hf_fuse.checkpoint.reader import open_checkpoint
from hf_fuse.merge.align.spaces import Heads, spaces_of

TEXT = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
ENCODER = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": HEADS}
DECODER = TEXT | ENCODER | {"num_key_value_heads": 2, "max_position_embeddings": 64}
IMAGE = {"image_size": 8, "patch_size": 4, "num_labels": 5}
SHORT = {"max_position_embeddings": 40}


def _t5(**options: Any) -> t.PreTrainedModel:
    config = t.T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=4, d_ff=24, num_layers=2, num_heads=HEADS, **options)
    return t.T5ForConditionalGeneration(config)


MODELS: dict[str, Callable[[], t.PreTrainedModel]] = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**DECODER)),
    "llama_tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**DECODER, tie_word_embeddings=True, mlp_bias=True)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**DECODER)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**DECODER, head_dim=6)),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**DECODER, head_dim=4, sliding_window=8)),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**DECODER)),
    "olmo2": lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**DECODER)),
    "llama_classifier": lambda: t.LlamaForSequenceClassification(t.LlamaConfig(**DECODER, num_labels=3)),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=WIDTH, n_layer=2, n_head=HEADS, n_positions=40, **TEXT)),
    "bert": lambda: t.BertForMaskedLM(t.BertConfig(**TEXT, **ENCODER, **SHORT)),
    "bert_classifier": lambda: t.BertForSequenceClassification(t.BertConfig(**TEXT, **ENCODER, **SHORT, num_labels=3)),
    "roberta": lambda: t.RobertaForMaskedLM(t.RobertaConfig(**TEXT, **ENCODER, **SHORT)),
    "t5": _t5,
    "t5_gated": lambda: _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**ENCODER, **IMAGE)),
    "dinov2": lambda: t.Dinov2ForImageClassification(
        t.Dinov2Config(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, mlp_ratio=2, **IMAGE)
    ),
}


def saved(kind: str, folder: Path, seed: int = 0) -> Path:
    """A model whose every parameter is random, biases and norms too."""
    torch.manual_seed(seed)
    model = MODELS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.3)
    model.save_pretrained(folder)
    if kind not in ("vit", "dinov2"):
        save_tokenizer(folder)
    return folder


def written_texts(file: Path) -> Path:
    """Sentences of the tokenizer's words, of several lengths."""
    random = seeded(5)
    rows = [
        {"text": " ".join(WORDS[k] for k in torch.randint(len(WORDS), (3 + row % 9,), generator=random))}
        for row in range(48)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def written_digits(file: Path, rows: int = 48, classes: int = 5) -> Path:
    """scikit-learn's digits below ``classes``, as images."""
    import datasets
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    chosen = np.flatnonzero(labels < classes)[:rows]
    images = [Image.fromarray((pixels[k].reshape(8, 8) * 15).astype("uint8")) for k in chosen]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict({"image": images, "label": labels[chosen].tolist()}, features=features).to_parquet(file)
    return file


def shuffled(source: Path, folder: Path, seed: int = 0) -> tuple[Path, dict[str, torch.Tensor]]:
    """A copy that computes the same, its units in a random order; and that order."""
    import shutil

    checkpoint = open_checkpoint(str(source))
    spaces = spaces_of(checkpoint)
    orders = random_orders(spaces, seeded(seed))
    state = load_weights(source)
    for name, axes in spaces.axes.items():
        for axis, parts in enumerate(axes):
            order = [part.start + orders[part.space] for part in parts]
            if order:
                state[name] = state[name].index_select(axis, torch.cat(order)).contiguous()
    shutil.copytree(source, folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    save_weights(folder, state)
    return folder, orders


def random_orders(spaces, random: torch.Generator) -> dict[str, torch.Tensor]:
    """Any order that heads allow, for every space."""

    def draw(count: int) -> torch.Tensor:
        return torch.randperm(count, generator=random)

    orders = {space: draw(size) for space, size in spaces.sizes.items()}
    stacks: dict[str, torch.Tensor] = {}
    for block, heads in spaces.heads.items():
        outer = draw(heads.groups)
        stack = block.split(".")[0] + ".heads"
        if stack in spaces.sizes and "cross" not in block:
            outer = stacks.setdefault(stack, outer)
        orders |= {block + word: order for word, order in _attention(heads, outer, draw, spaces.family.rotary).items()}
    return orders | stacks


def _attention(heads: Heads, outer: torch.Tensor, draw: Callable, rotary: bool) -> dict[str, torch.Tensor]:
    found: dict[str, list[int]] = {"query": [], "key": [], "value": [], "mixed": []}
    for group in outer.tolist():
        inside, values = draw(heads.per_group).tolist(), draw(heads.size).tolist()
        keys = list(range(heads.size)) if rotary else draw(heads.size).tolist()
        found["key"] += [group * heads.size + k for k in keys]
        found["value"] += [group * heads.size + k for k in values]
        for head in inside:
            start = (group * heads.per_group + head) * heads.size
            found["query"] += [start + k for k in keys]
            found["mixed"] += [start + k for k in values]
    return {word: torch.tensor(order) for word, order in found.items()}
