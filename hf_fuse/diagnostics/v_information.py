"""V-information: how much of a quantity a linear model can read from features (https://arxiv.org/abs/2002.10689).

Over the layers of a model it says how complex a feature is: what the first layers already tell is simple.
(https://arxiv.org/abs/2407.06076; the form of the complexity is recalled.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_fuse.errors import FuseError


def v_information(features_ND: Tensor, target_N: Tensor) -> float:
    """``log(Var z / residual variance) / 2`` in nats, of the best linear prediction with a Gaussian error; at least 0.

    Variances are of the N samples themselves: with D near N everything can be predicted. Use N well above D.

    Raises:
        FuseError: not more samples than features, or a target that never changes.
    """
    if len(features_ND) <= features_ND.shape[1] + 1:
        raise FuseError(
            f"V-information: {len(features_ND)} samples of {features_ND.shape[1]} features: a linear model fits all "
            "of them. Use more samples."
        )
    centred = features_ND.double() - features_ND.double().mean(0)
    target = target_N.double() - target_N.double().mean()
    if not target.square().sum() > 0:
        raise FuseError("V-information: the target is the same for all samples.")
    fitted = centred @ torch.linalg.lstsq(centred.cpu(), target.cpu()[:, None], driver="gelsd").solution[:, 0].to(
        centred
    )
    residual = (target - fitted).square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    return max(0.0, 0.5 * torch.log(target.square().sum() / residual).item())


def complexity(layers: Sequence[Tensor], target_N: Tensor) -> float:
    """One minus the mean V-information about a feature over layers ``(N, D)``: low for what all layers tell."""
    return 1 - sum(v_information(features_ND, target_N) for features_ND in layers) / len(layers)


def main_direction(features_ND: Tensor) -> Tensor:
    """The samples along the direction in which they differ most ``(N,)``, fp64: a feature to ask about."""
    centred_ND = features_ND.double() - features_ND.double().mean(0)
    left, singular, _ = torch.linalg.svd(centred_ND, full_matrices=False)
    return left[:, 0] * singular[0]
