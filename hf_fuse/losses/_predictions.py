"""Predictions of a batch: their labels, and means over them."""

from __future__ import annotations

from torch import Tensor

from hf_fuse.errors import FuseError


def mean(values_N: Tensor) -> Tensor:
    """The mean; of nothing 0, tied to the graph."""
    return values_N.sum() / max(values_N.numel(), 1)


def class_indices(labels_N: Tensor) -> Tensor:
    """The labels, if each is the index of a class.

    Raises:
        FuseError: they are numbers (regression) or several per sample.
    """
    if labels_N.is_floating_point() or labels_N.dim() != 1:
        raise FuseError(
            f"labels are {labels_N.dtype} of shape {list(labels_N.shape)}, but this loss expects the index of a class "
            "for each prediction, as for single-label classification and language models."
        )
    return labels_N


def sample_classes(labels_N: Tensor, features_ND: Tensor) -> Tensor:
    """The labels, if each is the class of a sample.

    Raises:
        FuseError: they are of tokens, or no classes.
    """
    if len(class_indices(labels_N)) != len(features_ND):
        raise FuseError(
            f"{len(labels_N)} labels for {len(features_ND)} samples: this loss expects one class per sample, as models "
            "for sequence or image classification have."
        )
    return labels_N
