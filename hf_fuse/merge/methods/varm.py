"""VaRM (FuseChat): weigh each model by how much it changed a tensor."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hf_fuse.merge.methods._passes import Measurement, Pass, Seen
from hf_fuse.merge.methods._products import add_energies
from hf_fuse.merge.methods._sphere import combine
from hf_fuse.registry import PerModel

PAPER = "https://arxiv.org/abs/2402.16107"
SCALARS = "mean"


def measure(count: int, numel: int, dtype: torch.dtype, *, change: str) -> Measurement:
    def add(block_KN: Tensor, total: Tensor, seen: Seen) -> None:
        if change == "square":
            add_energies(block_KN, total)
        else:
            total += torch.tensor([delta_N.abs().sum().item() for delta_N in block_KN], dtype=torch.float64)

    return (yield Pass(torch.zeros(count, dtype=torch.float64), add))


def varm(
    deltas_KN: Tensor,
    *,
    weight: PerModel = 1.0,
    change: Literal["square", "abs"] = "square",
    scope: Literal["tensor", "model"] = "tensor",
    state: Tensor,
) -> Tensor:
    """``sum_k e_k theta_k / sum_k e_k`` with ``e_k = mean(tau_k^2)``.

    Args:
        deltas_KN: task vectors, N elements.
        weight: a further factor of each model's e.
        change: mean of the squares (the paper) or of the magnitudes.
        scope: one set of weights per tensor (the paper), or for the whole model.
        state: K sums of squares or of magnitudes.

    A model that did not change a tensor has no weight there; if none did, the tensor stays as it is. (The released
    script falls back to equal weights as soon as one model has not changed a tensor, and reads the same analysis for
    all models, so that its weights are equal always.)
    """
    energies = state * torch.tensor(weight, dtype=torch.float64)
    total = float(energies.sum())
    return combine(deltas_KN, (energies / total).tolist() if total else [0.0] * len(energies))
