"""Log probabilities of student and teacher over the same outcomes.

N predictions, V tokens, O outcomes: the V tokens, or K of them and a bucket for the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fuse.distill.top_k import TopK, outside
from hf_fuse.errors import FuseError

# The log of a probability that fp32 holds as 0. With -inf itself, 0 times its difference to another one would be NaN.
IMPOSSIBLE = -1e4


def log_distributions(student_NV: Tensor, teacher_NV: Tensor | TopK, temperature: float) -> tuple[Tensor, Tensor]:
    """Of the student and the teacher, ``(N, O)`` each, in fp32.

    Raises:
        FuseError: the vocabularies differ in size, or the top-K was taken at another temperature.
    """
    student_NV = student_NV.float() / temperature
    if not isinstance(teacher_NV, TopK):
        check_shapes(student_NV, teacher_NV)
        return student_NV.log_softmax(-1), (teacher_NV.float() / temperature).log_softmax(-1)
    teacher_NV.check(temperature)
    ids_NK, teacher_NO = teacher_NV.ids_NK.long(), teacher_NV.log_probs_NK.float()
    known_NK = teacher_NV.known_NK
    student_NO = student_NV.gather(-1, ids_NK).masked_fill(~known_NK, IMPOSSIBLE)
    # Without tokens left for it, the bucket is no outcome.
    if ids_NK.shape[-1] < student_NV.shape[-1]:
        student_NO = torch.cat([student_NO, outside(student_NV, ids_NK, known_NK).unsqueeze(-1)], dim=-1)
        teacher_NO = torch.cat([teacher_NO, teacher_NV.tail_log_prob_N.float().unsqueeze(-1)], dim=-1)
    # What was stored in half precision no longer sums to 1.
    return student_NO.log_softmax(-1), teacher_NO.clamp(min=IMPOSSIBLE).log_softmax(-1)


def divergence(from_NO: Tensor, to_NO: Tensor) -> Tensor:
    """``KL(from || to)`` of log probabilities, summed over outcomes and predictions."""
    return (from_NO.exp() * (from_NO - to_NO)).sum()


def check_shapes(student_NV: Tensor, teacher_NV: Tensor) -> None:
    """Refuses logits that aren't over the same tokens.

    Raises:
        FuseError: the shapes differ.
    """
    if student_NV.shape != teacher_NV.shape:
        raise FuseError(
            f"The student's logits have shape {list(student_NV.shape)}, the teacher's {list(teacher_NV.shape)}. "
            "This method compares them token by token: both need the same vocabulary."
        )
