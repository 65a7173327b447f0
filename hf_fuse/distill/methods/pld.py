"""Plackett-Luce distillation: the student ranks the label first, then the other classes as the teacher does."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_fuse.distill.methods._distributions import check_shapes
from hf_fuse.distill.top_k import TopK, outside
from hf_fuse.errors import FuseError
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2506.12542"


def pld(
    student_NV: Tensor,
    teacher_NV: Tensor | TopK,
    labels_N: Tensor,
    *,
    temperature: Annotated[float, Between(0, open_low=True)] = 1.0,
    label_floor: Annotated[float, Between(0, 1)] = 0.0,
) -> Tensor:
    """Sum over N of ``sum_k alpha_k (logsumexp_{l >= k} s_l - s_k)``, classes in the order label, teacher's ranking.

    alpha is the teacher's probability of the class. The first term is the cross-entropy times the teacher's probability
    of the label, so the loss replaces cross-entropy (set the weight of ``task`` to 0); it is not 0 where student and
    teacher agree. Costs four ``(N, V)`` tensors and a sort; a :class:`TopK` gives the first K terms alone, exactly.

    Args:
        student_NV: logits; never tempered.
        teacher_NV: logits, or the top-K of them at the same temperature with the label's probability.
        labels_N: class indices.
        temperature: of alpha. The paper: 1 on ImageNet, 4 on CIFAR.
        label_floor: least alpha of the label (the others are scaled down), for teachers that are wrong with
            confidence and would have the label nearly ignored. Not in the paper.

    Raises:
        FuseError: a top-K without the labels' probabilities, or taken at another temperature.
    """
    student_NV = student_NV.float()
    ordered = _first_ranks if isinstance(teacher_NV, TopK) else _all_ranks
    order_NK, alpha_NK, known_NK = ordered(student_NV, teacher_NV, labels_N, temperature)
    if label_floor:
        alpha_NK = _with_floor(alpha_NK, label_floor)
    ranked_NK = score_NK = student_NV.gather(-1, order_NK).masked_fill(~known_NK, float("-inf"))
    if order_NK.shape[-1] < student_NV.shape[-1]:
        rest_N1 = outside(student_NV, order_NK, known_NK).unsqueeze(-1)
        ranked_NK = torch.cat([score_NK, rest_N1], dim=-1)
    remaining_NK = ranked_NK.flip(-1).logcumsumexp(-1).flip(-1)[:, : score_NK.shape[-1]]
    return (alpha_NK * (remaining_NK - score_NK).masked_fill(~known_NK, 0)).sum()


def _with_floor(alpha_NK: Tensor, label_floor: float) -> Tensor:
    label_N1 = alpha_NK[:, :1].clamp(min=label_floor)
    scale_N1 = (1 - label_N1) / (1 - alpha_NK[:, :1]).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.cat([label_N1, alpha_NK[:, 1:] * scale_N1], dim=-1)


# Ranked classes, their alpha, and which of them there are.
Ranks = tuple[Tensor, Tensor, Tensor]


def _all_ranks(student_NV: Tensor, teacher_NV: Tensor, labels_N: Tensor, temperature: float) -> Ranks:
    check_shapes(student_NV, teacher_NV)
    teacher_NV = teacher_NV.float()
    order_NV = teacher_NV.scatter(-1, labels_N.unsqueeze(-1), float("inf")).argsort(
        dim=-1, descending=True, stable=True
    )
    alpha_NV = (teacher_NV / temperature).softmax(-1).gather(-1, order_NV)
    return order_NV, alpha_NV, torch.ones_like(order_NV, dtype=torch.bool)


def _first_ranks(student_NV: Tensor, teacher: TopK, labels_N: Tensor, temperature: float) -> Ranks:
    teacher.check(temperature)
    if teacher.label_log_prob_N is None:
        raise FuseError("pld: the teacher's top-K lacks the labels' probabilities. Make it with the labels.")
    labels_N1, ids_NK = labels_N.unsqueeze(-1), teacher.ids_NK.long()
    ids = torch.cat([labels_N1, ids_NK], dim=-1)
    log_probs = torch.cat([teacher.label_log_prob_N.unsqueeze(-1), teacher.log_probs_NK], dim=-1).float()
    known = F.pad(teacher.known_NK, (1, 0), value=True)
    # The label stands first and, if it is among the K, a second time; otherwise the last of the K falls out.
    again = F.pad(ids_NK == labels_N1, (1, 0)) & known
    kept_NK = again.int().argsort(dim=-1, stable=True)[:, :-1]
    return ids.gather(-1, kept_NK), log_probs.gather(-1, kept_NK).exp(), known.gather(-1, kept_NK)
