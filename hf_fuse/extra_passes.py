"""What losses ask for beyond the output of a forward pass: what goes on inside of it, and further passes.

N predictions or samples that have a label, B samples, C classes, D features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from hf_fuse.attention_capture import attention_layers, captured_attention
from hf_fuse.batch_counts import IGNORED, labels_of
from hf_fuse.errors import FuseError
from hf_fuse.input_points import PARTNERS, SHARES, Move, mixture, moved, with_united_masks
from hf_fuse.loss_inputs import SECOND, forward_options, kept_predictions
from hf_fuse.model_features import classifier_inputs, classifier_of, of_labelled, sample_features
from hf_fuse.old_model import OldModel
from hf_fuse.replay import REPLAY, ReplayStream

if TYPE_CHECKING:
    from hf_fuse.trainer import FuseTrainer

# What must be given for what losses ask for.
FROM = {
    "old_model": ("old_features", "old_head", "old_bias", "old_class_means"),
    "replay_dataset": ("replay_logits", "replay_labels"),
    "mixup_alpha": ("partner_labels", "shares"),
}
# Without gradients or dropout they can't be computed, or say nothing.
ONLY_IN_TRAINING = {"second_logits", "second_features", "logits_at", "features_at"}


class ExtraPasses:
    """The passes of one trainer.

    Args:
        trainer: whose model, data and settings they use.
        old_model: to stay compatible with, or None.
        replay_dataset: to go on with beside the training set, or None.

    Raises:
        FuseError: an objective needs one that isn't given, or the other way round.
    """

    def __init__(self, trainer: FuseTrainer, old_model: nn.Module | str | None, replay_dataset: Any) -> None:
        self._trainer, self._replay_dataset = trainer, replay_dataset
        given = {"old_model": old_model, "replay_dataset": replay_dataset, "mixup_alpha": trainer.args.mixup_alpha}
        required = {name: objective.name for objective in trainer.objectives for name in objective.required}
        wanted = {name for objective in trainer.objectives for name in objective.needs.values()}
        for source, names in FROM.items():
            user = next((required[name] for name in names if name in required), None)
            if user and not given[source]:
                raise FuseError(f"objectives.{user}: needs {source}. Give it to the FuseTrainer or its FuseConfig.")
            if given[source] and wanted.isdisjoint(names):
                raise FuseError(f"{source} is given, but none of the objectives uses it.")
        if given["mixup_alpha"] and not trainer._untasked:
            raise FuseError(
                "mixup_alpha: the task loss knows only one of the two labels of a mixed sample. Set objectives.task to "
                "0; decoupled_mixup contains the cross-entropy of both."
            )
        self._old = OldModel(old_model, trainer.args.device) if old_model is not None else None
        # Before the training rather than at its first step.
        if "head" in required:
            self._check_classifier(trainer._base)
        if "old_head" in required:
            self._check_classifier(self._old.model)

    # ---- what goes in and on

    @contextlib.contextmanager
    def watching(self, needed: set[str], inputs: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, list]]]:
        """Inputs for the forward pass inside, mixed if the batch says so, and what is seen in it, by name."""
        base, given = self._trainer._base, self._trainer._of_model(inputs)
        seen: dict[str, list] = {}
        with contextlib.ExitStack() as stack:
            if PARTNERS in inputs:
                given = stack.enter_context(
                    moved(
                        base,
                        with_united_masks(given, inputs[PARTNERS]),
                        mixture(inputs[PARTNERS], inputs[SHARES]),
                    )
                )
            if "features" in needed:
                seen["features"] = stack.enter_context(classifier_inputs(base))
            if "attention" in needed:
                layers = [*attention_layers(base).values()]
                layer, index = layers[self._trainer.state.global_step % len(layers)]
                seen["attention"] = stack.enter_context(captured_attention(layer, index))
            yield given, seen

    def tensors(
        self, needed: set[str], model: nn.Module, inputs: dict[str, Any], outputs: Any, seen: dict[str, list]
    ) -> dict[str, Any]:
        """Name -> what losses get, of those in ``needed`` that come from here."""
        base, labels = self._trainer._base, labels_of(inputs, shifted=False)[0]
        found: dict[str, Any] = {}
        if "features" in needed:
            found["features"] = of_labelled(sample_features(base, inputs, outputs, seen["features"]), labels)
        if seen.get("attention"):
            found["attention"] = seen["attention"][-1]
        if needed & {"second_logits", "second_features"}:
            found |= self._second_view(needed, model, inputs)
        if "logits_at" in needed:
            found["logits_at"] = lambda move: self._logits(model, inputs, move)
        if "features_at" in needed:
            found["features_at"] = lambda move: self._features(model, inputs, move)
        if "partner_labels" in needed and PARTNERS in inputs:
            found |= _partners(inputs, labels)
        if needed & {"head", "head_bias"}:
            classifier = classifier_of(base)
            found |= {"head": classifier.weight, "head_bias": classifier.bias}
        if needed & {"replay_logits", "replay_labels"} and REPLAY in inputs:
            found |= self._replayed(model, inputs[REPLAY])
        if needed & {"old_head", "old_bias"}:
            classifier = classifier_of(self._old.model)
            found |= {"old_head": classifier.weight, "old_bias": classifier.bias}
        if "old_features" in needed:
            found["old_features"] = of_labelled(self._old.features(self._trainer._of_model(inputs)), labels)
        if "old_class_means" in needed:
            found["old_class_means"] = self._old_class_means
        return found

    # ---- further passes

    def _second_view(self, needed: set[str], model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """For the columns ``second_*``, or for the same inputs under other dropout."""
        base = self._trainer._base
        second = {name.removeprefix(SECOND): value for name, value in inputs.items() if name.startswith(SECOND)}
        second = second or self._trainer._of_model(inputs)
        if not getattr(base.config, "is_encoder_decoder", False):
            second = {name: value for name, value in second.items() if name != "labels"}
        wanted = forward_options({"features"}, base) if "second_features" in needed else {}
        with classifier_inputs(base) as seen:
            outputs = model(**second, **wanted)
        found, (labels, shifted) = {}, labels_of(inputs, shifted=self._trainer._loss_shifts_labels)
        if "second_features" in needed:
            found["second_features"] = of_labelled(sample_features(base, second, outputs, seen), labels)
        if "second_logits" in needed and labels is not None:
            found["second_logits"], _ = kept_predictions(outputs.logits, labels, shifted=shifted)
        return found

    def _logits(self, model: nn.Module, inputs: dict[str, Any], move: Move) -> Tensor:
        labels, shifted = labels_of(inputs, shifted=self._trainer._loss_shifts_labels)
        with moved(self._trainer._base, _unlabelled(self._trainer._of_model(inputs)), move) as given:
            return kept_predictions(model(**given).logits, labels, shifted=shifted)[0]

    def _features(self, model: nn.Module, inputs: dict[str, Any], move: Move) -> Tensor:
        base = self._trainer._base
        with (
            classifier_inputs(base) as seen,
            moved(base, _unlabelled(self._trainer._of_model(inputs)), move) as given,
        ):
            outputs = model(**given, **forward_options({"features"}, base))
        return of_labelled(sample_features(base, given, outputs, seen), labels_of(inputs, shifted=False)[0])

    def _replayed(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        labels, shifted = labels_of(batch, shifted=self._trainer._loss_shifts_labels)
        outputs = model(**_unlabelled(batch))
        logits, labels = kept_predictions(outputs.logits, labels, shifted=shifted)
        return {"replay_logits": logits, "replay_labels": labels}

    # ---- what stays

    @staticmethod
    def _check_classifier(model: nn.Module) -> None:
        if classifier_of(model) is None:
            raise FuseError(
                f"objectives: one needs the classifier of whole samples, but {type(model).__name__} has none. Load the "
                "model as AutoModelForSequenceClassification, AutoModelForImageClassification or the like."
            )

    @cached_property
    def replay(self) -> ReplayStream | None:
        """Batches of the second data set, if there is one."""
        if self._replay_dataset is None:
            return None
        trainer, args = self._trainer, self._trainer.args
        return ReplayStream(
            self._replay_dataset, trainer._model_collator, seed=args.seed,
            batch_size=args.replay_batch_size or args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps, process=args.process_index,
            processes=trainer.accelerator.num_processes,
        )  # fmt: skip

    @cached_property
    def _old_class_means(self) -> Tensor:
        """``(C, D)`` over the training set, NaN for classes without a sample; each process reads a part of it."""
        trainer, args = self._trainer, self._trainer.args
        if not hasattr(trainer.train_dataset, "__len__"):
            raise FuseError("old_class_means: the training set is a stream, which can't be read twice.")
        rows = range(args.process_index, len(trainer.train_dataset), trainer.accelerator.num_processes)
        batches = DataLoader(
            Subset(trainer.train_dataset, rows), args.per_device_eval_batch_size, collate_fn=trainer._model_collator
        )
        # Making an iterator of it draws a random number.
        with torch.random.fork_rng(devices=[]):
            sums_CD, counts_C = self._old.class_sums(batches, trainer._base.config.num_labels)
        sums_CD, counts_C = (trainer.accelerator.reduce(value, "sum") for value in (sums_CD, counts_C))
        return sums_CD / counts_C.unsqueeze(-1)  # 0 / 0 is NaN


def _unlabelled(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}


def _partners(inputs: dict[str, Any], labels: Any) -> dict[str, Tensor]:
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() != 1 or (labels == IGNORED).any():
        raise FuseError("mixup_alpha: needs one class as the label of every sample.")
    return {"partner_labels": labels[inputs[PARTNERS]], SHARES: inputs[SHARES]}
