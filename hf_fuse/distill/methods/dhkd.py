"""The auxiliary head's loss of Dual-Head Knowledge Distillation: a robust regression on the teacher's logits."""

from __future__ import annotations

import math
from typing import Annotated

from torch import Tensor
from torch.nn import functional as F

from hf_fuse.distill.methods._distributions import check_shapes
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2411.08937"


def dhkd(
    student_NV: Tensor,
    teacher_NV: Tensor,
    *,
    temperature: Annotated[float, Between(0, open_low=True)] = 2.0,
    mean_over_classes: bool = False,
) -> Tensor:
    """Sum over N and V of ``T^2 log cosh((student - teacher) / 2T)``, the paper's BinaryKL-Norm.

    ``KL(Bernoulli(1/2) || Bernoulli(sigmoid(d)))`` is ``log cosh(d / 2)``. In this form it stays finite at any gap
    (the reference's clamped sigmoid gives inf from a gap of about 17 T on); the gradient per logit is
    ``T/2 tanh((student - teacher) / 2T)``. It compares raw logits: a shift of one side is no longer free, which is why
    the paper trains it on a second head beside the classifier. On the classifier's own logits it hurts.

    Args:
        student_NV: logits of the auxiliary head.
        teacher_NV: logits.
        temperature: T; 2 in the paper's CIFAR recipes.
        mean_over_classes: the mean over V instead of the sum, for vocabularies.
    """
    check_shapes(student_NV, teacher_NV)
    half_NV = (student_NV.float() - teacher_NV.float()).abs() / (2 * temperature)
    log_cosh_NV = half_NV + F.softplus(-2 * half_NV) - math.log(2)
    per_prediction_N = log_cosh_NV.mean(-1) if mean_over_classes else log_cosh_NV.sum(-1)
    return temperature**2 * per_prediction_N.sum()
