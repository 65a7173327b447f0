"""A teacher's distribution cut down to its K likeliest tokens and one bucket for all others.

N predictions, V tokens of the vocabulary, K of them kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_fuse.errors import FuseError


@dataclass(frozen=True)
class TopK:
    """What is kept of N distributions. The probabilities of the K tokens and of the bucket sum to 1.

    Attributes:
        ids_NK: the likeliest tokens, in descending order.
        log_probs_NK: their log probabilities.
        tail_log_prob_N: of all other tokens together; -inf where there are none.
        label_log_prob_N: of the label, if it is known; it need not be among the K.
        temperature: that the logits were divided by. It can't be changed afterwards.
    """

    ids_NK: Tensor
    log_probs_NK: Tensor
    tail_log_prob_N: Tensor
    label_log_prob_N: Tensor | None = None
    temperature: float = 1.0

    @classmethod
    def of(cls, logits_NV: Tensor, k: int, labels_N: Tensor | None = None, *, temperature: float = 1.0) -> TopK:
        """Cuts down whole distributions; all V tokens are kept if there are fewer than ``k``."""
        log_probs_NV = (logits_NV.float() / temperature).log_softmax(-1)
        log_probs_NK, ids_NK = log_probs_NV.topk(min(k, log_probs_NV.shape[-1]), dim=-1)
        label = None if labels_N is None else log_probs_NV.gather(-1, labels_N.unsqueeze(-1)).squeeze(-1)
        return cls(ids_NK, log_probs_NK, outside(log_probs_NV, ids_NK), label, temperature)

    def __len__(self) -> int:
        return len(self.ids_NK)

    def rows(self, chosen: slice | Tensor) -> TopK:
        """Some of the N distributions."""
        label_N = self.label_log_prob_N
        return TopK(
            self.ids_NK[chosen],
            self.log_probs_NK[chosen],
            self.tail_log_prob_N[chosen],
            None if label_N is None else label_N[chosen],
            self.temperature,
        )

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


def outside(logits_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """``logsumexp`` over all tokens but ``ids``, ``(N,)``; -inf if there are none.

    Not ``log(1 - sum)`` of the others' probabilities: that has neither digits nor a gradient left when they sum to 1.
    """
    return logits_NV.scatter(-1, ids_NK, float("-inf")).logsumexp(-1)
