"""Deep mutual learning: peers learn together, each from the labels and from the others' predictions."""

from __future__ import annotations

import copy
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_fuse.distill.methods.forward_kl import forward_kl
from hf_fuse.errors import FuseError
from hf_fuse.losses._predictions import class_indices, mean
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/1706.00384"


class mutual(nn.Module):
    """The student's part, ``mean_j KL(peer_j || student)``, plus all that the peers minimise themselves.

    Each peer: its cross-entropy plus the mean of ``KL(other || peer)`` over the others, the student among them. What is
    learnt from carries no gradient. The student's own cross-entropy is the task loss. All make their step together
    (the paper lets them take turns). A peer costs as much as the student; only the student is saved.

    Args:
        peers: of the student's configuration, with fresh weights, unless ``DistillTrainer(peers=[...])`` are given.
        temperature: divides all logits in the divergences, which are multiplied by its square.
    """

    def __init__(
        self,
        *,
        peers: Annotated[int, Between(1)] = 1,
        temperature: Annotated[float, Between(0, open_low=True)] = 1.0,
    ) -> None:
        super().__init__()
        self.count, self.temperature = peers, temperature

    def attach(self, trainer: Any) -> None:
        self._trainer = trainer
        peers, student = trainer.peers, trainer.base
        if peers is None:
            with torch.random.fork_rng(devices=[]):
                # Not the student's own seed, with which a peer might start as its twin.
                torch.manual_seed(trainer.args.seed + 1)
                peers = [type(student)(copy.deepcopy(student.config)) for _ in range(self.count)]
        self.peers = nn.ModuleList(peers).train()

    def forward(self, logits_NC: Tensor, labels_N: Tensor, inputs: dict[str, Any]) -> Tensor:
        """
        Args:
            logits_NC: the student's, of the predictions that have a label.
            labels_N: class or token ids.
            inputs: the batch.

        Raises:
            FuseError: a peer predicts other classes or tokens.
        """
        given = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
        every = [logits_NC] + [self._trainer.predictions(peer(**given), inputs)[0] for peer in self.peers]
        return mutual_loss(every, class_indices(labels_N), self.temperature)


def mutual_loss(logits: list[Tensor], labels_N: Tensor, temperature: float = 1.0) -> Tensor:
    """Of K peers, the first of which gets its cross-entropy elsewhere; mean over N.

    Raises:
        FuseError: their logits differ in shape.
    """
    if len({peer_NC.shape for peer_NC in logits}) > 1:
        shapes = ", ".join(str(list(peer_NC.shape)) for peer_NC in logits)
        raise FuseError(f"mutual: student and peers predict different things: their logits have shapes {shapes}.")
    total = torch.stack([mean(F.cross_entropy(peer_NC.float(), labels_N, reduction="none")) for peer_NC in logits[1:]])
    pairs = [
        forward_kl(learner_NC, other_NC.detach(), temperature=temperature)
        for learner_NC in logits
        for other_NC in logits
        if other_NC is not learner_NC
    ]
    return total.sum() + torch.stack(pairs).sum() / (max(len(labels_N), 1) * (len(logits) - 1))
