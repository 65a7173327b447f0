"""HOC: new features are to be nearest to the old features of the same sample, and far from those of other classes.

Beside ``bct`` or a fixed classifier, for a new encoder that must search an old gallery: it compares samples, where
those compare with one point per class.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from hf_fuse.errors import FuseError
from hf_fuse.losses._predictions import class_indices, mean
from hf_fuse.losses._processes import gathered
from hf_fuse.losses._similarities import unit
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2405.02581"
IN_BATCH = True


def hoc(
    features_ND: Tensor,
    old_features_ND: Tensor,
    labels_N: Tensor,
    *,
    scale: Annotated[float, Between(0, open_low=True)] = 10.0,
) -> Tensor:
    """Mean of ``-log(e^(mu s_ii) / (e^(mu s_ii) + sum over other classes of e^(mu s_ij)))``, s cosines of old and new.

    The paper's total is 0.1 times the task's cross-entropy and 0.9 times this. Other samples of the same class take no
    part; the reference gives them a similarity of 0 instead, which makes its loss unbounded below. It compares the
    samples of a batch: micro-batches are batches of their own, processes are taken together.

    Args:
        features_ND: of the model in training.
        old_features_ND: of the frozen old model (``old_model``), for the same samples.
        labels_N: class indices.
        scale: mu.

    Raises:
        FuseError: the features are of different widths.
    """
    if features_ND.shape[-1] != old_features_ND.shape[-1]:
        raise FuseError(
            f"hoc: features have {features_ND.shape[-1]} numbers, the old ones {old_features_ND.shape[-1]}. They are "
            "compared number by number: both models need the same width."
        )
    new_ND, old_ND, labels_N = (
        gathered(rows) for rows in (unit(features_ND), unit(old_features_ND), class_indices(labels_N))
    )
    cosines_NN = scale * old_ND @ new_ND.T
    same_NN = labels_N[:, None] == labels_N[None, :]
    same_NN = same_NN & ~torch.eye(len(labels_N), dtype=torch.bool, device=labels_N.device)
    compared_NN = cosines_NN.masked_fill(same_NN, torch.finfo(torch.float32).min)
    return mean(compared_NN.logsumexp(-1) - cosines_NN.diagonal())
