"""The half on digits: a small vision transformer learns from labels, from a larger one, or from itself."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from study.distilling import Effort, Half, Method, Row, trainer_settings
from study.suites import fit, new_vit
from torch import Tensor
from transformers import PrinterCallback

from hf_fuse import DistillConfig, DistillTrainer, FuseConfig, FuseTrainer

TEACHER, LABELS = "the teacher", "labels alone"
CLEAN, NOISY = "right labels", "wrong labels"
WRONG = 0.3  # of the labels
RATE_AND_BATCH = {"learning_rate": 1e-2, "per_device_train_batch_size": 64}

Part = tuple[Tensor, Tensor]


def _objectives(task: float, name: str, **settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {label: {"objectives": {"task": task, name: options}} for label, options in settings.items()}


def methods() -> dict[str, Method]:
    """Name -> what is tried, around the values of the papers."""
    teacher, itself = partial(Method, "the teacher"), partial(Method, "itself")
    return {
        LABELS: Method("the labels", {"plain": {}, "smoothed 0.1": {"label_smoothing_factor": 0.1}}),
        "KD": teacher(
            {
                f"T {degree:g}": {"objectives": {"task": 0.1, "forward_kl": {"weight": 0.9, "temperature": degree}}}
                for degree in (2.0, 4.0)
            }
        ),
        "DHKD": teacher(_objectives(1.0, "dual_head", **{"weight 0.1": {"weight": 0.1}, "weight 1": {"weight": 1.0}})),
        "DHKD, one head": teacher(
            _objectives(1.0, "dhkd", **{"weight 0.1": {"weight": 0.1}, "weight 1": {"weight": 1.0}})
        ),
        "PLD": teacher(_objectives(0.0, "pld", **{"T 1": {"temperature": 1.0}, "T 4": {"temperature": 4.0}})),
        "TGeo-KD": teacher(_objectives(0.0, "tgeo", **{"T 1.5": {"temperature": 1.5}, "T 4": {"temperature": 4.0}})),
        "mutual learning": itself(_objectives(1.0, "mutual", **{"one peer": {"peers": 1}, "two peers": {"peers": 2}})),
        "MESA": itself(
            _objectives(1.0, "mesa", **{f"decay {d}": {"weight": 0.8, "decay": d} for d in (0.9, 0.99)})
        ),
        "SAF": itself(_objectives(1.0, "saf", **{"weight 0.3": {"weight": 0.3}, "weight 1": {"weight": 1.0}})),
        "SLA": itself(_objectives(1.0, "sla", **{"T 1": {"temperature": 1.0}, "T 3": {"temperature": 3.0}})),
        "LSSKD": itself(_objectives(1.0, "lsskd", **{"weight 0.3": {"weight": 0.3}, "weight 1": {"weight": 1.0}})),
    }  # fmt: skip


def prepare(seed: int, effort: Effort) -> tuple[dict[str, Row], Callable[[str, str], Row]]:
    """Trains the teacher."""
    parts = digit_parts(seed)
    teacher = new_vit(seed)
    fit(teacher, *parts["teacher"], effort.teacher_steps, 2e-3, seed)
    reached = {part: dict.fromkeys((CLEAN, NOISY), accuracy(teacher, *parts[part])) for part in ("validation", "test")}
    return {TEACHER: Row(**reached)}, partial(student, parts, teacher, seed, effort)


def student(parts: dict[str, Part], teacher: Any, seed: int, effort: Effort, method: str, setting: str) -> Row:
    """The row of one setting: a student of the right labels, and one of the wrong."""
    tried = methods()[method]
    asked = teacher if tried.family == "the teacher" else None
    images, labels = parts["train"]
    started = time.process_time()
    models = {
        name: trained((images, given), asked, seed, effort.steps, tried.settings[setting])
        for name, given in {CLEAN: labels, NOISY: with_wrong(labels, seed)}.items()
    }
    seconds = (time.process_time() - started) / (len(models) * effort.steps)
    validation, test = (
        {name: accuracy(model, *parts[part]) for name, model in models.items()} for part in ("validation", "test")
    )
    return Row(validation, test, setting, seconds)


def digit_parts(seed: int) -> dict[str, Part]:
    """Images and labels for the teacher, the student, the choice of settings, and the table: 700, 300, 300 and 497."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(seed))
    images = (torch.tensor(data.images, dtype=torch.float32)[order, None] - 8) / 8
    labels = torch.tensor(data.target)[order]
    names = ("teacher", "train", "validation", "test")
    return dict(zip(names, zip(*(values.split([700, 300, 300, 497]) for values in (images, labels)))))


def with_wrong(labels: Tensor, seed: int) -> Tensor:
    """The labels, of which a share of ``WRONG`` is another class."""
    random = torch.Generator().manual_seed(seed)
    other = (labels + torch.randint(1, 10, labels.shape, generator=random)) % 10
    return torch.where(torch.rand(labels.shape, generator=random) < WRONG, other, labels)


def new_student(seed: int) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
        num_channels=1, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(config)


def trained(data: Part, teacher: Any, seed: int, steps: int, setting: dict[str, Any]) -> Any:
    """A student after its training; with no teacher, of what needs none."""
    rows = [{"pixel_values": image, "labels": int(label)} for image, label in zip(*data)]
    with tempfile.TemporaryDirectory() as folder:
        settings = trainer_settings(folder, steps, seed) | RATE_AND_BATCH | setting
        if "objectives" in setting:
            trainer = DistillTrainer(new_student(seed), DistillConfig(**settings), teacher=teacher, train_dataset=rows)
        else:
            trainer = FuseTrainer(new_student(seed), FuseConfig(**settings), train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return trainer.model


@torch.no_grad()
def accuracy(model: Any, images: Tensor, labels: Tensor) -> float:
    return (model.eval()(images).logits.argmax(1) == labels).float().mean().item()


HALF = Half(LABELS, "accuracy", False, methods(), "", (("DHKD", "DHKD, one head"),), prepare)
