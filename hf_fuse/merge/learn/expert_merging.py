"""Expert Merging: coefficients with which the merged model does on each model's prompts as that model does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from tqdm import tqdm

from hf_fuse.checkpoint.reader import FilePool
from hf_fuse.errors import RecipeError
from hf_fuse.merge.columns import Columns, columns
from hf_fuse.merge.contraction import Contraction
from hf_fuse.merge.family import Family, Task
from hf_fuse.merge.learn._predictions import IGNORED
from hf_fuse.merge.learned_output import LearnedCoefficients
from hf_fuse.merge.parameters import layer_of
from hf_fuse.merge.sources import BLOCK, Buffers
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2509.25712"
TOKENS = 64  # likeliest tokens of a model's prediction that are remembered; all others are one bucket
RESTART = 50  # updates after which the learning rate is high again


@dataclass
class Lesson:
    """One batch, and what the model that it was made for does on it.

    Attributes:
        hidden: chosen hidden states where there is no padding, ``[n, d]`` each.
        ids_NK, log_probs_NK: the likeliest tokens or classes of every prediction.
    """

    task: Task
    batch: dict[str, Tensor]
    hidden: list[Tensor]
    ids_NK: Tensor
    log_probs_NK: Tensor
    examples: int


def expert_merging(
    family: Family,
    *,
    init: float = 0.3,
    parametrization: Literal["sigmoid", "identity"] = "sigmoid",
    tensors: Literal["layers", "all"] = "layers",
    hidden_states: Annotated[int, Between(0)] = 4,
    temperature: Annotated[float, Between(0, open_low=True)] = 1.0,
    regularization: Annotated[float, Between(0)] = 0.1,
    epochs: Annotated[int, Between(1)] = 5,
    update_size: Annotated[int, Between(1)] = 8,
    learning_rate: Annotated[float, Between(0, open_low=True)] = 0.5,
    weight_decay: Annotated[float, Between(0)] = 1e-5,
    chunk_budget: Annotated[float | None, Between(0, open_low=True)] = None,
    kappa: Annotated[float, Between(0)] = 0.5,
) -> LearnedCoefficients:
    """Minimises, over the prompts of model k, ``mean_l MSE(h_l, h_l of k) + T^2 KL(k || merged)``, no labels needed.

    Five to ten prompts of each model are enough (``examples: 8`` in the recipe). One coefficient per model and
    matrix of a layer; embeddings, heads, norms and biases stay the base's unless ``tensors`` says otherwise. Each
    model is looked at before learning begins, one at a time, in the place of the merged one. With ``chunk_budget``
    (Expert Merging++) a second round splits important tensors into chunks with a coefficient each: importance ``I_l
    = sum_k |c_kl| mean|tau_kl| n_l``, shares ``floor(B L I_l^kappa / sum I^kappa)`` of L tensors. Tensors whose
    share is 0 keep the value of the first round.

    Args:
        family: base, models, and prompts of each.
        init: of all coefficients, the best weight of task arithmetic (0.1 in the authors' code, for ten models).
        parametrization: ``sigmoid`` keeps coefficients between 0 and 1.
        tensors: ``layers`` is the paper's choice for large models; small ones may gain from ``all``, which includes
            vectors, embeddings and merged heads.
        hidden_states: how many of them to compare, evenly spread over the layers, the last included.
        temperature: of both distributions.
        regularization: times the mean distance of a model's coefficients from their mean. The authors' code has 5,
            for the losses of large models; on small ones that is all that counts.
        epochs: over the prompts; 1 in the authors' code.
        update_size: examples of one update.
        learning_rate: of AdamW, of the coefficients before the sigmoid; falls, and starts again after 50 updates.
        weight_decay: of AdamW, on the same.
        chunk_budget: B, chunks per tensor on the average (0.9 to 1.2 in the paper, unverified).
        kappa: evens importance out below 1 (unverified).
    """
    if parametrization == "sigmoid" and not 0 < init < 1:
        raise RecipeError(
            f"parameters: init is {init}, but a sigmoid is between 0 and 1. Say parametrization: identity."
        )
    matrices = {unit.name for unit in family.units if len(unit.matrix) > 1 and layer_of(unit.name)}
    learned = matrices if tensors == "layers" else {unit.name for unit in family.units}
    if not learned:
        raise RecipeError("models: no matrix is inside a layer. Say parameters: {tensors: all}.")
    fit = _Fit(family, parametrization == "sigmoid", temperature, regularization, epochs, update_size, learning_rate,
               weight_decay)  # fmt: skip
    layout, count = columns(family.units, "tensor", learned=learned)
    start_KG = torch.full((len(family.models), count), init) * _learned(layout, count)
    with family.contraction(layout, count) as contraction:
        lessons = _lessons(family, contraction, hidden_states, temperature)
        found_KG, history = fit.run(contraction, layout, start_KG, lessons)
    if chunk_budget is not None:
        chunks = _chunks(family, layout, found_KG, learned, chunk_budget, kappa)
        finer, count = columns(family.units, "chunk", chunks=chunks)
        parts = [found_KG[:, [layout[name].first]].expand(-1, own.count) for name, own in finer.items()]
        layout = finer
        with family.contraction(layout, count) as contraction:
            found_KG, more = fit.run(contraction, layout, torch.cat(parts, 1), lessons)
        history += more
    numbers = int(_learned(layout, count).sum()) * len(family.models)
    facts = {"loss before": history[0]["loss"], "loss after": history[-1]["loss"], "learned numbers": numbers}
    return LearnedCoefficients(found_KG, layout, facts=facts, history=history)


@dataclass(frozen=True)
class _Fit:
    """How coefficients are fitted to lessons; the fields are the estimator's parameters."""

    family: Family
    sigmoid: bool
    temperature: float
    regularization: float
    epochs: int
    update_size: int
    learning_rate: float
    weight_decay: float

    def run(
        self, contraction: Contraction, layout: dict[str, Columns], start_KG: Tensor, lessons: list[Lesson]
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """The coefficients, and the loss before and after every epoch."""
        learned_G = _learned(layout, start_KG.shape[1])
        raw_KG = (start_KG.logit() if self.sigmoid else start_KG.clone()).where(learned_G, start_KG).requires_grad_()
        optimizer = torch.optim.AdamW([raw_KG], lr=self.learning_rate, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, RESTART)
        random = torch.Generator().manual_seed(self.family.recipe.seed)

        def coefficients() -> Tensor:
            return (raw_KG.sigmoid() if self.sigmoid else raw_KG).where(learned_G, start_KG)

        contraction.write(start_KG)
        history = [{"epoch": 0, "loss": self._total(lessons)}]
        steps = self.epochs * len(lessons)
        with tqdm(total=steps, desc=self.family.recipe.estimator, unit="batch", disable=None) as bar:
            for epoch in range(1, self.epochs + 1):
                order = [lessons[number] for number in torch.randperm(len(lessons), generator=random).tolist()]
                for update in _updates(order, self.update_size):
                    examples = sum(lesson.examples for lesson in update)
                    for lesson in update:
                        (self._loss(lesson) * (lesson.examples / examples)).backward()
                        bar.update()
                    alpha_KG = coefficients()
                    spread = _spread(alpha_KG[:, learned_G]) * self.regularization
                    optimizer.zero_grad()
                    torch.autograd.backward([alpha_KG, spread], [contraction.taken_gradient(), torch.ones(())])
                    torch.nn.utils.clip_grad_norm_([raw_KG], 1.0)
                    optimizer.step()
                    schedule.step()
                    contraction.write(coefficients())
                history.append({"epoch": epoch, "loss": self._total(lessons)})
        return coefficients().detach(), history

    @torch.no_grad()
    def _total(self, lessons: list[Lesson]) -> float:
        """The mean loss over all examples."""
        examples = sum(lesson.examples for lesson in lessons)
        return sum(self._loss(lesson).item() * lesson.examples for lesson in lessons) / examples

    def _loss(self, lesson: Lesson) -> Tensor:
        """How far the merged model is from the other on one batch."""
        self.family.put_head(lesson.task.model)
        hidden, logits_NC = _seen(self.family.model, lesson.batch, len(lesson.hidden))
        log_probs_NC = (logits_NC / self.temperature).log_softmax(-1)
        theirs_NK = lesson.log_probs_NK.to(logits_NC.device)
        ours_NK = _with_rest(log_probs_NC, lesson.ids_NK.to(logits_NC.device))
        divergence = (theirs_NK.exp() * (theirs_NK - ours_NK)).sum(-1).mean() * self.temperature**2
        if not hidden:
            return divergence
        pairs = zip(hidden, lesson.hidden)
        return divergence + sum(mse_loss(h, t.to(h.device).float()) for h, t in pairs) / len(hidden)


def _learned(layout: dict[str, Columns], count: int) -> Tensor:
    """Which columns are learned, ``bool [G]``."""
    found_G = torch.zeros(count, dtype=torch.bool)
    for own in layout.values():
        found_G[own.first : own.first + own.count] = own.learned
    return found_G


def _spread(alpha_KG: Tensor) -> Tensor:
    """Mean distance of each model's coefficients from their mean."""
    return (alpha_KG - alpha_KG.mean(1, keepdim=True)).abs().mean()


def _updates(order: list[Lesson], size: int) -> Iterator[list[Lesson]]:
    """Batches of at least ``size`` examples together, and what is left."""
    update: list[Lesson] = []
    for lesson in order:
        update.append(lesson)
        if sum(one.examples for one in update) >= size:
            yield update
            update = []
    if update:
        yield update


@torch.no_grad()
def _lessons(family: Family, contraction: Contraction, states: int, temperature: float) -> list[Lesson]:
    """What each model does on its own prompts: the live model becomes one after the other."""
    found = []
    size = min(family.recipe.batch_size, 8)
    for task in family.tasks:
        models, count = contraction.gradient_KG.shape
        only_KG = torch.zeros(models, count)
        only_KG[task.model] = 1
        contraction.write(only_KG)
        family.put_head(task.model)
        for batch in task.batches(size, family.device):
            hidden, logits_NC = _seen(family.model, batch, states)
            log_probs_NC = (logits_NC / temperature).log_softmax(-1)
            ids_NK = log_probs_NC.topk(min(TOKENS, log_probs_NC.shape[-1]), -1).indices
            kept = [values.to("cpu", family.model.dtype) for values in hidden]
            examples = len(batch["labels"])
            found.append(Lesson(task, batch, kept, ids_NK.cpu(), _with_rest(log_probs_NC, ids_NK).cpu(), examples))
    return found


def _with_rest(log_probs_NC: Tensor, ids_NK: Tensor) -> Tensor:
    """Log-probabilities of some tokens, and of all others together in a last column if there are any."""
    kept_NK = log_probs_NC.gather(-1, ids_NK)
    if ids_NK.shape[-1] == log_probs_NC.shape[-1]:
        return kept_NK
    others = torch.ones_like(log_probs_NC, dtype=torch.bool).scatter(-1, ids_NK, False)
    rest_N = log_probs_NC.masked_fill(~others, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([kept_NK, rest_N], -1)


def _seen(model: Any, batch: dict[str, Tensor], states: int) -> tuple[list[Tensor], Tensor]:
    """Hidden states ``fp32 [n, d]`` and logits ``fp32 [N, C]`` where there is no padding; of an encoder-decoder the
    states of both."""
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    made = model(**inputs, output_hidden_states=states > 0)
    mask_BT = batch.get("attention_mask")

    def kept(values: Tensor, mask_BT: Tensor | None) -> Tensor:
        masked = mask_BT is not None and values.shape[:-1] == mask_BT.shape
        return (values[mask_BT.bool()] if masked else values.flatten(0, -2)).float()

    found: list[tuple[Tensor, Tensor | None]] = []
    written_BT = mask_BT
    if "decoder_input_ids" in batch:
        written_BT = batch["labels"] != IGNORED
        if states:
            found = [(state, mask_BT) for state in made.encoder_hidden_states[1:]]  # the first are the embeddings
            found += [(state, written_BT) for state in made.decoder_hidden_states[1:]]
    elif states:
        found = [(state, mask_BT) for state in made.hidden_states[1:]]
    states = min(states, len(found))
    places = [round((number + 1) * len(found) / states) - 1 for number in range(states)]
    logits = made.logits.float() if made.logits.ndim == 2 else kept(made.logits, written_BT)
    return [kept(*found[place]) for place in places], logits


def _chunks(
    family: Family, layout: dict[str, Columns], found_KG: Tensor, learned: set[str], budget: float, kappa: float
) -> dict[str, int]:
    """How many chunks each tensor gets, by its importance."""
    buffers = Buffers(torch.device("cpu"), family.merger.dtype, FilePool())
    importance = {}
    for unit in family.units:
        if unit.name in learned:
            size_K = torch.zeros(len(unit.inputs))
            for start, stop in family.merger.blocks(0, unit.numel, BLOCK):
                size_K += family.merger.block(unit, start, stop, buffers)[0].abs().sum(1)
            importance[unit.name] = (found_KG[:, layout[unit.name].first].abs() * size_K).sum().item()
    buffers.pool.close()
    share = {name: value**kappa for name, value in importance.items()}
    total = math.fsum(share.values()) or 1.0
    return {name: math.floor(budget * len(share) * value / total) for name, value in share.items()}
