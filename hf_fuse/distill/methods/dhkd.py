"""The auxiliary loss of DHKD on the student's own logits: a robust regression on the teacher's."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_fuse.distill.methods._distributions import check_shapes
from hf_fuse.distill.top_k import TopK
from hf_fuse.errors import FuseError
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2411.08937"


def dhkd(
    student_NV: Tensor,
    teacher_NV: Tensor | TopK,
    labels_N: Tensor | None = None,
    *,
    temperature: Annotated[float, Between(0, open_low=True)] = 2.0,
    mean_over_classes: bool = False,
) -> Tensor:
    """Sum over N and V of ``T^2 log cosh((student - teacher) / 2T)``, the paper's BinaryKL-Norm.

    ``KL(Bernoulli(1/2) || Bernoulli(sigmoid(d)))`` is ``log cosh(d / 2)``. In this form it stays finite at any gap
    (the reference's clamped sigmoid gives inf from a gap of about 17 T on); the gradient per logit is
    ``T/2 tanh((student - teacher) / 2T)``. It compares raw logits: a shift of one side is no longer free, which is why
    the paper trains it on a second head beside the classifier: the objective ``dual_head``. On the classifier's own
    logits, as here, it hurts.

    With a :class:`TopK` the sum is over its K tokens and the label, whose logits are known exactly.

    Args:
        student_NV: logits; in the paper those of the auxiliary head.
        teacher_NV: logits, or the top-K of them, taken at any temperature.
        labels_N: class or token ids; only looked at with a top-K.
        temperature: T; 2 in the paper's CIFAR recipes.
        mean_over_classes: the mean over those that are summed over, for vocabularies.

    Raises:
        FuseError: a top-K without ``log_z``.
    """
    student_NV = student_NV.float()
    if isinstance(teacher_NV, TopK):
        student_NV, teacher_NV, known_NV = _kept(student_NV, teacher_NV, labels_N)
    else:
        check_shapes(student_NV, teacher_NV)
        known_NV = torch.ones_like(student_NV, dtype=torch.bool)
    half_NV = (student_NV - teacher_NV.float()).abs() / (2 * temperature)
    log_cosh_NV = (half_NV + F.softplus(-2 * half_NV) - math.log(2)) * known_NV
    per_prediction_N = log_cosh_NV.sum(-1)
    if mean_over_classes:
        per_prediction_N = per_prediction_N / known_NV.sum(-1).clamp(min=1)
    return temperature**2 * per_prediction_N.sum()


def _kept(student_NV: Tensor, top: TopK, labels_N: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The logits of student and teacher at the K tokens and the label, and which of them count."""
    if top.log_z_N is None:
        raise FuseError("dhkd: compares logits, and the teacher's top-K lacks their logsumexp. Make it with log_z_N.")
    ids, log_probs, known = top.ids_NK.long(), top.log_probs_NK.float(), top.known_NK
    if labels_N is not None and top.label_log_prob_N is not None:
        label_N1 = top.label_log_prob_N.float().unsqueeze(-1)
        # Among the K it would count twice.
        is_new_N1 = ~((ids == labels_N.unsqueeze(-1)) & known).any(-1, keepdim=True) & (label_N1 > float("-inf"))
        ids = torch.cat([ids, labels_N.unsqueeze(-1)], dim=-1)
        log_probs, known = torch.cat([log_probs, label_N1], dim=-1), torch.cat([known, is_new_N1], dim=-1)
    teacher = (log_probs.masked_fill(~known, 0) + top.log_z_N.float().unsqueeze(-1)) * top.temperature
    return student_NV.gather(-1, ids), teacher, known
