"""Spherical Z-loss: the label's logit is to stand out from the others of its row, whatever their scale and offset.

For very many classes in a last layer that is trained with special kernels for the spherical family; elsewhere
cross-entropy learns better at the end, since the standardised logit can't exceed ``sqrt(C - 1)``.
"""

from __future__ import annotations

from typing import Annotated

from torch import Tensor
from torch.nn.functional import softplus

from hf_fuse.losses._predictions import class_indices, mean
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/1604.08859"
EPSILON = 1e-6


def spherical_z(
    logits_NC: Tensor,
    labels_N: Tensor,
    *,
    a: Annotated[float, Between(0, open_low=True)] = 1.0,
    b: float = 0.0,
) -> Tensor:
    """Mean of ``softplus(a (b - z_y)) / a``, where z are the logits less their mean, over their standard deviation.

    Set the weight of ``task`` to 0 to use it instead of the cross-entropy.

    Args:
        logits_NC: of the predictions that have a label.
        labels_N: class indices.
        a: slope; it and ``b`` are tuned in the paper, 1 and 0 are those of its code.
        b: the z at which the loss is ``log(2) / a``.
    """
    logits_NC = logits_NC.float()
    centred_NC = logits_NC - logits_NC.mean(-1, keepdim=True)
    # Inside of the root, whose slope is infinite at equal logits.
    z_NC = centred_NC / (centred_NC.square().mean(-1, keepdim=True) + EPSILON**2).sqrt()
    z_N = z_NC.gather(-1, class_indices(labels_N).unsqueeze(-1)).squeeze(-1)
    return mean(softplus(a * (b - z_N)) / a)
