"""Tiny image classifiers, and objectives that attach something to the training, in different layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from training_cases import language_data, llama, padded, three_steps
from transformers import ViTConfig, ViTForImageClassification

from hf_fuse import DistillConfig, DistillTrainer


def vit(seed: int = 0, **changes: Any):
    torch.manual_seed(seed)
    small = {"image_size": 4, "patch_size": 2, "num_channels": 3, "hidden_size": 16, "intermediate_size": 24,
             "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3, "initializer_range": 0.2,
             "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
    return ViTForImageClassification(ViTConfig(**small | changes))


def images(count: int = 16) -> list[dict[str, Any]]:
    """Noise in which the class shows, and a second view of each."""
    random = torch.Generator().manual_seed(4)
    pixels = torch.randn(count, 3, 4, 4, generator=random)
    labels = [max(0, index % 4 - 1) for index in range(count)]
    for image, label in zip(pixels, labels):
        image[label] += 1.0
    second = pixels + 0.3 * torch.randn(pixels.shape, generator=random)
    return [{"pixel_values": pixels[i], "second_pixel_values": second[i], "labels": labels[i]} for i in range(count)]


# Of 20 samples, 16 are left.
OFTEN = {"update_every": 2, "held_out": 0.2}
CASES: dict[str, dict[str, Any]] = {
    "saf": {"objectives": {"saf": {"gap": 1, "start_epoch": 0}}},
    "mesa": {"objectives": {"mesa": {"decay": 0.5}}},
    "mesa_language": {"model": llama, "objectives": {"mesa": {"decay": 0.5}}},
    "mutual": {"objectives": {"mutual": {"peers": 2, "temperature": 2.0}}},
    "sla": {"objectives": {"sla": 1.0}},
    "lsskd": {"objectives": {"lsskd": {"stages": 2}}},
    "mdcs": {"objectives": {"task": 0.0, "mdcs": {"ramp_epochs": 0.0, "consistency": 0.0}}},
    "tgeo": {"teacher": lambda: vit(7), "data": images(20), "objectives": {"task": 0.0, "tgeo": OFTEN}},
    "tgeo_language": {
        "model": llama,
        "teacher": lambda: llama(initializer_range=0.3),
        "data": language_data(20),
        "objectives": {"task": 0.0, "tgeo": OFTEN},
    },
}  # fmt: skip


def make_trainer(case: str, output: Path, batch: int, accumulation: int, **changes: Any) -> DistillTrainer:
    """Five steps of SGD, two to an epoch of the images, in the given layout."""
    settings = CASES[case] | {"max_steps": 5, "learning_rate": 0.05} | changes
    model = settings.pop("model", vit)()
    is_language = model.get_output_embeddings() is not None
    data = settings.pop("data", language_data(16) if is_language else images())
    own = {"teacher": settings.pop("teacher", lambda: None)(), "peers": settings.pop("peers", None)}
    own["peft_config"] = settings.pop("peft_config", None)
    return DistillTrainer(
        model,
        DistillConfig(**three_steps(output, batch, accumulation) | settings),
        train_dataset=data,
        eval_dataset=data[:5] if isinstance(data, list) else images(5),
        data_collator=padded if is_language else None,
        **own,
    )
