"""The loss on the straight path between two models: how high the barrier is that a merge of them falls on.

Models that have learnt the same in another order are far apart in weights, and what lies between them is bad; the
height of that barrier, before and after an alignment, says what the alignment is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hf_fuse.errors import FuseError
from hf_fuse.merge.align.live import forward

Points = Sequence[tuple[float, float]]  # place from 0 to 1, and the loss there
Batches = Callable[[], Iterable[dict[str, Tensor]]]  # all data again at every call


def check_loss(architecture: str, labelled: bool) -> None:
    """Raises FuseError where the data tell no loss."""
    classifier = "Classification" in architecture
    if not (classifier and labelled) and not architecture.endswith(("ForCausalLM", "LMHeadModel")):
        what = "data without labels" if classifier else architecture
        raise FuseError(f"path: the loss of {what} is not known. Set path to 0, or give labelled data to a classifier.")


@torch.no_grad()
def loss_path(reference: Any, other: Any, batches: Batches, points: int, what: str) -> list[tuple[float, float]]:
    """Mean loss at ``points`` places from the reference (0) to the other model (1), both ends included.

    The other model's weights are overwritten.
    """
    ends = [
        (a.detach(), b.detach().clone(), b) for a, b in zip(reference.parameters(), other.parameters(), strict=True)
    ]
    found = []
    for number in tqdm(range(points), desc=what, unit="point", disable=None):
        place = number / (points - 1)
        for start, end, values in ends:
            values.copy_(torch.lerp(start, end, place))
        found.append((place, _loss(other, batches)))
    return found


def _loss(model: Any, batches: Batches) -> float:
    total, count = 0.0, 0
    for batch in batches():
        logits = forward(model, batch).logits.float()
        labels = batch["labels"].to(logits.device)
        if logits.dim() == 3:
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += int((labels != -100).sum())
    return total / count


def barrier(path: Points) -> float:
    """How far the path rises above the straight line between the losses of its ends, at most; 0 if it does not."""
    (_, start), (_, end) = path[0], path[-1]
    return max(loss - (start + place * (end - start)) for place, loss in path)


def draw_path(paths: Mapping[str, Points], file: Path) -> None:
    """One line each before and after; nothing without matplotlib (the extra ``plot``)."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return
    from hf_fuse.plot_points import lines

    lines(
        paths,
        path=file,
        title="Loss between the two models",
        xlabel="from the reference (0) to the model (1)",
        ylabel="loss",
        logarithmic=False,
    )
