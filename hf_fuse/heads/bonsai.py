"""Bonsai: rich features by rounds of training, each on what the rounds before got wrong
(https://arxiv.org/abs/2203.15516).

A short plain training finds the easiest features. Each further round starts afresh and minimises the loss of the worst
group, groups being what earlier rounds got right and wrong. One network then learns to predict what every round says,
from which a classifier starts. For data whose easy features will not hold elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from hf_fuse.errors import FuseError
from hf_fuse.heads.network import NetworkHead


def worst_group_loss(losses_N: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """The largest mean loss of a group; groups ``(N,)`` are masks, empty ones do not count.

    Raises:
        FuseError: all groups are empty.
    """
    means = [losses_N[group].mean() for group in groups if group.any()]
    if not means:
        raise FuseError("worst-group loss: all groups are empty.")
    return torch.stack(means).max()


class Bonsai(NetworkHead):
    """A network of one hidden layer on inputs ``(N, D)``: pixels, or features of an encoder.

    Args:
        rounds: of training, the plain one included.
        hidden: units.
        first_steps: of the plain round. Short: a long one makes no errors, and leaves no groups.
        round_steps: of each further round, on all samples at once.
        synthesis_steps: of the network that learns what all rounds say.
        l2: weight of the squared parameters in the rounds.
        batch_size: of the synthesis; half of a batch are samples on which all rounds agree, as far as there are some.
        learning_rate: of Adam, throughout.
        epochs, weight_decay: of the classifier that is trained on the features afterwards (``epochs=0``: the mean of
            the rounds' own output layers).
        seed: of everything random.

    Attributes:
        rounds_: number of rounds that were trained.
    """

    LEARNED = (*NetworkHead.LEARNED, "rounds_")

    def __init__(
        self,
        rounds: int = 2,
        hidden: int = 390,
        first_steps: int = 51,
        round_steps: int = 501,
        synthesis_steps: int = 501,
        l2: float = 1.1e-3,
        batch_size: int = 256,
        learning_rate: float = 5e-4,
        epochs: int = 20,
        weight_decay: float = 1e-4,
        seed: int = 0,
    ):
        super().__init__(epochs, batch_size, learning_rate, weight_decay, seed)
        self.rounds = rounds
        self.hidden = hidden
        self.first_steps = first_steps
        self.round_steps = round_steps
        self.synthesis_steps = synthesis_steps
        self.l2 = l2

    def fit(self, X: Any, y: Any) -> Bonsai:
        """Rounds, synthesis, and the classifier on the features found."""
        self._forget()
        rows_ND, targets_N = self._samples(X, y)
        self._make()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self._grow(torch.as_tensor(rows_ND).float(), torch.as_tensor(targets_N))
        return self.partial_fit(X, y) if self.epochs else self

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Bonsai:
        """Trains the classifier on; the features stay. The first call is :meth:`fit`."""
        if not hasattr(self, "rounds_"):
            return self.fit(X, y)
        self.network_[0].requires_grad_(False)
        return super().partial_fit(X, y)

    def transform(self, X: Any) -> np.ndarray:
        """The features ``(N, hidden)``, for another classifier."""
        rows_ND = torch.as_tensor(self._features(X)).float()
        with torch.no_grad():
            return self.network_[0](rows_ND).numpy()

    def _network(self, width: int, classes: int) -> nn.Module:
        return nn.Sequential(nn.Sequential(nn.Linear(width, self.hidden), nn.ReLU()), nn.Linear(self.hidden, classes))

    def _grow(self, rows: Tensor, targets_N: Tensor) -> None:
        width, classes = rows.shape[1], len(self.classes_)
        everyone = torch.ones(len(rows), dtype=torch.bool)
        groups, found = [], []
        for number in tqdm(range(self.rounds), desc="bonsai", unit="round", disable=None):
            network = self._network(width, classes)
            steps = self.round_steps if groups else self.first_steps
            self._train_round(network, rows, targets_N, groups or [everyone], steps)
            found.append(network(rows).argmax(1).detach())
            right = found[-1] == targets_N
            if right.all() and number + 1 < self.rounds:
                break  # there is nothing left to learn from
            groups += [right, ~right]
        self.rounds_ = len(found)
        right_RN = torch.stack([said == targets_N for said in found])
        agreed = right_RN.all(0) | ~right_RN.any(0)
        self._synthesise(rows, found, agreed, classes)

    def _train_round(
        self, network: nn.Module, rows: Tensor, targets_N: Tensor, groups: Sequence[Tensor], steps: int
    ) -> None:
        optimizer = torch.optim.Adam(network.parameters(), lr=self.learning_rate)
        for _ in range(steps):
            losses_N = nn.functional.cross_entropy(network(rows), targets_N, reduction="none")
            penalty = sum(parameter.square().sum() for parameter in network.parameters())
            optimizer.zero_grad()
            (worst_group_loss(losses_N, groups) + self.l2 * penalty).backward()
            optimizer.step()

    def _synthesise(self, rows: Tensor, found: Sequence[Tensor], agreed: Tensor, classes: int) -> None:
        """Features that tell what every round says; the classifier starts from the mean of the rounds' layers."""
        body = self.network_[0]
        outputs = nn.ModuleList(nn.Linear(self.hidden, classes) for _ in found)
        optimizer = torch.optim.Adam([*body.parameters(), *outputs.parameters()], lr=self.learning_rate)
        sides = [side.nonzero()[:, 0] for side in (agreed, ~agreed) if side.any()]
        for _ in range(self.synthesis_steps):
            size = max(1, self.batch_size // len(sides))
            numbers = torch.cat([side[torch.randint(len(side), (size,))] for side in sides])
            features_ND = body(rows[numbers])
            losses = [
                nn.functional.cross_entropy(output(features_ND), said[numbers]) for output, said in zip(outputs, found)
            ]
            optimizer.zero_grad()
            (sum(losses) / len(losses)).backward()
            optimizer.step()
        with torch.no_grad():
            for name, values in self.network_[1].named_parameters():
                values.copy_(torch.stack([getattr(output, name) for output in outputs]).mean(0))
