"""Mixed Barlow Twins: features of mixed samples are to be the mixture of their features.

Beside ``barlow_twins``, when small data lets it overfit. Costs another forward pass, from mixed pixels or word
embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor, nn

from hf_fuse.input_points import Move, mixture
from hf_fuse.losses._processes import gathered
from hf_fuse.losses._projector import projector
from hf_fuse.losses.barlow_twins import correlation, redundancy
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2312.02151"
IN_BATCH = True


class mixed_barlow(nn.Module):
    """The loss of ``barlow_twins`` plus ``scale * lambda`` times the squared distances of ``C_m1`` and ``C_m2`` from
    their mixtures.

    ``x_m = a x + (1 - a) x[partner]``, with one a from Beta(1, 1) and one order of partners per micro-batch;
    ``C_m1* = a C(z, z_1) + (1 - a) C(z[partner], z_1)`` and so on. Both the mixed features and the targets learn, as in
    the reference, which mixes one view with the other's partner; here both are of the first view, so that pairs in
    columns ``second_*`` may be of another kind. Deviations are the biased ones: the reference divides those of a
    smaller count by the larger, so that equal views don't give 0. It compares the samples of a batch: micro-batches
    are batches of their own, processes are taken together.

    Args:
        off_diagonal: lambda.
        scale: of the mixed part; 5 for small data, in the reference's script for ImageNet 0.5 times two warmed-up
            factors.
        projection: features of the projection that is compared; 0: those of the model.
    """

    def __init__(
        self,
        *,
        off_diagonal: Annotated[float, Between(0)] = 0.0051,
        scale: Annotated[float, Between(0)] = 5.0,
        projection: Annotated[int, Between(0)] = 0,
    ) -> None:
        super().__init__()
        self.off_diagonal, self.scale, self.projection = off_diagonal, scale, projection

    def prepare(self, model: nn.Module, train_dataset: object) -> None:
        self.projector = projector(model, self.projection, self.projection) if self.projection else nn.Identity()

    def forward(self, features_ND: Tensor, second_features_ND: Tensor, features_at: Callable[[Move], Tensor]) -> Tensor:
        count = len(features_ND)
        if count < 2:
            return (features_ND.float() + second_features_ND.float()).sum() * 0
        partners_N = torch.randperm(count).to(features_ND.device)
        share = torch.rand(()).item()
        mixed_ND = features_at(mixture(partners_N, torch.full((count,), share, device=features_ND.device)))
        views = [self.projector(rows_ND.float()) for rows_ND in (features_ND, second_features_ND, mixed_ND)]
        first_ND, second_ND, mixed_ND = map(gathered, views)
        partner_ND = gathered(views[0][partners_N])
        loss = redundancy(correlation(first_ND, second_ND), self.off_diagonal)
        for other_ND in (first_ND, second_ND):
            target_DD = share * correlation(first_ND, other_ND) + (1 - share) * correlation(partner_ND, other_ND)
            distance = (correlation(mixed_ND, other_ND) - target_DD).square().sum()
            loss = loss + self.scale * self.off_diagonal * distance
        return loss
