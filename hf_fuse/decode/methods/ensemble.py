"""Mean of the models' next-token probabilities (linear), or of their logarithms (geometric)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from hf_fuse.decode.fused_models import FusedModels
from hf_fuse.errors import RecipeError
from hf_fuse.registry import PerModel


def ensemble(
    models: Sequence[nn.Module],
    *,
    mode: Literal["linear", "geometric"] = "linear",
    weights: PerModel | None = None,
) -> FusedModels:
    """Models that predict each token together.

    Args:
        models: with one tokenizer; the first one's configuration counts.
        mode: ``linear``: what one of the models finds likely stays likely; ``geometric``: a token needs the consent of
            all.
        weights: of the models, scaled to sum to 1; equal by default.

    Raises:
        FuseError: different tokenizers, or not one weight >= 0 per model.
    """
    weights = [1.0] * len(models) if weights is None else list(weights)
    if len(weights) != len(models) or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise RecipeError(f"weights: got {weights}, expected {len(models)} numbers >= 0, one per model, not all 0.")
    shares = [weight / sum(weights) for weight in weights]
    return FusedModels(models, partial(mean_prediction, shares=shares, mode=mode))


def mean_prediction(logits: Sequence[Tensor], shares: Sequence[float], mode: str) -> Tensor:
    """Logits of the mean, whose logsumexp is the mean of the models': a model with itself is exactly itself, also to
    settings that look at the size of logits (``repetition_penalty``).

    Args:
        logits: of each model, ``(..., V)``.
        shares: weights that sum to 1.
    """
    # A model of weight 0 has no say, also about what it finds impossible: 0 times -inf is not a number.
    said = [(share, logits_XV) for share, logits_XV in zip(shares, logits) if share]
    if mode == "geometric":
        return sum(share * logits_XV for share, logits_XV in said)  # normalising them moves each by a constant
    log_z_X1 = sum(share * logits_XV.logsumexp(-1, keepdim=True) for share, logits_XV in said)
    log_p_KXV = torch.stack([logits_XV.log_softmax(-1) + math.log(share) for share, logits_XV in said])
    return log_p_KXV.logsumexp(0) + log_z_X1
