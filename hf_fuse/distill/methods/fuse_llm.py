"""FuseLLM: the student learns from whichever of several language models predicts a text best, or from their mean."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_fuse.distill.methods._distributions import divergence, log_distributions
from hf_fuse.distill.sources import Source, fused, narrowed
from hf_fuse.distill.top_k import TopK
from hf_fuse.errors import FuseError
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2401.10491"

Fusion = Literal["min_ce", "avg_ce"]
Support = Literal["tail", "renormalized"]
Unaligned = Literal["skip", "label"]


def fuse_llm(
    student_NV: Tensor,
    sources: list[Source],
    labels_N: Tensor,
    *,
    fusion: Fusion = "min_ce",
    support: Support = "tail",
    unaligned: Unaligned = "skip",
    teacher_temperature: Annotated[float, Between(0, open_low=True)] = 1.0,
) -> Tensor:
    """Sum over N of ``KL(fused || student)``. The paper's loss is ``{task: 0.9, fuse_llm: 0.1}``; a schedule of both
    weights lets the teachers fade. FuseLLM's own setting is ``support: renormalized, unaligned: label``.

    Args:
        student_NV: logits, at temperature 1.
        sources: what the teachers predict; their vocabularies and tokenizations may differ.
        labels_N: token ids.
        fusion: ``min_ce`` takes the teacher that has the least cross-entropy on the row (the first of equals), the
            whole row from one; ``avg_ce`` mixes all with weights ``softmax(exp(-cross-entropy))``.
        support: ``tail`` compares the kept tokens and one bucket for all others. ``renormalized`` (the paper) spreads
            the kept tokens' probabilities over 1 and so discards what the teachers leave to others: it makes the
            student overconfident, and a student equal to its teacher still has a gradient.
        unaligned: what a prediction without a teacher counts: nothing, or (the paper) the cross-entropy of its label.
        teacher_temperature: divides the teachers' log probabilities, with ``renormalized`` alone.

    Raises:
        FuseError: a teacher temperature with ``tail``, or sources of different temperatures.
    """
    weights_NS = source_weights(sources, fusion)
    return fused_loss(
        student_NV, sources, weights_NS, labels_N, support=support, unaligned=unaligned,
        teacher_temperature=teacher_temperature,
    )  # fmt: skip


def source_weights(sources: list[Source], fusion: Fusion) -> Tensor:
    """How much each source counts for each prediction, ``(N, S)``."""
    ce_NS = torch.stack([source.cross_entropy_N for source in sources], dim=-1).float()
    if fusion == "min_ce":
        return F.one_hot(ce_NS.argmin(-1), len(sources)).float()
    has_NS = torch.stack([source.has_N for source in sources], dim=-1)
    return among(((-ce_NS).exp()).softmax(-1), has_NS)


def among(weights_NS: Tensor, has_NS: Tensor) -> Tensor:
    """Weights of those sources that have something to say, again with sum 1 (or 0, if none has)."""
    weights_NS = weights_NS * has_NS
    return weights_NS / weights_NS.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def fused_loss(
    student_NV: Tensor,
    sources: list[Source],
    weights_NS: Tensor,
    labels_N: Tensor,
    *,
    support: Support,
    unaligned: Unaligned,
    teacher_temperature: float,
) -> Tensor:
    """See :func:`fuse_llm`; ``weights_NS`` carry no gradient."""
    if support == "tail" and teacher_temperature != 1:
        raise FuseError(
            f"fuse_llm: teacher_temperature is {teacher_temperature:g}, but what the tail holds can't be tempered. "
            "Set it to 1, or support to renormalized."
        )
    for source in sources:
        source.own.check(1.0)
    top = fused([source.everywhere() for source in sources], weights_NS)
    # Where no token is known all is tail, on both sides: nothing to learn.
    taught_N = top.known_NK.any(-1)
    top = top.rows(taught_N)
    if support == "tail":
        top = narrowed(top, student_NV.shape[-1] - 1)
        student_NO, teacher_NO = log_distributions(student_NV[taught_N], top, 1.0)
        loss = divergence(teacher_NO, student_NO)
    else:
        loss = _renormalized(student_NV[taught_N], top, teacher_temperature)
    if unaligned == "label":
        loss = loss + F.cross_entropy(student_NV[~taught_N].float(), labels_N[~taught_N], reduction="sum")
    return loss


def _renormalized(student_NV: Tensor, top: TopK, temperature: float) -> Tensor:
    known_NK = top.known_NK
    # A row of which no token has a partner keeps no distribution.
    log_p_NK = (top.log_probs_NK / temperature).masked_fill(~known_NK, torch.finfo(torch.float32).min).log_softmax(-1)
    p_NK = log_p_NK.exp().masked_fill(~known_NK, 0)
    log_q_NK = student_NV.float().log_softmax(-1).gather(-1, top.ids_NK.long())
    return (p_NK * (log_p_NK.masked_fill(~known_NK, 0) - log_q_NK)).sum()
