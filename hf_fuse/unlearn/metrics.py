"""What unlearning is judged by: accuracies, whether an attacker can tell, and the distance to training anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import default_data_collator

from hf_fuse.errors import FuseError


@dataclass(frozen=True)
class UnlearningReport:
    """All of a model; compare with those of a model trained anew without the samples, not with 0 or 1.

    Attributes:
        forget_accuracy, retain_accuracy, test_accuracy: shares of right answers.
        membership: share of the forgotten samples that a loss threshold calls members of the training set. The
            threshold is the one that best tells retained from test samples. Training anew gives about what test samples
            give.
        kl_to_retrained: mean KL divergence from the retrained model's predictions, on the forgotten samples. None
            without one.
        parameter_distance: ``||theta - theta_retrained|| / ||theta_retrained||``. None without one.
    """

    forget_accuracy: float
    retain_accuracy: float
    test_accuracy: float
    membership: float
    kl_to_retrained: float | None = None
    parameter_distance: float | None = None

    def to_dict(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@torch.no_grad()
def unlearning_report(
    model: nn.Module,
    forget: Any,
    retain: Any,
    test: Any,
    *,
    retrained: nn.Module | None = None,
    data_collator: Callable = default_data_collator,
    batch_size: int = 64,
) -> UnlearningReport:
    """Measures a classifier after unlearning.

    Args:
        forget, retain, test: rows with labels: forgotten, kept, and never seen.
        retrained: the same model trained without the forgotten rows, to compare with.

    Raises:
        FuseError: a set is empty or has no labels, or ``retrained`` is another kind of model.
    """
    for name, rows in (("forget", forget), ("retain", retain), ("test", test)):
        if not len(rows):
            raise FuseError(f"{name}: holds no rows.")
    sets = [_log_probabilities(model, rows, data_collator, batch_size) for rows in (forget, retain, test)]
    accuracy = [(logs_NC.argmax(1) == labels_N).double().mean().item() for logs_NC, labels_N in sets]
    losses = [-logs_NC[torch.arange(len(labels_N)), labels_N] for logs_NC, labels_N in sets]
    threshold = membership_threshold(losses[1], losses[2])
    divergence = distance = None
    if retrained is not None:
        other_NC, _ = _log_probabilities(retrained, forget, data_collator, batch_size)
        divergence = (other_NC.exp() * (other_NC - sets[0][0])).sum(1).mean().item()
        pairs = list(zip(model.parameters(), retrained.parameters()))
        if [p.shape for p in model.parameters()] != [p.shape for p in retrained.parameters()]:
            raise FuseError(f"retrained: a {type(retrained).__name__} with other parameters than the model.")
        gap = sum((ours.float() - theirs.float().to(ours.device)).square().sum().item() for ours, theirs in pairs)
        distance = (gap / sum(theirs.float().square().sum().item() for _, theirs in pairs)) ** 0.5
    return UnlearningReport(*accuracy, (losses[0] <= threshold).double().mean().item(), divergence, distance)


def membership_threshold(members_N: Tensor, strangers_M: Tensor) -> float:
    """The loss up to which a sample is best called a member: the highest mean of both rates of right answers."""
    candidates = torch.cat([members_N, strangers_M]).sort().values
    found = torch.searchsorted(members_N.sort().values, candidates, right=True) / len(members_N)
    wrong = torch.searchsorted(strangers_M.sort().values, candidates, right=True) / len(strangers_M)
    return candidates[(found - wrong).argmax()].item()


def _log_probabilities(model: nn.Module, rows: Any, collate: Callable, size: int) -> tuple[Tensor, Tensor]:
    was_training = model.training
    model.eval()
    found, labels = [], []
    for batch in tqdm(DataLoader(rows, size, collate_fn=collate), desc="measure", unit="batch", disable=None):
        if "labels" not in batch:
            raise FuseError(f"rows have the columns {', '.join(batch)}; expected labels among them.")
        inputs = {name: values.to(model.device) for name, values in batch.items() if name != "labels"}
        found.append(model(**inputs).logits.float().log_softmax(-1).cpu())
        labels.append(batch["labels"].cpu())
    model.train(was_training)
    return torch.cat(found), torch.cat(labels)
