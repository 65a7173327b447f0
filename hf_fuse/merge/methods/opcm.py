"""OPCM: models added one after the other, each without what it would overwrite of those before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from hf_fuse.merge.methods._spectral import RANK_TOLERANCE, Triplets, except_for, triplets
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2501.09522"
# The authors project what nn.Linear holds: heads too, but no embeddings.
DEFAULTS = {
    "spectral": except_for(
        "embed_tokens", "word_embeddings", "token_embedding", "tok_embeddings", "wte", "embed_in", "shared.weight",
        "position_embedding", "positional_embedding", "token_type_embeddings", "wpe", "relative_attention_bias",
    )
}  # fmt: skip


def unit(spectral: bool) -> str:
    return "tensor" if spectral else "element"


def rescale(
    lengths: Sequence[float], merged_length: float, earlier_count: int, earlier_length: float
) -> tuple[float, dict[str, Any]]:
    """The sum's factor, which gives it the mean length of the task vectors so far, and what the next merge must know.

    Args:
        lengths: of each task vector, over the whole model. Zero ones count as absent.
        merged_length: of the sum.
    """
    new = [length for length in (lengths[1:] if earlier_count else lengths) if length > 0]
    count = earlier_count + len(new)
    mean = (earlier_count * earlier_length + sum(new)) / count if count else 0.0
    factor = mean / merged_length if merged_length > 0 and mean > 0 else 1.0
    record = {"earlier_count": count, "earlier_length": mean, "earlier_scale": 1 / factor}
    return factor, record if count else {}


def opcm(
    deltas_KN: Tensor,
    *,
    alpha: Annotated[float, Between(0, 1)] = 0.5,
    zero_diagonal: bool = True,
    spectral: bool = True,
    tolerance: Annotated[float, Between(0, 1)] = RANK_TOLERANCE,
    earlier_count: Annotated[int, Between(0)] = 0,
    earlier_length: Annotated[float, Between(0)] = 0.0,
    earlier_scale: Annotated[float, Between(0, open_low=True)] = 1.0,
) -> Tensor:
    """``T_k = T_(k-1) + P_k(tau_k)``, at the end scaled to the mean length of the task vectors over the whole model.

    P_k works on matrices: in the singular basis of T_(k-1) it removes the block of its leading directions and the rest
    of the diagonal. Everything else is added up.

    Args:
        deltas_KN: task vectors in the order of the recipe, ``[K, *shape]``. The authors shuffle; the order matters.
        alpha: the leading directions are those before the singular values' sum exceeds this share: larger protects
            more of the earlier models. As in the authors' code, 0 and 1 both mean none.
        zero_diagonal: remove the diagonal. Experiments with the authors' first code kept it by mistake.
        spectral: project this matrix, or just add. By default all but embeddings.
        tolerance: singular values up to this share of the largest belong to no direction of the earlier models.
        earlier_count: models in the first one, if it is itself such a merge (``hf-fuse merge --continue-from`` fills
            in this and the next two).
        earlier_length: mean length of their task vectors.
        earlier_scale: what its difference from the base is multiplied with to be their sum.

    The authors divide by the length after every model and multiply back with it before the next; as singular vectors
    do not change with scale, once at the end is the same. Which cross blocks the paper's own formula removes is
    unverified; this follows the code.
    """
    total = deltas_KN[0] * earlier_scale
    for delta in deltas_KN[1:]:
        if spectral and delta.ndim == 2 and delta.numel() and bool((total + delta).sum().isfinite()):
            total = total + _beside(delta, triplets(total, tolerance), alpha, zero_diagonal)
        else:
            total = total + delta
    return total


def _beside(delta_MN: Tensor, before: Triplets, alpha: float, zero_diagonal: bool) -> Tensor:
    """``tau - U_k (U_k' tau V_k) V_k' - sum over i >= k of (u_i' tau v_i) u_i v_i'``: thin, so no M x M basis."""
    count = protected(before.values_R, alpha)
    left_MR, _, right_RN = before
    turned_RN = left_MR.T @ delta_MN
    removed_RR = torch.zeros(len(left_MR.T), len(right_RN), dtype=delta_MN.dtype, device=delta_MN.device)
    if zero_diagonal:
        removed_RR.diagonal().copy_((turned_RN * right_RN).sum(1))
    removed_RR[:count, :count] = turned_RN[:count] @ right_RN[:count].T
    return delta_MN - left_MR @ (removed_RR @ right_RN)


def protected(values_R: Tensor, alpha: float) -> int:
    """Index of the first singular value whose running sum exceeds ``alpha`` of the sum; 0 if none does."""
    sums = values_R.double().cumsum(0)
    beyond = (sums > alpha * sums[-1]).nonzero() if len(sums) and math.isfinite(float(sums[-1])) else []
    return int(beyond[0]) if len(beyond) else 0
