"""A teacher's distribution cut down to its K likeliest tokens and one bucket for all others.

N predictions, V tokens of the vocabulary, K of them kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_fuse.errors import FuseError


@dataclass(frozen=True)
class TopK:
    """What is kept of N distributions. The probabilities of the K tokens and of the bucket sum to 1.

    Attributes:
        ids_NK: the likeliest tokens, in descending order. Where there are fewer than K, ids are 0 and log
            probabilities -inf.
        log_probs_NK: their log probabilities.
        tail_log_prob_N: of all other tokens together; -inf where there are none.
        label_log_prob_N: of the label, if it is known; it need not be among the K.
        temperature: that the logits were divided by. It can't be changed afterwards.
        log_z_N: logsumexp of the divided logits, for methods that compare the logits themselves.
    """

    ids_NK: Tensor
    log_probs_NK: Tensor
    tail_log_prob_N: Tensor
    label_log_prob_N: Tensor | None = None
    temperature: float = 1.0
    log_z_N: Tensor | None = None

    @classmethod
    def of(cls, logits_NV: Tensor, k: int, labels_N: Tensor | None = None, *, temperature: float = 1.0) -> TopK:
        """Cuts down whole distributions; all V tokens are kept if there are fewer than ``k``."""
        logits_NV = logits_NV.float() / temperature
        log_z_N = logits_NV.logsumexp(-1)
        log_probs_NV = logits_NV.log_softmax(-1)
        log_probs_NK, ids_NK = log_probs_NV.topk(min(k, log_probs_NV.shape[-1]), dim=-1)
        label = None if labels_N is None else log_probs_NV.gather(-1, labels_N.unsqueeze(-1)).squeeze(-1)
        return cls(ids_NK, log_probs_NK, outside(log_probs_NV, ids_NK), label, temperature, log_z_N)

    def __len__(self) -> int:
        return len(self.ids_NK)

    @property
    def known_NK(self) -> Tensor:
        """Which places hold a token."""
        return self.log_probs_NK > float("-inf")

    def rows(self, chosen: slice | Tensor) -> TopK:
        """Some of the N distributions."""
        return self.each(lambda values: values[chosen])

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Its five tensors in their order; the last two may be None."""
        return self.ids_NK, self.log_probs_NK, self.tail_log_prob_N, self.label_log_prob_N, self.log_z_N

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor | None], temperature: float) -> TopK:
        """What :attr:`tensors` were of."""
        ids_NK, log_probs_NK, tail_N, label_N, log_z_N = tensors
        return cls(ids_NK, log_probs_NK, tail_N, label_N, temperature, log_z_N)

    @classmethod
    def joined(cls, parts: Sequence[TopK]) -> TopK:
        """The distributions of several, one after the other."""
        columns = zip(*(part.tensors for part in parts))
        tensors = [None if any(values is None for values in column) else torch.cat(column) for column in columns]
        return cls.from_tensors(tensors, parts[0].temperature)

    def within(self, width: int) -> TopK:
        """The same over the first ``width`` tokens of the vocabulary; others that were kept go to the tail."""
        beyond_NK = self.ids_NK >= width
        tail_N = self.tail_log_prob_N.logaddexp(self.log_probs_NK.masked_fill(~beyond_NK, float("-inf")).logsumexp(-1))
        return replace(
            self,
            ids_NK=self.ids_NK.masked_fill(beyond_NK, 0),
            log_probs_NK=self.log_probs_NK.masked_fill(beyond_NK, float("-inf")),
            tail_log_prob_N=tail_N,
        )

    def each(self, function: Callable[[Tensor], Tensor]) -> TopK:
        """``function`` of every tensor."""
        changed = [None if values is None else function(values) for values in self.tensors]
        return TopK.from_tensors(changed, self.temperature)

    def check(self, temperature: float) -> None:
        """Refuses another temperature than the one the probabilities were made at.

        Raises:
            FuseError: the bucket's probability at that temperature can't be told from these.
        """
        if temperature != self.temperature:
            raise FuseError(
                f"The teacher's top-{self.ids_NK.shape[-1]} was taken at temperature {self.temperature:g}, but the "
                f"loss has {temperature:g}. The tokens outside of it can't be tempered any more: use one temperature."
            )


def outside(logits_NV: Tensor, ids_NK: Tensor, known_NK: Tensor | None = None) -> Tensor:
    """``logsumexp`` over all tokens but ``ids`` (those of them that are known), ``(N,)``; -inf if there are none.

    Not ``log(1 - sum)`` of the others' probabilities: that has neither digits nor a gradient left when they sum to 1.
    """
    if known_NK is not None:
        # In the place of a filler, one that is known: to leave it out twice changes nothing.
        ids_NK = ids_NK.where(known_NK, ids_NK.gather(-1, known_NK.int().argmax(-1, keepdim=True)))
    return logits_NV.scatter(-1, ids_NK, float("-inf")).logsumexp(-1)
