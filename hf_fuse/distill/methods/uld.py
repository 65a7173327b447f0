"""Universal Logit Distillation: compares sorted probabilities, so that the vocabularies may differ."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_fuse.distill.top_k import TopK
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2402.12030"
ANY_VOCABULARY = True  # tokens are compared by rank, so a teacher's need not be the student's


def uld(
    student_NV: Tensor,
    teacher_NV: Tensor | TopK,
    *,
    student_temperature: Annotated[float, Between(0, open_low=True)] = 1.0,
    temperature: Annotated[float, Between(0, open_low=True)] = 1.0,
) -> Tensor:
    """Sum over N of the L1 distance between the two probability vectors, each in descending order.

    It sees how peaked the teacher is, not which token it prefers: a shuffled teacher gives 0. The smaller vocabulary is
    filled up with zeros. With a :class:`TopK`, its K values are compared with the student's K largest, and what is left
    on both sides as one more value; this spares the sort of all V.

    Args:
        student_NV: logits.
        teacher_NV: logits over any vocabulary, or the top-K of them at the teacher's temperature.
        student_temperature: divides the student's logits.
        temperature: divides the teacher's logits.
    """
    student_NV = (student_NV.float() / student_temperature).softmax(-1)
    if isinstance(teacher_NV, TopK):
        teacher_NV.check(temperature)
        teacher_NO = torch.cat([teacher_NV.log_probs_NK, teacher_NV.tail_log_prob_N.unsqueeze(-1)], -1).float().exp()
        k = teacher_NV.ids_NK.shape[-1]
        student_NK = _filled(student_NV.topk(min(k, student_NV.shape[-1]), dim=-1).values, k) * teacher_NV.known_NK
        student_NO = torch.cat([student_NK, 1 - student_NK.sum(-1, keepdim=True)], dim=-1)
        return (student_NO - teacher_NO).abs().sum()
    teacher_NV = (teacher_NV.float() / temperature).softmax(-1)
    width = max(student_NV.shape[-1], teacher_NV.shape[-1])
    sorted_NV = [_filled(p_NV.sort(-1, descending=True).values, width) for p_NV in (student_NV, teacher_NV)]
    return (sorted_NV[0] - sorted_NV[1]).abs().sum()


def _filled(values_NV: Tensor, width: int) -> Tensor:
    return F.pad(values_NV, (0, width - values_NV.shape[-1]))
