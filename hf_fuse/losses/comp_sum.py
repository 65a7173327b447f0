"""Comp-sum losses: the family of cross-entropy, from sum-exponential to mean absolute error, by one number.

With ``tau`` above 1 for data with wrong labels, which it forgives; at 1 it is cross-entropy. Same cost.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from hf_fuse.losses._predictions import class_indices, mean
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2304.07288"


def comp_sum(logits_NC: Tensor, labels_N: Tensor, *, tau: Annotated[float, Between(0, 2)] = 1.5) -> Tensor:
    """Mean of ``((1 / p_y)^(1 - tau) - 1) / (1 - tau)``, p_y the probability of the label.

    tau 0 is the sum-exponential loss, 1 cross-entropy, between 1 and 2 the generalised cross-entropy with q = tau - 1
    (robust to wrong labels), 2 the mean absolute error ``1 - p_y``. Set the weight of ``task`` to 0 to use it instead
    of the cross-entropy.

    Args:
        logits_NC: of the predictions that have a label.
        labels_N: class indices.
        tau: see above. Below 1, hard and mislabelled examples dominate: ``log p_y`` is kept above -30.
    """
    log_p_N = logits_NC.float().log_softmax(-1).gather(-1, class_indices(labels_N).unsqueeze(-1)).squeeze(-1)
    if abs(tau - 1) < 1e-4:
        return mean(-log_p_N)
    if tau < 1:
        log_p_N = log_p_N.clamp(min=-30)
    return mean(torch.expm1((tau - 1) * log_p_N) / (1 - tau))
