"""LaSO: from the features of two samples to those of one with the intersection, union or difference of their labels.

(Label-Set Operations, https://arxiv.org/abs/1902.09811.) New samples for label combinations that the data lacks. Losses
and weights are recalled from the paper.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_fuse.errors import FuseError
from hf_fuse.heads.head import features
from hf_fuse.heads.network import arrays_of, restore, train
from hf_fuse.heads.saved import SavedEstimator

OPERATIONS = ("intersection", "union", "difference")


class _Operations(nn.Module):
    def __init__(self, width: int, hidden: int, labels: int):
        super().__init__()
        self.classifier = nn.Linear(width, labels)
        self.operations = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(2 * width, hidden), nn.LeakyReLU(), nn.Linear(hidden, width))
                for name in OPERATIONS
            }
        )

    def apply_to(self, name: str, first: Tensor, second: Tensor) -> Tensor:
        return self.operations[name](torch.cat([first, second], dim=-1))


class LabelSetOperations(SavedEstimator):
    """Networks that do set operations on the labels of features, judged by a linear classifier trained with them.

    Args:
        hidden: units of each network.
        consistency: weight of what holds for sets: intersection and union are symmetric, a set with itself is itself,
            and a set is the union of its difference from another and their intersection.
        epochs, batch_size, learning_rate, weight_decay, seed: of the training.
    """

    STATE = ("network_",)
    LEARNED = ("n_features_in_", "n_labels_")

    def __init__(
        self,
        hidden: int = 128,
        consistency: float = 0.1,
        epochs: int = 100,
        batch_size: int = 64,
        learning_rate: float = 3e-3,
        weight_decay: float = 1e-4,
        seed: int = 0,
    ):
        self.hidden = hidden
        self.consistency = consistency
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.seed = seed

    def fit(self, X: Any, Y: Any) -> LabelSetOperations:
        """Learns from features ``(N, D)`` and label sets ``(N, L)`` of 0 and 1.

        Raises:
            FuseError: Y is no such table.
        """
        X, Y = torch.as_tensor(features(X)).float(), torch.as_tensor(features(Y)).float()
        if len(X) != len(Y) or not ((Y == 0) | (Y == 1)).all():
            raise FuseError(f"Y has the shape {tuple(Y.shape)}; expected a row of 0 and 1 for each of {len(X)} rows.")
        self.n_features_in_, self.n_labels_ = X.shape[1], Y.shape[1]
        self._make()
        train(
            self.network_, self._loss, X, Y, epochs=self.epochs, batch_size=self.batch_size,
            learning_rate=self.learning_rate, weight_decay=self.weight_decay, seed=self.seed,
        )  # fmt: skip
        return self

    def _loss(self, X: Tensor, Y: Tensor) -> Tensor:
        network, other = self.network_, torch.randperm(len(X))
        other_X, other_Y = X[other], Y[other]
        wanted = {"intersection": Y * other_Y, "union": torch.maximum(Y, other_Y), "difference": Y * (1 - other_Y)}
        made = {name: network.apply_to(name, X, other_X) for name in OPERATIONS}
        loss = nn.functional.binary_cross_entropy_with_logits(network.classifier(X), Y)
        for name in OPERATIONS:
            loss = loss + nn.functional.binary_cross_entropy_with_logits(network.classifier(made[name]), wanted[name])
        mse = nn.functional.mse_loss
        kept = sum(
            mse(made[name], network.apply_to(name, other_X, X)) + mse(network.apply_to(name, X, X), X)
            for name in ("intersection", "union")
        )
        kept = kept + mse(network.apply_to("union", made["difference"], made["intersection"]), X)
        return loss + self.consistency * kept

    @torch.no_grad()
    def combine(self, operation: str, first: Any, second: Any) -> np.ndarray:
        """Features ``(N, D)``.

        Args:
            operation: ``intersection``, ``union`` or ``difference`` (labels of the first without those of the second).
        """
        if operation not in OPERATIONS:
            raise FuseError(f"operation is {operation!r}; expected {', '.join(OPERATIONS)}.")
        pair = [self._features(X) for X in (first, second)]
        return self.network_.apply_to(operation, *pair).numpy()

    @torch.no_grad()
    def predict_proba(self, X: Any) -> np.ndarray:
        """Probability of each label ``(N, L)``, of real or combined features."""
        return self.network_.classifier(self._features(X)).sigmoid().numpy()

    def _features(self, X: Any) -> Tensor:
        self._fitted()
        return torch.as_tensor(features(X)).float()

    def _make(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.network_ = _Operations(self.n_features_in_, self.hidden, self.n_labels_)

    def _state(self) -> dict[str, np.ndarray]:
        return arrays_of(self.network_)

    def _restore(self, arrays: dict[str, np.ndarray]) -> None:
        self._make()
        restore(self.network_, arrays)
