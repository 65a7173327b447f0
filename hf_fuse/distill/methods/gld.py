"""InfiGFusion's graph-on-logits distillation: the student's likeliest tokens vary together as the teacher's do."""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor

from hf_fuse.distill.sources import Source
from hf_fuse.distill.top_k import TopK
from hf_fuse.errors import FuseError
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2505.13893"


def gld(
    student_NV: Tensor,
    sources: list[Source],
    sequences_N: Tensor,
    *,
    k: Annotated[int, Between(1)] = 10,
    standardize: Literal["z_score", "logsumexp", "none"] = "z_score",
    token_weight: Annotated[float, Between(0)] = 1.0,
    structure_weight: Annotated[float, Between(0)] = 1.0,
) -> Tensor:
    """Sum over the sequences of ``T * structure``, plus the sum over N of ``sum_i |t_(i) - s_(i)|``; mean of sources.

    Each position's k largest logits, in descending order, make Z ``(T, k)``. Its graph ``C = Z'Z / T`` has the ranks as
    nodes (the only reading that works across tokenizers), ``f = C 1 / k`` is a number per node, and the structure term
    is ``sum_i |f_student - f_teacher|``, both sorted. C itself is never made: ``f = Z'(Z 1) / (T k)`` is linear in T k.
    It compares sequences whose numbers of tokens differ; the token-wise term takes the places that both share.

    The authors have published no code: the compression of the graph, 1/T and the weights of the terms are our reading
    of their figure. Graphs of equal degree sequences can't be told apart.

    Args:
        student_NV: logits.
        sources: what the teachers predict, over vocabularies of any kind.
        sequences_N: of which row of the batch each prediction is.
        k: ranks. 10 in the paper.
        standardize: what is done to the k logits of a position. Raw ones (``none``) may be shifted by any constant,
            which this loss would punish.
        token_weight: of the token-wise term.
        structure_weight: of the structure term.

    Raises:
        FuseError: a teacher keeps fewer than k tokens, or raw logits are wanted of one that doesn't keep their scale.
    """
    if k > student_NV.shape[-1]:
        raise FuseError(f"gld: k is {k}, but the student's vocabulary has {student_NV.shape[-1]} tokens.")
    # Logits as log probabilities: a shift that the standardisation takes out anyway.
    log_probs_NV = student_NV.float() if standardize == "none" else student_NV.float().log_softmax(-1)
    student_NK = _standardized(log_probs_NV.topk(k, dim=-1).values, standardize)
    total = student_NK.sum() * 0
    for source in sources:
        teacher_MK = _standardized(_largest(source.own, k, standardize), standardize)
        tokenwise = (student_NK[source.has_N] - teacher_MK[source.place_N[source.has_N]]).abs().sum()
        structure = _structure(student_NK, sequences_N, teacher_MK, source.own_sequences_M)
        total = total + token_weight * tokenwise + structure_weight * structure
    return total / max(len(sources), 1)


def node_features(logits_TK: Tensor) -> Tensor:
    """``C 1 / k`` of ``C = Z'Z / T``, ``(K,)``, without C."""
    tokens, k = logits_TK.shape
    return logits_TK.T @ logits_TK.sum(-1) / (tokens * k)


def _structure(student_NK: Tensor, sequences_N: Tensor, teacher_MK: Tensor, sequences_M: Tensor) -> Tensor:
    total = student_NK.sum() * 0
    for number in sequences_N.unique().tolist():
        ours_TK, theirs_TK = student_NK[sequences_N == number], teacher_MK[sequences_M == number]
        if len(theirs_TK):
            ours_K, theirs_K = (node_features(side).sort(descending=True).values for side in (ours_TK, theirs_TK))
            total = total + len(ours_TK) * (ours_K - theirs_K).abs().sum()
    return total


def _largest(top: TopK, k: int, standardize: str) -> Tensor:
    if top.ids_NK.shape[-1] < k or not bool(top.known_NK[:, :k].all()):
        raise FuseError(
            f"gld: needs {k} tokens of each prediction, the teacher's keep {top.ids_NK.shape[-1]}. Lower k."
        )
    values_NK = top.log_probs_NK[:, :k].float()
    if standardize != "none":
        return values_NK
    if top.log_z_N is None:
        raise FuseError("gld: the teacher's top-K doesn't keep the scale of its logits. Set standardize to z_score.")
    return values_NK + top.log_z_N.float().unsqueeze(-1)


def _standardized(values_NK: Tensor, how: str) -> Tensor:
    if how != "z_score":
        return values_NK
    values_NK = values_NK - values_NK.mean(-1, keepdim=True)
    return values_NK / values_NK.square().mean(-1, keepdim=True).clamp(min=1e-12).sqrt()
