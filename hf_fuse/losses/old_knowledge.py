"""Keeps what a model knew while domain adapters learn (stage one of MixDA).

For adapters that learn a domain while the model's general knowledge is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fuse.losses._tokens import flat, token_mean

PAPER = "https://arxiv.org/abs/2306.05406"
MEAN_OVER = "samples"


def old_knowledge(
    adapted_outputs: tuple[Tensor, ...],
    original_outputs: tuple[Tensor, ...],
    generic_attention_mask: Tensor | None = None,
) -> Tensor:
    """Mean squared difference of feed-forward outputs with and without domain adapters, on generic text.

    The paper's stage one has weight 1 for it and 0.5 for the task, the cross-entropy of masked knowledge. (Its code
    compares the adapted output with itself, which gives 0.) ``hf_fuse.adapters.mixda_training.MixDaTrainer`` supplies
    the tensors.

    Args:
        adapted_outputs: per layer ``(B, S, o)``.
        original_outputs: of the frozen layers alone, for the same inputs.
        generic_attention_mask: ``(B, S)``, 0 for padding.
    """
    per_layer = [
        token_mean((flat(adapted) - flat(original)).square().mean(-1), generic_attention_mask)
        for adapted, original in zip(adapted_outputs, original_outputs, strict=True)
    ]
    return torch.stack(per_layer).mean()
