"""Tiny students and teachers in different layouts."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from training_cases import bert, classes_data, language_data, llama, padded, three_steps

from hf_fuse import DistillConfig, DistillTrainer, registry


def another(make, **changes):
    """A model of other weights."""

    def made():
        model = make(**changes)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        return model

    return made


def lora():
    return LoraConfig(target_modules=["q_proj", "up_proj"], r=4, lora_dropout=0.0, init_lora_weights=False)


# Those that compare the student with one teacher, token by token; the others fuse several.
ONE_TEACHER = [
    name
    for name in registry.names("distill")
    if not isinstance(registry.get("distill", name).function, type)
    and "sources" not in signature(registry.get("distill", name).function).parameters
]
KL = {"task": 0.5, "forward_kl": {"weight": 0.5, "temperature": 2.0}}
CASES: dict[str, dict[str, Any]] = {
    "language": {"model": llama, "teacher": another(llama), "objectives": KL | {"logit_z": 0.1}},
    "chunks": {"model": llama, "teacher": another(llama), "objectives": KL, "chunk_size": 5},
    "two_teachers": {
        "model": llama,
        "teacher": lambda: [another(llama)(), another(llama, hidden_size=32, vocab_size=32)()],
        "objectives": {"task": 0.0, "jsd": 1.0, "pld": {"start": 0.0, "end": 1.0}},
        "teacher_weights": [0.25, 0.75],
        "chunk_size": 3,
    },
    "base": {"model": llama, "peft_config": lora, "teacher": lambda: "base", "objectives": KL},
    "classes": {"model": bert, "teacher": another(bert), "objectives": {"task": 0.0, "pld": 1.0, "reverse_kl": 0.5}},
}


def make_trainer(case: str, output: Path, batch: int, accumulation: int, **changes: Any) -> DistillTrainer:
    """Three steps of SGD on one of ``CASES``, in the given layout."""
    settings = CASES[case] | changes
    model, teacher = settings.pop("model")(), settings.pop("teacher")()
    is_language = model.get_output_embeddings() is not None
    data = language_data() if is_language else classes_data()
    own = {key: settings.pop(key) for key in ("compute_metrics", "processing_class", "teacher_tokenizer",
                                              "compute_loss_func") if key in settings}  # fmt: skip
    own["peft_config"] = settings.pop("peft_config", lambda: None)()
    args = DistillConfig(**three_steps(output, batch, accumulation) | settings)
    return DistillTrainer(
        model,
        args,
        teacher=teacher,
        train_dataset=data,
        eval_dataset=[data[index] for index in range(13)],
        data_collator=padded if is_language else None,
        **own,
    )
