"""Diagnostics while training: features of a fixed set of samples are measured at the end of each epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, default_data_collator

from hf_fuse.diagnostics.neural_collapse import neural_collapse
from hf_fuse.diagnostics.separability import separability
from hf_fuse.model_features import classifier_inputs, classifier_of, sample_features

# features (N, D), labels (N,) or None, the model -> name -> number.
Measure = Callable[[Tensor, Tensor | None, nn.Module], Mapping[str, float]]


@torch.no_grad()
def collect_features(model: nn.Module, batches: Any) -> tuple[Tensor, Tensor | None]:
    """Features ``(N, D)``, fp32 on the CPU, and labels ``(N,)`` if the batches have some; the model's mode is kept."""
    rows, labels = [], []
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            inputs = {name: values.to(model.device) for name, values in batch.items() if name != "labels"}
            with classifier_inputs(model) as seen:
                outputs = model(**inputs, output_hidden_states=True)
            rows.append(sample_features(model, inputs, outputs, seen).float().cpu())
            if "labels" in batch:
                labels.append(batch["labels"].cpu())
    finally:
        model.train(was_training)
    return torch.cat(rows), torch.cat(labels) if labels else None


class FeatureCallback(TrainerCallback):
    """Measures features at the end of each epoch, and draws what came of it.

    Every process measures all samples. The numbers are in ``history``, and in ``state.log_history`` of the trainer.

    Args:
        measure: what to measure: :func:`collapse`, or a function of your own.
        dataset: some hundred rows, as the model takes them.
        data_collator: rows -> a batch.
        batch_size: samples per forward pass.
        chart: file to draw the numbers to at the end of training.

    Attributes:
        history: one dictionary per epoch, with ``epoch`` and ``step``.
    """

    def __init__(
        self,
        measure: Measure,
        dataset: Any,
        data_collator: Callable = default_data_collator,
        *,
        batch_size: int = 32,
        chart: str | Path | None = None,
    ):
        self.measure = measure
        self.batches = DataLoader(dataset, batch_size, collate_fn=data_collator)
        self.chart = chart
        self.history: list[dict[str, float]] = []

    def on_epoch_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        model = getattr(model, "module", model)  # without DDP around it
        features_ND, labels_N = collect_features(model, self.batches)
        found = dict(self.measure(features_ND, labels_N, model))
        self.history.append({"epoch": state.epoch, "step": state.global_step, **found})
        state.log_history.append(dict(self.history[-1]))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.chart is not None and state.is_world_process_zero:
            self.plot(self.chart)

    def plot(self, path: str | Path) -> Path:
        """Draws the numbers over the epochs.

        Raises:
            FuseError: nothing was measured, unknown file format, or matplotlib is missing.
        """
        from hf_fuse.plot_points import lines

        names = [name for name in (self.history[0] if self.history else ()) if name not in ("epoch", "step")]
        series = {name: [(row["epoch"], row[name]) for row in self.history] for name in names}
        return lines(
            series, path=path, title="features while training", xlabel="epoch", ylabel="value", logarithmic=False
        )


def collapse(features_ND: Tensor, labels_N: Tensor | None, model: nn.Module) -> dict[str, float]:
    """Measure of :class:`FeatureCallback`: neural collapse of a classifier."""
    classifier = classifier_of(model)
    head = () if classifier is None else (classifier.weight.float().cpu(), _bias(classifier))
    return neural_collapse(features_ND, labels_N, *head).to_dict()


def _bias(layer: nn.Linear) -> Tensor | None:
    return None if layer.bias is None else layer.bias.float().cpu()


class SeparabilityStop(FeatureCallback):
    """Stops training when the separability of unlabelled samples rises no more.

    Args:
        clusters: how many classes there are to be.
        dataset, data_collator, batch_size, chart: as of :class:`FeatureCallback`.
        patience: epochs without a rise before training stops.
        threshold: relative rise that counts.
    """

    def __init__(
        self, clusters: int, dataset: Any, *args: Any, patience: int = 3, threshold: float = 0.01, **kwargs: Any
    ):
        super().__init__(
            lambda features, _, __: {"separability": separability(features, clusters)}, dataset, *args, **kwargs
        )
        self.patience = patience
        self.threshold = threshold

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_epoch_end(args, state, control, **kwargs)
        values = [row["separability"] for row in self.history]
        best, since = values[0], 0
        for value in values[1:]:
            best, since = (value, 0) if value > best * (1 + self.threshold) else (best, since + 1)
        if since >= self.patience:
            control.should_training_stop = True
