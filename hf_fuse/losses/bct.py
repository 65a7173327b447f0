"""Backward-compatible training: the new features are to work with the old model's classifier.

For a new encoder that must search a gallery embedded by the old one, where the features have the same width and the old
model classified at least some of the same classes.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_fuse.errors import FuseError
from hf_fuse.losses._predictions import class_indices

PAPER = "https://arxiv.org/abs/2003.11942"


def bct(features_ND: Tensor, labels_N: Tensor, old_head_CD: Tensor, old_bias_C: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of the old classifier on the new features; weight 1 beside the task.

    Samples of classes that the old classifier doesn't have give 0 and count in the mean. For them, and if the old
    model is no classifier, :mod:`hf_fuse.losses.oca` compares with the means of old features instead.

    Args:
        features_ND: of the model in training.
        labels_N: class indices; the old model's classes come first, in the same order.
        old_head_CD: frozen weights of the old model's classifier (``old_model``).
        old_bias_C: its bias, if it has one.

    Raises:
        FuseError: the features are of different widths.
    """
    if features_ND.shape[-1] != old_head_CD.shape[-1]:
        raise FuseError(
            f"bct: features have {features_ND.shape[-1]} numbers, the old classifier takes {old_head_CD.shape[-1]}. It "
            "needs the same width; oca takes a wider new model too."
        )
    logits_NC = features_ND.float() @ old_head_CD.float().T
    if old_bias_C is not None:
        logits_NC = logits_NC + old_bias_C.float()
    known_N = class_indices(labels_N) < len(old_head_CD)
    loss_N = cross_entropy(logits_NC[known_N], labels_N[known_N], reduction="none")
    return loss_N.sum() / max(len(labels_N), 1)
