"""LDAM: cross-entropy with a margin that is larger the rarer the label.

For fine-tuning on imbalanced classes, together with ``class_balanced`` and its deferred re-weighting.
"""

from __future__ import annotations

from typing import Annotated

from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from hf_fuse.losses._predictions import class_indices, mean
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/1906.07413"


def ldam(
    logits_NC: Tensor,
    labels_N: Tensor,
    class_counts_C: Tensor,
    *,
    max_margin: Annotated[float, Between(0)] = 0.5,
    scale: Annotated[float, Between(0, open_low=True)] = 1.0,
) -> Tensor:
    """Mean cross-entropy of ``scale * logits`` after the label's logit has been lowered by its class's margin.

    Set the weight of ``task`` to 0 to use it instead of the cross-entropy. Together with re-weighting (LDAM-DRW):
    :mod:`hf_fuse.losses.class_balanced`.

    Args:
        logits_NC: of the predictions that have a label.
        labels_N: class indices.
        class_counts_C: how often each label occurs in the training set.
        max_margin: of the rarest class; the others have less by the fourth root of their frequency.
        scale: 30 for the cosine classifier that the paper uses; 1 for ordinary logits.
    """
    margins_C = class_margins(class_counts_C, max_margin).to(logits_NC.device)
    lowered_NC = logits_NC.float() - one_hot(class_indices(labels_N), logits_NC.shape[-1]) * margins_C
    return mean(cross_entropy(scale * lowered_NC, labels_N, reduction="none"))


def class_margins(class_counts_C: Tensor, max_margin: float) -> Tensor:
    """Proportional to ``n^(-1/4)``, the largest is ``max_margin``; absent classes count as seen once."""
    rarity_C = class_counts_C.clamp(min=1).float().pow(-0.25)
    return max_margin * rarity_C / rarity_C.max()
