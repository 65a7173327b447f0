"""Shifts a large model's logits by what fine-tuning changed in a small one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated

from torch import Tensor, nn

from hf_fuse.decode.fused_models import FusedModels
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2401.08565"


def proxy_tuning(
    model: nn.Module,
    experts: nn.Module | Sequence[nn.Module],
    base_model: nn.Module,
    *,
    alpha: Annotated[float, Between(-100, 100)] = 1.0,
) -> FusedModels:
    """``model + alpha (expert - base_model)``, in logits: the large model as if it had been fine-tuned too.

    Args:
        model: the large one.
        experts: small fine-tuned ones; the shifts of several are added.
        base_model: what the experts were fine-tuned from.
        alpha: how far to go; 0 is the large model alone, below 0 away from the experts.

    Raises:
        FuseError: different tokenizers.
    """
    experts = list(experts) if isinstance(experts, Sequence) else [experts]
    return FusedModels([model, base_model, *experts], partial(shifted, alpha=alpha))


def shifted(logits: Sequence[Tensor], alpha: float) -> Tensor:
    """Logits ``(..., V)`` of the large model, the small base and its experts -> the shifted ones."""
    large_XV, base_XV, *experts = logits
    return large_XV + alpha * sum(expert_XV - base_XV for expert_XV in experts)
