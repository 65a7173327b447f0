"""MDCS: experts that lean to frequent, all, or rare classes, each consistent over a weak and a strong view."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_fuse.distill.methods._distributions import divergence
from hf_fuse.errors import FuseError
from hf_fuse.model_features import classifier_of
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2308.09922"


class mdcs(nn.Module):
    """``sum_k CE(v_k, label)`` on both views + ``ramp * sum_k KL(v_k weak || v_k strong)``, for long-tailed classes.

    Expert k answers ``v_k = logits_k + adjustment_k * log(class counts)``. The divergence is the mean over the samples
    that the expert gets right on the weak view; of these a micro-batch sees its own alone. The strong view is the
    columns ``second_*`` of the batch, or the same inputs under other dropout.

    Experts are linear on the features of the classifier, and their deviations from it sum to 0: the student's own
    logits are always the mean of the unadjusted experts, which is the paper's inference, and the experts can be dropped
    when it is saved. (In the paper experts have layers of their own.) Set the weight of ``task`` to 0.

    Args:
        frequent: adjustment of the first expert. The three defaults are those for CIFAR-LT in the reference code.
        all_: adjustment of the second expert.
        rare: adjustment of the third expert.
        consistency: weight of the divergence at the end of its ramp.
        ramp_epochs: it grows from 0 over so many epochs.
    """

    def __init__(
        self,
        *,
        frequent: float = -0.5,
        all_: float = 1.0,
        rare: float = 2.5,
        consistency: Annotated[float, Between(0)] = 0.6,
        ramp_epochs: Annotated[float, Between(0)] = 20.0,
    ) -> None:
        super().__init__()
        self.adjustments = (frequent, all_, rare)
        self.consistency, self.ramp_epochs = consistency, ramp_epochs

    def prepare(self, model: nn.Module, train_dataset: Any) -> None:
        classifier = classifier_of(model)
        if classifier is None:
            raise FuseError(f"objectives.mdcs: {type(model).__name__} has no classifier whose features could be taken.")
        self.deviations = nn.Linear(classifier.in_features, 3 * model.config.num_labels)
        nn.init.zeros_(self.deviations.weight)
        nn.init.zeros_(self.deviations.bias)

    def forward(
        self,
        logits_NC: Tensor,
        features_ND: Tensor,
        second_logits_NC: Tensor,
        second_features_ND: Tensor,
        labels_N: Tensor,
        class_counts_C: Tensor,
        epoch: float,
    ) -> Tensor:
        """
        Args:
            logits_NC: the student's, for the weak view.
            features_ND: what its classifier got.
            second_logits_NC: for the strong view.
            second_features_ND: likewise.
            labels_N: classes.
            class_counts_C: of the training set.
            epoch: how many are done.
        """
        weak_N3C = self._experts(logits_NC, features_ND)
        strong_N3C = self._experts(second_logits_NC, second_features_ND)
        ramp = min(int(epoch) / self.ramp_epochs, 1.0) if self.ramp_epochs else 1.0
        return mdcs_loss(
            weak_N3C, strong_N3C, labels_N, class_counts_C, self.adjustments, consistency=ramp * self.consistency
        )

    def _experts(self, logits_NC: Tensor, features_ND: Tensor) -> Tensor:
        apart_N3C = self.deviations(features_ND).float().view(len(features_ND), 3, -1)
        return logits_NC.float().unsqueeze(1) + apart_N3C - apart_N3C.mean(1, keepdim=True)


def mdcs_loss(
    weak_NKC: Tensor,
    strong_NKC: Tensor,
    labels_N: Tensor,
    class_counts_C: Tensor,
    adjustments: tuple[float, ...],
    *,
    consistency: float,
) -> Tensor:
    """Of K experts' unadjusted logits; a class that never occurs counts as one sample."""
    log_counts_C = class_counts_C.float().clamp(min=1).log()
    shift_KC = torch.tensor(adjustments, device=log_counts_C.device).unsqueeze(-1) * log_counts_C
    weak_NKC, strong_NKC = ((view.float() + shift_KC).log_softmax(-1) for view in (weak_NKC, strong_NKC))
    total = weak_NKC.sum() * 0
    for number in range(len(adjustments)):
        weak_NC, strong_NC = weak_NKC[:, number], strong_NKC[:, number]
        for view_NC in (weak_NC, strong_NC):
            total = total + F.nll_loss(view_NC, labels_N, reduction="sum") / (2 * max(len(labels_N), 1))
        right_N = weak_NC.argmax(-1) == labels_N
        if consistency and right_N.any():
            apart = divergence(weak_NC[right_N].detach(), strong_NC[right_N])
            total = total + consistency * apart / right_N.sum()
    return total
