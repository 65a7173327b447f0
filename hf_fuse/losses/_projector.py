"""Layers between a model's features and a loss, which are thrown away after the training."""

from __future__ import annotations

from torch import nn

from hf_fuse.model_features import feature_size


def projector(model: nn.Module, hidden_size: int, size: int) -> nn.Sequential:
    """Two linear layers on the features of ``model``.

    Without the batch normalisation that papers have between them: it would depend on how a batch is split.
    """
    return nn.Sequential(nn.Linear(feature_size(model), hidden_size), nn.ReLU(), nn.Linear(hidden_size, size))
