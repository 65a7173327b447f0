"""Supervised contrastive loss: samples of one class are to be near each other, and far from all others.

As the first part of a curriculum, for long-tailed classes: start with this and end with cross-entropy, by
``{"sup_con": {"weight": {"start": 1, "end": 0}}, "task": {"start": 0, "end": 1}}``. Draw batches that are balanced over
classes: one without a second sample of a class has nothing to draw together.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from hf_fuse.losses._predictions import class_indices
from hf_fuse.losses._processes import gathered
from hf_fuse.losses._projector import projector
from hf_fuse.losses._similarities import unit
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2004.11362"
IN_BATCH = True
MEAN_OVER = "samples"


class sup_con(nn.Module):
    """Mean over the samples that have others of their class of the mean over these of
    ``-log(e^(s_ip / t) / sum over a != i of e^(s_ia / t))``, s a cosine.

    It compares the samples of a batch: micro-batches are batches of their own, processes are taken together. How the
    weight falls in the paper that proposes the curriculum is not verified: linear or quadratic (``shape``).

    Args:
        temperature: t.
        projection: numbers of the projection that is compared (128 in the paper); 0: the features themselves.
    """

    def __init__(
        self,
        *,
        temperature: Annotated[float, Between(0, open_low=True)] = 0.1,
        projection: Annotated[int, Between(0)] = 0,
    ) -> None:
        super().__init__()
        self.temperature, self.projection = temperature, projection

    def prepare(self, model: nn.Module, train_dataset: object) -> None:
        if self.projection:
            self.projector = projector(model, self.projection, self.projection)

    def forward(self, features_ND: Tensor, labels_N: Tensor) -> Tensor:
        labels_N = class_indices(labels_N)
        if self.projection:
            features_ND = self.projector(features_ND.float())
        return supervised_contrast(gathered(unit(features_ND)), gathered(labels_N), self.temperature)


def supervised_contrast(unit_ND: Tensor, labels_N: Tensor, temperature: float) -> Tensor:
    """The loss of rows of length 1; 0 if no class has two samples."""
    itself_NN = torch.eye(len(labels_N), dtype=torch.bool, device=labels_N.device)
    scores_NN = (unit_ND @ unit_ND.T / temperature).masked_fill(itself_NN, torch.finfo(unit_ND.dtype).min)
    positive_NN = (labels_N[:, None] == labels_N[None, :]) & ~itself_NN
    count_N = positive_NN.sum(-1)
    loss_N = torch.where(positive_NN, scores_NN.logsumexp(-1, keepdim=True) - scores_NN, 0).sum(-1)
    return (loss_N / count_N.clamp(min=1)).sum() / (count_N > 0).sum().clamp(min=1)
