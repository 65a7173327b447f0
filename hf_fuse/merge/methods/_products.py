"""Inner products between the models' vectors, summed over blocks: what the spherical and geometric methods measure."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from hf_fuse.merge.methods._passes import Measurement, Pass


def gram(count: int) -> Measurement:
    """The K x K matrix of inner products of whole tensors, fp64."""
    return (yield Pass(torch.zeros(count, count, dtype=torch.float64), add_products))


def energies(rows: Iterable[Tensor]) -> Tensor:
    """Sum of squares of each row, ``fp64 [K]``."""
    return torch.tensor([_energy(row.reshape(-1)) for row in rows], dtype=torch.float64)


def _energy(row_N: Tensor) -> float:
    square = row_N.square().sum().item()  # in an order that does not depend on memory addresses, as dot's does
    if _in_range(square) or row_N.dtype != torch.float32:
        return square
    scale = _unit_scale(row_N)
    row_N = row_N * scale if abs(math.log2(scale)) < 126 else row_N.double() * scale
    return row_N.square().sum().item() / scale / scale


def _unit_scale(row_N: Tensor) -> float:
    """A power of two that brings the largest number near 1: the result is that of any other unit, bit for bit."""
    peak = float(row_N.abs().max()) if row_N.numel() else 0.0
    return 2.0 ** -math.frexp(peak)[1] if 0 < peak < math.inf else 1.0


def add_energies(block_KN: Tensor, total: Tensor, seen: object = None) -> None:
    """Adds the sums of squares of the block's rows to ``total``, ``fp64 [K]``."""
    total += energies(block_KN)


def _in_range(square: float) -> bool:
    """Squares of tiny or huge numbers leave the range of fp32: no method may depend on the unit of its weights."""
    return 1e-24 < square < 1e34


def add_products(block_KN: Tensor, total: Tensor, seen: object = None) -> None:
    """Adds the block's inner products to ``total``, ``fp64 [K, K]``."""
    products = _products(block_KN)
    if block_KN.dtype == torch.float32 and not all(_in_range(square) for square in products.diagonal().tolist()):
        scales = torch.tensor([_unit_scale(row_N) for row_N in block_KN], dtype=torch.float64)
        unit_KN = (block_KN.double() * scales[:, None].to(block_KN.device)).float()
        products = _products(unit_KN) / scales[:, None] / scales[None, :]
    total += products


def _products(block_KN: Tensor) -> Tensor:
    # One call instead of K^2 dots: threads that come back to the interpreter less often wait for it less.
    return (block_KN @ block_KN.T).to("cpu", torch.float64)
