"""Decoupled mixup: of two mixed samples each label is also to beat all classes but the other one.

For classification with mixed samples (``mixup_alpha``: pixels, or word embeddings), where few labels and plain mixup
leave the model undecided. Costs nothing beyond mixup.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from hf_fuse.losses._predictions import class_indices, mean
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2203.10761"


def decoupled_mixup(
    logits_NC: Tensor,
    labels_N: Tensor,
    partner_labels_N: Tensor,
    shares_N: Tensor,
    *,
    eta: Annotated[float, Between(0)] = 0.1,
    power: Annotated[float, Between(0, open_low=True)] = 1.0,
) -> Tensor:
    """Mean of ``l ce_a + (1 - l) ce_b + eta (l^p d_a + (1 - l)^p d_b)``, l the share of the sample with label a.

    ``d_a`` is the cross-entropy of a among the classes without b, and the other way round; where both labels are the
    same, it is plain cross-entropy. It contains the task's loss: set the weight of ``task`` to 0, and ``mixup_alpha``
    in :class:`~hf_fuse.FuseConfig`. Partners are drawn within a micro-batch.

    Args:
        logits_NC: of the mixed samples.
        labels_N: class indices, a.
        partner_labels_N: of the samples that were mixed in, b.
        shares_N: l.
        eta: how much the decoupled terms count; 0 is mixup.
        power: p of the shares in the decoupled terms.
    """
    logits_NC = logits_NC.float()
    shares_N = shares_N.float()
    first_N, second_N = class_indices(labels_N).unsqueeze(-1), partner_labels_N.unsqueeze(-1)
    log_p_NC = logits_NC.log_softmax(-1)
    ce_a_N, ce_b_N = (-log_p_NC.gather(-1, index).squeeze(-1) for index in (first_N, second_N))
    mixed_N = shares_N * ce_a_N + (1 - shares_N) * ce_b_N
    d_a_N, d_b_N = _without(logits_NC, first_N, second_N), _without(logits_NC, second_N, first_N)
    decoupled_N = shares_N**power * d_a_N + (1 - shares_N) ** power * d_b_N
    return mean(torch.where(labels_N == partner_labels_N, ce_a_N, mixed_N + eta * decoupled_N))


def _without(logits_NC: Tensor, label_N1: Tensor, other_N1: Tensor) -> Tensor:
    """Cross-entropy ``(N,)`` of the label among all classes but the other."""
    same_N1 = label_N1 == other_N1
    kept_NC = logits_NC.scatter(-1, other_N1, torch.finfo(torch.float32).min).where(~same_N1, logits_NC)
    return kept_NC.logsumexp(-1) - logits_NC.gather(-1, label_N1).squeeze(-1)
