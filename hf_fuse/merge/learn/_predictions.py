"""What estimators of coefficients ask of a model's predictions: which there are, their entropy, how many are right.

N predictions of a batch (examples of a classifier, next tokens of a language model), C classes or tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

IGNORED = -100  # labels of positions at which nothing is predicted


def predictions(model: Any, batch: dict[str, Tensor], *, prompts: bool = False) -> tuple[Tensor, Tensor]:
    """Logits ``fp32 [N, C]`` of the predictions of a batch, and the labels given for them ``[N]``.

    Args:
        prompts: of language models count every next token that is no padding, not only those that are trained on.
    """
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    labels = batch["labels"]
    logits = model(**inputs).logits
    if logits.ndim == 2:
        return logits.float(), labels
    if "decoder_input_ids" in batch:  # what an encoder-decoder reads is not predicted
        kept_BT = labels != IGNORED
        return logits[kept_BT].float(), labels[kept_BT]
    kept_BT = _predicted(batch, prompts)
    return logits[:, :-1][kept_BT].float(), labels[:, 1:][kept_BT]


def _predicted(batch: dict[str, Tensor], prompts: bool) -> Tensor:
    """At which positions but the last a next token counts, ``bool [B, T - 1]``."""
    if prompts:
        return batch["attention_mask"][:, 1:].bool()
    return batch["labels"][:, 1:] != IGNORED


def entropy(logits_NC: Tensor) -> Tensor:
    """Entropy of each prediction in nats, ``[N]``."""
    log_probs_NC = logits_NC.log_softmax(-1)
    return -(log_probs_NC.exp() * log_probs_NC).sum(-1)


def mean_cross_entropy(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Of a batch's predictions, with the labels that it has."""
    logits_NC, labels_N = predictions(model, batch)
    return cross_entropy(logits_NC, labels_N)


@torch.no_grad()
def scores(model: Any, batches: Iterable[dict[str, Tensor]]) -> tuple[float, float]:
    """Share of the predictions that are right, and the mean cross-entropy, over all of the batches."""
    right, total, count = 0, 0.0, 0
    for batch in batches:
        logits_NC, labels_N = predictions(model, batch)
        right += int((logits_NC.argmax(-1) == labels_N).sum())
        total += cross_entropy(logits_NC, labels_N, reduction="sum").item()
        count += len(labels_N)
    return right / count, total / count
