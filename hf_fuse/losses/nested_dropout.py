"""Nested dropout: the classifier is to work from the first k features alone, with k drawn anew each step.

For features whose first numbers matter most, so that embeddings or the classifier can be cut afterwards
(:func:`accuracy_by_width`, :func:`keep_first`); also against label noise, which the last features learn.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from hf_fuse.losses._predictions import class_indices, mean
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/1402.0915"


def nested_dropout(
    features_ND: Tensor,
    labels_N: Tensor,
    head_CD: Tensor,
    head_bias_C: Tensor | None = None,
    step: int = 0,
    *,
    sigma: Annotated[float, Between(0, open_low=True)] = 100.0,
    mu: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Mean cross-entropy of the classifier on features of which all from the k-th on are 0.

    k is the same for all samples of an optimizer step, drawn with ``p(k) ~ exp(-((k - mu) / sigma)^2)`` from 1 to D.
    With a weight of 0 for ``task`` the model is trained by nested dropout alone.

    Args:
        features_ND: what the classifier takes.
        labels_N: class indices.
        head_CD: its weights.
        head_bias_C: its bias.
        step: number of the optimizer step.
        sigma: how far k reaches; the reference uses 10 and 100.
        mu: the most probable k, if it is within 1 to D.
        seed: of the draws.
    """
    k = drawn_width(features_ND.shape[-1], sigma=sigma, mu=mu, seed=seed, step=step)
    bias_C = None if head_bias_C is None else head_bias_C.float()
    logits_NC = linear(features_ND[:, :k].float(), head_CD[:, :k].float(), bias_C)
    return mean(cross_entropy(logits_NC, class_indices(labels_N), reduction="none"))


def width_probabilities(size: int, *, sigma: float, mu: float = 0.0) -> Tensor:
    """``p(k)`` for k from 1 to ``size``."""
    distance_D = (torch.arange(1, size + 1, dtype=torch.float64) - mu) / sigma
    return (-distance_D.square()).softmax(-1)


def drawn_width(size: int, *, sigma: float, mu: float, seed: int, step: int) -> int:
    """k of an optimizer step: the same on every process and in every micro-batch."""
    random = torch.Generator().manual_seed(seed * 2**32 + step)
    return int(torch.multinomial(width_probabilities(size, sigma=sigma, mu=mu), 1, generator=random)) + 1


@torch.no_grad()
def accuracy_by_width(features_ND: Tensor, labels_N: Tensor, head_CD: Tensor, head_bias_C: Tensor | None) -> Tensor:
    """Accuracy ``(D,)`` of the classifier on the first 1, 2, ... D features; choose k by it on validation data."""
    logits_NC = features_ND.new_zeros(len(features_ND), len(head_CD)) + (0 if head_bias_C is None else head_bias_C)
    accuracies = []
    for feature_N, column_C in zip(features_ND.T, head_CD.T):
        logits_NC = logits_NC + feature_N[:, None] * column_C
        accuracies.append((logits_NC.argmax(-1) == labels_N).float().mean())
    return torch.stack(accuracies)


@torch.no_grad()
def keep_first(head: nn.Linear, k: int) -> None:
    """Makes a classifier look at the first ``k`` features alone, in place: a stock layer with zeros in the rest."""
    head.weight[:, k:] = 0
