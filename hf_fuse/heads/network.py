"""Heads that are small networks, trained on features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from hf_fuse.heads.head import Head

SomeHead = TypeVar("SomeHead", bound="NetworkHead")


class NetworkHead(Head):
    """A head whose state is a torch module, trained with AdamW on cosine-scheduled epochs.

    ``partial_fit`` trains on from where the last call ended, on the new samples only; classes can't be added later.

    Args:
        epochs, batch_size, learning_rate, weight_decay: of each call of ``fit`` or ``partial_fit``.
        seed: of the start values, the order of samples and dropout.
    """

    STATE: ClassVar[tuple[str, ...]] = ("network_",)

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

    def partial_fit(self: SomeHead, X: Any, y: Any, classes: Any = None) -> SomeHead:
        """Trains on.

        Args:
            classes: all that there will be; needed in the first call if ``y`` does not have all.

        Raises:
            InputError: classes that were not there before.
        """
        X, numbers = self._samples(X, y, classes)
        if not hasattr(self, "network_"):
            self._make()
        train(
            self.network_, lambda rows, targets: nn.functional.cross_entropy(self.network_(rows), targets),
            torch.as_tensor(X).float(), torch.as_tensor(numbers), epochs=self.epochs, batch_size=self.batch_size,
            learning_rate=self.learning_rate, weight_decay=self.weight_decay, seed=self.seed,
        )  # fmt: skip
        return self

    @torch.no_grad()
    def scores(self, X: Any) -> np.ndarray:
        """Logits ``(N, C)``."""
        rows_ND = torch.as_tensor(self._features(X)).float()
        return torch.cat([self.network_(rows) for rows in rows_ND.split(self.batch_size)]).double().numpy()

    def _network(self, width: int, classes: int) -> nn.Module:
        """A new network for features of this width."""
        raise NotImplementedError

    def _make_room(self, classes: np.ndarray, places: np.ndarray) -> None:
        self._no_new_classes()

    def _make(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.network_ = self._network(self.n_features_in_, len(self.classes_)).eval()

    def _state(self) -> dict[str, np.ndarray]:
        return arrays_of(self.network_)

    def _restore(self, arrays: dict[str, np.ndarray]) -> None:
        self._make()
        restore(self.network_, arrays)


def arrays_of(network: nn.Module) -> dict[str, np.ndarray]:
    """Everything that a network has learned."""
    return {name: values.numpy() for name, values in network.state_dict().items()}


def restore(network: nn.Module, arrays: dict[str, np.ndarray]) -> None:
    """Takes back what :func:`arrays_of` gave."""
    network.load_state_dict({name: torch.as_tensor(values) for name, values in arrays.items()})


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
    batches = -(-count // batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    network.train()
    with torch.random.fork_rng(devices=[]):  # of dropout
        torch.manual_seed(seed)
        for _ in tqdm(range(epochs), desc=type(network).__name__, unit="epoch", disable=None):
            # Of nearly the same size: one sample left over would break a BatchNorm.
            for rows in torch.randperm(count, generator=order).tensor_split(batches):
                optimizer.zero_grad()
                loss(*(column[rows] for column in columns)).backward()
                optimizer.step()
                schedule.step()
    network.eval()
