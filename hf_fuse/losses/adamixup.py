"""AdaMixUp: how much of each other two samples may take is learned, so that mixtures don't look like real samples.

Instead of plain mixup when fixed shares hurt, because mixtures of two classes fall among samples of a third. Costs one
forward pass from mixed pixels or word embeddings, and two small layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, linear

from hf_fuse.errors import FuseError
from hf_fuse.input_points import Move, mixture
from hf_fuse.losses._predictions import class_indices, mean
from hf_fuse.model_features import feature_size
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/1809.02499"


class adamixup(nn.Module):
    """Mean of ``l ce(y) + (1 - l) ce(y of the partner)`` of mixed samples, plus the binary cross-entropy of telling
    them from real ones.

    ``l = a + u d``, u uniform in [0, 1] and ``(a, d, rest)`` the softmax of a layer on the features of both samples.
    The gradients of both parts reach it through the mixed points. The cross-entropy of real samples is the task's, with
    weight 1 in the paper as both parts here. The paper tells from images with an encoder of its own; here it is the
    model's features, which the layer doesn't change. Partners are drawn within a micro-batch.

    Args:
        hidden: units of both layers.
    """

    def __init__(self, *, hidden: Annotated[int, Between(1)] = 64) -> None:
        super().__init__()
        self.hidden = hidden

    def prepare(self, model: nn.Module, train_dataset: object) -> None:
        size = feature_size(model)
        self.policy = nn.Sequential(nn.Linear(2 * size, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 3))
        self.intrusion = nn.Sequential(nn.Linear(size, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 1))

    def shares(self, features_ND: Tensor, partners_N: Tensor, uniform_N: Tensor) -> Tensor:
        """l ``(N,)``, in (0, 1)."""
        rows_ND = features_ND.detach().float()
        a_N, d_N, _ = self.policy(torch.cat([rows_ND, rows_ND[partners_N]], dim=-1)).softmax(-1).unbind(-1)
        return a_N + uniform_N * d_N

    def forward(
        self,
        features_ND: Tensor,
        labels_N: Tensor,
        features_at: Callable[[Move], Tensor],
        head_CD: Tensor,
        head_bias_C: Tensor | None = None,
    ) -> Tensor:
        labels_N, count = class_indices(labels_N), len(features_ND)
        partners_N = torch.randperm(count).to(features_ND.device)
        shares_N = self.shares(features_ND, partners_N, torch.rand(count).to(features_ND.device))

        def move(points: Tensor) -> Tensor:
            if len(points) != count:
                raise FuseError("adamixup: needs a label for each sample; some are -100.")
            return mixture(partners_N, shares_N)(points)

        mixed_ND = features_at(move).float()
        logits_NC = linear(mixed_ND, head_CD.float(), None if head_bias_C is None else head_bias_C.float())
        own_N, other_N = (cross_entropy(logits_NC, of, reduction="none") for of in (labels_N, labels_N[partners_N]))
        real_N, unreal_N = (self.intrusion(rows_ND).squeeze(-1) for rows_ND in (features_ND.float(), mixed_ND))
        told_N = _told(real_N, 1.0) + _told(unreal_N, 0.0)
        return mean(shares_N * own_N + (1 - shares_N) * other_N + told_N / 2)


def _told(scores_N: Tensor, truth: float) -> Tensor:
    return binary_cross_entropy_with_logits(scores_N, torch.full_like(scores_N, truth), reduction="none")
