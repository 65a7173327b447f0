"""LOOK: the nearest neighbours of a sample, among all training samples, are to be of its class.

For supervised training before the real one, where ``sup_con`` pulls all samples of a class together, and different
kinds within a class are to stay apart. Keeps the features of the whole training set.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor, nn

from hf_fuse.losses._predictions import mean, sample_classes
from hf_fuse.losses._processes import gathered
from hf_fuse.losses._sample_table import SampleTable
from hf_fuse.losses._similarities import unit
from hf_fuse.model_features import feature_size
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2110.06014"


class look(nn.Module):
    """Mean of ``-log(sum over neighbours of the own class of e^(s / t) / sum over neighbours of e^(s / t))``, s a
    cosine, of the K nearest of all samples as they were when last seen.

    If none of them is of the sample's class, its nearest one is counted in, without which there would be no gradient;
    a sample whose class has not been seen yet counts as 0. Features enter the bank when their optimizer step is over.
    K and t are recalled and not verified.

    Args:
        neighbours: K.
        temperature: t.
    """

    def __init__(
        self,
        *,
        neighbours: Annotated[int, Between(1)] = 32,
        temperature: Annotated[float, Between(0, open_low=True)] = 0.1,
    ) -> None:
        super().__init__()
        self.neighbours, self.temperature = neighbours, temperature
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._step = 0
        self.register_state_dict_pre_hook(lambda module, *_: module._store())

    def prepare(self, model: nn.Module, train_dataset: Any) -> None:
        self.bank = SampleTable.of(train_dataset, feature_size(model))
        self.classes = SampleTable.of(train_dataset, dtype=torch.long)

    def forward(self, features_ND: Tensor, labels_N: Tensor, sample_ids_N: Tensor, step: int = 0) -> Tensor:
        if step != self._step:
            self._store()
            self._step = step
        unit_ND, labels_N = unit(features_ND), sample_classes(labels_N, features_ND)
        self._waiting.append(tuple(map(gathered, (sample_ids_N, unit_ND.detach(), labels_N))))
        known_NS = self.bank.written & (
            torch.arange(len(self.bank.values), device=labels_N.device) != sample_ids_N[:, None]
        )
        own_NS = self.classes.values == labels_N[:, None]
        return mean(leave_one_out(unit_ND @ self.bank.values.T / self.temperature, own_NS, known_NS, self.neighbours))

    def _store(self) -> None:
        for sample_ids_N, rows_ND, labels_N in self._waiting:
            self.bank.write(sample_ids_N, rows_ND)
            self.classes.write(sample_ids_N, labels_N)
        self._waiting.clear()


def leave_one_out(scores_NS: Tensor, own_NS: Tensor, known_NS: Tensor, neighbours: int) -> Tensor:
    """The loss ``(N,)`` of scores between samples and the bank.

    Args:
        scores_NS: cosines over t.
        own_NS: where the bank's sample is of the same class.
        known_NS: what may be a neighbour.
        neighbours: K.
    """
    lowest = torch.finfo(scores_NS.dtype).min
    known = scores_NS.masked_fill(~known_NS, lowest)
    own = scores_NS.masked_fill(~(own_NS & known_NS), lowest)
    near_NS = known >= known.topk(min(neighbours, known.shape[-1]), dim=-1).values[:, -1:]
    near_NS = near_NS | (own >= own.max(-1, keepdim=True).values)
    loss_N = known.masked_fill(~near_NS, lowest).logsumexp(-1) - own.masked_fill(~near_NS, lowest).logsumexp(-1)
    return torch.where((own_NS & known_NS).any(-1), loss_N, 0)
