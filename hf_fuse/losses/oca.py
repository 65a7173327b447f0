"""Compatibility with the means of old features: the beginning of the new feature vector lives in the old space.

For a new encoder that must search a gallery embedded by the old one and may be wider, or has classes of which the old
model has no classifier.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from hf_fuse.errors import FuseError
from hf_fuse.losses._predictions import class_indices, mean
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2408.08793"


def oca(
    features_ND: Tensor,
    labels_N: Tensor,
    old_class_means_CO: Tensor,
    *,
    classification: Annotated[float, Between(0)] = 10.0,
    alignment: Annotated[float, Between(0)] = 5.0,
) -> Tensor:
    """Mean of ``classification * cross-entropy(cosines to all means) + alignment * (1 - cosine to the own mean)``.

    The cosines are those of the first O of the D new features. The reference adds 5 times the task's cross-entropy
    (labels smoothed by 0.1) behind a learned orthogonal layer; before a linear classifier such a layer changes nothing,
    so here the model's own classifier is used. Its layer has a bias, which would spoil the angles.

    Args:
        features_ND: of the model in training, D at least O.
        labels_N: class indices.
        old_class_means_CO: mean of the old model's features of each class, NaN where a class has no sample.
        classification: weight.
        alignment: weight.

    Raises:
        FuseError: the new features are narrower than the old.
    """
    width = old_class_means_CO.shape[-1]
    if features_ND.shape[-1] < width:
        raise FuseError(
            f"oca: features have {features_ND.shape[-1]} numbers, fewer than the old model's {width}. The new model "
            "must be at least as wide."
        )
    known_C = ~old_class_means_CO.isnan().any(-1)
    means_CO = normalize(old_class_means_CO.float().nan_to_num(), dim=-1)
    cosines_NC = normalize(features_ND[:, :width].float(), dim=-1) @ means_CO.T
    logits_NC = cosines_NC.masked_fill(~known_C, torch.finfo(torch.float32).min)
    kept_N = known_C[class_indices(labels_N)]
    own_N = cosines_NC.gather(-1, labels_N.unsqueeze(-1)).squeeze(-1)
    loss_N = classification * cross_entropy(logits_NC, labels_N, reduction="none") + alignment * (1 - own_N)
    return mean(torch.where(kept_N, loss_N, 0))
