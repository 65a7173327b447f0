"""AMCL: contrast in several projections at once, with a learned temperature for each pair of samples and projection.

Instead of ``info_nce`` where no temperature suits all pairs, such as views of very different strength. Each projection
costs an N x N x 128 layer; one that is shared by all pairs is what to try first.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_fuse.errors import FuseError
from hf_fuse.losses._processes import gathered
from hf_fuse.losses._projector import projector
from hf_fuse.losses._similarities import unit
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2310.05615"
IN_BATCH = True


class amcl(nn.Module):
    """InfoNCE, in both directions, of the scores ``sum over heads h of cos_h(i, j) / tau_h(i, j)``, plus
    ``beta * sum over heads of the mean of (log tau / preferred + 1 / tau)``.

    The penalty is least at the preferred temperature and keeps temperatures from the ends of their range. In the paper
    it is ``n / 2 log tau + 1 / tau``, which is least at ``2 / n``; what n is, and that scores are added up over heads,
    is recalled and not verified, and the public code can't run. It compares the samples of a batch: micro-batches are
    batches of their own, processes are taken together.

    Args:
        heads: projections.
        size: numbers of each.
        hidden: units of the layers that tell temperatures.
        beta: weight of the penalty.
        preferred: temperature.
        lowest: temperature; 1e-5 in the paper, which is beyond half precision.
        highest: temperature.

    Raises:
        FuseError: the preferred temperature is out of the range.
    """

    def __init__(
        self,
        *,
        heads: Annotated[int, Between(1)] = 3,
        size: Annotated[int, Between(1)] = 128,
        hidden: Annotated[int, Between(1)] = 128,
        beta: Annotated[float, Between(0)] = 0.1,
        preferred: Annotated[float, Between(0, open_low=True)] = 0.2,
        lowest: Annotated[float, Between(0, open_low=True)] = 0.05,
        highest: Annotated[float, Between(0, open_low=True)] = 2.0,
    ) -> None:
        super().__init__()
        if not lowest < preferred < highest:
            raise FuseError(
                f"amcl: preferred is {preferred}, expected between lowest ({lowest}) and highest ({highest})."
            )
        self.heads, self.size, self.hidden, self.beta, self.preferred = heads, size, hidden, beta, preferred
        self.lowest, self.highest = lowest, highest

    def prepare(self, model: nn.Module, train_dataset: object) -> None:
        self.projections = nn.ModuleList(projector(model, self.size, self.size) for _ in range(self.heads))
        self.temperatures = nn.ModuleList(
            PairTemperature(self.size, self.hidden, self.lowest, self.highest) for _ in range(self.heads)
        )

    def forward(self, features_ND: Tensor, second_features_ND: Tensor) -> Tensor:
        scores_NN, penalty = 0, 0
        for project, temperature in zip(self.projections, self.temperatures):
            first_NP, second_NP = (
                gathered(unit(project(rows_ND.float()))) for rows_ND in (features_ND, second_features_ND)
            )
            tau_NN = temperature(first_NP, second_NP)
            scores_NN = scores_NN + first_NP @ second_NP.T / tau_NN
            penalty = penalty + (tau_NN.log() / self.preferred + 1 / tau_NN).mean()
        if len(scores_NN) < 2:
            return scores_NN.sum() * 0
        own_N = torch.arange(len(scores_NN), device=scores_NN.device)
        recognition = (cross_entropy(scores_NN, own_N) + cross_entropy(scores_NN.T, own_N)) / 2
        return recognition + self.beta * penalty


class PairTemperature(nn.Module):
    """``lowest + (highest - lowest) sigmoid(phi([z_i, z_j]))`` of all pairs, phi with one hidden layer."""

    def __init__(self, size: int, hidden: int, lowest: float, highest: float) -> None:
        super().__init__()
        self.lowest, self.highest = lowest, highest
        # A layer on two vectors side by side is the sum of a layer on each.
        self.first, self.second = nn.Linear(size, hidden), nn.Linear(size, hidden, bias=False)
        self.out = nn.Linear(hidden, 1)

    def forward(self, first_NP: Tensor, second_MP: Tensor) -> Tensor:
        hidden_NMH = (self.first(first_NP)[:, None] + self.second(second_MP)[None]).relu()
        return self.lowest + (self.highest - self.lowest) * self.out(hidden_NMH).squeeze(-1).sigmoid()
