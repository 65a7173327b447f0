"""d-Simplex: fixed class vectors at the corners of a regular simplex, so that features stay where they were.

(https://arxiv.org/abs/2405.02581.) Room for classes to come is kept from the start: their corners are free, and no
class moves when one is added. Merging or updating the encoder keeps the meaning of every direction.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_fuse.errors import FuseError
from hf_fuse.heads.head import InputError
from hf_fuse.heads.network import NetworkHead


def simplex(corners: int) -> Tensor:
    """K unit vectors ``(K, K - 1)`` with the cosine ``-1 / (K - 1)`` between any two.

    Raises:
        FuseError: fewer than two corners.
    """
    if corners < 2:
        raise FuseError(f"corners is {corners}; expected at least 2.")
    width = corners - 1
    # The unit vectors, and the one point as far from each of them as they are from each other.
    last = torch.full((1, width), (1 - corners**0.5) / width, dtype=torch.float64)
    rows = torch.cat([torch.eye(width, dtype=torch.float64), last])
    rows = rows - rows.mean(0)
    return (rows / rows.norm(dim=1, keepdim=True)).float()


class SimplexClassifier(nn.Module):
    """Cosine logits ``(N, C)`` of features ``(N, D)`` with the first C corners of a fixed simplex.

    In an encoder that is trained: ``model.classifier = SimplexClassifier(width, classes)``.

    Args:
        width: D, of the features; a learned projection brings them to ``corners - 1``.
        classes: C.
        corners: room for classes; the paper keeps 1024. Memory: its square.
        scale: of the cosines.
        from_end: gives class 0 the last corner, class 1 the one before, as the reference does.
    """

    def __init__(self, width: int, classes: int, *, corners: int = 1024, scale: float = 16.0, from_end: bool = False):
        super().__init__()
        if classes > corners:
            raise FuseError(f"corners is {corners}, too few for {classes} classes.")
        self.scale = scale
        self.projection = nn.Linear(width, corners - 1, bias=False)
        taken = simplex(corners)
        self.register_buffer("corners", (taken.flip(0) if from_end else taken)[:classes].clone())

    def forward(self, features_ND: Tensor) -> Tensor:
        directions = nn.functional.normalize(self.projection(features_ND), dim=-1)
        return self.scale * directions @ self.corners.T


class Simplex(NetworkHead):
    """A projection of features, trained towards the corners; ``partial_fit`` gives new classes the next free ones.

    Args:
        corners, scale: as of :class:`SimplexClassifier`.
        epochs, batch_size, learning_rate, weight_decay, seed: as of :class:`~hf_fuse.heads.network.NetworkHead`.
    """

    def __init__(
        self,
        corners: int = 1024,
        scale: float = 16.0,
        epochs: int = 50,
        batch_size: int = 64,
        learning_rate: float = 1e-2,
        weight_decay: float = 1e-4,
        seed: int = 0,
    ):
        super().__init__(epochs, batch_size, learning_rate, weight_decay, seed)
        self.corners = corners
        self.scale = scale

    def _network(self, width: int, classes: int) -> Any:
        return SimplexClassifier(width, classes, corners=self.corners, scale=self.scale)

    def _make_room(self, classes: np.ndarray, places: np.ndarray) -> None:
        if len(classes) > self.corners:
            raise InputError(f"corners is {self.corners}, too few for {len(classes)} classes.")
        corners = simplex(self.corners)[: len(classes)]
        # Those of the old classes stay theirs, whatever the order of names.
        order = np.concatenate([places, np.setdiff1d(np.arange(len(classes)), places)])
        self.network_.corners = torch.empty_like(corners).index_copy_(
            0, torch.as_tensor(order), torch.cat([self.network_.corners, corners[len(places) :]])
        )
