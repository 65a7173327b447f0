"""Labels as a matrix: single classes and several labels per sample alike."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from hf_fuse.errors import FuseError


def label_matrix(labels: Tensor, logits_NL: Tensor) -> tuple[Tensor, Tensor]:
    """Which labels each sample has and which it hasn't, ``(N, L)`` booleans; neither where the matrix is below 0.

    Args:
        labels: ``(N,)`` class indices, or ``(N, L)`` of 0 and 1.
        logits_NL: of the N samples.

    Raises:
        FuseError: labels of another shape.
    """
    if labels.dim() == 1 and not labels.is_floating_point():
        positive_NL = one_hot(labels, logits_NL.shape[-1]).bool()
        return positive_NL, ~positive_NL
    if labels.shape != logits_NL.shape:
        raise FuseError(
            f"labels have shape {list(labels.shape)}, the logits {list(logits_NL.shape)}. This loss expects one class "
            "per sample, or 0 or 1 for each of its labels (problem_type 'multi_label_classification')."
        )
    return labels > 0.5, (labels >= 0) & (labels <= 0.5)


def mean_of_positives(values_NL: Tensor, positive_NL: Tensor) -> Tensor:
    """The mean over samples of the mean over their labels; a sample without labels counts as 0."""
    per_sample_N = torch.where(positive_NL, values_NL, 0).sum(-1) / positive_NL.sum(-1).clamp(min=1)
    return per_sample_N.sum() / max(len(per_sample_N), 1)
