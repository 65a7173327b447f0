"""LER: confident predictions of old classes for unlabelled samples stay what they are, adjusted to how often they come.

For finding new classes among unlabelled samples without forgetting the known ones (LegoGCD), with weight 2. Unlabelled
samples have the label -100.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor, nn

from hf_fuse.losses._predictions import class_indices, mean
from hf_fuse.losses._processes import gathered
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2501.05272"


class ler(nn.Module):
    """Mean over all samples of ``-sum q log softmax(l / t + strength log r)`` where it applies, ``q = softmax(l / t)``.

    It applies to samples without a label of which an old class is predicted with at least ``threshold``. r are the mean
    predictions, a moving average that is updated once per optimizer step. q is a target and carries no gradient; in the
    public code it does.

    Args:
        old_classes: so many, which come first; 0: all.
        threshold: of the largest probability.
        sharpness: temperature of the probability that is compared with it.
        temperature: t.
        strength: of the adjustment.
        decay: share of r that stays in each step.
    """

    prior_C: Tensor
    present: Tensor
    step: Tensor

    def __init__(
        self,
        *,
        old_classes: Annotated[int, Between(0)] = 0,
        threshold: Annotated[float, Between(0, 1)] = 0.7,
        sharpness: Annotated[float, Between(0, open_low=True)] = 0.1,
        temperature: Annotated[float, Between(0, open_low=True)] = 0.05,
        strength: Annotated[float, Between(0)] = 0.4,
        decay: Annotated[float, Between(0, 1)] = 0.999,
    ) -> None:
        super().__init__()
        self.old_classes, self.threshold, self.sharpness = old_classes, threshold, sharpness
        self.temperature, self.strength, self.decay = temperature, strength, decay

    def prepare(self, model: nn.Module, train_dataset: Any) -> None:
        classes = model.config.num_labels
        self.old_classes = self.old_classes or classes
        self.register_buffer("prior_C", torch.full((classes,), 1 / classes))
        # Of the present step: sums of probabilities, and their number last.
        self.register_buffer("present", torch.zeros(classes + 1))
        self.register_buffer("step", torch.tensor(0))

    def forward(self, sample_logits_BC: Tensor, sample_labels_B: Tensor, step: int = 0) -> Tensor:
        logits_BC, labels_B = sample_logits_BC.float(), class_indices(sample_labels_B)
        self._average(logits_BC.detach(), step)
        confidence_B, predicted_B = (logits_BC.detach() / self.sharpness).softmax(-1).max(-1)
        kept_B = (labels_B < 0) & (confidence_B >= self.threshold) & (predicted_B < self.old_classes)
        targets_BC = (logits_BC.detach() / self.temperature).softmax(-1)
        adjusted_BC = logits_BC / self.temperature + self.strength * self.prior_C.clamp(min=1e-12).log()
        loss_B = -(targets_BC * adjusted_BC.log_softmax(-1)).sum(-1)
        return mean(torch.where(kept_B, loss_B, 0))

    def _average(self, logits_BC: Tensor, step: int) -> None:
        if step != self.step:
            if self.present[-1] > 0:
                self.prior_C.lerp_(self.present[:-1] / self.present[-1], 1 - self.decay)
            self.present.zero_()
            self.step.fill_(step)
        sums_C = logits_BC.softmax(-1).sum(0)
        self.present += gathered(torch.cat([sums_C, sums_C.new_tensor([len(logits_BC)])])[None]).sum(0)
