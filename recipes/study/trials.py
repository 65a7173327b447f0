"""One training per setting of each method: validation rows choose the setting, and test rows give the figure."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from study.small_data import Rows
from torch import Tensor
from transformers import PrinterCallback, default_data_collator

from hf_fuse import FuseConfig, FuseTrainer

Settings = Mapping[str, dict[str, Any]]  # name of a setting -> arguments of FuseConfig
Found = dict[str, dict[str, "Row"]]  # question -> method -> row


@dataclass
class Row:
    """A method's figure on test data, and the setting that validation data chose."""

    score: float
    setting: str = ""


@dataclass(frozen=True)
class Question:
    """What methods are judged by.

    Attributes:
        figure: what is measured, on test data.
        baseline: the method that the others are compared with.
        references: what is shown without being compared.
    """

    figure: str
    baseline: str
    lower_is_better: bool = False
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Effort:
    """Sizes of a run."""

    base_steps: int = 120
    steps: int = 24
    seeds: int = 3
    settings: int = 2  # of each method
    methods: int | None = None  # of each question about losses; all, if None
    language_steps: int = 60


FULL, QUICK = Effort(), Effort(base_steps=1, steps=1, seeds=1, settings=1, methods=3, language_steps=2)


@dataclass
class Task:
    """Data to learn, and figures of the trained model; validation data chooses by the first one.

    Attributes:
        model: a new model; its argument is added to the seed of what is random in it.
        figures: question -> (trainer, rows) -> value; higher is better.
        arguments: further ones of the trainer, for objectives.
        rate: learning rate.
    """

    model: Callable[[int], Any]
    train: Rows
    validation: Any
    test: Any
    figures: dict[str, Callable[[FuseTrainer, Any], float]]
    arguments: dict[str, Any] = field(default_factory=dict)
    rate: float = 2e-3


def compared(task: Task, methods: Mapping[str, Settings], seed: int, effort: Effort) -> Found:
    """All figures of all methods, each with the setting that is best on validation data."""
    first, found = next(iter(task.figures)), {question: {} for question in task.figures}
    for method, settings in list(methods.items())[: effort.methods]:
        highest = -float("inf")
        for label, setting in list(settings.items())[: effort.settings]:
            trainer = trained(task, setting, seed, effort)
            reached = task.figures[first](trainer, task.validation)
            if reached > highest:
                highest = reached
                for question, figure in task.figures.items():
                    found[question][method] = Row(figure(trainer, task.test), label)
    return found


def trained(task: Task, setting: dict[str, Any], seed: int, effort: Effort) -> FuseTrainer:
    """A trainer that has trained. ``setting``: of FuseConfig; ``rows`` changes the training rows first."""
    setting = dict(setting)
    rows = setting.pop("rows", lambda rows, size, seed: rows)(task.train, 32 * effort.steps, seed)
    start = setting.pop("start", 0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "output_dir": folder, "max_steps": effort.steps, "learning_rate": task.rate, "lr_scheduler_type": "cosine",
            "warmup_steps": effort.steps // 10, "weight_decay": 0.05, "per_device_train_batch_size": 32,
            "seed": seed + 1000 * start, "use_cpu": True, "dataloader_pin_memory": False, "save_strategy": "no",
            "logging_strategy": "no", "report_to": "none", "disable_tqdm": True, "remove_unused_columns": False,
        } | setting  # fmt: skip
        others = task.arguments if "objectives" in setting else {}
        trainer = FuseTrainer(task.model(start), FuseConfig(**arguments), train_dataset=rows, **others)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    trainer.model.eval()
    return trainer


# -- figures ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits_and_labels(model: Any, rows: Rows) -> tuple[Tensor, Tensor]:
    batch = default_data_collator(rows)
    labels = batch.pop("labels")
    return model(**batch).logits, labels


def accuracy(trainer: FuseTrainer, rows: Rows) -> float:
    logits_NC, labels_N = logits_and_labels(trainer.model, rows)
    return (logits_NC.argmax(1) == labels_N).float().mean().item()


def recalls(trainer: FuseTrainer, rows: Rows) -> Tensor:
    """Share of each class's rows that is recognised, ``(C,)``."""
    logits_NC, labels_N = logits_and_labels(trainer.model, rows)
    right_N = (logits_NC.argmax(1) == labels_N).float()
    return torch.stack([right_N[labels_N == label].mean() for label in labels_N.unique()])


def balanced_accuracy(trainer: FuseTrainer, rows: Rows) -> float:
    return recalls(trainer, rows).mean().item()


def worst_class(trainer: FuseTrainer, rows: Rows) -> float:
    return recalls(trainer, rows).min().item()


def f1(trainer: FuseTrainer, rows: Rows) -> float:
    """Of the second of two classes."""
    logits_NC, labels_N = logits_and_labels(trainer.model, rows)
    said_N = logits_NC.argmax(1)
    hits = (said_N * labels_N).sum().item()
    return 2 * hits / max((said_N.sum() + labels_N.sum()).item(), 1)


def both_found(trainer: FuseTrainer, rows: Rows) -> float:
    """Of a row's labels, the share among as many highest scores (R-precision)."""
    logits_NC, labels_NC = logits_and_labels(trainer.model, rows)
    shares = [labels[logits.topk(int(labels.sum())).indices].mean() for logits, labels in zip(logits_NC, labels_NC)]
    return torch.stack(shares).mean().item()
