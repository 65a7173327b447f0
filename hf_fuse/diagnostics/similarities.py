"""How the similarities of a contrastive training are spread: what tells whether its temperature is right."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fuse.losses._similarities import unit

PAPER = "https://arxiv.org/abs/2012.09740"


@torch.no_grad()
def similarity_statistics(
    features_ND: Tensor, second_features_MD: Tensor, labels_N: Tensor | None = None, *, temperature: float = 0.05
) -> dict[str, Tensor]:
    """Numbers of the embeddings of N pairs; rows of the second view beyond N are further negatives.

    Returns:
        ``positive_cosine``: mean cosine of a pair. ``hardness_entropy``: mean entropy of the negatives' shares in the
        gradient, ``softmax(s / temperature)``, in nats: near 0 if the hardest alone counts, log of their number if all
        count alike. ``uniformity``: ``log mean e^(-2 d^2)`` over the distances d of different first views, the lower
        the more evenly spread. ``tolerance``: mean cosine of different samples of one class, with ``labels_N``.
    """
    first_ND, second_MD = unit(features_ND), unit(second_features_MD)
    count = len(first_ND)
    cosines_NM = first_ND @ second_MD.T
    itself_NM = torch.eye(count, len(second_MD), dtype=torch.bool, device=cosines_NM.device)
    log_shares_NM = (cosines_NM / temperature).masked_fill(itself_NM, float("-inf")).log_softmax(-1)
    others_NN = ~torch.eye(count, dtype=torch.bool, device=cosines_NM.device)
    within_NN = first_ND @ first_ND.T
    found = {
        "positive_cosine": cosines_NM.diagonal().mean(),
        "hardness_entropy": -(log_shares_NM.exp() * log_shares_NM.masked_fill(itself_NM, 0)).sum(-1).mean(),
        # d^2 = 2 - 2 cos
        "uniformity": (4 * within_NN[others_NN] - 4).logsumexp(0) - others_NN.sum().log(),
    }
    if labels_N is not None:
        found["tolerance"] = within_NN[others_NN & (labels_N[:, None] == labels_N[None, :])].mean()
    return found
