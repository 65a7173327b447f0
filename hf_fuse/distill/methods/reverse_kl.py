"""Reverse KL divergence: the student keeps to what the teacher finds likely, and may leave out some of it (MiniLLM)."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from hf_fuse.distill.methods._distributions import divergence, log_distributions
from hf_fuse.distill.top_k import TopK
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2306.08543"


def reverse_kl(
    student_NV: Tensor,
    teacher_NV: Tensor | TopK,
    *,
    temperature: Annotated[float, Between(0, open_low=True)] = 1.0,
    scale_by_t2: bool = True,
) -> Tensor:
    """Sum over N of ``KL(student || teacher)``, in nats, on given text (MiniLLM: on the student's own).

    With a :class:`TopK`, what the student predicts outside of the teacher's K tokens is one bucket.

    Args:
        student_NV: logits.
        teacher_NV: logits, or the top-K of them at the same temperature.
        temperature: divides both logits.
        scale_by_t2: multiplies by the temperature's square.
    """
    student_NO, teacher_NO = log_distributions(student_NV, teacher_NV, temperature)
    return divergence(student_NO, teacher_NO) * (temperature**2 if scale_by_t2 else 1)
