"""How alike two sets of units are: CKA (https://arxiv.org/abs/1905.00414), and one unit matched to another by
correlation.

(https://arxiv.org/abs/1511.07543.) Two models whose units match one to one are worth aligning before a merge.
Similarity is biased towards simple features: it does not say that both compute the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from tqdm import tqdm

from hf_fuse.errors import FuseError


@dataclass(frozen=True)
class UnitMatching:
    """Units of one layer matched to units of another.

    Attributes:
        one_to_one: ``(D,)``, the partner of each unit when each may be taken once (the sum of correlations is largest).
        correlations: ``(D,)``, with that partner.
        best_correlations: ``(D,)``, with the most alike unit, which several may share.
    """

    one_to_one: Tensor
    correlations: Tensor
    best_correlations: Tensor

    @property
    def redundancy(self) -> float:
        """Mean gap between the two: how much is lost because several units are alike."""
        return (self.best_correlations - self.correlations).mean().item()

    def to_dict(self) -> dict[str, float]:
        return {
            "one_to_one": self.correlations.mean().item(),
            "best": self.best_correlations.mean().item(),
            "redundancy": self.redundancy,
        }


def correlations(first_ND: Tensor, second_NE: Tensor) -> Tensor:
    """Correlation ``(D, E)`` of every unit with every other over N samples; 0 for units that never change."""
    return _standardised(first_ND).T @ _standardised(second_NE)


def match_units(first_ND: Tensor, second_ND: Tensor) -> UnitMatching:
    """Matches the units of two layers. Time grows with ``D^3``.

    Raises:
        FuseError: another number of samples, or fewer units in the second.
    """
    _check(first_ND, second_ND)
    if second_ND.shape[1] < first_ND.shape[1]:
        raise FuseError(f"the second layer has {second_ND.shape[1]} units, fewer than the first ({first_ND.shape[1]}).")
    found = correlations(first_ND, second_ND).cpu()
    rows, partners = linear_sum_assignment(found.numpy(), maximize=True)
    partners = torch.as_tensor(partners)
    return UnitMatching(partners, found[torch.as_tensor(rows), partners], found.max(1).values)


def linear_cka(first_ND: Tensor, second_NE: Tensor, *, debiased: bool = True) -> float:
    """Linear CKA: 1 for a rotated and scaled copy, near 0 for independent features.

    Args:
        debiased: the unbiased estimate of HSIC (https://arxiv.org/abs/2010.15327), for N of at least 4; the plain one
            is far above 0 for independent features unless N is much larger than D. Time and memory grow with ``N^2``.

    Raises:
        FuseError: another number of samples, too few of them, or features that never change.
    """
    _check(first_ND, second_NE)
    if debiased:
        return cka_of_layers([first_ND], [second_NE]).item()
    first, second = _centred(first_ND), _centred(second_NE)
    products = [(a.T @ b).square().sum() for a, b in ((first, second), (first, first), (second, second))]
    return _normalised(*products).item()


def cka_of_layers(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Debiased linear CKA ``(L1, L2)`` of every layer ``(N, D)`` of one model with every layer of another.

    Memory: an ``N x N`` matrix per layer of the first.

    Raises:
        FuseError: as of :func:`linear_cka`.
    """
    if len(first[0]) < 4:
        raise FuseError(f"CKA: {len(first[0])} samples are too few for the unbiased estimate; expected 4 or more.")
    grams = [_gram(layer_ND) for layer_ND in first]
    own = [_unbiased_hsic(gram, gram) for gram in grams]
    columns = []
    for layer_ND in tqdm(second, desc="CKA", unit="layer", disable=None):
        other = _gram(layer_ND)
        itself = _unbiased_hsic(other, other)
        columns.append(
            torch.stack([_normalised(_unbiased_hsic(gram, other), h, itself) for gram, h in zip(grams, own)])
        )
    return torch.stack(columns, dim=1)


def _normalised(both: Tensor, first: Tensor, second: Tensor) -> Tensor:
    if not (first > 0 and second > 0):
        raise FuseError("CKA: the features of one layer hardly ever change. Take other samples, or more.")
    return both / (first * second).sqrt()


def _gram(features_ND: Tensor) -> Tensor:
    """Inner products of different samples."""
    features_ND = _centred(features_ND)
    return (features_ND @ features_ND.T).fill_diagonal_(0)


def _unbiased_hsic(first_NN: Tensor, second_NN: Tensor) -> Tensor:
    count = len(first_NN)
    ends = first_NN.sum() * second_NN.sum() / ((count - 1) * (count - 2))
    middle = (first_NN.sum(0) @ second_NN.sum(0)) * 2 / (count - 2)
    return ((first_NN * second_NN).sum() + ends - middle) / (count * (count - 3))


def _centred(features_ND: Tensor) -> Tensor:
    return features_ND.double() - features_ND.double().mean(0)


def _standardised(features_ND: Tensor) -> Tensor:
    centred = _centred(features_ND)
    return centred / centred.norm(dim=0).clamp(min=1e-12)


def _check(first: Tensor, second: Tensor) -> None:
    if first.dim() != 2 or second.dim() != 2 or len(first) != len(second):
        raise FuseError(
            f"features have the shapes {tuple(first.shape)} and {tuple(second.shape)}; expected (N, units)."
        )
