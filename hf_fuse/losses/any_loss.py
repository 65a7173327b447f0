"""AnyLoss: the reported metric itself (F-beta, balanced accuracy, geometric mean), made differentiable.

For imbalanced classes when one of these metrics is what counts; batches of 32 or more, since it is a ratio of counts
over the batch.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from hf_fuse.errors import FuseError
from hf_fuse.losses._labels import label_matrix
from hf_fuse.losses._processes import gathered
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2405.14745"
IN_BATCH = True
TINY = 1e-7


def any_loss(
    logits_NC: Tensor,
    labels_N: Tensor,
    progress: float = 1.0,
    *,
    metric: Literal["f_beta", "balanced_accuracy", "geometric_mean", "accuracy"] = "f_beta",
    beta: Annotated[float, Between(0, open_low=True)] = 1.0,
    amplification: Annotated[float, Between(0, open_low=True)] = 73.0,
    first_amplification: Annotated[float, Between(0, open_low=True)] = 10.0,
    anneal_until: Annotated[float, Between(0, 1)] = 0.5,
) -> Tensor:
    """1 - metric, of one of two classes, or the mean over labels or classes (each against the rest).

    Probabilities are sharpened to ``a = sigmoid(L (p - 1/2))`` and counted: true positives are ``sum a y``. A class
    that the batch lacks, or that all its samples have, is left out. At the paper's L = 73 only probabilities within 0.1
    of one half learn, so L grows to it. It compares the samples of a batch: micro-batches are batches of their own,
    processes are taken together.

    Args:
        logits_NC: of two classes (the second is the positive one), of C classes, or of C labels.
        labels_N: class indices, or ``(N, C)`` of 0 and 1.
        progress: share of the training that is done.
        metric: what to raise.
        beta: of F-beta; above 1 recall counts more.
        amplification: L from ``anneal_until`` on.
        first_amplification: L at the start.
        anneal_until: share of the training.

    Raises:
        FuseError: single-label classification with one logit.
    """
    probabilities_NC, positive_NC = _probabilities(logits_NC.float(), labels_N)
    probabilities_NC, positive_NC = gathered(probabilities_NC), gathered(positive_NC)
    done = min(progress / anneal_until, 1.0) if anneal_until else 1.0
    sharpness = first_amplification + done * (amplification - first_amplification)
    sharp_NC = (sharpness * (probabilities_NC - 0.5)).sigmoid()
    score_C = soft_metric(sharp_NC, positive_NC.float(), metric, beta)
    present_C = positive_NC.any(0) & ~positive_NC.all(0)
    return torch.where(present_C, 1 - score_C, 0).sum() / present_C.sum().clamp(min=1)


def soft_metric(sharp_NC: Tensor, labels_NC: Tensor, metric: str, beta: float = 1.0) -> Tensor:
    """The metric ``(C,)`` of each column from counts that may be fractions; that of whole numbers is the usual one."""
    positives_C, negatives_C = labels_NC.sum(0), (1 - labels_NC).sum(0)
    hits_C, rejections_C = (sharp_NC * labels_NC).sum(0), ((1 - sharp_NC) * (1 - labels_NC)).sum(0)
    if metric == "accuracy":
        return (hits_C + rejections_C) / (positives_C + negatives_C).clamp(min=1)
    if metric == "f_beta":
        return (1 + beta**2) * hits_C / (beta**2 * positives_C + sharp_NC.sum(0)).clamp(min=TINY)
    recall_C, specificity_C = hits_C / positives_C.clamp(min=TINY), rejections_C / negatives_C.clamp(min=TINY)
    if metric == "balanced_accuracy":
        return (recall_C + specificity_C) / 2
    # The slope of the root is infinite at 0.
    return (recall_C * specificity_C + TINY).sqrt()


def _probabilities(logits_NC: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities ``(N, C)`` and which of them are true; of two classes the second alone."""
    if labels.is_floating_point():
        return logits_NC.sigmoid(), label_matrix(labels, logits_NC)[0]
    if logits_NC.shape[-1] == 1:
        raise FuseError(
            "any_loss: the model has one logit, but class indices as labels. Give it two classes (num_labels=2), or "
            "labels of 0.0 and 1.0 for multi_label_classification."
        )
    positive_NC = label_matrix(labels, logits_NC)[0]
    if logits_NC.shape[-1] == 2:
        return (logits_NC[:, 1:] - logits_NC[:, :1]).sigmoid(), positive_NC[:, 1:]
    return logits_NC.softmax(-1), positive_NC
