"""Neural collapse: how far features have contracted to their class means, and these to a simplex.

(https://arxiv.org/abs/2008.08186.) It is a common vocabulary for what heads, mixup and merging do to features, not a
goal of fine-tuning; with classes of unequal size or other losses than cross-entropy the limit is another geometry.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from hf_fuse.errors import FuseError


@dataclass(frozen=True)
class NeuralCollapse:
    """All fall to 0 as features collapse.

    Attributes:
        within: NC1, ``tr(S_within S_between^+) / C``. The first notebook of the paper's authors leaves out ``/ C``.
        within_ratio: ``tr(S_within) / tr(S_between)``: needs no pseudo-inverse.
        norms: NC2, standard deviation over mean of the distances of class means from their mean.
        angles: NC2, mean ``|cos + 1 / (C - 1)|`` over pairs of class means.
        duality: NC3, squared distance between classifier and class means, each of norm 1. None without a classifier.
        mismatch: NC4, share of samples that classifier and nearest class mean call differently. None without a
            classifier.
    """

    within: float
    within_ratio: float
    norms: float
    angles: float
    duality: float | None = None
    mismatch: float | None = None

    def to_dict(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@torch.no_grad()
def neural_collapse(
    features_ND: Tensor, labels_N: Tensor, weights_CD: Tensor | None = None, bias_C: Tensor | None = None
) -> NeuralCollapse:
    """Measures neural collapse. Memory: two ``D x D`` matrices.

    Args:
        features_ND: what the classifier takes.
        labels_N: class numbers. Classes without samples do not count.
        weights_CD: of the classifier, a row per class number; needed for ``duality`` and ``mismatch``.
        bias_C: of the classifier.

    Raises:
        FuseError: fewer than two classes with samples, equal class means, or a classifier of another width or with too
            few rows.
    """
    features_ND, labels_N = features_ND.double(), labels_N.to(features_ND.device)
    classes_K, numbers_N = labels_N.unique(return_inverse=True)
    classes = len(classes_K)
    if classes < 2:
        raise FuseError(f"neural collapse: the samples are of {classes} class(es); expected at least two.")
    members_NK = torch.nn.functional.one_hot(numbers_N, classes).to(features_ND)
    means_KD = members_NK.T @ features_ND / members_NK.sum(0)[:, None]
    spread_ND = features_ND - means_KD[numbers_N]
    centred_KD = means_KD - means_KD.mean(0)
    if not centred_KD.norm() > 0:
        raise FuseError("neural collapse: all class means are equal. Look at the features.")
    within_DD = spread_ND.T @ spread_ND / len(features_ND)
    # S_between has rank C - 1 at most: its pseudo-inverse comes from the small side.
    _, singular, right = torch.linalg.svd(centred_KD / classes**0.5, full_matrices=False)
    kept = singular > singular[0] * 1e-8
    projected = right[kept] @ within_DD @ right[kept].T
    norms_K = centred_KD.norm(dim=1)
    unit_KD = centred_KD / norms_K[:, None].clamp(min=1e-30)
    pairs = ~torch.eye(classes, dtype=torch.bool, device=features_ND.device)
    angles = ((unit_KD @ unit_KD.T)[pairs] + 1 / (classes - 1)).abs().mean()
    duality = mismatch = None
    if weights_CD is not None:
        if weights_CD.shape[1] != features_ND.shape[1] or len(weights_CD) <= int(classes_K.max()):
            raise FuseError(
                f"weights_CD has the shape {tuple(weights_CD.shape)}; expected a row for each class up to "
                f"{int(classes_K.max())} and {features_ND.shape[1]} columns."
            )
        weights_KD = weights_CD.to(features_ND)[classes_K]
        duality = (weights_KD / weights_KD.norm() - centred_KD / centred_KD.norm()).square().sum().item()
        logits_NK = features_ND @ weights_KD.T
        if bias_C is not None:
            logits_NK = logits_NK + bias_C.to(features_ND)[classes_K]
        nearest_N = torch.cdist(features_ND, means_KD).argmin(1)
        mismatch = (logits_NK.argmax(1) != nearest_N).double().mean().item()
    return NeuralCollapse(
        within=((projected.diagonal() / singular[kept] ** 2).sum() / classes).item(),
        within_ratio=(within_DD.trace() / (centred_KD.square().sum() / classes)).item(),
        norms=(norms_K.std(unbiased=False) / norms_K.mean()).item(),
        angles=angles.item(),
        duality=duality,
        mismatch=mismatch,
    )
