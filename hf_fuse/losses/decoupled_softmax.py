"""Decoupled softmax: each of a sample's labels competes with the labels that it hasn't, and not with its others.

For classifiers with many labels per sample, and for retrieval: unlike plain softmax it doesn't push a sample's labels
against each other, and unlike binary cross-entropy it needs no threshold to learn a ranking.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import softplus

from hf_fuse.losses._labels import label_matrix, mean_of_positives
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2310.10636"


def decoupled_softmax(
    logits_NL: Tensor, labels_N: Tensor, *, temperature: Annotated[float, Between(0, open_low=True)] = 1.0
) -> Tensor:
    """Mean over samples of the mean over their labels l of ``-log(e^s_l / (e^s_l + sum of e^s_j over absent j))``.

    With one label per sample it is cross-entropy. Samples without labels give 0 and count in the mean, so that it
    doesn't depend on how a batch is split; the reference leaves them out.

    Args:
        logits_NL: of L labels; similarities in retrieval.
        labels_N: ``(N, L)`` of 0 and 1, or ``(N,)`` class indices. Entries below 0 take no part.
        temperature: divides the logits; the paper's 0.05 is for similarities of unit vectors.
    """
    scores_NL = logits_NL.float() / temperature
    positive_NL, negative_NL = label_matrix(labels_N, logits_NL)
    # The lowest number and not -inf: a sample with every label has a log-sum of nothing, whose gradient is NaN.
    absent_N1 = scores_NL.masked_fill(~negative_NL, torch.finfo(scores_NL.dtype).min).logsumexp(-1, keepdim=True)
    return mean_of_positives(softplus(absent_N1 - scores_NL), positive_NL)
