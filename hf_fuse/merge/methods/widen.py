"""WIDEN: weigh columns by how much their length and direction changed, ranked among the columns of the same model."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import torch
from torch import Tensor

from hf_fuse.merge.methods._passes import Measurement, Pass, Place, Seen
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2408.03092"
SCALARS = "mean"
UNIT = "rows"
MEASURE_SCOPE = "tensor"

_TOKENS = re.compile(r"embed(?!_out)|wte|wpe|(^|\.)shared\.")  # matrices of one vector per token, position or type


def measure(
    count: int, numel: int, dtype: torch.dtype, *, axis: str, threshold: float, significant: float, place: Place
) -> Measurement:
    """State: a coefficient per model and column (or row), ``fp64 [K, C]``; None for vectors."""
    if len(place.shape) < 2 or numel == 0:
        return None
    by_row = _by_row(axis, place)
    vectors = place.shape[0] if by_row else numel // place.shape[0]

    def add(block_KRC: Tensor, total: Tensor, seen: Seen) -> None:
        first = seen.place.start // block_KRC.shape[-1]
        part = total[:, first : first + block_KRC.shape[1]] if by_row else total
        dim = -1 if by_row else 0
        sums = _inner_products(seen.base, block_KRC, dim)
        if block_KRC.dtype == torch.float32 and not _in_range(sums):
            sums = _inner_products(seen.base.double(), block_KRC.double(), dim)
        part += sums.cpu()

    sums = yield Pass(torch.zeros(2 * count + 1, vectors, dtype=torch.float64), add)
    base_C, along_KC, changed_KC = sums[0], sums[1 : count + 1], sums[count + 1 :]
    changes = _length_change(base_C, along_KC, changed_KC), _turn(base_C, along_KC, changed_KC, dtype)
    of_length, of_direction = (_scores(_ranks(change_KC), threshold, significant) for change_KC in changes)
    return (of_length + of_direction) / 2


def widen(
    deltas_KN: Tensor,
    *,
    threshold: float = 1.0,
    significant: Annotated[float, Between(0)] = 1.0,
    axis: Literal["auto", "columns", "rows"] = "auto",
    state: Tensor | None,
    place: Place,
) -> Tensor:
    """``theta_0 + sum_k c_k tau_k`` with a coefficient per model and column.

    Each model's columns are ranked by the change of their length and of their direction. A score is the softmax over
    models of these ranks, or ``significant`` where a rank exceeds ``threshold`` times the mean rank; c_k is the mean of
    both scores. Vectors use |tau| in place of ranks, element by element, and have one score.

    Args:
        deltas_KN: task vectors, ``[K, R, C]``.
        threshold: t of the paper; below 0 every element counts as significant (task arithmetic).
        significant: s of the paper, the score of what is significant.
        axis: the vectors of a matrix ``[out, in]``. ``auto``: the columns, but the rows of embeddings (by name), one
            per token. Tensors of more axes are ``[out, rest]``.
        state: coefficients of a matrix.
        place: the block's tensor and rows.

    Coefficients do not sum to 1 over models: merging a model with itself does not return it. A vector of the base that
    is zero has no direction; to leave zero is the largest turn of all.
    """
    count = deltas_KN.shape[0]
    if state is None:
        magnitude_KN = deltas_KN.abs()
        factors_KN = _scores(magnitude_KN, threshold, significant)
    elif _by_row(axis, place):
        first = place.start // deltas_KN.shape[-1]
        factors_KN = state[:, first : first + deltas_KN.shape[1], None].to(deltas_KN)
    else:
        factors_KN = state[:, None, :].to(deltas_KN)
    merged = deltas_KN[0] * factors_KN[0]
    for k in range(1, count):
        merged.add_(deltas_KN[k] * factors_KN[k])
    return merged


def _by_row(axis: str, place: Place) -> bool:
    if axis != "auto":
        return axis == "rows"
    return len(place.shape) == 2 and _TOKENS.search(place.tensor) is not None


def _inner_products(base_RC: Tensor, deltas_KRC: Tensor, dim: int) -> Tensor:
    """Of the base's vectors with themselves, with their changes, and of the changes with themselves. ``[2K+1, C]``"""
    along = [(base_RC * delta_RC).sum(dim) for delta_RC in deltas_KRC]
    return torch.stack([base_RC.square().sum(dim), *along, *(delta_RC.square().sum(dim) for delta_RC in deltas_KRC)])


def _in_range(sums: Tensor) -> bool:
    """Squares of tiny or huge numbers leave the range of fp32."""
    largest = sums.abs().amax(1)
    largest = largest[largest > 0]
    return len(largest) == len(sums) and float(largest.min()) > 1e-24 and float(largest.max()) < 1e34


def _length_change(base_C: Tensor, along_KC: Tensor, changed_KC: Tensor) -> Tensor:
    """``| |theta_k| - |theta_0| |``, without subtracting numbers that are nearly equal."""
    difference_KC = 2 * along_KC + changed_KC
    lengths_KC = (base_C + difference_KC).clamp_min(0).sqrt() + base_C.sqrt()
    return torch.where(lengths_KC > 0, difference_KC.abs() / lengths_KC, 0.0)


def _turn(base_C: Tensor, along_KC: Tensor, changed_KC: Tensor, dtype: torch.dtype) -> Tensor:
    """``1 - cos(theta_k, theta_0)``, by the sine where they are close. A change along the base is no turn, though the
    products of numbers in ``dtype`` may say so by a few last bits."""
    square_KC = (base_C + 2 * along_KC + changed_KC).clamp_min(0)
    scale_KC = base_C * square_KC
    cosine_KC = (base_C + along_KC) / scale_KC.sqrt()
    across_KC = base_C * changed_KC - along_KC.square()
    noise_KC = base_C * changed_KC * (8 * torch.finfo(dtype).eps)
    sine_squared_KC = torch.where(across_KC > noise_KC, across_KC, 0.0) / scale_KC
    turn_KC = torch.where(cosine_KC > 0, sine_squared_KC / (1 + cosine_KC), 1 - cosine_KC)
    turn_KC = torch.where(scale_KC > 0, turn_KC, torch.inf)
    return torch.where(changed_KC > 0, turn_KC, 0.0)


def _ranks(change_KC: Tensor) -> Tensor:
    """Share of a model's vectors that changed less; equal ones in their order."""
    order_KC = change_KC.argsort(dim=-1, stable=True)
    ramp_C = torch.arange(change_KC.shape[-1], dtype=change_KC.dtype) / change_KC.shape[-1]
    return torch.empty_like(change_KC).scatter_(-1, order_KC, ramp_C.expand_as(change_KC))


def _scores(values: Tensor, threshold: float, significant: float) -> Tensor:
    """Softmax over models, or ``significant`` where a value exceeds ``threshold`` times its model's mean."""
    mean = values.mean(-1, keepdim=True)
    return torch.where(values > threshold * mean, significant, values.softmax(0))
