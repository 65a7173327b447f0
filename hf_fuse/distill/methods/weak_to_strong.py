"""Weak-to-strong generalisation: a strong student learns from a weak teacher and, more and more, from itself."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from hf_fuse.distill.methods._distributions import log_distributions
from hf_fuse.distill.top_k import TopK
from hf_fuse.errors import FuseError
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2312.09390"


def weak_to_strong(
    student_NV: Tensor,
    teacher_NV: Tensor | TopK,
    progress: float = 1.0,
    *,
    confidence: Annotated[float, Between(0, 1)] = 0.5,
    warm_up: Annotated[float, Between(0, 1)] = 0.2,
    threshold: Literal["none", "prior"] = "none",
) -> Tensor:
    """Sum over N of ``(1 - c) CE(student, weak labels) + c CE(student, its own hard prediction)``.

    c grows linearly to ``confidence``. Leave the true labels out of it: set the weight of ``task`` to 0. (The reference
    code multiplies its warm-up by the share itself, so that c jumps at its end.)

    Args:
        student_NV: logits.
        teacher_NV: the weak teacher's logits, or the top-K of them at temperature 1; its probabilities are the labels.
        progress: share of the training that is done.
        confidence: of the student in itself at the end. Recalled from the paper: 0.75 for the widest gaps, 0.5 else.
        warm_up: share of the training in which c grows. Recalled from the paper: 0.2.
        threshold: what makes a hard prediction. ``none``: the likeliest class. ``prior``, for two classes: as many
            predictions of class 0 as the weak labels have on average, by the quantile of the student's probabilities.
            This compares the samples of a batch, and sees those of a micro-batch alone.

    Raises:
        FuseError: ``prior`` with more or fewer than two classes.
    """
    student_NO, teacher_NO = log_distributions(student_NV, teacher_NV, 1.0)
    weak_N = -(teacher_NO.exp() * student_NO).sum(-1)
    log_probs_NV = student_NV.float().log_softmax(-1)
    own_N = -log_probs_NV.gather(-1, _predictions(log_probs_NV, teacher_NO, threshold).unsqueeze(-1)).squeeze(-1)
    share = confidence * (min(1.0, progress / warm_up) if warm_up else 1.0)
    taught_N = (1 - share) * weak_N + share * own_N
    if isinstance(teacher_NV, TopK):  # of a teacher that says nothing there, the student is not to be sure either
        taught_N = taught_N.masked_fill(~teacher_NV.known_NK.any(-1), 0)
    return taught_N.sum()


def _predictions(log_probs_NV: Tensor, weak_NO: Tensor, threshold: str) -> Tensor:
    if threshold == "none" or not len(log_probs_NV):
        return log_probs_NV.argmax(-1)
    if log_probs_NV.shape[-1] != 2 or weak_NO.shape[-1] != 2:
        raise FuseError(
            f"weak_to_strong: threshold 'prior' is for two classes, there are {log_probs_NV.shape[-1]}. Use 'none'."
        )
    first_N = log_probs_NV.detach()[:, 0].exp()
    return (first_N <= torch.quantile(first_N, weak_NO.exp()[:, 1].mean())).long()
