"""l1-sparse unlearning: fine-tuning on what may stay, while an l1 penalty prunes what only the rest needed.

(https://arxiv.org/abs/2304.04934.) A callback for any Trainer whose training set are the samples to retain.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import TrainerCallback

from hf_fuse.errors import FuseError


class L1Sparse(TrainerCallback):
    """``alpha ||theta||_1`` over all trainable parameters; the weight falls linearly to 0 before the last epochs.

    Args:
        alpha: weight at the start. Around 5e-4 in the paper (recalled; it depends on the learning rate and the model).
        epochs_without: at the end of training, without the penalty.
        step: ``proximal`` moves every parameter towards 0 by ``lr * weight`` after the optimizer's step, and stops
            there: exact zeros. ``penalty`` adds the gradient of the l1 norm to the others, as the paper does: Adam
            rescales it.

    Attributes:
        zeros: share of the trainable parameters that were exactly 0 at the end of training.
    """

    def __init__(
        self, alpha: float = 5e-4, *, epochs_without: float = 0.0, step: Literal["proximal", "penalty"] = "proximal"
    ):
        if not (alpha >= 0 and epochs_without >= 0) or step not in ("proximal", "penalty"):
            raise FuseError(
                f"alpha is {alpha}, epochs_without {epochs_without} and step {step!r}; expected numbers from 0 on, and "
                "proximal or penalty."
            )
        self.alpha = alpha
        self.epochs_without = epochs_without
        self.step = step
        self.zeros: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.epochs_without >= state.num_train_epochs:
            raise FuseError(
                f"epochs_without is {self.epochs_without}, but training has {state.num_train_epochs} epochs: the "
                "penalty would never count."
            )

    def weight(self, state: Any) -> float:
        """Weight of the penalty now."""
        share = (state.epoch or 0.0) / (state.num_train_epochs - self.epochs_without)
        return self.alpha * max(0.0, 1.0 - share)

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        if self.step == "penalty":
            weight = self.weight(state)
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.sign(), alpha=weight)

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, *, optimizer: Any, **kwargs: Any) -> None:
        if self.step == "proximal":
            weight = self.weight(state)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    kept = (parameter.abs() - group["lr"] * weight).clamp(min=0)
                    parameter.copy_(parameter.sign() * kept)

    @torch.no_grad()
    def on_train_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.zeros = sum((p == 0).sum().item() for p in trained) / sum(p.numel() for p in trained)
