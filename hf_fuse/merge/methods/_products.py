"""Inner products between the models' vectors, summed over blocks: what the spherical and geometric methods measure."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fuse.merge.methods._passes import Measurement, Pass


def gram(count: int) -> Measurement:
    """The K x K matrix of inner products of whole tensors, fp64."""
    return (yield Pass(torch.zeros(count, count, dtype=torch.float64), add_products))


def add_products(block_KN: Tensor, total: Tensor, seen: object = None) -> None:
    """Adds the block's inner products to ``total``, ``fp64 [K, K]``."""
    products = _products(block_KN)
    squares = products.diagonal()
    # Squares of tiny or huge numbers leave the range of fp32: no method may depend on the unit of its weights.
    if block_KN.dtype == torch.float32 and not ((squares > 1e-24) & (squares < 1e34)).all():
        products = _products(block_KN.double())
    total += products


def _products(block_KN: Tensor) -> Tensor:
    count = block_KN.shape[0]
    products = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(i, count):
            products[i, j] = products[j, i] = torch.dot(block_KN[i], block_KN[j]).item()
    return products
