"""Diagnostics while training: features of a fixed set of samples are measured at the end of each epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import TrainerCallback, default_data_collator

from hf_fuse.diagnostics.neural_collapse import neural_collapse
from hf_fuse.diagnostics.separability import separability
from hf_fuse.diagnostics.unit_matching import linear_cka, match_units
from hf_fuse.diagnostics.v_information import complexity, main_direction, v_information
from hf_fuse.errors import FuseError
from hf_fuse.model_features import classifier_inputs, classifier_of, pooled, sample_features

# features (N, D) or those of each layer, labels (N,) or None, the model -> name -> number.
Measure = Callable[[Any, "Tensor | None", nn.Module], Mapping[str, float]]


@torch.no_grad()
def collect_features(model: nn.Module, batches: Any, *, layers: bool = False) -> tuple[Any, Tensor | None]:
    """Features ``(N, D)``, fp32 on the CPU, and labels ``(N,)`` if the batches have some; the model's mode is kept.

    With ``layers`` the features are a list: of each layer the mean over the tokens, the embeddings first.
    """
    rows, labels = [], []
    was_training = model.training
    model.eval()
    try:
        for batch in tqdm(batches, desc="features", unit="batch", leave=False, disable=None):
            inputs = {name: values.to(model.device) for name, values in batch.items() if name != "labels"}
            with classifier_inputs(model) as seen:
                outputs = model(**inputs, output_hidden_states=True)
            if layers:
                found = [pooled(states, inputs.get("attention_mask")) for states in outputs.hidden_states]
            else:
                found = [sample_features(model, inputs, outputs, seen)]
            rows.append([features_BD.float().cpu() for features_BD in found])
            if "labels" in batch:
                labels.append(batch["labels"].cpu())
    finally:
        model.train(was_training)
    joined = [torch.cat(parts) for parts in zip(*rows)]
    return joined if layers else joined[0], torch.cat(labels) if labels else None


class FeatureCallback(TrainerCallback):
    """Measures features at the end of each epoch, and draws what came of it.

    Every process measures all samples; the first one's numbers count. They are in ``history``, and in
    ``state.log_history`` of the trainer.

    Args:
        measure: what to measure: :func:`collapse`, :func:`likeness`, :func:`layer_information`, or a function of your
            own.
        dataset: some hundred rows, as the model takes them.
        data_collator: rows -> a batch.
        batch_size: samples per forward pass.
        chart: file to draw the numbers to at the end of training.
        layers: gives the measure the features of every layer.
        prefix: in front of the names, for several callbacks in one run.

    Attributes:
        history: one dictionary per epoch, with ``epoch`` and ``step``; of this training, from before a resume too.
    """

    def __init__(
        self,
        measure: Measure,
        dataset: Any,
        data_collator: Callable = default_data_collator,
        *,
        batch_size: int = 32,
        chart: str | Path | None = None,
        layers: bool = False,
        prefix: str = "",
    ):
        if chart is not None:
            from hf_fuse.plots import _checked

            _checked(chart)  # rather than after the training
        self.layers, self.prefix = layers, prefix
        self.measure = measure
        self.batches = DataLoader(dataset, batch_size, collate_fn=data_collator)
        self.chart = chart
        self.history: list[dict[str, float]] = []

    def on_epoch_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        model = getattr(model, "module", model)  # without DDP around it
        features, labels_N = collect_features(model, self.batches, layers=self.layers)
        found = {self.prefix + name: value for name, value in self.measure(features, labels_N, model).items()}
        # Processes that decided by their own rounding would not stop at the same time.
        (found,) = broadcast_object_list([found])
        state.log_history.append({"epoch": state.epoch, "step": state.global_step, **found})
        self.history = [dict(row) for row in state.log_history if found.keys() <= row.keys()]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.chart is not None and state.is_world_process_zero:
            self.plot(self.chart)

    def plot(self, path: str | Path) -> Path:
        """Draws the numbers over the epochs.

        Raises:
            FuseError: nothing was measured, unknown file format, or matplotlib is missing.
        """
        from hf_fuse.plot_points import lines

        names = [name for name in (self.history[-1] if self.history else ()) if name not in ("epoch", "step")]
        series = {name: [(row["epoch"], row[name]) for row in self.history] for name in names}
        return lines(
            series, path=path, title="features while training", xlabel="epoch", ylabel="value", logarithmic=False
        )


def collapse(features_ND: Tensor, labels_N: Tensor | None, model: nn.Module) -> dict[str, float]:
    """Measure of :class:`FeatureCallback`: neural collapse of a classifier.

    Raises:
        FuseError: the data has no labels.
    """
    if labels_N is None:
        raise FuseError("neural collapse needs samples with labels.")
    classifier = classifier_of(model)
    head = () if classifier is None else (classifier.weight.float().cpu(), _bias(classifier))
    return neural_collapse(features_ND, labels_N, *head).to_dict()


def _bias(layer: nn.Linear) -> Tensor | None:
    return None if layer.bias is None else layer.bias.float().cpu()


def likeness(reference_ND: Tensor) -> Measure:
    """Measure of :class:`FeatureCallback`: how like the features still are to others of the same samples.

    Args:
        reference_ND: as of :func:`collect_features`: of the model before training, or of another one.

    Returns:
        A measure of ``cka`` and, for the same number of units, ``one_to_one``, ``best`` and ``redundancy``.
    """

    def measure(features_ND: Tensor, labels_N: Tensor | None, model: nn.Module) -> dict[str, float]:
        found = {"cka": linear_cka(features_ND, reference_ND)}
        if features_ND.shape == reference_ND.shape:
            found |= match_units(features_ND, reference_ND).to_dict()
        return found

    return measure


def layer_information(layers: list[Tensor], labels_N: Tensor | None, model: nn.Module) -> dict[str, float]:
    """Measure of :class:`FeatureCallback` with ``layers=True``: V-information of each layer about the direction in
    which the last one's samples differ most, and its complexity.
    """
    target_N = main_direction(layers[-1])
    found = {f"layer_{number}": v_information(layer, target_N) for number, layer in enumerate(layers[:-1])}
    return found | {"complexity": complexity(layers[:-1], target_N)}


class SeparabilityStop(FeatureCallback):
    """Stops training when the separability of unlabelled samples rises no more.

    Args:
        clusters: how many classes there are to be.
        dataset, data_collator, batch_size, chart, prefix: as of :class:`FeatureCallback`.
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
        values = [row[f"{self.prefix}separability"] for row in self.history]
        best, since = values[0], 0
        for value in values[1:]:
            best, since = (value, 0) if value > best * (1 + self.threshold) else (best, since + 1)
        if since >= self.patience:
            control.should_training_stop = True
