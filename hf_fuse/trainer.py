"""``FuseTrainer``: ``transformers.Trainer`` whose loss is the task loss plus weighted objectives.

What makes it right under gradient accumulation and on several processes: every loss is a mean over its micro-batch, and
counts by the micro-batch's share in the whole batch of the optimizer step. The Trainer's own rule (the model divides by
``num_items_in_batch``) holds only for models and terms that know about it, and multiplies all others by the number of
accumulation steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from hf_fuse.attention_report import AttentionWatch
from hf_fuse.batch_counts import (
    IGNORED,
    PREDICTIONS,
    TOKENS,
    UNITS,
    count,
    count_of_column,
    labels_of,
    masked,
    repeated_samples,
)
from hf_fuse.errors import FuseError
from hf_fuse.extra_passes import ONLY_IN_TRAINING, ExtraPasses
from hf_fuse.input_points import PARTNERS, SHARES, drawing_partners
from hf_fuse.loss_inputs import (
    FROM_MODEL,
    FROM_TRAINER,
    SECOND,
    check_columns,
    check_needs,
    class_counts,
    forward_options,
    kept_predictions,
    own_balance_weight,
    router_choices,
    without,
)
from hf_fuse.model_features import of_labelled
from hf_fuse.objective_heads import average_gradients, prepare, trained_parameters
from hf_fuse.objectives import load_states, save_states
from hf_fuse.renamed_weights import restore_renamed
from hf_fuse.replay import REPLAY
from hf_fuse.router_report import ExpertUsageChart, RouterUsage
from hf_fuse.sample_ids import SAMPLE_IDS, keeping_sample_ids, numbered
from hf_fuse.trainer_arguments import check_arguments, name_causal_loss, with_adapter
from hf_fuse.trainer_config import FuseConfig
from hf_fuse.trainer_logs import Averages

if TYPE_CHECKING:
    from peft import PeftConfig


class FuseTrainer(Trainer):
    """Trains with ``loss = w_task * task_loss + sum of w * objective``, each term logged under its own name.

    Every term is the mean over the whole batch of an optimizer step, whatever the number of accumulation steps and
    processes; only losses that compare samples of a batch see those of one micro-batch, be it spread over processes.
    ``eval_loss`` is the task loss, the mean over the whole evaluation set, so that it compares runs and moments with
    different weights; the other objectives are logged beside it as ``eval_<name>``.

    ::

        args = FuseConfig("out", objectives={"logit_z": 1e-4, "load_balance": {"start": 0, "end": 0.01, "until": 0.1}})
        FuseTrainer(model, args, train_dataset=data, processing_class=tokenizer, peft_config=MixLoraConfig()).train()

    What a loss needs is read from the names of its parameters (:mod:`hf_fuse.losses`). A subclass offers further
    tensors by :attr:`extra_tensors` and :meth:`named_tensors`.

    Args:
        model: a transformers or PEFT model.
        args: a :class:`FuseConfig`.
        peft_config: puts an adapter of this kind on ``model``.
        old_model: for losses that need ``old_features`` and the like: a model, its folder or name. It stays frozen.
        replay_dataset: for losses that need ``replay_logits``: rows as those of ``train_dataset``. It is cycled.
        trainer_arguments: all others of ``transformers.Trainer``: ``train_dataset``, ``eval_dataset``,
            ``processing_class``, ``data_collator``, ``compute_loss_func``, ``compute_metrics``, ``callbacks``,
            ``optimizers``...

    Raises:
        FuseError: the model or the data can't give what an objective needs.
    """

    # Losses are normalised over the whole batch of the optimizer step here: the Trainer must not divide them again.
    loss_is_scaled_for_ga = True
    # Names of tensors that a subclass's `named_tensors` adds.
    extra_tensors: frozenset[str] = frozenset()

    def __init__(
        self,
        model: nn.Module | None = None,
        args: FuseConfig | None = None,
        *,
        peft_config: PeftConfig | None = None,
        old_model: nn.Module | str | None = None,
        replay_dataset: Any = None,
        **trainer_arguments: Any,
    ) -> None:
        args = FuseConfig() if args is None else args
        check_arguments(model, args)
        if peft_config is not None:
            model = with_adapter(model, peft_config)
        name_causal_loss(model)
        self.task_weight, self.objectives = args.read_objectives()
        super().__init__(model, args, **trainer_arguments)
        self._check_model()
        self._passes = ExtraPasses(self, args.old_model if old_model is None else old_model, replay_dataset)
        if SAMPLE_IDS in self._loss_columns:
            self.data_collator = keeping_sample_ids(self.data_collator)
        self._whole_batch: Tensor | None = None
        self._window, self._evaluation = Averages(), Averages()
        self.router_usage = RouterUsage()
        self._attention = AttentionWatch(args.attention_entropy_steps) if args.attention_entropy_steps else None
        if args.router_statistics:
            self.add_callback(ExpertUsageChart(self))
        for callback in getattr(getattr(model, "base_model", None), "trainer_callbacks", ()):
            self.add_callback(callback)
        prepare(self.objectives, self._base, self.train_dataset, seed=args.seed, device=args.device)
        self._stateful = [objective for objective in self.objectives if objective.stateful]
        self._head_parameters = trained_parameters(self._stateful, self.accelerator)

    def named_tensors(self, needed: set[str], model: nn.Module, inputs: dict[str, Any], outputs: Any) -> dict[str, Any]:
        """What losses ask for, by name; None or no entry for what this batch and output don't have.

        Args:
            needed: names that the losses of this step ask for.
            model: as wrapped for training; for further forward passes.
            inputs: the batch, with the columns that the model doesn't take.
            outputs: of the model.
        """
        found = {name: inputs.get(name) for name in needed}
        found |= {name: getattr(outputs, name, None) for name in needed & FROM_MODEL.keys()}
        labels, shifted = labels_of(inputs, shifted=self._loss_shifts_labels)
        predicted = labels is not None and getattr(outputs, "logits", None) is not None
        if predicted and needed & {"logits", "labels", "second_logits"}:
            found["logits"], found["labels"] = kept_predictions(outputs.logits, labels, shifted=shifted)
        if predicted and needed & {"sample_logits", "sample_labels"}:
            found["sample_logits"], found["sample_labels"] = outputs.logits, labels
        if found.get(SAMPLE_IDS) is not None:
            found[SAMPLE_IDS] = of_labelled(found[SAMPLE_IDS], labels)
        router_logits = getattr(outputs, "router_logits", None)
        if "router_weights" in needed and found["router_weights"] is None and router_logits:
            found["router_weights"] = router_choices(
                router_logits, self._base.config.get_text_config().num_experts_per_tok
            )
        if "class_counts" in needed:
            found["class_counts"] = self._class_counts
        if "progress" in needed:
            found["progress"] = self.state.global_step / max(self.state.max_steps, 1)
        if "epoch" in needed:
            found["epoch"] = self.state.epoch or 0.0
        if "step" in needed:
            found["step"] = self.state.global_step
        return found

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """In training, this micro-batch's part of the total loss; in evaluation, its mean task loss."""
        inputs = dict(inputs)
        repeated_B = None if model.training else repeated_samples(inputs, self.accelerator)
        if repeated_B is not None:
            inputs |= masked(inputs, repeated_B, labels=IGNORED)
        weights = self._weights(model.training)
        active = [objective for objective in self.objectives if objective.name in weights]
        needed = {name for objective in active for name in objective.needs.values()}
        asked = forward_options(needed, self._base)
        with self._passes.watching(needed, inputs) as (given, seen):
            task, router_loss, outputs = self._forward(model, given | asked)
        if repeated_B is not None:
            # Not before: attention would have nothing to attend to.
            inputs |= masked(inputs, repeated_B, attention_mask=0)
        counts_U = self._count(inputs)
        terms = {"task_loss": (weights["task_loss"], task, PREDICTIONS)}
        if router_loss is not None:
            terms["aux_loss"] = (1.0, router_loss, PREDICTIONS)
        tensors = self.named_tensors(needed, model, inputs, outputs) if active else {}
        tensors |= self._passes.tensors(needed, model, inputs, outputs, seen)
        for objective in active:
            arguments = objective.arguments(tensors)
            if arguments is not None:
                terms[objective.name] = (weights[objective.name], objective.loss(**arguments), objective.mean_over)
            elif model.training:
                lacking = [name for name in objective.needs.values() if tensors.get(name) is None]
                raise FuseError(
                    f"objectives.{objective.name}: needs {', '.join(lacking)}, which neither the batch (it has "
                    f"{', '.join(inputs)}) nor the output of {type(self._base).__name__} contains."
                )
        if not model.training:
            return self._evaluated(terms, counts_U, outputs, asked, return_outputs)
        if self._attention and self._attention.due(self.state.global_step):
            self._attention.observe(self._base, self._of_model(inputs), self.state.global_step)
        if self.args.router_statistics:
            self.router_usage.observe(self._base, outputs, inputs.get("attention_mask"), counts_U[UNITS.index(TOKENS)])
        loss = self._total(terms, counts_U)
        return (loss, outputs) if return_outputs else loss

    def _total(self, terms: dict[str, tuple[float, Tensor, str]], counts_U: Tensor) -> Tensor:
        """Weighted sum of the terms, each times this micro-batch's share in the whole batch."""
        whole_U = counts_U if self._whole_batch is None else self._whole_batch
        share_U = counts_U / whole_U.clamp(min=1)
        total = torch.zeros((), device=counts_U.device)
        for name, (weight, value, unit) in terms.items():
            share = share_U[self._units.index(unit)]
            # The mean over nothing is NaN in some models; here it counts for nothing.
            value = torch.where(share > 0, value.to(share.device), 0.0)
            if len(terms) > 1:
                self._window.add(name, value, share)
            # Gradients are averaged over the processes, shares refer to all of them.
            total = total + weight * share * self._averaged_processes * value
        return total

    def _evaluated(
        self,
        terms: dict[str, tuple[float, Tensor, str]],
        counts_U: Tensor,
        outputs: Any,
        asked: dict,
        return_outputs: bool,
    ) -> Tensor | tuple[Tensor, Any]:
        for name, (_, value, unit) in terms.items():
            self._evaluation.add(name, value, counts_U[self._units.index(unit)])
        task = terms["task_loss"][1]
        if not return_outputs:
            return task
        return task, without(outputs, {"aux_loss", *(name.removeprefix("output_") for name in asked)})

    def _forward(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None, Any]:
        """Mean task loss of the micro-batch, the weighted loss of the model's own routers or None, and the output."""
        # With the count of this micro-batch, those models that normalise by it return the mean as the others do.
        counted = isinstance(labels_of(inputs, shifted=False)[0], Tensor)
        items = self._count(inputs)[UNITS.index(PREDICTIONS)].clamp(min=1) if counted else None
        if self._untasked and labels_of(inputs, shifted=False)[0] is None:
            outputs = model(**inputs)
            return torch.zeros((), device=self.args.device), None, outputs
        apart = bool(self.label_smoother or self.compute_loss_func) and "labels" in inputs
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=items)
        if counted and (self.model_accepts_loss_kwargs or self.compute_loss_func):
            loss = loss / self._averaged_processes  # the Trainer has multiplied by it
        return *self._without_router_loss(loss, outputs, apart=apart), outputs

    def _without_router_loss(self, loss: Tensor, outputs: Any, *, apart: bool) -> tuple[Tensor, Tensor | None]:
        """The loss less those of routers, the base's and an adapter's, and the sum of these, weighted.

        ``apart``: the base never added its own.
        """
        adapted = hasattr(outputs, "aux_loss_folded")
        own, router_loss = getattr(outputs, "base_aux_loss" if adapted else "aux_loss", None), None
        if own is not None:
            own = own.to(loss.device) * (own_balance_weight(self._base) or 0.0)
            loss = loss if apart else loss - own
            router_loss = own if self._base.config.get_text_config().output_router_logits else None
        if adapted and outputs.aux_loss is not None:
            loss = loss - outputs.aux_loss if outputs.aux_loss_folded else loss
            router_loss = outputs.aux_loss if router_loss is None else router_loss + outputs.aux_loss
        return loss, router_loss

    def get_train_dataloader(self) -> DataLoader:
        dataset, collate = self.train_dataset, self.data_collator
        if SAMPLE_IDS in self._loss_columns:
            self.train_dataset = numbered(dataset)
        if self.args.mixup_alpha:
            self.data_collator = drawing_partners(collate, self.args.mixup_alpha)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = dataset, collate

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        heads = [parameter for parameter in self._head_parameters if id(parameter) not in known]
        if heads:
            optimizer.add_param_group({"params": heads, "weight_decay": self.args.weight_decay})
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            average_gradients(self._head_parameters, self.accelerator)
        return loss

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """The micro-batches of an optimizer step; counts what they hold on all processes."""
        for parameter in self._head_parameters:
            parameter.grad = None  # the Trainer does this for the parameters of the model alone
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            check_columns(self.objectives, batches[0], self.extra_tensors)
            self._add_replay(batches)
            whole_U = torch.stack([self._count(batch) for batch in batches]).sum(0)
            if self.args.average_tokens_across_devices:
                whole_U = self.accelerator.reduce(whole_U, "sum") / self.get_tp_size()
            self._whole_batch = whole_U
        return batches, items

    def _add_replay(self, batches: list[dict[str, Any]]) -> None:
        if self._passes.replay is not None:
            others = self._passes.replay.micro_batches(self.state.global_step, len(batches))
            for batch, other in zip(batches, others):
                batch[REPLAY] = other

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self._evaluation.clear()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix") or (args[4] if len(args) > 4 else "eval")
        means = self._evaluation.take(self.accelerator)
        if "task_loss" in means:
            output.metrics[f"{prefix}_loss"] = means.pop("task_loss")
        output.metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._window.take(self.accelerator)
            # Of the optimizer step that has just been made.
            moment = self.state.global_step - 1, self.state.max_steps
            named = {"task": self.task_weight} | {objective.name: objective.weight for objective in self.objectives}
            logs |= {f"{name}_weight": weight(*moment) for name, weight in named.items() if not weight.constant}
            logs |= self.router_usage.take(self.accelerator)
            logs |= self._attention.take(self.accelerator) if self._attention else {}
        super().log(logs, start_time)

    def _weights(self, training: bool) -> dict[str, float]:
        """Name -> weight of the terms to be computed now."""
        if not training:
            # Without dropout a second view is the first one, and states belong to the training.
            left_out = {o.name for o in self._stateful}
            left_out |= {o.name for o in self.objectives if not ONLY_IN_TRAINING.isdisjoint(o.required)}
            return {"task_loss": 1.0} | {o.name: 1.0 for o in self.objectives if o.name not in left_out}
        moment = self.state.global_step, self.state.max_steps
        weights = {objective.name: objective.weight(*moment) for objective in self.objectives}
        return {"task_loss": self.task_weight(*moment)} | {name: weight for name, weight in weights.items() if weight}

    @property
    def _base(self) -> nn.Module:
        """The transformers model inside of wrappers and adapters."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _count(self, inputs: dict[str, Any]) -> Tensor:
        """How many there are of each of ``_units``."""
        counts_U = count(self._of_model(inputs), self.args.device, shifted=self._loss_shifts_labels)
        others = [
            count_of_column(inputs.get(name), self.args.device, shifted=self._loss_shifts_labels)
            for name in self._units[len(UNITS) :]
        ]
        return torch.stack([*counts_U, *others])

    @cached_property
    def _units(self) -> tuple[str, ...]:
        """What terms are means over: those of every batch, and columns that some losses count."""
        return tuple(dict.fromkeys([*UNITS, *(objective.mean_over for objective in self.objectives)]))

    @cached_property
    def _model_collator(self) -> Callable[[list], dict[str, Any]]:
        """For data that isn't trained on as such: without the columns that models don't take."""
        return self._get_collator_with_removed_columns(self.data_collator)

    @cached_property
    def _averaged_processes(self) -> int:
        """Number of processes whose batches make up the whole batch of an optimizer step."""
        return self.accelerator.num_processes // self.get_tp_size() if self.args.average_tokens_across_devices else 1

    @cached_property
    def _untasked(self) -> bool:
        """Whether the task counts for nothing all the time: then a model without a loss will do."""
        return self.task_weight.constant and not self.task_weight.start and not self.compute_loss_func

    @cached_property
    def _class_counts(self) -> Tensor:
        return class_counts(self.train_dataset, self._base.config.num_labels).to(self.args.device)

    @cached_property
    def _loss_columns(self) -> set[str]:
        """Columns of the data that losses need and the model doesn't take."""
        names = {name for objective in self.objectives for name in objective.needs.values()}
        names -= FROM_MODEL.keys() | FROM_TRAINER.keys() | self.extra_tensors
        return names - {"labels", *inspect.signature(self._base.forward).parameters}

    def _of_model(self, inputs: dict[str, Any]) -> dict[str, Any]:
        columns = self._loss_columns | {PARTNERS, SHARES, REPLAY}
        return {name: value for name, value in inputs.items() if name not in columns and not name.startswith(SECOND)}

    def _set_signature_columns_if_needed(self) -> None:
        """Keeps the columns that losses need when the Trainer removes unused ones."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns += [*self._loss_columns, *(SECOND + name for name in self._signature_columns)]

    def _check_model(self) -> None:
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise FuseError(
                "Context and sequence parallelism split a sample's tokens, which the objectives don't support."
            )
        for objective in self.objectives:
            check_needs(objective, self._base, self.train_dataset, self.extra_tensors)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        restore_renamed(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        restore_renamed(self.model, self.state.best_model_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        save_states(self._stateful, output_dir, self.args.process_index)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_states(self._stateful, checkpoint, self.args.process_index)
