"""SLA with self-distillation: a joint head tells class and view of turned images, and teaches the classifier."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_fuse.distill.attached._views import (
    VIEWS,
    Transform,
    aggregated,
    check_images,
    further_views,
    joint_labels,
)
from hf_fuse.distill.methods.forward_kl import forward_kl
from hf_fuse.errors import FuseError
from hf_fuse.model_features import classifier_of
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/1910.05872"


class sla(nn.Module):
    """Cross-entropy of the joint head over all M views, plus ``T^2 KL(mean of the views' answers || student)``.

    A view is no other example of its class but has a label of its own, ``class * M + view``. The classifier itself
    sees unturned images (the task loss) and learns from all views through the joint head, which is dropped when the
    student is saved: inference takes one pass. Training takes M. Gains are largest with few samples per class.

    Args:
        transform: ``rotation`` by quarter turns (M = 4, square images), ``colors``: orders of three channels (M = 6).
        temperature: divides both logits of the divergence.
        sum_over_views: multiplies the joint head's cross-entropy by M, as the reference does on ImageNet.
    """

    def __init__(
        self,
        *,
        transform: Transform = "rotation",
        temperature: Annotated[float, Between(0, open_low=True)] = 1.0,
        sum_over_views: bool = False,
    ) -> None:
        super().__init__()
        self.transform, self.temperature, self.sum_over_views = transform, temperature, sum_over_views

    def prepare(self, model: nn.Module, train_dataset: Any) -> None:
        check_images(model, "objectives.sla")
        classifier = classifier_of(model)
        if classifier is None:
            raise FuseError(f"objectives.sla: {type(model).__name__} has no classifier whose features could be taken.")
        self.head = nn.Linear(classifier.in_features, model.config.num_labels * VIEWS[self.transform])

    def attach(self, trainer: Any) -> None:
        self._trainer = trainer

    def forward(
        self, features_ND: Tensor, logits_NC: Tensor, labels_N: Tensor, inputs: dict[str, Any], model: nn.Module
    ) -> Tensor:
        """
        Args:
            features_ND: what the classifier gets, of the images that have a label.
            logits_NC: its answers.
            labels_N: classes.
            inputs: the batch, with ``pixel_values`` and ``labels``.
            model: the student.
        """
        _, views_BD = self._trainer.further_pass(model, {"pixel_values": further_views(inputs, self.transform)})
        joint_BK = self.head(torch.cat([features_ND, views_BD]))
        views = VIEWS[self.transform]
        joint = F.cross_entropy(joint_BK.float(), joint_labels(labels_N, views), reduction="sum")
        mean_NC = aggregated(joint_BK.detach(), views)
        taught = forward_kl(logits_NC, mean_NC, temperature=self.temperature)
        return (joint / (1 if self.sum_over_views else views) + taught) / max(len(labels_N), 1)
