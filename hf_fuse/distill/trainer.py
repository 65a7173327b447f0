"""``DistillTrainer``: a student that learns from frozen teachers while it trains.

N predictions that have a label, V tokens of the vocabulary or classes, D hidden, M distillation methods.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from hf_fuse import registry
from hf_fuse.batch_counts import IGNORED, PREDICTIONS, labels_of
from hf_fuse.distill.aligned_teacher import AlignedTeacher
from hf_fuse.distill.cache import TeacherCache, is_cache
from hf_fuse.distill.cache_checks import Coverage, check_revision, check_student, check_tokenizer
from hf_fuse.distill.cached_teacher import CACHED, CachedTeacher, WithPredictions
from hf_fuse.distill.chunked import chunked_sum
from hf_fuse.distill.config import DistillConfig, is_distillation
from hf_fuse.distill.head_inputs import head_inputs, of_predictions
from hf_fuse.distill.sources import Source, narrowed
from hf_fuse.distill.teachers import (
    BASE,
    BaseTeacher,
    Teacher,
    check_teacher,
    check_unchanged,
    load_teacher,
    replaced_head,
    tokenizer_of,
)
from hf_fuse.distill.top_k import TopK
from hf_fuse.errors import FuseError
from hf_fuse.loss_inputs import kept_predictions, without
from hf_fuse.losses._predictions import class_indices
from hf_fuse.model_features import classifier_inputs, sample_features
from hf_fuse.objective_heads import trained_parameters
from hf_fuse.objectives import Objective
from hf_fuse.trainer import FuseTrainer

# What objectives of `distill/attached` may ask for besides.
FURTHER = ("teacher_logits", "head_inputs", "inputs", "model")


class DistillTrainer(FuseTrainer):
    """Trains with ``loss = w_task * task_loss + sum of w * distillation + sum of w * objective``.

    ::

        args = DistillConfig("out", objectives={"task": 0.5, "forward_kl": {"weight": 0.5, "temperature": 2.0}})
        DistillTrainer(student, args, teacher="org/big-model", train_dataset=data, processing_class=tokenizer).train()

    Every term is the mean over all predictions of an optimizer step, whatever the number of accumulation steps and
    processes. Teachers see the student's batches. They are frozen, in evaluation mode and in their own precision, lie
    whole on each process's device, and are neither in the optimizer nor in checkpoints.

    Args:
        model: the student: a transformers or PEFT model.
        args: a :class:`DistillConfig`.
        teacher: a model, its name on the Hub or folder, ``"base"`` for the student's base model with its adapters
            switched off, the folder of a cache that ``hf-fuse teach`` has made (no model is in memory then), an
            :class:`~hf_fuse.distill.aligned_teacher.AlignedTeacher` for one that reads with another tokenizer or chat
            template, or a list of such. The terms of several teachers are added with ``teacher_weights``. None for
            objectives that do without (:mod:`hf_fuse.distill.attached`).
        teacher_tokenizer: of all teachers, where it can't be found beside them. It must be the student's.
        peers: models that learn together with the student, for the objective ``mutual``.
        trainer_arguments: of :class:`~hf_fuse.FuseTrainer`: ``peft_config``, ``train_dataset``, ``processing_class``...

    Raises:
        FuseError: a teacher can't be loaded, or predicts other tokens or classes than the student; or ``chunk_size``
            with a model or objective that it can't serve; or an objective lacks its teacher.
    """

    extra_tensors = frozenset({"student", "teacher", "sources", "sequences", "distilled", *FURTHER})

    def __init__(
        self,
        model: nn.Module | None = None,
        args: DistillConfig | None = None,
        *,
        teacher: nn.Module | str | AlignedTeacher | list[nn.Module | str | AlignedTeacher] | None = None,
        teacher_tokenizer: Any = None,
        peers: list[nn.Module] | None = None,
        **trainer_arguments: Any,
    ) -> None:
        args = DistillConfig() if args is None else args
        if not isinstance(args, DistillConfig):
            raise FuseError(f"args is a {type(args).__name__}, expected a DistillConfig.")
        super().__init__(model, args, **trainer_arguments)
        self._methods = [objective for objective in self.objectives if is_distillation(objective)]
        self.objectives = [_from_the_forward_pass(o) if is_distillation(o) else o for o in self.objectives]
        self._distilled: dict[str, Tensor] = {}
        self._logits_wanted, self._head_checked = False, False
        self.peers = peers
        self._teacher_logits: Tensor | TopK | None = None
        self._head_inputs: Tensor | None = None
        self._cached: list[dict[str, Tensor]] = []
        self._evaluates_methods = True
        given = [] if teacher is None else teacher if isinstance(teacher, list) else [teacher]
        self.teachers = [self._teacher(each) for each in given]
        self._teacher_weights = self._checked_weights()
        tokenizer = tokenizer_of(self._base, self.processing_class)
        for each in self.teachers:
            if isinstance(each, CachedTeacher):
                check_student(each, self._base, self._methods + self._stateful, shifted=self._loss_shifts_labels)
                check_tokenizer(each, tokenizer, self._base.config.get_text_config().vocab_size)
            elif isinstance(each, AlignedTeacher):
                each.check(self._base, tokenizer)
            else:
                check_teacher(each, self._base, tokenizer, tokenizer_of(each.base, teacher_tokenizer))
        if args.chunk_size:
            self._check_chunks()
        modules = [o for o in (*self.objectives, *self._methods) if isinstance(o.loss, nn.Module)]
        for objective in modules:
            if hasattr(objective.loss, "attach"):
                objective.loss.attach(self)
                objective.loss.to(args.device)
        # Some have made the layers that they train only now.
        self._stateful = [objective for objective in modules if objective.stateful]
        self._head_parameters = trained_parameters(self._stateful, self.accelerator)
        self._coverage = Coverage(self._caches, self._collate_of_model)
        self._coverage.check(self.train_dataset)

    @property
    def student(self) -> nn.Module:
        """The model inside of wrappers, with its adapters."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def base(self) -> nn.Module:
        """The transformers model inside of wrappers and adapters."""
        return self._base

    def predictions(self, outputs: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The logits ``(N, C)`` of a further forward pass, and the labels ``(N,)``, where ``inputs`` have labels."""
        labels, shifted = labels_of(inputs, shifted=self._loss_shifts_labels)
        return kept_predictions(outputs.logits, labels, shifted=shifted)

    def further_pass(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, Tensor | None]:
        """The output for other inputs, and what the classifier took, ``(B, D)``; None from models without one."""
        with classifier_inputs(self._base) as seen:
            outputs = model(**inputs)
        return outputs, sample_features(self._base, inputs, outputs, seen) if seen else None

    def named_tensors(self, needed: set[str], model: nn.Module, inputs: dict[str, Any], outputs: Any) -> dict[str, Any]:
        return super().named_tensors(needed, model, inputs, outputs) | {
            "distilled": self._distilled,
            "teacher_logits": self._teacher_logits,
            "head_inputs": self._head_inputs,
            "inputs": self._of_model(inputs),
            "model": model,
        }

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self._cached = inputs.get(CACHED, [])
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            for objective in self._stateful:
                if hasattr(objective.loss, "before_step"):
                    objective.loss.before_step()
        return loss

    def get_train_dataloader(self) -> DataLoader:
        with self._with_predictions():
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        with self._with_predictions():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        with self._with_predictions():
            return super().get_test_dataloader(test_dataset)

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self._evaluates_methods = self._coverage.knows(dataloader.dataset)
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple:
        # Only what is gathered for metrics is worth whole logits.
        self._logits_wanted = not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._logits_wanted = False

    def _forward(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None, Any]:
        weights = self._weights(model.training)
        methods = [objective for objective in self._methods if objective.name in weights]
        asking = model.training and any("teacher_logits" in o.needs.values() for o in self.objectives)
        labels, shifted = labels_of(inputs, shifted=self._loss_shifts_labels)
        if labels is None and (methods or self.args.chunk_size):
            raise FuseError(f"Distillation needs labels to know the predictions; the batch has {', '.join(inputs)}.")
        if self.args.chunk_size and not self._logits_wanted:
            return self._forward_in_chunks(model, inputs, methods)
        # Before the student's pass: switching adapters must not fall between it and its backward pass.
        teachers = self.teachers if methods or asking else []
        answers = self._said(teachers, inputs, labels, shifted)
        for number, each in enumerate(teachers):
            if number not in answers:
                answers[number] = kept_predictions(each.logits(inputs), labels, shifted=shifted)[0]
        answers = [answers[number] for number in range(len(teachers))]
        self._teacher_logits = answers[0] if asking else None
        below = any("head_inputs" in o.needs.values() for o in self.objectives if o.name in weights)
        with head_inputs(self._base) if below else contextlib.nullcontext([]) as seen:
            task, router_loss, outputs = super()._forward(model, inputs)
        self._head_inputs = of_predictions(self._base, seen[-1], inputs, labels, shifted=shifted) if below else None
        if methods:
            student_NV, labels_N = kept_predictions(outputs.logits, labels, shifted=shifted)
            sequences_N = _sequences(labels, shifted=shifted)
            sums_M = self._sums(methods, student_NV, answers, class_indices(labels_N), sequences_N)
            self._keep(methods, sums_M, len(labels_N))
        return task, router_loss, outputs

    def _forward_in_chunks(
        self, model: nn.Module, inputs: dict[str, Any], methods: list[Objective]
    ) -> tuple[Tensor, Tensor | None, Any]:
        """As :meth:`_forward`, but the losses are computed in the place of the output layer, chunk by chunk."""
        labels, shifted = labels_of(inputs, shifted=self._loss_shifts_labels)
        teachers = self.teachers if methods else []
        # What needs no output layer is there already: its chunks are numbers of predictions.
        said = self._said(teachers, inputs, labels, shifted)
        count = int((labels[..., 1:] if shifted else labels).ne(IGNORED).sum())
        teacher_ND = [
            torch.arange(count, device=labels.device)
            if number in said
            else kept_predictions(each.hidden(inputs), labels, shifted=shifted)[0]
            for number, each in enumerate(teachers)
        ]
        head = self._base.get_output_embeddings().forward
        sums = None

        def loss(hidden_ND: Tensor, labels_N: Tensor, *teacher_ND: Tensor) -> Tensor:
            student_NV = head(hidden_ND)
            answers = [
                said[number].rows(rows_ND) if number in said else teachers[number].head(rows_ND)
                for number, rows_ND in enumerate(teacher_ND)
            ]
            task = F.cross_entropy(student_NV.float(), labels_N, reduction="sum")
            return torch.cat([task[None], self._sums(methods, student_NV, answers, labels_N)])

        def losses_for_logits(hidden_BSD: Tensor) -> Tensor:
            nonlocal sums
            hidden_ND, labels_N = kept_predictions(hidden_BSD, labels, shifted=shifted)
            sums = chunked_sum(loss, hidden_ND, labels_N, *teacher_ND, chunk_size=self.args.chunk_size)
            return sums[None, None]

        given = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
        with replaced_head(self._base, losses_for_logits):
            outputs = model(**given)
        if not self._head_checked:
            check_unchanged(sums[None, None], outputs.logits, self._base)
            self._head_checked = True
        # Wrappers look for the graph in what the model returns, not in what was kept aside.
        sums = outputs.logits[0, 0]
        self._keep(methods, sums[1:], count)
        task, router_loss = self._without_router_loss(sums[0] / max(count, 1), outputs, apart=True)
        return task, router_loss, without(outputs, {"logits"})

    def _said(self, teachers: list, inputs: dict[str, Any], labels: Tensor, shifted: bool) -> dict[int, Source | TopK]:
        """What those of the teachers say that are no models with the student's tokens, by their numbers."""
        found, cached = {}, iter(self._cached)
        for number, each in enumerate(teachers):
            if isinstance(each, AlignedTeacher):
                found[number] = each.source(inputs, labels, shifted=shifted)
            elif isinstance(each, CachedTeacher):
                found[number] = each.predictions(next(cached), labels, shifted=shifted)
        return found

    def _sums(
        self,
        methods: list[Objective],
        student_NV: Tensor,
        answers: list[Tensor | Source | TopK],
        labels_N: Tensor,
        sequences_N: Tensor | None = None,
    ) -> Tensor:
        """Of each method, over the predictions and weighted over the teachers, ``(M,)``."""
        # What lies beyond the smallest vocabulary is padding, as was checked.
        widths = [logits.shape[-1] for logits in (student_NV, *answers) if isinstance(logits, Tensor)]
        width = min([*widths, *(each.facts.vocabulary for each in self._caches)])
        given = {"student": student_NV[:, :width], "labels": labels_N, "sequences": sequences_N}
        given["progress"] = self.state.global_step / max(self.state.max_steps, 1)
        sums = []
        for objective in methods:
            if "sources" in objective.needs.values():
                sums.append(objective.loss(**objective.arguments(given | {"sources": answers})))
                continue
            values = [
                weight * objective.loss(**objective.arguments(_of_one(objective, given, answer, width)))
                for weight, answer in zip(self._teacher_weights, answers)
            ]
            sums.append(torch.stack(values).sum())
        return torch.stack(sums) if sums else student_NV.new_zeros(0, dtype=torch.float32)

    def _keep(self, methods: list[Objective], sums_M: Tensor, count: int) -> None:
        self._distilled = {objective.name: value / max(count, 1) for objective, value in zip(methods, sums_M)}

    def _teacher(self, given: nn.Module | str | AlignedTeacher) -> Teacher | AlignedTeacher:
        if isinstance(given, AlignedTeacher):
            return given.placed(self.args.device)
        if isinstance(given, str | Path) and is_cache(given):
            given = TeacherCache(given)
        if isinstance(given, TeacherCache):
            teacher = CachedTeacher(given)
            check_revision(teacher, self.args.teacher_model_init_kwargs or {})
            return teacher
        if given == BASE:
            return BaseTeacher(self.model, self.args.device)
        if given is self.model or given is self._base:
            raise FuseError("The teacher is the student itself. For its base model without adapters, give 'base'.")
        if isinstance(given, str):
            return Teacher(load_teacher(given, self.args.teacher_model_init_kwargs or {}), self.args.device, given)
        if self.args.teacher_model_init_kwargs:
            raise FuseError("teacher_model_init_kwargs is for teachers given by name, but the teacher is a model.")
        if not isinstance(given, nn.Module):
            raise FuseError(f"teacher is a {type(given).__name__}, expected a model, a name or 'base', or a list.")
        return Teacher(given, self.args.device, getattr(given, "name_or_path", "") or type(given).__name__)

    def _checked_weights(self) -> list[float]:
        count, weights = len(self.teachers), self.args.teacher_weights
        asking = [o.name for o in self.objectives if "teacher_logits" in o.needs.values()]
        learning = [objective.name for objective in self._methods] + asking
        if learning and not count:
            raise FuseError(f"objectives.{learning[0]}: needs a teacher, and none is given. Give at least one.")
        if count and not learning:
            raise FuseError("A teacher is given, but no objective learns from one. Add {'forward_kl': 1.0}.")
        if asking and any(isinstance(each, AlignedTeacher) for each in self.teachers):
            raise FuseError(f"objectives.{asking[0]}: needs logits of the student's tokens. Use another objective.")
        fusing = [o.name for o in self._methods if "sources" in o.needs.values()]
        if fusing and not all(isinstance(each, AlignedTeacher) for each in self.teachers):
            raise FuseError(
                f"objectives.{fusing[0]}: fuses teachers that may read in other tokens. Give each as an "
                "AlignedTeacher(model, rows, student=Encoding(tokenizer, max_length))."
            )
        if asking and count > 1:
            raise FuseError(f"objectives.{asking[0]}: learns from one teacher, and {count} are given.")
        if weights is not None and len(weights) != count:
            raise FuseError(f"teacher_weights has {len(weights)} numbers for {count} teacher(s).")
        return weights or [1 / max(count, 1)] * count

    @property
    def _caches(self) -> list[CachedTeacher]:
        return [each for each in self.teachers if isinstance(each, CachedTeacher)]

    @contextlib.contextmanager
    def _with_predictions(self) -> Iterator[None]:
        """Batches that are made inside bring what cached teachers predict."""
        collate = self.data_collator
        if self._caches:
            self.data_collator = WithPredictions(collate, self._caches)
        try:
            yield
        finally:
            self.data_collator = collate

    def _collate_of_model(self, rows: list) -> dict[str, Any]:
        return self._get_collator_with_removed_columns(self.data_collator)(rows)

    def _of_model(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in super()._of_model(inputs).items() if name != CACHED}

    def _weights(self, training: bool) -> dict[str, float]:
        weights = super()._weights(training)
        left_out = set() if training or self._evaluates_methods else {objective.name for objective in self._methods}
        return {name: weight for name, weight in weights.items() if name not in left_out}

    def _check_chunks(self) -> None:
        if not self._loss_shifts_labels or self._base.get_output_embeddings() is None:
            raise FuseError(
                f"chunk_size is for causal language models; the student is a {type(self._base).__name__}. Set it to 0."
            )
        if self.label_smoother or self.compute_loss_func:
            name = "compute_loss_func" if self.compute_loss_func else "label_smoothing_factor"
            raise FuseError(f"{name}: needs all logits, which chunks never make. Set chunk_size to 0.")
        if self.args.torch_compile:
            raise FuseError(
                "chunk_size replaces the output layer, which torch_compile doesn't allow. Drop one of them."
            )
        if any(isinstance(teacher, BaseTeacher) for teacher in self.teachers) and any(
            "lora_" in name or "modules_to_save" in name
            for name, _ in self._base.get_output_embeddings().named_parameters()
        ):
            raise FuseError(
                "The adapter changes the output layer, which chunks use as the base's. Set chunk_size to 0."
            )


def _sequences(labels: Tensor, *, shifted: bool) -> Tensor | None:
    """Of which row of the batch each prediction is, ``(N,)``; None where a row is one prediction."""
    kept = labels[..., 1:] if shifted else labels
    return (kept != IGNORED).nonzero()[:, 0] if kept.dim() > 1 and not kept.is_floating_point() else None


def _of_one(objective: Objective, given: dict[str, Any], answer: Tensor | Source | TopK, width: int) -> dict[str, Any]:
    """What a method gets that learns from one teacher: the predictions about which this teacher says something."""
    if isinstance(answer, Tensor):
        return given | {"teacher": answer[:, :width]}
    if isinstance(answer, TopK):
        return given | {"teacher": answer.within(width)}
    if getattr(registry.get("distill", objective.name).module, "ANY_VOCABULARY", False):
        chosen_N, top = answer.has_N, answer.unmapped()
    else:
        top = narrowed(answer.everywhere().within(width), width - 1)
        chosen_N = top.known_NK.any(-1)
        top = top.rows(chosen_N)
    return given | {"student": given["student"][chosen_N], "labels": given["labels"][chosen_N], "teacher": top}


def _from_the_forward_pass(objective: Objective) -> Objective:
    """The same term, whose value is there when the model has run."""

    def value(distilled: dict[str, Tensor]) -> Tensor:
        return distilled[objective.name]

    return dataclasses.replace(
        objective,
        loss=value,
        needs={"distilled": "distilled"},
        optional=frozenset(),
        mean_over=PREDICTIONS,
    )
