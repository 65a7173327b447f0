"""BlockRank: in one layer, the tokens that ask attend to the documents that answer.

For language models that rank documents in their context, beside the task's loss, with weight 0.1: attention alone can
then do the ranking. Needs eager attention, and data that says which tokens are of which document.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from hf_fuse.errors import FuseError
from hf_fuse.losses._predictions import mean
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2510.05396"


def block_rank(
    attentions: tuple[Tensor, ...],
    document_ids_BT: Tensor,
    asking_tokens_BT: Tensor,
    relevant_documents_BM: Tensor,
    *,
    layer: int = -1,
    temperature: Annotated[float, Between(0, open_low=True)] = 0.05,
) -> Tensor:
    """Mean of ``-log(sum over relevant documents of e^(a_m / t) / sum over all of e^(a_m / t))``, a_m the attention of
    the asking tokens that falls on document m.

    a is the mean over heads and asking tokens, and sums to 1 over documents. A sample without relevant documents, or
    whose asking tokens see none, counts as 0. The loss is small as soon as relevant documents have 0.3 more than
    others.

    Args:
        attentions: of all layers.
        document_ids_BT: which document each token is of, from 0 on; -100: of none.
        asking_tokens_BT: 1 where the tokens are that ask, the last two of the prompt in the reference.
        relevant_documents_BM: 1 where a document answers, 0 where not, -100 where there is none.
        layer: the reference takes the 20th of a 7B model.
        temperature: t; 0.05 in the reference's code, 0.1 in its description.

    Raises:
        FuseError: the columns don't fit the attention.
    """
    attention_BHTT = attentions[layer]
    tokens, documents = attention_BHTT.shape[-1], relevant_documents_BM.shape[-1]
    if document_ids_BT.shape[-1] != tokens or asking_tokens_BT.shape[-1] != tokens:
        raise FuseError(
            f"block_rank: attention is between {tokens} tokens, document_ids are {list(document_ids_BT.shape)} and "
            f"asking_tokens {list(asking_tokens_BT.shape)}. Pad both columns like input_ids, with -100 and 0."
        )
    if document_ids_BT.max() >= documents:
        raise FuseError(
            f"block_rank: a token is of document {document_ids_BT.max()}, but relevant_documents has only {documents} "
            "columns, from 0 on."
        )
    mass_BM = attention_mass(attention_BHTT, document_ids_BT, asking_tokens_BT, documents)
    lowest = torch.finfo(torch.float32).min
    scores_BM = (mass_BM / temperature).masked_fill(relevant_documents_BM < 0, lowest)
    relevant_BM = relevant_documents_BM > 0
    loss_B = scores_BM.logsumexp(-1) - scores_BM.masked_fill(~relevant_BM, lowest).logsumexp(-1)
    return mean(torch.where(relevant_BM.any(-1) & (mass_BM.sum(-1) > 0), loss_B, 0))


def attention_mass(attention_BHTT: Tensor, document_ids_BT: Tensor, asking_tokens_BT: Tensor, documents: int) -> Tensor:
    """``(B, M)``, how much of the attention to documents each gets."""
    asking_BT = asking_tokens_BT > 0
    sample_A, _ = asking_BT.nonzero(as_tuple=True)
    # Only the rows of tokens that ask, in fp32.
    attention_AHT = attention_BHTT.transpose(1, 2)[asking_BT].float()
    of_document_BTM = document_ids_BT.unsqueeze(-1) == torch.arange(documents, device=document_ids_BT.device)
    to_documents_AHM = attention_AHT @ of_document_BTM[sample_A].float()
    shares_AM = (to_documents_AHM / to_documents_AHM.sum(-1, keepdim=True).clamp(min=1e-12)).mean(1)
    sums_BM = shares_AM.new_zeros(len(asking_BT), documents).index_add(0, sample_A, shares_AM)
    return sums_BM / asking_BT.sum(-1, keepdim=True).clamp(min=1)
