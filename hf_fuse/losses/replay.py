"""Replay: the model goes on predicting a second data set, so that it doesn't forget what that stands for.

For tuning a language model on a task while its general language is kept (LaMo); the simplest remedy against forgetting,
for one more forward and backward pass. Weight 0.1, searched from 0 to 1.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_fuse.losses._predictions import class_indices, mean

PAPER = "https://arxiv.org/abs/2310.20587"
MEAN_OVER = "replay"


def replay(replay_logits_NC: Tensor, replay_labels_N: Tensor) -> Tensor:
    """Mean cross-entropy on batches of ``replay_dataset``, an argument of :class:`~hf_fuse.FuseTrainer`.

    Its samples are cycled, each time in another order; what comes at a step follows from the seed and its number.

    Args:
        replay_logits_NC: of the predictions that have a label.
        replay_labels_N: class or token ids.
    """
    return mean(cross_entropy(replay_logits_NC.float(), class_indices(replay_labels_N), reduction="none"))
