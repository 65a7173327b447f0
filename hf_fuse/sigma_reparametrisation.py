"""Sigma-reparametrisation: each weight matrix is trained as ``gain * W / sigma(W)``, sigma its largest singular value.

Keeps attention from collapsing, where training is unstable (large learning rates, deep models, half precision). The
model computes what it did before, and after :func:`fold_sigma` it is a stock model again. arXiv 2303.06296
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from hf_fuse.errors import FuseError


class SpectralGain(nn.Module):
    """``gain * W / sigma(W)``, sigma by one step of power iteration per training forward pass, in fp32.

    The gain starts at ``sigma(W)``, so that pre-trained weights stay what they are. (1 in the paper, for training from
    scratch.)

    Args:
        weight: a matrix.
    """

    direction: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        _, values, right = torch.linalg.svd(weight.detach().float(), full_matrices=False)
        self.register_buffer("direction", right[0].clone())
        self.gain = nn.Parameter(values[0].clone())

    def forward(self, weight: Tensor) -> Tensor:
        matrix, direction = weight.float(), self.direction
        with torch.no_grad():
            left = normalize(matrix @ direction, dim=0)
            if self.training:
                direction = normalize(matrix.T @ left, dim=0)
                self.direction.copy_(direction)
                left = normalize(matrix @ direction, dim=0)
        # A copy: the buffer changes before the backward pass if the matrix is used again.
        sigma = left @ matrix @ direction.clone()
        return (self.gain / sigma.clamp(min=torch.finfo(torch.float32).tiny) * matrix).to(weight.dtype)


def sigma_reparametrise(model: nn.Module, targets: Sequence[str] | None = None) -> list[str]:
    """Reparametrises linear layers in place, before the trainer is made.

    Costs two products of a matrix and a vector per layer and forward pass, and a vector of memory.

    Args:
        model: a transformers model without adapters.
        targets: last parts of the names of layers (``q_proj``); None: all linear layers but the output.

    Returns:
        The names of the layers.

    Raises:
        FuseError: the model has an adapter or quantised weights, or no such layers.
    """
    if hasattr(model, "peft_config"):
        raise FuseError(
            "sigma_reparametrise: the model has an adapter, whose weights aren't those of the layers. Merge it."
        )
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output
        and (targets is None or name.rpartition(".")[2] in targets)
    }  # fmt: skip
    for name, layer in layers.items():
        if parametrize.is_parametrized(layer, "weight"):
            raise FuseError(f"sigma_reparametrise: {name} is reparametrised already.")
        if not layer.weight.is_floating_point() or type(layer) not in (nn.Linear, Conv1D):
            raise FuseError(f"sigma_reparametrise: {name} is quantised. Load the model in a floating-point dtype.")
    if not layers:
        raise FuseError(
            f"sigma_reparametrise: the model has no linear layers named {', '.join(targets or ['anything'])}."
        )
    for layer in layers.values():
        parametrize.register_parametrization(layer, "weight", SpectralGain(layer.weight))
    return list(layers)


def fold_sigma(model: nn.Module) -> None:
    """Puts the effective weights back into the layers, in place: do this before saving the model."""
    for layer in [module for module in model.modules() if parametrize.is_parametrized(module, "weight")]:
        if isinstance(layer.parametrizations.weight[0], SpectralGain):
            layer.parametrizations.weight.eval()  # without another step of the iteration
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
