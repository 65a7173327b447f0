"""iSogCLR: contrast with a temperature of its own for each sample, and negatives averaged over past batches.

Instead of ``info_nce`` when batches are small or some samples have many near negatives (long tails, near duplicates).
It keeps three numbers per training sample.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor, nn

from hf_fuse.errors import FuseError
from hf_fuse.losses._processes import gathered
from hf_fuse.losses._sample_table import SampleTable
from hf_fuse.losses._similarities import cosines
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2305.11965"
IN_BATCH = True
STEEPEST = 3.0


class isogclr(nn.Module):
    """Mean of ``tau_i log s_i + tau_i rho``, with ``s_i`` the moving average of the mean over negatives j of
    ``e^(h_ij / tau_i)``, ``h_ij`` how much more similar j is to sample i than its own second view.

    Temperatures follow their gradient ``log s_i + rho - mean_j w_ij h_ij / tau_i`` with momentum. Averages are kept as
    logarithms, which no temperature makes overflow, and begin at a sample's first visit, in whichever epoch it is.
    The public code has the similarity itself in place of h, and a table for each view. Defaults are LibAUC's for one
    kind of data; for two kinds (images and texts) it has rho 6. It compares the samples of a batch: micro-batches are
    batches of their own, processes are taken together.

    Args:
        rho: the higher, the higher the temperatures.
        gamma: share of the present batch in the averages.
        momentum: of the temperatures' gradients: the share of the present one.
        learning_rate: of the temperatures.
        first: temperature.
        lowest: temperature.
        highest: temperature.
    """

    def __init__(
        self,
        *,
        rho: Annotated[float, Between(0)] = 0.3,
        gamma: Annotated[float, Between(0, 1, open_low=True)] = 0.8,
        momentum: Annotated[float, Between(0, 1, open_low=True)] = 0.9,
        learning_rate: Annotated[float, Between(0)] = 0.01,
        first: Annotated[float, Between(0, open_low=True)] = 0.1,
        lowest: Annotated[float, Between(0, open_low=True)] = 0.05,
        highest: Annotated[float, Between(0, open_low=True)] = 0.7,
    ) -> None:
        super().__init__()
        if not lowest <= first <= highest:
            raise FuseError(f"isogclr: first is {first}, expected from lowest ({lowest}) to highest ({highest}).")
        self.rho, self.gamma, self.momentum, self.learning_rate = rho, gamma, momentum, learning_rate
        self.first, self.lowest, self.highest = first, lowest, highest

    def prepare(self, model: nn.Module, train_dataset: object) -> None:
        self.table = SampleTable.of(train_dataset, 3)

    def forward(self, features_ND: Tensor, second_features_ND: Tensor, sample_ids_N: Tensor) -> Tensor:
        cosines_NN, ids_N = cosines(features_ND, second_features_ND), gathered(sample_ids_N)
        if len(cosines_NN) < 2:
            return cosines_NN.sum() * 0
        return self.of_differences(cosines_NN - cosines_NN.diagonal()[:, None], ids_N)

    def of_differences(self, h_NN: Tensor, ids_N: Tensor) -> Tensor:
        """The loss of ``h_ij``, whose diagonal doesn't count; moves the samples' averages and temperatures."""
        itself_NN = torch.eye(len(h_NN), dtype=torch.bool, device=h_NN.device)
        with torch.no_grad():
            rows_N3, visited_N = self.table.read(ids_N)
            log_s_N, tau_N, slope_N = rows_N3.unbind(-1)
            tau_N = torch.where(visited_N, tau_N, self.first)
            powers_NN = (h_NN / tau_N[:, None]).masked_fill(itself_NN, -math.inf)
            log_mean_N = powers_NN.logsumexp(-1) - math.log(len(h_NN) - 1)
            kept = math.log(max(1 - self.gamma, 1e-30))
            averaged_N = torch.logaddexp(log_s_N + kept, log_mean_N + math.log(self.gamma))
            log_s_N = torch.where(visited_N, averaged_N, log_mean_N)
            weights_NN = (powers_NN - log_s_N[:, None]).exp() / (len(h_NN) - 1)
        weighted_N = (weights_NN * h_NN).sum(-1)
        with torch.no_grad():
            value_N = tau_N * (log_s_N + self.rho)
            slope_now_N = (log_s_N + self.rho - weighted_N / tau_N).clamp(-STEEPEST, STEEPEST)
            slope_N = slope_N + self.momentum * (slope_now_N - slope_N)
            tau_N = (tau_N - self.learning_rate * slope_N).clamp(self.lowest, self.highest)
            self.table.write(ids_N, torch.stack([log_s_N, tau_N, slope_N], dim=-1))
        # The gradient is that of the weighted mean, the value what is minimised.
        return (weighted_N - weighted_N.detach() + value_N).mean()
