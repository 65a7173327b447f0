"""Mean of the models' next-token probabilities (linear), or of their logarithms (geometric)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from hf_fuse.decode.completions import tokenizer_beside
from hf_fuse.decode.fused_models import FusedModels
from hf_fuse.decode.translated_model import TranslatedModel
from hf_fuse.decode.vocabularies import first_difference, named
from hf_fuse.errors import RecipeError
from hf_fuse.registry import PerModel


def ensemble(
    models: Sequence[nn.Module],
    *,
    mode: Literal["linear", "geometric"] = "linear",
    weights: PerModel | None = None,
    align: Literal["none", "exact", "min_ed"] = "none",
) -> FusedModels:
    """Models that predict each token together.

    Args:
        models: the first one's configuration and tokenizer count.
        mode: ``linear``: what one of the models finds likely stays likely; ``geometric``: a token needs the consent of
            all.
        weights: of the models, scaled to sum to 1; equal by default.
        align: what to do with models that have another tokenizer than the first, in ``linear`` mode: refuse them;
            let them speak for the tokens that have the ``exact`` same text; or, where there is none, also for the
            nearest by edit distance (``min_ed``).

    Raises:
        FuseError: different tokenizers, or not one weight >= 0 per model.
    """
    weights = [1.0] * len(models) if weights is None else list(weights)
    if len(weights) != len(models) or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise RecipeError(f"weights: got {weights}, expected {len(models)} numbers >= 0, one per model, not all 0.")
    if align != "none":
        models = _translated(models, mode, align)
    shares = [weight / sum(weights) for weight in weights]
    return FusedModels(models, partial(mean_prediction, shares=shares, mode=mode))


def _translated(models: Sequence[nn.Module], mode: str, align: str) -> list[nn.Module]:
    if mode != "linear":
        raise RecipeError(
            f"align: only for linear ensembles. In a {mode} one, a token without a partner has no chance."
        )
    tokenizers = [tokenizer_beside(model, named(model)) for model in models]
    pairs = list(zip(models, tokenizers))
    return [
        TranslatedModel(model, tokenizer, *pairs[0], align) if first_difference(tokenizers[0], tokenizer) else model
        for model, tokenizer in pairs
    ]


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
