"""Barlow Twins: each feature is to agree between two views of a sample, and no two features are to say the same.

For representations from dropout views or augmented pairs when batches are too small for InfoNCE: it has no negatives.
As an addition to a task, weight 1e-3 to 1e-2.
"""

from __future__ import annotations

from typing import Annotated

from torch import Tensor, nn

from hf_fuse.losses._processes import gathered
from hf_fuse.losses._projector import projector
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2103.03230"
IN_BATCH = True
EPSILON = 1e-5


class barlow_twins(nn.Module):
    """``sum_i (1 - C_ii)^2 + lambda * sum over i != j of C_ij^2``, C the correlation of the features of the two views.

    It grows with the number of features, whose square C takes as memory. It compares the samples of a batch:
    micro-batches are batches of their own, processes are taken together. One sample alone gives 0.

    Args:
        off_diagonal: lambda.
        projection: features of the projection that is compared, 512 to 2048 for fine-tuning; 0: those of the model.
    """

    def __init__(
        self, *, off_diagonal: Annotated[float, Between(0)] = 0.0051, projection: Annotated[int, Between(0)] = 0
    ) -> None:
        super().__init__()
        self.off_diagonal, self.projection = off_diagonal, projection

    def prepare(self, model: nn.Module, train_dataset: object) -> None:
        if self.projection:
            self.projector = projector(model, self.projection, self.projection)

    def forward(self, features_ND: Tensor, second_features_ND: Tensor) -> Tensor:
        if self.projection:
            features_ND, second_features_ND = (
                self.projector(rows_ND.float()) for rows_ND in (features_ND, second_features_ND)
            )
        features_ND, second_features_ND = gathered(features_ND), gathered(second_features_ND)
        if len(features_ND) < 2:
            return (features_ND.float() + second_features_ND.float()).sum() * 0
        return redundancy(correlation(features_ND, second_features_ND), self.off_diagonal)


def correlation(first_ND: Tensor, second_ND: Tensor) -> Tensor:
    """``(D, D)``; its diagonal is 1 for equal views, since deviations are those of the batch itself (biased)."""
    first_ND, second_ND = standardised(first_ND), standardised(second_ND)
    return first_ND.T @ second_ND / max(len(first_ND), 1)


def standardised(rows_ND: Tensor) -> Tensor:
    """Mean 0 and variance 1 in each column, in fp32."""
    rows_ND = rows_ND.float()
    centred_ND = rows_ND - rows_ND.mean(0)
    return centred_ND / (centred_ND.square().mean(0) + EPSILON).sqrt()


def redundancy(correlation_DD: Tensor, off_diagonal: float) -> Tensor:
    """The loss of a correlation matrix."""
    on = correlation_DD.diagonal()
    off = correlation_DD.square().sum() - on.square().sum()
    return (1 - on).square().sum() + off_diagonal * off
