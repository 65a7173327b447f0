"""Proxy tuning with a strength of its own for each token: the large model is to move as far as the small one has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated

import torch
from torch import Tensor, nn

from hf_fuse.decode.fused_models import FusedModels
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2406.15480"


def dynamic_logits_fusion(
    model: nn.Module,
    experts: nn.Module | Sequence[nn.Module],
    base_model: nn.Module,
    *,
    maximum: Annotated[float, Between(0)] = 2.0,
    steps: Annotated[int, Between(1, 1000)] = 20,
) -> FusedModels:
    """``model + a (expert - base_model)`` with the ``a`` of each token whose divergences from the large model, in both
    directions, are closest to the expert's from its base.

    Args:
        model: the large one.
        experts: small fine-tuned ones; of several, one is chosen for each token.
        base_model: what the experts were fine-tuned from.
        maximum: largest strength.
        steps: strengths tried between 0 (the large model alone) and the largest.

    Raises:
        FuseError: different tokenizers.
    """
    experts = list(experts) if isinstance(experts, Sequence) else [experts]
    fuse = partial(moved_as_far, strengths=[maximum * step / steps for step in range(steps + 1)])
    return FusedModels([model, base_model, *experts], fuse)


def moved_as_far(logits: Sequence[Tensor], strengths: Sequence[float]) -> Tensor:
    """The large model's logits moved by the best strength towards the best expert, ``(..., V)``.

    Args:
        logits: of the large model, the small base and its experts, ``(..., V)``.
        strengths: to choose from; of equally good ones the first.
    """
    large_XV, base_XV, *experts = logits
    best_X, strength_X, expert_X = best_move(logits, strengths)
    shift_XV = torch.zeros_like(large_XV)
    for number, expert_XV in enumerate(experts):
        chosen_X1 = (strength_X * (expert_X == number)).unsqueeze(-1)
        shift_XV += chosen_X1 * (expert_XV - base_XV)
    return large_XV + shift_XV


def best_move(logits: Sequence[Tensor], strengths: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """The smallest sum over experts of squared differences of divergences, its strength and the expert's number.

    With several experts each is tried alone, and measured by the sum over all of them: the paper's search over one
    expert at a time, which takes experts times strengths evaluations instead of a power. (Its wording leaves open by
    which sum the experts are compared.)
    """
    large_XV, base_XV, *experts = logits
    log_p_XV, log_q_XV = large_XV.log_softmax(-1), base_XV.log_softmax(-1)
    p_XV = log_p_XV.exp()
    wanted = []
    for expert_XV in experts:
        log_e_XV = expert_XV.log_softmax(-1)
        wanted.append((_divergence(log_e_XV, log_q_XV), _divergence(log_q_XV, log_e_XV)))
    best_X = torch.full_like(p_XV[..., 0], torch.inf)
    strength_X, expert_X = torch.zeros_like(best_X), torch.zeros_like(best_X)
    for number, expert_XV in enumerate(experts):
        shift_XV = expert_XV - base_XV
        expected_X = (p_XV * shift_XV).sum(-1)
        for strength in strengths:
            # log of the moved distribution: log p + a shift - log_z, so no further softmax is needed.
            moved_XV = log_p_XV + strength * shift_XV
            log_z_X = moved_XV.logsumexp(-1)
            moved_expected_X = ((moved_XV - log_z_X.unsqueeze(-1)).exp() * shift_XV).sum(-1)
            forward_X = strength * moved_expected_X - log_z_X
            backward_X = log_z_X - strength * expected_X
            cost_X = sum((forward_X - there) ** 2 + (backward_X - back) ** 2 for there, back in wanted)
            better_X = cost_X < best_X
            best_X = torch.where(better_X, cost_X, best_X)
            strength_X = torch.where(better_X, strength, strength_X)
            expert_X = torch.where(better_X, number, expert_X)
    return best_X, strength_X, expert_X


def _divergence(log_p_XV: Tensor, log_q_XV: Tensor) -> Tensor:
    return (log_p_XV.exp() * (log_p_XV - log_q_XV)).sum(-1)
