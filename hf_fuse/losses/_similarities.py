"""Similarities between the rows of two views."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_fuse.losses._processes import gathered


def unit(rows_ND: Tensor) -> Tensor:
    """Rows of length 1, in fp32: at small temperatures a rounding of half precision moves the loss."""
    return normalize(rows_ND.float(), dim=-1)


def same_group(group_ids_N: Tensor | None, count: int, device: torch.device) -> Tensor:
    """``(N, N)``: which samples are no negatives of each other; all but themselves are if there are no ids."""
    itself_NN = torch.eye(count, dtype=torch.bool, device=device)
    if group_ids_N is None:
        return itself_NN
    ids_N = gathered(group_ids_N)
    return (ids_N[:, None] == ids_N[None, :]) | itself_NN


def cosines(first_ND: Tensor, second_MD: Tensor) -> Tensor:
    """``(N, M)``, of all processes' rows.

    The second view may have more rows than the first: those beyond are further negatives, which belong to no sample.
    """
    second_ND, rest_RD = second_MD[: len(first_ND)], second_MD[len(first_ND) :]
    columns = torch.cat([gathered(unit(second_ND)), gathered(unit(rest_RD))]) if len(rest_RD) else None
    return gathered(unit(first_ND)) @ (gathered(unit(second_ND)) if columns is None else columns).T
