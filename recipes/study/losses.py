"""Losses of hf_fuse/losses on the two classifiers: what is tried, on which data, and which figure judges it.

A loss joins the study by a line in the table of its question.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from study import small_data
from study.small_data import Rows, Source, few, in_pairs, long_tailed, one_against_rest, with_wrong_labels
from study.trials import (
    Effort,
    Found,
    Question,
    Settings,
    Task,
    accuracy,
    balanced_accuracy,
    both_found,
    compared,
    f1,
    trained,
    worst_class,
)
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import default_data_collator

from hf_fuse import FuseTrainer
from hf_fuse.input_points import moved
from hf_fuse.model_features import classifier_inputs, sample_features

CE = "cross-entropy"
# As many tries as the others have.
PLAIN = {CE: {"plain": {}, "another start": {"start": 1}}}
WRONG = 0.3
ONE = {"digits": 6, "text": 30}  # rows of each class, where labels are few
TAIL = {"digits": [40, 30, 22, 16, 12, 9, 6, 4, 3, 2], "text": [60, 40, 25, 16, 10, 6]}
RADIUS = 1.0  # of moves of an image, whose 64 numbers lie between -1 and 1


def beside(name: str, *weights: float, task: float = 1.0, **options: Any) -> Settings:
    """The loss beside the task's, with some weights."""
    return {f"weight {w:g}": {"objectives": {"task": task, name: {"weight": w, **options}}} for w in weights}


def instead(name: str, option: str, *values: Any, **options: Any) -> Settings:
    """The loss instead of the task's, with some values of an option."""
    return {f"{option} {v:g}": {"objectives": {"task": 0, name: {option: v, **options}}} for v in values}


def curriculum(name: str, *shapes: str) -> Settings:
    fall, rise = {"start": 1, "end": 0}, {"start": 0, "end": 1}
    return {
        shape: {"objectives": {name: {"weight": {**fall, "shape": shape}}, "task": {**rise, "shape": shape}}}
        for shape in shapes
    }


def mixed(settings: Settings, alpha: float = 0.5) -> Settings:
    return {label: {**setting, "mixup_alpha": alpha} for label, setting in settings.items()}


def balanced_rows(rows: Rows, size: int, seed: int) -> Rows:
    from datasets import Dataset

    from hf_fuse.data.class_balanced import class_balanced

    numbers = Dataset.from_dict({"label": [row["labels"] for row in rows], "number": range(len(rows))})
    return [rows[number] for number in class_balanced(numbers, size=max(size, len(rows)), seed=seed)["number"]]


FEW: dict[str, Settings] = {
    "logit_z": beside("logit_z", 1e-2, 1e-1),
    "spherical_z": instead("spherical_z", "a", 1.0, 4.0),
    "mixup": mixed(instead("decoupled_mixup", "eta", 0.0)),
    "decoupled_mixup": mixed(instead("decoupled_mixup", "eta", 0.1, 1.0)),
    "adamixup": beside("adamixup", 0.3),
    "dkl": beside("dkl", 1, 4),
    "info_nce": beside("info_nce", 0.03, 0.3),
    "isogclr": beside("isogclr", 0.03),
    "amcl": beside("amcl", 0.03),
    "barlow_twins": beside("barlow_twins", 0.01),
    "mixed_barlow": beside("mixed_barlow", 0.01),
    "sup_con": beside("sup_con", 0.1, 1.0),
    "sup_con, curriculum": curriculum("sup_con", "linear", "quadratic"),
    "metrix": beside("metrix", 0.3),
    "proto_triplet": beside("proto_triplet", 0.1),
    "look": beside("look", 0.1),
    "bias_loss": beside("bias_loss", 1.0, task=0.0),
}
NOISY: dict[str, Settings] = {
    "comp_sum (GCE)": instead("comp_sum", "tau", 1.4, 1.7),
    "comp_sum (sum-exp)": instead("comp_sum", "tau", 0.5),
    "dkl": beside("dkl", 1),
    "decoupled_mixup": mixed(instead("decoupled_mixup", "eta", 0.1)),
}
LONG_TAILED: dict[str, Settings] = {
    "class_balanced": instead("class_balanced", "beta", 0.9, 0.999),
    "class_balanced, deferred": instead("class_balanced", "beta", 0.999, defer_until=0.7),
    "ldam": instead("ldam", "max_margin", 0.5, 2.0),
    "ldam + class_balanced": {
        "deferred": {"objectives": {"task": 0, "ldam": {"max_margin": 2.0}, "class_balanced": {"defer_until": 0.7}}}
    },
    "any_loss (balanced accuracy)": beside("any_loss", 1.0, 4.0, metric="balanced_accuracy"),
    "sup_con, curriculum": curriculum("sup_con", "linear"),
    "class-balanced sampling": {"plain": {"rows": balanced_rows, "train_sampling_strategy": "sequential"}},
}
RARE: dict[str, Settings] = {
    "any_loss (F1)": beside("any_loss", 1.0, 4.0),
    "any_loss (F1) alone": beside("any_loss", 1.0, task=0.0),
    "ens_loss": instead("ens_loss", "period", 0, 10),
    "class_balanced": instead("class_balanced", "beta", 0.999),
}
MANY_LABELS: dict[str, Settings] = {
    "decoupled_softmax": instead("decoupled_softmax", "temperature", 0.5, 1.0),
    "soft_top_k": instead("soft_top_k", "alpha", 1.0, 2.0, k=2),
    "any_loss (F1)": beside("any_loss", 1.0),
}
STEADY: dict[str, Settings] = {
    "smooth_adversarial": instead("smooth_adversarial", "nu", 0.3, 1.0, radius=RADIUS, steps=2),
    "decoupled_mixup": NOISY["decoupled_mixup"],
}
FIRST_FEATURES: dict[str, Settings] = {"nested_dropout": instead("nested_dropout", "sigma", 10, 30)}
COMPATIBLE: dict[str, Settings] = {
    "bct": beside("bct", 0.3, 1.0),
    "oca": beside("oca", 0.03, 0.1),
    "hoc": beside("hoc", 0.3, 3.0),
    "bt2": beside("bt2", 0.1),
}
FORGETTING: dict[str, Settings] = {"replay": beside("replay", 0.3, 1.0)}
RETRIEVAL: dict[str, Settings] = {
    "info_nce": instead("info_nce", "temperature", 0.05, 0.2),
    "mann_whitney": instead("mann_whitney", "temperature", 0.05, 0.2),
    "isogclr": instead("isogclr", "rho", 0.1, 0.3),
    "amcl": instead("amcl", "preferred", 0.1, 0.2),
}


QUESTIONS: dict[str, Question] = {}
for data in ("digits", "text"):
    QUESTIONS |= {
        f"{data}, few labels": Question("accuracy", CE),
        f"{data}, wrong labels": Question("accuracy", CE),
        f"{data}, long tail": Question("balanced accuracy", CE),
        f"{data}, long tail, worst class": Question("recall of the worst class", CE),
        f"{data}, rare class": Question("F1", CE),
        f"{data}, next task": Question("mean accuracy of the old and the new task", CE),
        f"{data}, next task, what it knew": Question("accuracy of the old task", CE),
    }
QUESTIONS |= {
    "digits, two labels each": Question("share of labels among the two highest scores", CE),
    "digits, small moves": Question("accuracy under small moves of the inputs, up the loss", CE),
    "digits, first 8 features": Question("accuracy of the classifier on the first 8 features", CE),
    "digits, old gallery": Question("accuracy of the nearest old class mean", CE),
    "digits, old gallery, classifier": Question("accuracy of the new model by itself", CE),
}
QUESTIONS["text, retrieval"] = Question("area over pairs of all queries", "info_nce")
QUESTIONS["text, retrieval, first hit"] = Question("share of queries whose own passage is nearest", "info_nce")


def digit_losses(seed: int, effort: Effort) -> Found:
    """Question -> method -> row."""
    source = small_data.digits(seed, effort.base_steps)
    return _answers(on_both(source, seed, effort) | on_images(source, seed, effort), source, seed, effort)


def text_losses(seed: int, effort: Effort) -> Found:
    source = small_data.text(seed)
    asked = on_both(source, seed, effort) | {"retrieval": (retrieval(source), RETRIEVAL)}
    return _answers(asked, source, seed, effort)


def _answers(asked: Asked, source: Source, seed: int, effort: Effort) -> Found:
    found: Found = {}
    for question, (task, methods) in asked.items():
        found |= compared(task, methods, seed, effort)
        print(f"seed {seed}, {source.name}: {question} done", file=sys.stderr, flush=True)
    return found


Asked = dict[str, tuple[Task, dict[str, Settings]]]


def task_of(
    source: Source, rows: Rows, *, prepare: Callable[[Rows], Rows] = list, model: Any = None, **figures: Any
) -> Task:
    """``prepare`` changes the rows of all parts; ``figures``: last words of a question -> figure."""
    return Task(
        model or source.model, prepare(rows), prepare(source.parts["validation"]), prepare(source.parts["test"]),
        {f"{source.name}, {question}": figure for question, figure in figures.items()}, rate=source.rate,
    )  # fmt: skip


def on_both(source: Source, seed: int, effort: Effort) -> Asked:
    """What to learn from images and from text, and what is tried."""
    train, one, classes = source.parts["train"], ONE[source.name], source.classes
    rows = few(train, one)
    wrong = with_wrong_labels(few(train, 2 * one), WRONG, classes, seed)
    tail = long_tailed(train, TAIL[source.name])
    in_two = partial(source.model, classes=2)
    known = trained(task_of(source, rows), {}, seed, effort).model
    return {
        "few labels": (task_of(source, rows, **{"few labels": accuracy}), PLAIN | FEW),
        "wrong labels": (task_of(source, wrong, **{"wrong labels": accuracy}), PLAIN | NOISY),
        "long tail": (
            task_of(source, tail, **{"long tail": balanced_accuracy, "long tail, worst class": worst_class}),
            PLAIN | LONG_TAILED,
        ),
        "rare class": (
            task_of(source, rows, prepare=one_against_rest, model=in_two, **{"rare class": f1}), PLAIN | RARE,
        ),
        "next task": (next_task(source, known, rows), PLAIN | FORGETTING),
    }  # fmt: skip


def on_images(source: Source, seed: int, effort: Effort) -> Asked:
    """The same for questions that are put to images only."""
    train, one = source.parts["train"], ONE[source.name]
    rows = few(train, one)
    pairs = partial(in_pairs, classes=source.classes, count=300, seed=seed)
    several = partial(source.model, problem="multi_label_classification")
    old = trained(task_of(source, few(train, one // 2)), {}, seed, effort).model
    gallery = class_means(old, rows)
    compatible = task_of(
        source, train, model=partial(source.model, untrained=True),
        **{"old gallery": partial(nearest_mean, gallery), "old gallery, classifier": accuracy},
    )  # fmt: skip
    return {
        "two labels each": (
            task_of(source, train, prepare=pairs, model=several, **{"two labels each": both_found}),
            PLAIN | MANY_LABELS,
        ),
        "small moves": (task_of(source, rows, **{"small moves": steady_accuracy}), PLAIN | STEADY),
        "first 8 features": (task_of(source, rows, **{"first 8 features": first_features}), PLAIN | FIRST_FEATURES),
        "old gallery": (replace(compatible, arguments={"old_model": old}), PLAIN | COMPATIBLE),
    }


def next_task(source: Source, known: Any, replayed: Rows) -> Task:
    """A model of ``known``'s weights learns rows of the other kind; validation and test are (new, old)."""

    def model(start: int) -> Any:
        made = source.model()
        made.load_state_dict(known.state_dict())
        return made

    new, old = source.other, source.parts
    return Task(
        model, few(new["train"], 20), (new["validation"], old["validation"]), (new["test"], old["test"]),
        {
            f"{source.name}, next task": lambda trainer, both: sum(accuracy(trainer, rows) for rows in both) / 2,
            f"{source.name}, next task, what it knew": lambda trainer, both: accuracy(trainer, both[1]),
        },
        {"replay_dataset": replayed}, source.rate,
    )  # fmt: skip


def retrieval(source: Source) -> Task:
    """The two halves of a passage are to find each other, by an encoder from scratch."""

    def rows(part: str) -> Rows:
        half = small_data.TOKENS // 2
        names = ("input_ids", "attention_mask")
        return [
            {n: row[n][:half] for n in names} | {f"second_{n}": row[n][half:] for n in names}
            for row in source.parts[part]
            if row["attention_mask"].all()
        ]

    figures = {"text, retrieval": pair_area, "text, retrieval, first hit": first_hit}
    return Task(lambda start: source.model().bert, rows("train"), rows("validation"), rows("test"), figures, rate=3e-3)


# -- figures ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def features_and_labels(model: Any, rows: Rows) -> tuple[Tensor, Tensor]:
    batch = default_data_collator(rows)
    labels_N = batch.pop("labels")
    with classifier_inputs(model) as seen:
        outputs = model(**batch, output_hidden_states=True)
    return sample_features(model, batch, outputs, seen), labels_N


def class_means(model: Any, rows: Rows) -> Tensor:
    """Of unit features ``(C, D)``: an old model's gallery."""
    features_ND, labels_N = features_and_labels(model, rows)
    unit_ND = normalize(features_ND, dim=-1)
    return torch.stack([unit_ND[labels_N == label].mean(0) for label in labels_N.unique()])


def nearest_mean(gallery_CD: Tensor, trainer: FuseTrainer, rows: Rows) -> float:
    """Accuracy of the nearest mean of old features, by cosine; of bt2's features those in the old space."""
    features_ND, labels_N = features_and_labels(trainer.model, rows)
    layers = next((objective.loss for objective in trainer.objectives if objective.name == "bt2"), None)
    if layers is not None:
        with torch.no_grad():
            features_ND = layers.embed(features_ND)[:, : gallery_CD.shape[1]]
    scores_NC = normalize(features_ND, dim=-1) @ normalize(gallery_CD, dim=-1).T
    return (scores_NC.argmax(1) == labels_N).float().mean().item()


def first_features(trainer: FuseTrainer, rows: Rows, width: int = 8) -> float:
    from hf_fuse.losses.nested_dropout import accuracy_by_width

    features_ND, labels_N = features_and_labels(trainer.model, rows)
    head = trainer.model.classifier
    return accuracy_by_width(features_ND, labels_N, head.weight, head.bias)[width - 1].item()


def steady_accuracy(trainer: FuseTrainer, rows: Rows, steps: int = 5) -> float:
    """Accuracy where each sample's points (pixels, word embeddings) were moved up the loss, within ``RADIUS``."""
    batch = default_data_collator(rows)
    labels_N, move_N = batch.pop("labels"), torch.tensor(0.0)
    for _ in range(steps):
        points: list[Tensor] = []

        def step(x: Tensor, move_N: Tensor = move_N, points: list[Tensor] = points) -> Tensor:
            points.append((x.detach() + move_N).requires_grad_())
            return points[0]

        with moved(trainer.model, batch, step) as inputs:
            loss = cross_entropy(trainer.model(**inputs).logits, labels_N, reduction="sum")
        (slope,) = torch.autograd.grad(loss, points[0])
        move_N = move_N + RADIUS / 2 * slope / _lengths(slope).clamp(min=1e-12)
        move_N = move_N * (RADIUS / _lengths(move_N).clamp(min=1e-12)).clamp(max=1)
    with torch.no_grad(), moved(trainer.model, batch, lambda x: x + move_N) as inputs:
        return (trainer.model(**inputs).logits.argmax(1) == labels_N).float().mean().item()


def _lengths(moves_N: Tensor) -> Tensor:
    return torch.linalg.vector_norm(moves_N.flatten(1), dim=1).view(-1, *[1] * (moves_N.dim() - 1))


@torch.no_grad()
def _pair_scores(trainer: FuseTrainer, rows: Rows) -> Tensor:
    """Cosines ``(N, N)`` of all first halves with all second halves."""
    batch, model = default_data_collator(rows), trainer.model
    sides = []
    for prefix in ("", "second_"):
        inputs = {name: batch[prefix + name] for name in ("input_ids", "attention_mask")}
        outputs = model(**inputs, output_hidden_states=True)
        sides.append(normalize(sample_features(model, inputs, outputs, None), dim=-1))
    return sides[0] @ sides[1].T


def pair_area(trainer: FuseTrainer, rows: Rows) -> float:
    """The chance that a passage's own halves score above two halves of different passages, whichever these are."""
    scores_NN = _pair_scores(trainer, rows)
    others = scores_NN[~torch.eye(len(scores_NN), dtype=torch.bool)].sort().values
    return (torch.searchsorted(others, scores_NN.diagonal()).double().mean() / len(others)).item()


def first_hit(trainer: FuseTrainer, rows: Rows) -> float:
    scores_NN = _pair_scores(trainer, rows)
    return (scores_NN.argmax(1) == torch.arange(len(scores_NN))).float().mean().item()
