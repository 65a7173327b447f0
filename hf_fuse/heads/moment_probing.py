"""Moment Probing: classifies by the covariances of token features beside their mean.

(https://arxiv.org/abs/2307.11342.) More than a linear probe for one projection of the tokens; the encoder stays frozen.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from hf_fuse.errors import FuseError
from hf_fuse.heads.head import InputError, on_the_cpu
from hf_fuse.heads.network import NetworkHead


class MomentProbe(nn.Module):
    """Logits ``(N, C)`` of token features ``(N, T, D)``; tokens that are NaN are padding.

    Tokens are projected and split into P parts. The cross-covariances of neighbouring parts, their rows scaled to
    length 1, go through two strided convolutions to a linear layer, whose logits are added to those of the first token.

    Args:
        width: D.
        classes: C.
        projection: width of the projected tokens; parts have ``projection / parts`` channels, at least 7.
        parts: P.
        centre: what is subtracted before the covariance: the mean of each channel over the tokens, or one number, the
            mean over tokens and channels, as the reference does.
    """

    def __init__(
        self, width: int, classes: int, *, projection: int = 512, parts: int = 4, centre: str = "channels"
    ) -> None:
        super().__init__()
        size = projection // parts
        if projection % parts or parts < 2 or size < 7:
            raise FuseError(
                f"projection is {projection} in {parts} parts; expected at least 2 equal parts of 7 channels or more."
            )
        if centre not in ("channels", "scalar"):
            raise FuseError(f"centre is {centre!r}; expected channels or scalar.")
        self.parts, self.centre = parts, centre
        self.project = nn.Linear(width, projection)
        self.norm = nn.LayerNorm(size)
        maps = parts - 1
        self.reduce = nn.Sequential(nn.Conv2d(maps, maps, 3, 2), nn.ReLU(), nn.Conv2d(maps, maps, 3, 2))
        side = (((size - 3) // 2 + 1) - 3) // 2 + 1
        self.moments = nn.Linear(maps * side * side, classes)
        self.first = nn.Linear(width, classes)

    def forward(self, tokens_NTD: Tensor) -> Tensor:
        there_NT = ~tokens_NTD.isnan().any(-1)
        tokens_NTD = tokens_NTD.nan_to_num(0.0)
        return self.first(tokens_NTD[:, 0]) + self.moments(
            self.reduce(self.covariances(tokens_NTD, there_NT)).flatten(1)
        )

    def covariances(self, tokens_NTD: Tensor, there_NT: Tensor) -> Tensor:
        """``(N, P - 1, S, S)`` of neighbouring parts of S channels, rows of length 1."""
        parts_NTPS = self.norm(self.project(tokens_NTD).unflatten(-1, (self.parts, -1)))
        weights = there_NT[:, :, None, None].to(parts_NTPS)
        counts = weights.sum(1, keepdim=True).clamp(min=1)
        means = (parts_NTPS * weights).sum(1, keepdim=True) / counts
        if self.centre == "scalar":
            means = means.mean(-1, keepdim=True)
        centred = (parts_NTPS - means) * weights
        found = torch.einsum("ntps,ntpr->npsr", centred[:, :, :-1], centred[:, :, 1:]) / counts
        return nn.functional.normalize(found, dim=-1)


class MomentProbing(NetworkHead):
    """``X`` are token features ``(N, T, D)``, padding NaN, as from ``EncoderFeatures(model, tokens=True)``.

    Args:
        projection, parts, centre: as of :class:`MomentProbe`; the paper has 512 in 4 parts.
        epochs, batch_size, learning_rate, weight_decay, seed: as of :class:`~hf_fuse.heads.network.NetworkHead`.
    """

    def __init__(
        self,
        projection: int = 512,
        parts: int = 4,
        centre: Literal["channels", "scalar"] = "channels",
        epochs: int = 50,
        batch_size: int = 64,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-4,
        seed: int = 0,
    ):
        super().__init__(epochs, batch_size, learning_rate, weight_decay, seed)
        self.projection = projection
        self.parts = parts
        self.centre = centre

    def _network(self, width: int, classes: int) -> nn.Module:
        return MomentProbe(width, classes, projection=self.projection, parts=self.parts, centre=self.centre)

    def _numbers(self, X: Any) -> np.ndarray:
        X = np.asarray(on_the_cpu(X, "float"), dtype=np.float32)
        if X.ndim != 3 or not len(X):
            raise InputError(f"X has the shape {X.shape}; expected token features (samples, tokens, channels).")
        if np.isnan(X[:, 0]).any() or np.isinf(X).any():
            raise InputError("X: the first token of a sample is padding, or features are infinite. Pad on the right.")
        return X
