"""AdaMerging: the coefficients with which the merged model is surest of its predictions on unlabelled examples."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from hf_fuse.merge.columns import columns
from hf_fuse.merge.contraction import Contraction
from hf_fuse.merge.family import Family, Task
from hf_fuse.merge.learn._predictions import entropy, predictions
from hf_fuse.merge.learned_output import LearnedCoefficients
from hf_fuse.merge.methods.ties_task_arithmetic import vectors
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2310.02575"
CHECKED = 256  # examples of each task that the check looks at


def merging(*, ties: bool, density: float, **_: Any) -> tuple[str, dict[str, Any]]:
    """The method that the coefficients are weights of, and its parameters."""
    return ("ties_task_arithmetic", {"density": density}) if ties else ("task_arithmetic", {})


def ada_merging(
    family: Family,
    *,
    granularity: Literal["task", "block", "tensor"] = "tensor",
    blocks: str | None = None,
    ties: bool = False,
    density: Annotated[float, Between(0, 1)] = 0.2,
    init: float = 0.3,
    steps: Annotated[int, Between(1)] = 500,
    learning_rate: Annotated[float, Between(0, open_low=True)] = 1e-3,
    clamp: bool = True,
    check_every: Annotated[int, Between(1)] = 25,
    collapse: Annotated[float, Between(0, 1)] = 0.1,
) -> LearnedCoefficients:
    """Minimises ``sum_k mean_x H(softmax(head_k(f_c(x))))`` over examples x of task k, with Adam.

    Low entropy is only what a model believes: from a good start it gains, from a bad one it talks itself into few
    classes. So every ``check_every`` steps the entropy of the *mean* prediction of each task is looked at. When it has
    fallen by more than ``collapse`` for some task, learning stops, and the coefficients of the last check before count.
    Start from the best weight of task arithmetic (hf-fuse sweep). With language models, where every next token is a
    prediction, this is an experiment: the paper has classifiers only.

    Args:
        family: base, models, and unlabelled examples of each; heads are the models' own.
        granularity: a coefficient per model (``task``), per layer (``block``), or per tensor, the paper's layer-wise.
        blocks: regular expression that says which tensors make a block; by default a layer.
        ties: AdaMerging++, whose task vectors are trimmed and freed of sign conflicts first.
        density: share of each task vector that is kept then.
        init: of all coefficients.
        steps: of the optimizer; 500 in the paper.
        learning_rate: of Adam; the batch is the recipe's batch_size for each task (16 in the paper).
        clamp: keep coefficients in [0, 1] by projection after each step.
        check_every: steps between two looks at the mean predictions.
        collapse: largest fall of the entropy of the mean prediction, relative to the start.
    """
    layout, count = columns(family.units, granularity, blocks=blocks)
    coefficients_KG = torch.full((len(family.models), count), init)
    with family.contraction(layout, count, change=_filter(family, ties)) as contraction:
        kept_KG, history, facts = surest(
            family, contraction, coefficients_KG, steps=steps, learning_rate=learning_rate, clamp=clamp,
            check_every=check_every, collapse=collapse,
        )  # fmt: skip
    return LearnedCoefficients(kept_KG, layout, facts=facts, history=history)


def surest(
    family: Family,
    contraction: Contraction,
    coefficients_KG: Tensor,
    *,
    steps: int,
    learning_rate: float,
    clamp: bool,
    check_every: int,
    collapse: float,
) -> tuple[Tensor, list[dict[str, Any]], dict[str, Any]]:
    """The coefficients that these become, history and facts; see :func:`ada_merging`."""
    optimizer = torch.optim.Adam([coefficients_KG], lr=learning_rate)
    size, seed = family.recipe.batch_size, family.recipe.seed
    sources = [task.drawn(size, family.device, seed + number) for number, task in enumerate(family.tasks)]
    kept_KG, history, stopped = coefficients_KG.clone(), [], False
    contraction.write(coefficients_KG)
    history.append(_looked_at(family, 0))
    for step in tqdm(range(1, steps + 1), desc=family.recipe.estimator, unit="step", disable=None):
        for task, source in zip(family.tasks, sources):
            family.put_head(task.model)
            logits_NC, _ = predictions(family.model, next(source), prompts=True)
            entropy(logits_NC).mean().backward()
        coefficients_KG.grad = contraction.taken_gradient()
        optimizer.step()
        if clamp:  # a clamp inside the model would have no gradient outside, and what got there would stay
            coefficients_KG.clamp_(0, 1)
        contraction.write(coefficients_KG)
        if step % check_every == 0 or step == steps:
            history.append(_looked_at(family, step))
            if stopped := _has_collapsed(history, collapse):
                break
            kept_KG = coefficients_KG.clone()
    used = [row["step"] for row in history][-2 if stopped else -1]
    facts = {
        "steps": used, "stopped by collapse": stopped, "entropy before": _mean(history[0], "entropy"),
        "entropy after": _mean(next(row for row in history if row["step"] == used), "entropy"),
    }  # fmt: skip
    return kept_KG, history, facts


def _filter(family: Family, ties: bool) -> Any:
    if not ties:
        return None
    state = family.merger.states[""]
    return lambda unit, start, deltas_KN: torch.stack(vectors(deltas_KN, state=state))


@torch.no_grad()
def _looked_at(family: Family, step: int) -> dict[str, Any]:
    """Of each task the mean entropy of the predictions, and the entropy of the mean prediction."""
    found = {"step": step, "entropy": {}, "entropy of the mean": {}}
    for task in family.tasks:
        family.put_head(task.model)
        single, mean = _entropies(family, task)
        found["entropy"][task.name], found["entropy of the mean"][task.name] = single, mean
    return found


def _entropies(family: Family, task: Task) -> tuple[float, float]:
    total_C: Tensor | float = 0.0
    single, count = 0.0, 0
    for batch in task.batches(family.recipe.batch_size, family.device, most=CHECKED):
        logits_NC, _ = predictions(family.model, batch, prompts=True)
        single += entropy(logits_NC).sum().item()
        total_C = total_C + logits_NC.softmax(-1).sum(0)
        count += len(logits_NC)
    return single / count, entropy((total_C / count).log()).item()


def _has_collapsed(history: list[dict[str, Any]], allowed: float) -> bool:
    first, last = history[0]["entropy of the mean"], history[-1]["entropy of the mean"]
    return any(last[name] < (1 - allowed) * first[name] for name in first)


def _mean(row: dict[str, Any], what: str) -> float:
    return sum(row[what].values()) / len(row[what])
