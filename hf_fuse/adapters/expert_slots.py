"""Experts of a feed-forward layer without sorting tokens on the host: for accelerators and torch.compile.

``expert_slots`` evaluates all tokens K times, once per choice: the experts' factors side by side are one product, and a
mask in rank space leaves each token its own. Shapes never depend on the routing, so nothing waits for the device and
torch.compile sees one graph. ``expert_groups`` sorts on the device and multiplies each group with its expert alone,
which pays once the E r columns side by side cost more than moving T K rows.
Both keep no activation of an expert: eagerly, each pass is checkpointed; compiled, the compiler decides.
Axes: T tokens, f width of the layer, E experts, K choices per token, r rank; N = T K.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_fuse.adapters.expert_loop import Projection


def expert_slots(
    activated: Projection,
    linear: Projection | None,
    weights_TE: Tensor,
    A_Erf: Tensor | None,
    activation: Callable[[Tensor], Tensor],
    kept_Tf: Tensor | None = None,
    kept_by_factors_Tf: Tensor | None = None,
    *,
    chosen_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`~hf_fuse.adapters.expert_loop.expert_loop`; without ``chosen_TK`` every token passes all E experts."""
    hidden_Tf, ranks_TEr = 0, None
    for chosen in range(weights_TE.shape[1]) if chosen_TK is None else chosen_TK.unbind(1):
        weighted_Tf, weighted_TEr = _recomputed(
            _slot, chosen, activated, linear, weights_TE, A_Erf, activation, kept_Tf, kept_by_factors_Tf
        )
        hidden_Tf = hidden_Tf + weighted_Tf
        if A_Erf is not None:
            ranks_TEr = weighted_TEr if ranks_TEr is None else ranks_TEr + weighted_TEr
    return hidden_Tf.to(activated.base_Tf.dtype), ranks_TEr


def _slot(
    chosen: int | Tensor,
    activated: Projection,
    linear: Projection | None,
    weights_TE: Tensor,
    A_Erf: Tensor | None,
    activation: Callable[[Tensor], Tensor],
    kept_Tf: Tensor | None,
    kept_by_factors_Tf: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    weights_TE = weights_TE * _is_chosen(chosen, weights_TE)
    h_Tf = activation(_raised(activated, chosen))
    if linear is not None:
        h_Tf = h_Tf * _raised(linear, chosen)
    hidden_Tf = (h_Tf if kept_Tf is None else h_Tf * kept_Tf) * weights_TE.sum(1, keepdim=True)
    if A_Erf is None:
        return hidden_Tf, None
    seen_Tf = (h_Tf if kept_by_factors_Tf is None else h_Tf * kept_by_factors_Tf).to(A_Erf.dtype)
    if isinstance(chosen, int):
        ranks_TEr = F.linear(seen_Tf, A_Erf[chosen]).unsqueeze(1)
    else:
        ranks_TEr = F.linear(seen_Tf, A_Erf.flatten(0, 1)).unflatten(1, A_Erf.shape[:2])
    return hidden_Tf, (ranks_TEr * weights_TE.unsqueeze(-1)).to(A_Erf.dtype)


def _raised(projection: Projection, chosen: int | Tensor) -> Tensor:
    base_Tf, ranks_TEr, B_Efr = projection
    if ranks_TEr is None:
        return base_Tf
    if isinstance(chosen, int):
        change_Tf = F.linear(ranks_TEr[:, chosen], B_Efr[chosen])
    else:
        own_TEr = ranks_TEr * _is_chosen(chosen, ranks_TEr).unsqueeze(-1)
        change_Tf = F.linear(own_TEr.flatten(1), B_Efr.transpose(0, 1).flatten(1))
    return (base_Tf + change_Tf).to(base_Tf.dtype)


def _is_chosen(chosen: int | Tensor, values_TE: Tensor) -> Tensor:
    column = chosen if isinstance(chosen, int) else chosen.unsqueeze(-1)
    return torch.arange(values_TE.shape[1], device=values_TE.device) == column


def _recomputed(function: Callable, *arguments):
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def can_group(dtype: torch.dtype, ranks: set[int]) -> bool:
    """Only in bf16 do grouped products exist everywhere and under torch.compile, with rows of whole 16 bytes."""
    return hasattr(F, "grouped_mm") and dtype == torch.bfloat16 and all(rank % 8 == 0 for rank in ranks)


def expert_groups(
    activated: Projection,
    linear: Projection | None,
    weights_TE: Tensor,
    A_Erf: Tensor | None,
    activation: Callable[[Tensor], Tensor],
    kept_Tf: Tensor | None = None,
    kept_by_factors_Tf: Tensor | None = None,
    *,
    chosen_TK: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`~hf_fuse.adapters.expert_loop.expert_loop`, where :func:`can_group`."""
    return _recomputed(
        _groups, activated, linear, weights_TE, A_Erf, activation, kept_Tf, kept_by_factors_Tf, chosen_TK
    )


def _groups(
    activated: Projection,
    linear: Projection | None,
    weights_TE: Tensor,
    A_Erf: Tensor | None,
    activation: Callable[[Tensor], Tensor],
    kept_Tf: Tensor | None,
    kept_by_factors_Tf: Tensor | None,
    chosen_TK: Tensor,
) -> tuple[Tensor, Tensor | None]:
    (tokens, experts), choices = weights_TE.shape, chosen_TK.shape[1]
    expert_N, order_N = chosen_TK.flatten().sort(stable=True)
    token_N = order_N // choices
    ends_E = (chosen_TK.flatten().unsqueeze(-1) == torch.arange(experts, device=chosen_TK.device)).sum(0).cumsum(0)
    place_N = token_N * experts + expert_N  # in (T, E) flattened

    def raised(projection: Projection) -> Tensor:
        base_Tf, ranks_TEr, B_Efr = projection
        base_Nf = base_Tf.index_select(0, token_N)
        if ranks_TEr is None:
            return base_Nf
        ranks_Nr = ranks_TEr.flatten(0, 1).index_select(0, place_N)
        return (base_Nf + F.grouped_mm(ranks_Nr, B_Efr.transpose(1, 2), offs=ends_E.int())).to(base_Tf.dtype)

    h_Nf = activation(raised(activated))
    if linear is not None:
        h_Nf = h_Nf * raised(linear)
    weight_N1 = weights_TE.flatten().index_select(0, place_N).unsqueeze(-1)
    weighted_Nf = (h_Nf if kept_Tf is None else h_Nf * kept_Tf.index_select(0, token_N)) * weight_N1
    # Back in order the K choices of a token lie side by side: their sum needs no atomics.
    hidden_Tf = weighted_Nf.index_select(0, order_N.argsort()).unflatten(0, (tokens, choices)).sum(1)
    if A_Erf is None:
        return hidden_Tf.to(activated.base_Tf.dtype), None
    seen_Nf = h_Nf if kept_by_factors_Tf is None else h_Nf * kept_by_factors_Tf.index_select(0, token_N)
    ranks_Nr = F.grouped_mm(seen_Nf.to(A_Erf.dtype), A_Erf.transpose(1, 2), offs=ends_E.int()) * weight_N1
    ranks_TEr = A_Erf.new_zeros(tokens * experts, A_Erf.shape[1]).index_copy(0, place_N, ranks_Nr.to(A_Erf.dtype))
    return hidden_Tf.to(activated.base_Tf.dtype), ranks_TEr.unflatten(0, (tokens, experts))
