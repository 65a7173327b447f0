"""Heads that are small networks, trained on features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from hf_fuse.heads.head import Head, features

SomeHead = TypeVar("SomeHead", bound="NetworkHead")


class NetworkHead(Head):
    """A head whose state is a torch module, trained with AdamW on cosine-scheduled epochs.

    ``partial_fit`` trains on from where the last call ended, on the new samples only; classes can't be added.

    Args:
        epochs, batch_size, learning_rate, weight_decay: of each call of ``fit`` or ``partial_fit``.
        seed: of the start values, the order of samples and dropout.
    """

    DIMENSIONS: ClassVar[int] = 2  # of X

    def __init__(
        self,
        epochs: int = 50,
        batch_size: int = 64,
        learning_rate: float = 1e-2,
        weight_decay: float = 1e-4,
        seed: int = 0,
    ):
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.seed = seed

    def fit(self: SomeHead, X: Any, y: Any) -> SomeHead:
        self.__dict__.pop("network_", None)
        return super().fit(X, y)

    def partial_fit(self: SomeHead, X: Any, y: Any) -> SomeHead:
        """Trains on.

        Raises:
            ValueError: classes that were not there before.
        """
        X = self._rows(X)
        known = len(getattr(self, "classes_", ()))
        targets_N = torch.as_tensor(self._learned(y, len(X)))
        if known and len(self.classes_) != known:
            raise ValueError(f"{type(self).__name__} can't learn new classes. Call fit with all of them.")
        if not hasattr(self, "network_"):
            self._make(X.shape[-1])
        train(
            self.network_, lambda rows, targets: self._loss(self.network_(rows), targets), X, targets_N,
            epochs=self.epochs, batch_size=self.batch_size, learning_rate=self.learning_rate,
            weight_decay=self.weight_decay, seed=self.seed,
        )  # fmt: skip
        return self

    @torch.no_grad()
    def decision_function(self, X: Any) -> np.ndarray:
        """Logits ``(N, C)``."""
        self._fitted()
        return torch.cat([self.network_(rows) for rows in self._rows(X).split(self.batch_size)]).double().numpy()

    def _network(self, width: int, classes: int) -> nn.Module:
        """A new network for features of this width."""
        raise NotImplementedError

    def _loss(self, logits_NC: Tensor, targets_N: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits_NC, targets_N)

    def _rows(self, X: Any) -> Tensor:
        return torch.as_tensor(features(X, self.DIMENSIONS)).float()

    def _make(self, width: int) -> None:
        self.width_ = width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.network_ = self._network(width, len(self.classes_)).eval()

    def _state(self) -> dict[str, np.ndarray]:
        return {"width": np.array(self.width_)} | {n: v.numpy() for n, v in self.network_.state_dict().items()}

    def _restore(self, arrays: dict[str, np.ndarray]) -> None:
        self._make(arrays["width"].item())
        self.network_.load_state_dict({n: torch.as_tensor(v) for n, v in arrays.items() if n != "width"})


def train(
    network: nn.Module,
    loss: Callable[..., Tensor],
    *columns: Tensor,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
) -> None:
    """Trains in place; random numbers elsewhere stay what they were.

    Args:
        loss: rows of the columns -> mean loss.
        columns: of N rows each.
    """
    order = torch.Generator().manual_seed(seed)
    count = len(columns[0])
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-count // batch_size))
    network.train()
    with torch.random.fork_rng(devices=[]):  # of dropout
        torch.manual_seed(seed)
        for _ in tqdm(range(epochs), desc=type(network).__name__, unit="epoch", disable=None):
            for rows in torch.randperm(count, generator=order).split(batch_size):
                optimizer.zero_grad()
                loss(*(column[rows] for column in columns)).backward()
                optimizer.step()
                schedule.step()
    network.eval()
