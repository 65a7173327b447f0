"""IGNITE: the model's mean output is to change little when its parameters do.

For regression models that something is optimised against afterwards (surrogates of experiments), which would find their
errors. Costs a further forward pass and two backward passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor, nn

from hf_fuse.input_points import Move
from hf_fuse.losses._parameters import replaced
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2503.04242"
IN_BATCH = True


class ignite(nn.Module):
    """``multiplier * rho * |g|``, g the gradient of the mean output by the parameters; its own gradient is the
    difference of g a small step along it, over that step.

    The multiplier rises while ``rho |g|`` is above ``allowed`` and falls, to 0 at least, while it is below. g is that
    of a micro-batch on a process: each of them is a batch of its own. No default is verified. Not for parameters that
    are split over processes (FSDP, DeepSpeed), nor for models with dropout, which differs between the two passes.

    Args:
        rho: how far parameters may be off.
        allowed: change of the output.
        learning_rate: of the multiplier.
        radius: the small step.
    """

    multiplier: Tensor

    def __init__(
        self,
        *,
        rho: Annotated[float, Between(0, open_low=True)] = 0.05,
        allowed: Annotated[float, Between(0)] = 0.05,
        learning_rate: Annotated[float, Between(0)] = 0.01,
        radius: Annotated[float, Between(0, open_low=True)] = 0.01,
    ) -> None:
        super().__init__()
        self.rho, self.allowed, self.learning_rate, self.radius = rho, allowed, learning_rate, radius
        self.register_buffer("multiplier", torch.tensor(1.0))

    def prepare(self, model: nn.Module, train_dataset: object) -> None:
        # A list, which makes them no part of this module.
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def forward(self, logits_NC: Tensor, logits_at: Callable[[Move], Tensor]) -> Tensor:
        slopes = self._slopes(logits_NC, keep=True)
        norm = torch.stack([slope.square().sum() for slope in slopes]).sum().sqrt()
        if not norm > 0:
            return logits_NC.float().sum() * 0
        moved = [value.detach().float() + self.radius / norm * g for value, g in zip(self.trained, slopes)]
        with replaced(self.trained, moved):
            further = self._slopes(logits_at(lambda points: points), keep=False)
        weight = self.multiplier.item() * self.rho
        self.multiplier.add_(self.learning_rate * (self.rho * norm - self.allowed)).clamp_(min=0)
        # A term without a value of its own, whose gradient is the wanted one.
        along = sum((value.float() * (there - here)).sum() for value, there, here in zip(self.trained, further, slopes))
        return weight * ((along - along.detach()) / self.radius + norm)

    def _slopes(self, logits_NC: Tensor, *, keep: bool) -> list[Tensor]:
        found = torch.autograd.grad(logits_NC.float().mean(), self.trained, retain_graph=keep, allow_unused=True)
        return [
            torch.zeros_like(value, dtype=torch.float32) if slope is None else slope.float()
            for value, slope in zip(self.trained, found)
        ]
