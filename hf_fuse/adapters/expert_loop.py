"""Experts of a feed-forward layer one after the other, each over the tokens that chose it: the CPU's way.

The backward pass computes the experts' activations again, so none of those T x K x f values is kept: autograd holds the
outputs of the frozen projections alone. Tokens are taken in blocks: what one expert adds to is still in the cache when
the next does.
Axes: T tokens, f width of the layer, E experts, r rank; m the tokens of one block that chose one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_fuse.adapters.precise_linear import no_autocast

ROWS = 256  # tokens of a block per expert to aim at: fewer make products inefficient, more leave the cache


class Projection(NamedTuple):
    """A projection into the layer's width: its frozen output and, if it has experts, their part in rank space.

    ``ranks_TEr`` is ``A_e x`` of every expert, with the scaling, ``B_Efr`` the up projections; both at least as precise
    as ``base_Tf``.
    """

    base_Tf: Tensor
    ranks_TEr: Tensor | None = None
    B_Efr: Tensor | None = None


def expert_loop(
    activated: Projection,
    linear: Projection | None,
    weights_TE: Tensor,
    A_Erf: Tensor | None,
    activation: Callable[[Tensor], Tensor],
    kept_Tf: Tensor | None = None,
    kept_by_factors_Tf: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``sum_e weight_e h_e`` as ``(T, f)`` and ``weight_e A_e h_e`` as ``(T, E, r)``, with
    ``h_e = activation(activated_e) * linear_e``.

    Args:
        activated: the gate projection, or the only one of a layer without gate.
        linear: the up projection of a gated layer.
        weights_TE: 0 where an expert has nothing to do; there is no gradient there.
        A_Erf: factors of the down projection, None if it has no experts.
        activation: elementwise, without trainable parameters.
        kept_Tf: dropout's mask on h_e.
        kept_by_factors_Tf: on h_e as the input of A_e.
    """
    linear = linear or Projection(None)
    return _ExpertLoop.apply(activation, weights_TE, A_Erf, kept_Tf, kept_by_factors_Tf, *activated, *linear)


class _ExpertLoop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: Callable, weights_TE: Tensor, *tensors: Tensor | None):
        ctx.activation = activation
        ctx.save_for_backward(weights_TE, *tensors)
        A_Erf, kept_Tf, kept_by_factors_Tf = tensors[:3]
        activated, linear = Projection(*tensors[3:6]), Projection(*tensors[6:])
        precise = torch.promote_types(weights_TE.dtype, activated.base_Tf.dtype)
        hidden_Tf = torch.empty_like(activated.base_Tf, memory_format=torch.contiguous_format)
        ranks_TEr = None if A_Erf is None else A_Erf.new_zeros(*weights_TE.shape, A_Erf.shape[1])
        # Narrow products are half as fast again from contiguous factors.
        A_Efr = None if A_Erf is None else A_Erf.transpose(1, 2).contiguous()
        with no_autocast(weights_TE):
            for block, chosen in _blocks(weights_TE):
                sum_bf = hidden_Tf[block].to(precise).zero_()
                for expert, tokens_m in chosen:
                    weight_m1 = _rows(weights_TE[:, expert, None], tokens_m)
                    h_mf = activation(_raised(activated, expert, tokens_m))
                    if linear.base_Tf is not None:
                        h_mf = _raised(linear, expert, tokens_m).mul_(h_mf)
                    if A_Erf is not None:
                        ranks_mr = _masked(h_mf, kept_by_factors_Tf, tokens_m).to(A_Erf.dtype) @ A_Efr[expert]
                        ranks_TEr[:, expert].index_copy_(0, tokens_m, (ranks_mr * weight_m1).to(A_Erf.dtype))
                    weighted_mf = _masked(h_mf, kept_Tf, tokens_m).to(precise).mul_(weight_m1)
                    sum_bf.index_add_(0, tokens_m - block.start, weighted_mf)
                if sum_bf.dtype != hidden_Tf.dtype:
                    hidden_Tf[block] = sum_bf
        return hidden_Tf, ranks_TEr

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_hidden_Tf: Tensor, d_ranks_TEr: Tensor | None):
        weights_TE, A_Erf, kept_Tf, kept_by_factors_Tf, *tensors = ctx.saved_tensors
        activated, linear = Projection(*tensors[:3]), Projection(*tensors[3:])
        precise = torch.promote_types(weights_TE.dtype, activated.base_Tf.dtype)
        d_weights_TE = torch.zeros_like(weights_TE)
        d_A_Erf = None if A_Erf is None else torch.zeros_like(A_Erf, dtype=precise)
        d_activated, d_linear = _gradient_of(activated, precise), _gradient_of(linear, precise)
        with no_autocast(weights_TE):
            for block, chosen in _blocks(weights_TE):
                for gradient in (d_activated, d_linear):
                    if gradient.base_Tf is not None:
                        gradient.base_Tf[block].zero_()
                for expert, tokens_m in chosen:
                    weight_m1 = _rows(weights_TE[:, expert, None], tokens_m)
                    with torch.enable_grad():
                        raised_mf = _raised(activated, expert, tokens_m).requires_grad_()
                        active_mf = ctx.activation(raised_mf)
                    h_mf = active_mf.detach()
                    if linear.base_Tf is not None:
                        linear_mf = _raised(linear, expert, tokens_m)
                        h_mf = h_mf * linear_mf
                    d_h_mf = _masked(_rows(d_hidden_Tf, tokens_m), kept_Tf, tokens_m)
                    if A_Erf is not None:
                        d_ranks_mr = _rows(d_ranks_TEr[:, expert], tokens_m)
                        d_h_mf = _add_product(d_h_mf, d_ranks_mr, A_Erf[expert], kept_by_factors_Tf, tokens_m)
                        seen_mf = _masked(h_mf, kept_by_factors_Tf, tokens_m).to(A_Erf.dtype)
                        d_A_Erf[expert] += (d_ranks_mr * weight_m1).to(A_Erf.dtype).t() @ seen_mf
                    d_weights_TE[:, expert].index_copy_(0, tokens_m, (h_mf.to(precise) * d_h_mf).sum(-1).to(weights_TE))
                    d_h_mf.mul_(weight_m1)
                    if linear.base_Tf is not None:
                        _pass_back(d_linear, linear, expert, tokens_m, d_h_mf * active_mf.detach())
                        d_h_mf.mul_(linear_mf)
                    (d_raised_mf,) = torch.autograd.grad(active_mf, raised_mf, d_h_mf)
                    _pass_back(d_activated, activated, expert, tokens_m, d_raised_mf)
        return None, d_weights_TE, d_A_Erf, None, None, *d_activated, *d_linear


def _blocks(weights_TE: Tensor) -> Iterator[tuple[slice, list[tuple[int, Tensor]]]]:
    """Blocks of tokens, and in each the experts that are used, with their tokens."""
    chosen_ET = (weights_TE != 0).t()
    experts, count = chosen_ET.shape
    size = max(ROWS, ROWS * experts * count // max(1, int(chosen_ET.sum())))
    for start in range(0, count, size):
        block = slice(start, min(start + size, count))
        tokens = chosen_ET[:, block].nonzero()[:, 1] + start
        parts = tokens.split(chosen_ET[:, block].sum(1).tolist())
        yield block, [(expert, tokens_m) for expert, tokens_m in enumerate(parts) if len(tokens_m)]


def _rows(values: Tensor, tokens_m: Tensor) -> Tensor:
    """A copy of some rows; twice as fast as ``values[tokens_m]``."""
    return values.index_select(0, tokens_m)


def _masked(values_mf: Tensor, kept_Tf: Tensor | None, tokens_m: Tensor) -> Tensor:
    return values_mf if kept_Tf is None else values_mf * _rows(kept_Tf, tokens_m)


def _raised(projection: Projection, expert: int, tokens_m: Tensor) -> Tensor:
    """A projection's output for some tokens, changed by one expert."""
    base_Tf, ranks_TEr, B_Efr = projection
    raised_mf = _rows(base_Tf, tokens_m)
    if ranks_TEr is None:
        return raised_mf
    return raised_mf.to(B_Efr.dtype).addmm_(_rows(ranks_TEr[:, expert], tokens_m), B_Efr[expert].t()).to(base_Tf.dtype)


def _add_product(sum_mf: Tensor, left_mr: Tensor, right_rf: Tensor, kept_Tf: Tensor | None, tokens_m: Tensor) -> Tensor:
    """``sum + mask * left @ right``, in place where it can be."""
    if kept_Tf is None:
        return sum_mf.to(right_rf.dtype).addmm_(left_mr, right_rf).to(sum_mf.dtype)
    return sum_mf.add_(_masked(left_mr @ right_rf, kept_Tf, tokens_m))


def _gradient_of(projection: Projection, precise: torch.dtype) -> Projection:
    """Zeros, but for the first: that is set to zero block by block, when it is needed in the cache."""
    base_Tf, ranks_TEr, B_Efr = projection
    return Projection(
        None if base_Tf is None else torch.empty_like(base_Tf, memory_format=torch.contiguous_format),
        None if ranks_TEr is None else torch.zeros_like(ranks_TEr, memory_format=torch.contiguous_format),
        # Laid out as (E, r, f), in which the sum over tokens is twice as fast.
        None if B_Efr is None else torch.zeros_like(B_Efr.transpose(1, 2), dtype=precise).transpose(1, 2),
    )


def _pass_back(gradient: Projection, projection: Projection, expert: int, tokens_m: Tensor, d_mf: Tensor) -> None:
    """Adds to the projection's gradient what comes back through :func:`_raised`."""
    _, ranks_TEr, B_Efr = projection
    gradient.base_Tf.index_add_(0, tokens_m, d_mf)
    if ranks_TEr is not None:
        d_mf = d_mf.to(B_Efr.dtype)
        gradient.B_Efr[expert].t().add_(_rows(ranks_TEr[:, expert], tokens_m).t() @ d_mf)
        gradient.ranks_TEr[:, expert].index_copy_(0, tokens_m, d_mf @ B_Efr[expert])
