"""Entropy bonus: predictions are to stay undecided, and near those of a moving average of the model.

For fine-tuning after which a model is to be sampled from, such as before reinforcement learning, where a sharp
distribution explores nothing. The anchor costs a forward pass and a copy of what is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_fuse.errors import FuseError
from hf_fuse.input_points import Move
from hf_fuse.losses._parameters import replaced
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2501.11651"
ROWS_AT_A_TIME = 1024


class entropy_bonus(nn.Module):
    """``-mean entropy + divergence * mean KL(model || anchor)``, over the predictions that have a label.

    The anchor's parameters start as the model's and move with each optimizer step:
    ``anchor = decay * anchor + (1 - decay) * model``. The weight of the objective is that of the entropy. The paper's
    coefficients are not verified, its training code isn't public. With dropout the divergence is also that of two
    passes. Not for parameters that are split over processes (FSDP, DeepSpeed).

    Args:
        divergence: weight of KL, relative to that of the entropy; 0: no anchor.
        decay: share of the anchor that stays in each step.
    """

    updated_step: Tensor

    def __init__(
        self, *, divergence: Annotated[float, Between(0)] = 1.0, decay: Annotated[float, Between(0, 1)] = 0.99
    ) -> None:
        super().__init__()
        self.divergence, self.decay = divergence, decay

    def prepare(self, model: nn.Module, train_dataset: object) -> None:
        if not self.divergence:
            return
        # A list, which makes them no part of this module.
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self.trained:
            raise FuseError("entropy_bonus: no parameter of the model is trained, so its anchor would never move.")
        self.register_buffer("updated_step", torch.tensor(0))
        for index, parameter in enumerate(self.trained):
            # In half precision a hundredth of a step would be lost.
            self.register_buffer(f"anchor_{index}", parameter.detach().float().clone())

    def forward(
        self, logits_NC: Tensor, labels_N: Tensor, logits_at: Callable[[Move], Tensor], step: int = 0
    ) -> Tensor:
        if not self.divergence:
            return _sum(logits_NC, None, 0.0) / max(len(logits_NC), 1)
        anchors = [getattr(self, f"anchor_{index}") for index in range(len(self.trained))]
        with torch.no_grad():
            if step > self.updated_step:
                for anchor, parameter in zip(anchors, self.trained):
                    anchor.lerp_(parameter.detach().float(), 1 - self.decay)
                self.updated_step.fill_(step)
            with replaced(self.trained, anchors):
                anchor_NC = logits_at(lambda points: points)
        return _sum(logits_NC, anchor_NC, self.divergence) / max(len(logits_NC), 1)


def _sum(logits_NC: Tensor, anchor_NC: Tensor | None, divergence: float) -> Tensor:
    """Over rows; a few at a time, recomputed for the gradient: fp32 copies of a vocabulary's logits are large."""
    total = logits_NC.float().sum() * 0
    for first in range(0, len(logits_NC), ROWS_AT_A_TIME):
        rows = slice(first, first + ROWS_AT_A_TIME)
        anchor = None if anchor_NC is None else anchor_NC[rows]
        total = total + checkpoint(_of_rows, logits_NC[rows], anchor, divergence, use_reentrant=False)
    return total


def _of_rows(logits_NC: Tensor, anchor_NC: Tensor | None, divergence: float) -> Tensor:
    log_p_NC = logits_NC.float().log_softmax(-1)
    p_NC = log_p_NC.exp()
    loss = (p_NC * log_p_NC).sum()
    if anchor_NC is not None:
        loss = loss + divergence * (p_NC * (log_p_NC - anchor_NC.float().log_softmax(-1))).sum()
    return loss
