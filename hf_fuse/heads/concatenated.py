"""Cat: the features of several models side by side, and one layer on all of them.

(https://arxiv.org/abs/2212.07346.) Networks trained from different seeds learn different features; together they serve
better than one network of their size once the data changes. Fine-tune each model alone first, then train this layer:
fine-tuning the concatenation as one network loses the gain. With scikit-learn the features are
``make_union(EncoderFeatures(first), EncoderFeatures(second))``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_fuse.errors import FuseError
from hf_fuse.heads.network import NetworkHead, train


def concatenated_layer(layers: Sequence[nn.Linear]) -> nn.Linear:
    """A layer on concatenated features with exactly the mean of the models' logits: ``[W_1, ..., W_n] / n``.

    Args:
        layers: the last layer of each model, in the order of the features, over the same classes.

    Raises:
        FuseError: no layers, or other numbers of classes.
    """
    if not layers or len({layer.out_features for layer in layers}) > 1:
        raise FuseError(f"layers: {[layer.out_features for layer in layers]} classes; expected the same of each model.")
    made = nn.Linear(sum(layer.in_features for layer in layers), layers[0].out_features)
    with torch.no_grad():
        made.weight.copy_(torch.cat([layer.weight.float() for layer in layers], dim=1) / len(layers))
        made.bias.copy_(sum(layer.bias.float() for layer in layers if layer.bias is not None) / len(layers))
    return made


class Concatenated(NetworkHead):
    """A linear layer on concatenated features, trained from the mean of the models' own layers.

    Args:
        start: the models' last layers, in the order of the features and for the classes in sorted order; none: zeros.
        batch_norm: normalises the features over the batch first; then ``start`` does not fit.
        epochs, batch_size, learning_rate, weight_decay, seed: as of :class:`~hf_fuse.heads.network.NetworkHead`; 2
            epochs at 1e-3 in the reference.
    """

    def __init__(
        self,
        start: Sequence[nn.Linear] | None = None,
        batch_norm: bool = False,
        epochs: int = 2,
        batch_size: int = 64,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-4,
        seed: int = 0,
    ):
        super().__init__(epochs, batch_size, learning_rate, weight_decay, seed)
        self.start = start
        self.batch_norm = batch_norm

    def _network(self, width: int, classes: int) -> nn.Module:
        layer = nn.Linear(width, classes)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        if self.start is not None:
            if self.batch_norm:
                raise FuseError("start: the models' layers take features as they are. Leave out batch_norm.")
            layer = concatenated_layer(self.start)
            if (layer.in_features, layer.out_features) != (width, classes):
                raise FuseError(
                    f"start: layers for {layer.in_features} features and {layer.out_features} classes; the data has "
                    f"{width} and {classes}."
                )
        return nn.Sequential(nn.BatchNorm1d(width), layer) if self.batch_norm else nn.Sequential(layer)

    def _parameters(self) -> dict[str, Any]:
        # The start layers have done their work.
        return super()._parameters() | {"start": None}


class Student(nn.Module):
    """A network on the inputs of a head with one output per concatenated model, for :func:`distilled`."""

    def __init__(self, body: nn.Module, width: int, widths: Sequence[int]):
        super().__init__()
        self.body = body
        self.members = nn.ModuleList(nn.Linear(width, size) for size in widths)

    def forward(self, inputs: Tensor) -> list[Tensor]:
        features_ND = self.body(inputs)
        return [member(features_ND) for member in self.members]


def distilled(
    body: nn.Module,
    width: int,
    inputs: Tensor,
    members: Sequence[np.ndarray | Tensor],
    *,
    epochs: int = 20,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-4,
    seed: int = 0,
) -> nn.Module:
    """Trains one network whose features predict those of all members, each by a layer of its own (squared error).

    Args:
        body: inputs -> features ``(N, width)``; trained in place and returned.
        inputs: ``(N, ...)``.
        members: features ``(N, D_m)`` of each model on the same samples.
    """
    targets = [torch.as_tensor(np.asarray(member)).float() for member in members]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = Student(body, width, [target.shape[1] for target in targets])

    def loss(rows: Tensor, *wanted: Tensor) -> Tensor:
        return sum(nn.functional.mse_loss(found, target) for found, target in zip(student(rows), wanted)) / len(wanted)

    train(
        student, loss, inputs, *targets, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate,
        weight_decay=weight_decay, seed=seed,
    )  # fmt: skip
    return body
