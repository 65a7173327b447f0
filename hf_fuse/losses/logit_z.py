"""Logit z-loss: keeps the softmax normaliser of the predictions near 1, so that logits don't drift.

For stable training of language models in half precision, and of large vocabularies; it costs nothing.
"""

from __future__ import annotations

from torch import Tensor

from hf_fuse.losses._predictions import mean

PAPER = "https://arxiv.org/abs/2204.02311"


def logit_z(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """Mean of ``logsumexp(logits)^2`` over the predictions; usual weight 1e-4 (PaLM).

    Args:
        logits_NC: of the predictions that have a label.
        labels_N: not looked at; the mean is over the positions that have one.
    """
    return mean(logits_NC.float().logsumexp(-1).square())
