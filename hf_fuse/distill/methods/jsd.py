"""Generalised Jensen-Shannon divergence: between forward KL (beta 0) and reverse KL (beta 1) (GKD)."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from hf_fuse.distill.methods._distributions import divergence, log_distributions
from hf_fuse.distill.top_k import TopK
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2306.13649"


def jsd(
    student_NV: Tensor,
    teacher_NV: Tensor | TopK,
    *,
    beta: Annotated[float, Between(0, 1)] = 0.5,
    temperature: Annotated[float, Between(0, open_low=True)] = 1.0,
    scale_by_t2: bool = True,
    continuous: bool = True,
) -> Tensor:
    """Sum over N of ``beta KL(T || M) + (1 - beta) KL(S || M)`` with the mixture ``M = (1 - beta) S + beta T``.

    As in TRL, beta 0 is forward KL and 1 is reverse KL. The formula itself goes to 0 at both ends, so that a small beta
    would nearly switch the loss off; divided by ``beta (1 - beta)`` it goes to these two divergences.

    Args:
        student_NV: logits.
        teacher_NV: logits, or the top-K of them at the same temperature.
        beta: see above.
        temperature: divides both logits.
        scale_by_t2: multiplies by the temperature's square.
        continuous: divides by ``beta (1 - beta)`` (4 times the Jensen-Shannon divergence at 0.5); False is TRL's value.
    """
    student_NO, teacher_NO = log_distributions(student_NV, teacher_NV, temperature)
    scale = temperature**2 if scale_by_t2 else 1
    if beta == 0:
        return divergence(teacher_NO, student_NO) * scale
    if beta == 1:
        return divergence(student_NO, teacher_NO) * scale
    mixture_NO = torch.logaddexp(student_NO + math.log1p(-beta), teacher_NO + math.log(beta))
    value = beta * divergence(teacher_NO, mixture_NO) + (1 - beta) * divergence(student_NO, mixture_NO)
    return value * (scale / (beta * (1 - beta)) if continuous else scale)
