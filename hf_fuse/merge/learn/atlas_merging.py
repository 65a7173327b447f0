"""aTLAS: a coefficient per task vector and tensor, learned from labelled examples, or from unlabelled ones."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from hf_fuse.errors import RecipeError
from hf_fuse.merge.columns import columns
from hf_fuse.merge.contraction import Contraction
from hf_fuse.merge.family import Family
from hf_fuse.merge.learn._predictions import mean_cross_entropy, scores
from hf_fuse.merge.learn._self_training import SelfTraining
from hf_fuse.merge.learn_data import WRITERS
from hf_fuse.merge.learned_output import LearnedCoefficients
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2407.02880"
DATA = "either"
LEAST_STEPS = 10  # of an epoch: few examples are seen several times
KEPT = 0.95  # share of the base's accuracy on the control data that unlearning may not fall below
# Of the paper, by what is learned from: (learning rate, epochs).
DEFAULTS_FOR = {"tasks": (1e-3, 20), "target": (1e-1, 10), "negate": (5e-3, 10)}


def atlas_merging(
    family: Family,
    *,
    goal: Literal["add", "negate", "unlabelled"] = "add",
    granularity: Literal["task", "block", "tensor"] = "tensor",
    chunks: Annotated[int, Between(1)] = 1,
    tensors: Literal["all", "matrices"] = "all",
    budget: Annotated[int | None, Between(1)] = None,
    epochs: Annotated[int | None, Between(1)] = None,
    learning_rate: Annotated[float | None, Between(0, open_low=True)] = None,
    weight_decay: Annotated[float, Between(0)] = 0.1,
    penalty: Literal["none", "l1", "l2"] = "none",
) -> LearnedCoefficients:
    """Starts from the base (all coefficients 0) and minimises the cross-entropy of the merged model with AdamW.

    Of the epochs that one counts whose accuracy on the examples is best, the base included. ``negate`` minimises
    ``-CE(data) + CE(control)``, and the epoch counts whose accuracy on ``data`` is lowest among those with at least 95%
    of the base's on ``control``. The models' task vectors need not be those of the examples: with ``data`` of a new
    target they are a pool to put it together from, in a few dozen numbers.

    Args:
        family: base and models; examples of each model (their losses are added), or of a target.
        goal: ``unlabelled`` believes the surest predictions of each class and agreement of two views of an example;
            needs a classifier.
        granularity: a coefficient per model, per layer (``block``) or per tensor.
        chunks: a coefficient for each of so many random parts of every tensor (the paper's xK), with ``tensor``.
        tensors: ``matrices`` leaves vectors (norms, biases) as the base has them, which costs little.
        budget: most task vectors to use for one tensor: those with the largest gradient at the base.
        epochs: over the examples; none: 20 for the models' own, 10 for a target.
        learning_rate: none: 1e-3 for the models' own examples, 5e-3 to unlearn, 0.1 and falling for a target.
        weight_decay: pulls coefficients to 0, that is, the merged model to the base.
        penalty: 0.5 times the mean over tensors of the norm of a tensor's coefficients over the models.
    """
    if chunks > 1 and granularity != "tensor":
        raise RecipeError(f"parameters: chunks is {chunks}, but parts of tensors need granularity: tensor.")
    _check_data(family, goal)
    learned = [unit.name for unit in family.units if tensors == "all" or len(unit.matrix) > 1]
    wanted: Any = "chunk" if chunks > 1 else granularity
    layout, count = columns(family.units, wanted, chunks=chunks, learned=learned)
    kind = "negate" if goal == "negate" else "target" if family.tasks[0].model is None else "tasks"
    rate, rounds = DEFAULTS_FOR[kind]
    rate, rounds = learning_rate or rate, epochs or rounds
    coefficients_KG = torch.zeros(len(family.models), count)
    optimizer = torch.optim.AdamW([coefficients_KG], lr=rate, weight_decay=weight_decay)
    steps = max(LEAST_STEPS, max(-(-len(task.data.train) // family.recipe.batch_size) for task in family.tasks))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * rounds) if kind == "target" else None
    with family.contraction(layout, count, cut="scattered", seed=family.recipe.seed) as contraction:
        contraction.write(coefficients_KG)
        lessons: Any = (SelfTraining if goal == "unlabelled" else _Labels)(family, goal, steps * rounds)
        history, best_KG, best = [_row(family, 0)], coefficients_KG.clone(), 0
        chosen_KG = _chosen(contraction, lessons, steps, budget) if budget else torch.ones_like(coefficients_KG)
        with tqdm(total=steps * rounds, desc=family.recipe.estimator, unit="step", disable=None) as bar:
            for epoch in range(1, rounds + 1):
                lessons.begin_epoch()
                for _ in range(steps):
                    lessons.backward()
                    gradient_KG = contraction.taken_gradient() + _penalty_gradient(coefficients_KG, penalty)
                    coefficients_KG.grad = gradient_KG * chosen_KG
                    torch.nn.utils.clip_grad_norm_([coefficients_KG], 1.0)
                    optimizer.step()
                    if schedule:
                        schedule.step()
                    contraction.write(coefficients_KG)
                    bar.update()
                history.append(_row(family, epoch))
                if _is_better(history[epoch], history[best], history[0], goal):
                    best_KG, best = coefficients_KG.clone(), epoch
    facts = {"epochs": rounds, "epoch that counts": best, "learned numbers": int(chosen_KG.count_nonzero())}
    facts |= {f"accuracy on {name}": value for name, value in history[best]["accuracy"].items()}
    return LearnedCoefficients(best_KG, layout, "scattered", facts, history)


def _check_data(family: Family, goal: str) -> None:
    if goal != "unlabelled" and (without := [task.name for task in family.tasks if not task.labelled]):
        raise RecipeError(f"data: the examples of {without[0]} have no column label, which goal: {goal} learns from.")
    if goal == "negate" and (family.control is None or len(family.tasks) > 1):
        raise RecipeError("parameters: goal: negate needs one data, what to forget, and control, what to keep.")
    if goal != "negate" and family.control is not None:
        raise RecipeError(f"control has no meaning for goal: {goal}. Remove it.")
    if goal == "unlabelled" and (family.kind in WRITERS or len(family.tasks) > 1):
        raise RecipeError("parameters: goal: unlabelled needs one data, and classifiers.")


class _Labels:
    """Cross-entropy with the labels of the data, of several tasks one after the other."""

    def __init__(self, family: Family, goal: str, _: int):
        self.family = family
        signs = [(task, -1.0 if goal == "negate" else 1.0) for task in family.tasks]
        signs += [(family.control, 1.0)] if family.control else []
        size, seed = family.recipe.batch_size, family.recipe.seed
        self.sources = [
            (task, sign, task.drawn(size, family.device, seed + number)) for number, (task, sign) in enumerate(signs)
        ]

    def begin_epoch(self) -> None:
        pass

    def backward(self) -> None:
        """One batch of each task."""
        for task, sign, source in self.sources:
            self.family.put_head(task.model)
            (sign * mean_cross_entropy(self.family.model, next(source))).backward()


def _chosen(contraction: Contraction, lessons: Any, steps: int, budget: int) -> Tensor:
    """1 for the ``budget`` models with the largest gradient of each column, as it is at the base; else 0."""
    lessons.begin_epoch()
    for _ in range(steps):
        lessons.backward()
    size_KG = contraction.taken_gradient().abs()
    rank_KG = size_KG.argsort(0, descending=True).argsort(0)
    return (rank_KG < budget).float()


def _penalty_gradient(coefficients_KG: Tensor, penalty: str) -> Tensor:
    """Gradient of ``0.5 mean_j ||c_.j||_p``; 0 where the norm has none."""
    if penalty == "none":
        return torch.zeros_like(coefficients_KG)
    if penalty == "l1":
        slope_KG = coefficients_KG.sign()
    else:
        slope_KG = coefficients_KG / coefficients_KG.norm(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
    return 0.5 / coefficients_KG.shape[1] * slope_KG


def _row(family: Family, epoch: int) -> dict[str, Any]:
    """How the merged model does on all of the examples."""
    found: dict[str, Any] = {"epoch": epoch, "accuracy": {}, "loss": {}}
    for task in [*family.tasks, *([family.control] if family.control else [])]:
        family.put_head(task.model)
        made = scores(family.model, task.batches(family.recipe.batch_size, family.device))
        found["accuracy"][task.name], found["loss"][task.name] = made
    return found


def _is_better(row: dict[str, Any], best: dict[str, Any], first: dict[str, Any], goal: str) -> bool:
    """Whether an epoch is to count instead of the best one so far."""
    if goal == "unlabelled":
        return True  # there are no labels to tell by
    if goal == "negate":
        forgotten = next(iter(row["accuracy"]))
        kept = row["accuracy"]["control"] >= KEPT * first["accuracy"]["control"]
        ours, theirs = (-one["accuracy"][forgotten] for one in (row, best))
        return kept and (ours, row["loss"][forgotten]) > (theirs, best["loss"][forgotten])
    ours, theirs = ((sum(one["accuracy"].values()), -sum(one["loss"].values())) for one in (row, best))
    return ours > theirs
