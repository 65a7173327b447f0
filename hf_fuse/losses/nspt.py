"""NSPT: features of rehearsed samples stay near the old model's features of their class.

For learning new classes with a buffer of old samples (COCONUT), beside the task's loss. Needs the model as it was
before (``old_model``).
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from hf_fuse.batch_counts import IGNORED
from hf_fuse.errors import FuseError
from hf_fuse.losses._predictions import sample_classes
from hf_fuse.losses._processes import gathered
from hf_fuse.losses._similarities import unit
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2310.02699"
IN_BATCH = True
MEAN_OVER = "samples"


def nspt(
    features_ND: Tensor,
    old_features_ND: Tensor,
    labels_N: Tensor,
    rehearsed_B: Tensor | None = None,
    sample_labels_B: Tensor | None = None,
    *,
    temperature: Annotated[float, Between(0, open_low=True)] = 0.1,
) -> Tensor:
    """Mean over rehearsed samples i that have others p of their class of the mean over these of
    ``-log(e^(z_i o_p / t) / sum over a != i of e^(z_i z_a / t))``, z features of length 1 and o the old model's.

    Positives are the old model's and negatives the new one's, so that it may fall below 0. It compares the samples of a
    batch: micro-batches are batches of their own, processes are taken together. The formula is recalled and t not
    verified; no code is public.

    Args:
        features_ND: of the model in training.
        old_features_ND: of ``old_model``, for the same samples.
        labels_N: class indices.
        rehearsed_B: 1 for samples from the buffer; without such a column all are.
        sample_labels_B: labels of all samples, which tell whose are left out of the others.
        temperature: t.

    Raises:
        FuseError: features of different widths.
    """
    if features_ND.shape[-1] != old_features_ND.shape[-1]:
        raise FuseError(
            f"nspt: features have {features_ND.shape[-1]} numbers, the old ones {old_features_ND.shape[-1]}. They are "
            "compared number by number: both models need the same width."
        )
    if rehearsed_B is None:
        rehearsed_N = torch.ones_like(labels_N)
    else:
        rehearsed_N = rehearsed_B if sample_labels_B is None else rehearsed_B[sample_labels_B != IGNORED]
    new_ND, old_ND, labels_N, rehearsed_N = (
        gathered(rows)
        for rows in (unit(features_ND), unit(old_features_ND), sample_classes(labels_N, features_ND), rehearsed_N)
    )
    itself_NN = torch.eye(len(labels_N), dtype=torch.bool, device=labels_N.device)
    positive_NN = (labels_N[:, None] == labels_N[None, :]) & ~itself_NN
    all_N = (new_ND @ new_ND.T / temperature).masked_fill(itself_NN, torch.finfo(torch.float32).min).logsumexp(-1)
    loss_NN = all_N[:, None] - new_ND @ old_ND.T / temperature
    counts_N = positive_NN.sum(-1)
    anchor_N = (counts_N > 0) & (rehearsed_N > 0)
    loss_N = torch.where(positive_NN, loss_NN, 0).sum(-1) / counts_N.clamp(min=1)
    return torch.where(anchor_N, loss_N, 0).sum() / anchor_N.sum().clamp(min=1)
