"""Small families with data, for tests of learned coefficients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import VOCABULARY, WIDTH, save_tokenizer

from .learn_cases import written_texts


def saved_classifiers(root: Path, classes: tuple[int, ...] = (4, 3, 5)) -> list[Path]:
    """A BERT classifier and others whose trunk is a little away from its, each with a head of its own."""
    from transformers import BertConfig, BertForSequenceClassification

    folders, first = [], None
    for number, labels in enumerate(classes):
        torch.manual_seed(number)
        config = BertConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=32, pad_token_id=3, num_labels=labels, initializer_range=0.3,
        )  # fmt: skip
        model = BertForSequenceClassification(config)
        if first is not None:
            trunk = {name: value + 0.1 * torch.randn(value.shape) for name, value in first.items()}
            model.bert.load_state_dict(trunk)
        else:
            first = {name: value.clone() for name, value in model.bert.state_dict().items()}
        folders.append(root / f"model-{number}")
        model.save_pretrained(folders[-1])
        save_tokenizer(folders[-1])
    return folders


def recipe_of(estimator: str, base: Path, models: list[Path], own: Any, **more: Any) -> dict[str, Any]:
    """``own`` is one file for every model, a list of files, or None."""
    sources = own if isinstance(own, list) else [own] * len(models)
    entries = [{"path": str(m)} | ({"data": str(d)} if d else {}) for m, d in zip(models, sources)]
    return {"estimator": estimator, "base_model": str(base), "models": entries} | more


def unlabelled(root: Path) -> Path:
    return written_texts(root / "texts.jsonl")


def saved_writers(root: Path, kind: str = "llama", models: int = 2) -> tuple[Path, list[Path]]:
    """A language model with a tokenizer, and fine-tunes of it."""
    from tiny_models import transformers_family

    family = transformers_family(kind, root, models)
    for folder in family.all:
        save_tokenizer(folder)
    return family.base, family.tuned


def saved_images(root: Path, count: int = 24) -> Path:
    """Digits as an image folder, for the ViT of tiny_models: three channels, classes 0 to 4."""
    from PIL import Image
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(n_class=5, return_X_y=True)
    for number in range(count):
        file = root / "images" / "train" / str(classes[number]) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels[number].reshape(8, 8) * 15.9).astype("uint8")).convert("RGB").save(file)
    return root / "images"
