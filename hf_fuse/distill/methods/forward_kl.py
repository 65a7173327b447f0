"""Forward KL divergence: the student covers everything that the teacher finds likely (knowledge distillation)."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from hf_fuse.distill.methods._distributions import divergence, log_distributions
from hf_fuse.distill.top_k import TopK
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/1503.02531"


def forward_kl(
    student_NV: Tensor,
    teacher_NV: Tensor | TopK,
    *,
    temperature: Annotated[float, Between(0, open_low=True)] = 1.0,
    scale_by_t2: bool = True,
) -> Tensor:
    """Sum over N of ``KL(teacher || student)``, in nats.

    With a :class:`TopK`, over its K tokens and one bucket for all others: a lower bound of the whole divergence, 0 only
    if the buckets agree. Renormalising the K tokens instead would teach overconfidence.

    Args:
        student_NV: logits.
        teacher_NV: logits, or the top-K of them at the same temperature.
        temperature: divides both logits.
        scale_by_t2: multiplies by the temperature's square.
    """
    student_NO, teacher_NO = log_distributions(student_NV, teacher_NV, temperature)
    return divergence(teacher_NO, student_NO) * (temperature**2 if scale_by_t2 else 1)
