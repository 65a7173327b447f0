"""TGeo-KD: a learnt ratio between teacher and label for each sample, such that a step lowers the validation loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset
from transformers import TrainerCallback

from hf_fuse.distill.earlier_self import check_whole, evaluating
from hf_fuse.distill.fusion_ratio import (
    SCALARS,
    Controller,
    copies,
    gaps,
    scalar_features,
    slopes,
    vector_features,
    wide,
)
from hf_fuse.distill.top_k import TopK
from hf_fuse.errors import FuseError
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2312.15112"
# Above so many classes, features are numbers instead of vectors.
FEW_CLASSES = 100


class tgeo(nn.Module):
    """Mean of ``a T^2 KL(teacher || student) + (1 - a) cross-entropy``: set the weight of ``task`` to 0.

    ``a = f(features)``, in (0.05, 0.95) and 0.5 at first. Every ``update_every`` steps f learns: with the step
    ``new = old - lr * gradient``, the derivative of the validation loss by the ratio of sample i of n is
    ``-lr / n * <gradient of the validation loss at new, gradient of (T^2 KL_i - CE_i) at old>``, taken as a central
    difference of ``T^2 KL_i - CE_i`` at ``old +- e * validation gradient``, the ratio being a constant of the step. For
    SGD that is exact, for other optimizers it leaves out how they scale gradients. Such a step costs one more pass with
    gradient and two without, and a copy of what trains. (The reference code leaves f as it was initialised.)

    Features of classifiers with up to 100 classes are the paper's: probabilities of student and teacher, label, mean of
    the teacher for the class, and their squared differences. Otherwise, as for language models, eight distances,
    probabilities and entropies per prediction; these can be made from a teacher's cache too.

    Args:
        temperature: T, divides both logits of the divergence.
        update_every: optimizer steps of the student between two of the controller.
        held_out: share of the training set that is kept from training, for validation.
        learning_rate: of the controller's AdamW. The reference's 0.1 was never put to the test.
        weight_decay: of the same AdamW.
        mean_momentum: how much of the teacher's mean for a class stays at an optimizer step.
    """

    takes_top_k = True

    def __init__(
        self,
        *,
        temperature: Annotated[float, Between(0, open_low=True)] = 1.5,
        update_every: Annotated[int, Between(1)] = 10,
        held_out: Annotated[float, Between(0, 0.9, open_low=True)] = 0.1,
        learning_rate: Annotated[float, Between(0)] = 0.01,
        weight_decay: Annotated[float, Between(0)] = 0.05,
        mean_momentum: Annotated[float, Between(0, 1)] = 0.9,
    ) -> None:
        super().__init__()
        self.temperature, self.update_every, self.held_out = temperature, update_every, held_out
        self.learning_rate, self.weight_decay, self.mean_momentum = learning_rate, weight_decay, mean_momentum
        self._step = _Step()

    def prepare(self, model: nn.Module, train_dataset: Any) -> None:
        classes = 0 if model.get_output_embeddings() is not None else model.config.num_labels
        self.classes = classes if classes <= FEW_CLASSES else 0
        self.controller = Controller(
            9 * self.classes or SCALARS, learning_rate=self.learning_rate, weight_decay=self.weight_decay
        )
        self.register_buffer("class_means_CC", torch.zeros(self.classes, self.classes))
        self.register_buffer("seen_C", torch.zeros(self.classes, dtype=torch.bool))

    def attach(self, trainer: Any) -> None:
        check_whole(trainer, "objectives.tgeo")
        self._trainer = trainer
        trainer.train_dataset, self._validation = _split(trainer.train_dataset, self.held_out, trainer.args.seed)
        trainer.add_callback(_Moments(self._begin, self._end))

    def forward(
        self, logits_NC: Tensor, teacher_logits_NC: Tensor | TopK, labels_N: Tensor, inputs: dict[str, Any]
    ) -> Tensor:
        """
        Args:
            logits_NC: the student's, of the predictions that have a label.
            teacher_logits_NC: for the same predictions, or the top-K of them at the same temperature.
            labels_N: class or token ids.
            inputs: the batch.
        """
        # What lies beyond the smaller vocabulary is padding.
        if isinstance(teacher_logits_NC, TopK):
            teacher_logits_NC = teacher_logits_NC.within(logits_NC.shape[-1])
        else:
            width = min(logits_NC.shape[-1], teacher_logits_NC.shape[-1])
            logits_NC, teacher_logits_NC = logits_NC[:, :width], teacher_logits_NC[:, :width]
        features_NF = self._features(logits_NC, teacher_logits_NC, labels_N)
        if self._step.before or self.classes:
            self._step.add(inputs, teacher_logits_NC, labels_N, features_NF)
        ratio_N = self.controller(features_NF).detach()
        kl_N, entropy_N = gaps(logits_NC, teacher_logits_NC, labels_N, self.temperature)
        return (ratio_N * kl_N + (1 - ratio_N) * entropy_N).sum() / max(len(labels_N), 1)

    def _features(self, logits_NC: Tensor, teacher_NC: Tensor | TopK, labels_N: Tensor) -> Tensor:
        if not self.classes:
            return scalar_features(logits_NC, teacher_NC, labels_N)
        probabilities_NC = wide(teacher_NC).softmax(-1)
        means_NC = torch.where(self.seen_C[labels_N, None], self.class_means_CC[labels_N], probabilities_NC)
        return vector_features(logits_NC, teacher_NC, labels_N, means_NC)

    def _begin(self) -> None:
        due = self._trainer.state.global_step % self.update_every == 0
        self._step = _Step(copies(self._trained()) if due else [])

    def _end(self) -> None:
        """After the student's step, which the controller is judged by."""
        step, self._step = self._step, _Step()
        if not step.batches:  # as long as the objective weighs nothing
            return
        if self.classes:
            self._move_means(step)
        if not step.before:
            return
        trainer = self._trainer
        # The learning rate of the step that has just been made.
        rate = trainer.optimizer.param_groups[0]["lr"]
        count = trainer.accelerator.reduce(torch.tensor(float(len(step.labels_N)), device=trainer.args.device), "sum")
        with evaluating(trainer.student), trainer.compute_loss_context_manager():
            gradient = validation_gradient(self._trained(), self._validation_batches(), trainer)
            slopes_N = slopes(self._trained(), step.before, gradient, lambda: self._differences(step))
        by_ratio_N = -rate / count * slopes_N
        self.controller.step(trainer.accelerator.reduce(self.controller.gradient(step.features_NF, by_ratio_N), "sum"))

    def _differences(self, step: _Step) -> Tensor:
        """``T^2 KL - CE`` of the step's predictions, ``(N,)``."""
        values = []
        for inputs, teacher_NC, labels_N, _ in step.batches:
            logits_NC, _ = self._trainer.predictions(self._trainer.student(**_unlabelled(inputs)), inputs)
            if isinstance(teacher_NC, Tensor):
                logits_NC = logits_NC[:, : teacher_NC.shape[-1]]
            kl_N, entropy_N = gaps(logits_NC, teacher_NC, labels_N, self.temperature)
            values.append(kl_N - entropy_N)
        return torch.cat(values)

    def _move_means(self, step: _Step) -> None:
        teacher_NC = torch.cat([wide(teacher_NC) for _, teacher_NC, _, _ in step.batches]).softmax(-1)
        sums_CC = torch.zeros_like(self.class_means_CC).index_add_(0, step.labels_N, teacher_NC.to(self.class_means_CC))
        counts_C = torch.bincount(step.labels_N, minlength=self.classes).float()
        sums_CC, counts_C = (self._trainer.accelerator.reduce(value, "sum") for value in (sums_CC, counts_C))
        found_C = counts_C > 0
        means_CC = sums_CC / counts_C.clamp(min=1).unsqueeze(-1)
        # The first mean of a class stands for itself.
        kept_C = torch.where(found_C, self.mean_momentum * self.seen_C, 1.0)
        self.class_means_CC.copy_(means_CC.lerp(self.class_means_CC, kept_C.unsqueeze(-1)))
        self.seen_C |= found_C

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._trainer.student.parameters() if parameter.requires_grad]

    def _validation_batches(self) -> Iterator[dict[str, Any]]:
        """This process's part of as many held-out samples as an optimizer step has, others each time."""
        trainer, random = self._trainer, torch.Generator().manual_seed(self._trainer.state.global_step)
        size, parts = trainer.args.per_device_train_batch_size, trainer.accelerator.num_processes
        total = size * trainer.args.gradient_accumulation_steps * parts
        chosen = torch.randperm(len(self._validation), generator=random)[:total].tolist()
        chosen = chosen[trainer.accelerator.process_index :: parts]
        collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
        for start in range(0, len(chosen), size):
            rows = [self._validation[index] for index in chosen[start : start + size]]
            yield trainer._of_model(trainer._prepare_inputs(collate(rows)))


class _Step:
    """What an optimizer step has seen: its micro-batches, and what trains as it was before; empty if none is due."""

    def __init__(self, before: list[Tensor] = ()) -> None:
        self.before, self.batches = before, []

    def add(self, *batch: Any) -> None:
        self.batches.append(batch)

    @property
    def labels_N(self) -> Tensor:
        return torch.cat([labels_N for _, _, labels_N, _ in self.batches])

    @property
    def features_NF(self) -> Tensor:
        return torch.cat([features_NF for *_, features_NF in self.batches])


class _Moments(TrainerCallback):
    def __init__(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self._begin, self._end = begin, end

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._begin()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._end()


def validation_gradient(trained: list[nn.Parameter], batches: Iterator[dict[str, Any]], trainer: Any) -> list[Tensor]:
    """Of the mean cross-entropy over the batches of all processes, by each trained parameter."""
    total, count = [torch.zeros_like(parameter) for parameter in trained], 0
    with torch.enable_grad():
        for inputs in batches:
            logits_NC, labels_N = trainer.predictions(trainer.student(**_unlabelled(inputs)), inputs)
            loss = F.cross_entropy(wide(logits_NC), labels_N, reduction="sum")
            found = torch.autograd.grad(loss, trained, allow_unused=True)
            total = [was if more is None else was + more for was, more in zip(total, found)]
            count += len(labels_N)
    whole = trainer.accelerator.reduce(torch.tensor(float(count), device=trainer.args.device), "sum").clamp(min=1)
    return [trainer.accelerator.reduce(each, "sum") / whole.to(each) for each in total]


def _unlabelled(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}


def _split(dataset: Any, share: float, seed: int) -> tuple[Any, Any]:
    """The data set without some samples, and these."""
    if not hasattr(dataset, "__len__") or round(share * len(dataset)) < 1 or len(dataset) < 2:
        raise FuseError(
            f"objectives.tgeo: a share of {share} of the training set is kept for validation, but the set is "
            "a stream or too small."
        )
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    kept = round(share * len(dataset))
    parts = sorted(order[kept:]), sorted(order[:kept])
    if hasattr(dataset, "select"):
        return tuple(dataset.select(part) for part in parts)
    return tuple(Subset(dataset, part) for part in parts)
