"""What several teachers say about the predictions of a batch, each in its own vocabulary, and one distribution of it.

N predictions of the student, M of a teacher, V tokens of the student's vocabulary, K kept ones, S sources.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_fuse.distill.top_k import TopK
from hf_fuse.distill.vocabulary_map import NO_TOKEN, VocabularyMap, merged


@dataclass(frozen=True)
class Source:
    """One teacher's predictions for a batch of the student's.

    Attributes:
        own: its M predictions, over its own vocabulary.
        own_sequences_M: of which row of the batch each is.
        place_N: which of them follows on the same text as the student's prediction; -1 where none does.
        cross_entropy_N: of the teacher, the mean over the row that the student's prediction is in, in nats.
        mapping: to the student's vocabulary; None if it is the same one.
        collisions: see :class:`~hf_fuse.distill.vocabulary_map.VocabularyMap`.
    """

    own: TopK
    own_sequences_M: Tensor
    place_N: Tensor
    cross_entropy_N: Tensor
    mapping: VocabularyMap | None = None
    collisions: str = "sum"

    @property
    def has_N(self) -> Tensor:
        """Which of the student's predictions it has something to say about."""
        return self.place_N >= 0

    def rows(self, chosen: slice | Tensor) -> Source:
        """For some of the N predictions."""
        return dataclasses.replace(self, place_N=self.place_N[chosen], cross_entropy_N=self.cross_entropy_N[chosen])

    def unmapped(self) -> TopK:
        """What it predicts where it has a place, over its own vocabulary."""
        return self.own.rows(self.place_N[self.has_N])

    def predictions(self) -> TopK:
        """What it predicts where it has a place, over the student's vocabulary."""
        top = self.unmapped()
        return top if self.mapping is None else self.mapping(top, collisions=self.collisions)

    def everywhere(self) -> TopK:
        """:meth:`predictions` for all N; where it has no place, no token is known and the tail has it all."""
        top, has_N = self.predictions(), self.has_N
        count, k = len(has_N), top.ids_NK.shape[-1]
        ids_NK = top.ids_NK.new_zeros(count, k)
        log_probs_NK = top.log_probs_NK.new_full((count, k), float("-inf"), dtype=torch.float32)
        tail_N = log_probs_NK.new_zeros(count)
        ids_NK[has_N], log_probs_NK[has_N] = top.ids_NK, top.log_probs_NK.float()
        tail_N[has_N] = top.tail_log_prob_N.float()
        return TopK(ids_NK, log_probs_NK, tail_N, None, top.temperature)


def fused(tops: Sequence[TopK], weights_NS: Tensor) -> TopK:
    """The mixture ``sum_s w_s P_s``.

    A token that only one source keeps is in the tail of the others, where nobody knows how much of it is its own: that
    probability stays in the tail.

    Args:
        tops: S sources' top-K of the same N predictions, over the same vocabulary.
        weights_NS: sum to 1 in each row.
    """
    log_weights_NS = weights_NS.float().log()
    log_probs_NK = torch.cat([top.log_probs_NK + log_weights_NS[:, s : s + 1] for s, top in enumerate(tops)], dim=-1)
    ids_NK = torch.cat([top.ids_NK.where(top.known_NK, NO_TOKEN) for top in tops], dim=-1)
    tail_NS = torch.stack([top.tail_log_prob_N for top in tops], dim=-1) + log_weights_NS
    mixture = TopK(ids_NK, log_probs_NK, tail_NS.logsumexp(-1), None, tops[0].temperature)
    return merged(ids_NK, log_probs_NK, mixture)


def narrowed(top: TopK, width: int) -> TopK:
    """At most ``width`` tokens of each prediction, the others in the tail.

    With one less than the vocabulary has, the tail is what no token of a row is: exact, also where it is one token.
    """
    tail_N = torch.cat([top.log_probs_NK[:, width:], top.tail_log_prob_N.unsqueeze(-1)], dim=-1).logsumexp(-1)
    return dataclasses.replace(
        top, ids_NK=top.ids_NK[:, :width], log_probs_NK=top.log_probs_NK[:, :width], tail_log_prob_N=tail_N
    )


def label_probability(top: TopK, labels_N: Tensor, vocabulary: int) -> Tensor:
    """Of each label, ``(N,)``: its own where the label is kept, else an equal share of the tail."""
    is_label_NK = (top.ids_NK == labels_N[:, None]) & top.known_NK
    left_N = (vocabulary - top.known_NK.sum(-1)).clamp(min=1)
    kept_N = top.log_probs_NK.exp().masked_fill(~is_label_NK, 0).sum(-1)
    return torch.where(is_label_NK.any(-1), kept_N, top.tail_log_prob_N.exp() / left_N)
