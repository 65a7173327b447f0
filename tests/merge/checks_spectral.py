"""What the tests of the spectral methods share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_fuse import merge_state_dicts


def merged(method: str, *deltas, weights=None, **parameters) -> Tensor:
    """The method on task vectors of a zero base."""
    deltas = [torch.as_tensor(d) for d in deltas]
    deltas = [d if d.is_floating_point() else d.float() for d in deltas]
    options = {"dtype": "float64"} if deltas[0].dtype == torch.float64 else {}
    base = {"w": torch.zeros_like(deltas[0])}
    models = [{"w": d} for d in deltas]
    return merge_state_dicts(models, method, base=base, weights=weights, parameters=parameters, **options)["w"]


def low_rank(rows: int, columns: int, rank: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)


def polar(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def nearly_shared(count: int, rows: int, columns: int) -> list[Tensor]:
    """Task vectors of full rank whose strongest directions differ by about 1e-4 between tasks, fp64."""
    generator = torch.Generator().manual_seed(11)
    deltas = torch.randn(count, rows, columns, generator=generator, dtype=torch.float64)
    deltas[:, 0] *= 0.03
    deltas[:, :, 0] *= 0.03
    deltas[:, 0, 0] = 300.0
    return list(deltas)


def rotated(method: Callable[..., Tensor], *deltas: Tensor) -> None:
    """f(Q tau R) = Q f(tau) R for orthogonal Q and R."""
    rows, columns = deltas[0].shape
    generator = torch.Generator().manual_seed(7)
    left = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))[0]
    turned = method(*(left @ delta @ right for delta in deltas))
    torch.testing.assert_close(turned, left @ method(*deltas) @ right, rtol=0, atol=1e-9)
