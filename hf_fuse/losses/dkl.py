"""Consistency of two views: the divergence between the predictions for them (R-Drop, LegoGCD's DKL).

For fine-tuning on little data with any model that has dropout, or inputs in two versions. Costs a second forward pass.
"""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from hf_fuse.losses._predictions import mean
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2106.14448"


def dkl(
    logits_NC: Tensor,
    second_logits_NC: Tensor,
    labels_N: Tensor,
    *,
    temperature: Annotated[float, Between(0, open_low=True)] = 1.0,
    symmetric: bool = True,
) -> Tensor:
    """Mean divergence; both sides carry gradient. 0 for equal views, so the model needs dropout or two inputs.

    The second view is the columns ``second_*`` of the batch (``second_input_ids``...) or, without any, the same inputs
    under other dropout. It costs a second forward pass.

    Args:
        logits_NC: of the predictions that have a label.
        second_logits_NC: the same predictions for the second view.
        labels_N: not looked at; the mean is over the positions that have one.
        temperature: divides both logits. LegoGCD: 0.1.
        symmetric: the mean of both directions (R-Drop, weight 1 to 5); else KL(first || second) alone (LegoGCD).
    """
    first_NC = (logits_NC.float() / temperature).log_softmax(-1)
    second_NC = (second_logits_NC.float() / temperature).log_softmax(-1)
    forward_N = (first_NC.exp() * (first_NC - second_NC)).sum(-1)
    if not symmetric:
        return mean(forward_N)
    return mean((forward_N + (second_NC.exp() * (second_NC - first_NC)).sum(-1)) / 2)
