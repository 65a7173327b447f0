"""What a loss remembers of each training sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_fuse.errors import FuseError
from hf_fuse.losses._processes import gathered


class SampleTable(nn.Module):
    """A row of numbers per training sample: saved in checkpoints, and the same on all processes.

    Args:
        samples: how many there are; ids are from 0 to ``samples - 1``.
        shape: of a row.
        dtype: of the numbers.
    """

    values: Tensor
    written: Tensor

    def __init__(self, samples: int, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(samples, *shape, dtype=dtype))
        self.register_buffer("written", torch.zeros(samples, dtype=torch.bool))

    @classmethod
    def of(cls, dataset: Any, *shape: int, dtype: torch.dtype = torch.float32) -> SampleTable:
        """A table with a row for each sample of a training set.

        Raises:
            FuseError: it is a stream.
        """
        if not hasattr(dataset, "__len__"):
            raise FuseError("sample_ids: the training set is a stream, whose number of samples isn't known.")
        return cls(len(dataset), *shape, dtype=dtype)

    def read(self, sample_ids_B: Tensor) -> tuple[Tensor, Tensor]:
        """The rows ``(B, *shape)``, and which of them ``(B,)`` have ever been written; the others are 0."""
        self._check(sample_ids_B)
        return self.values[sample_ids_B], self.written[sample_ids_B]

    def write(self, sample_ids_B: Tensor, rows_B: Tensor) -> None:
        """Replaces rows by those of this batch on all processes. All must call it, with equally many rows."""
        self._check(sample_ids_B)
        ids = gathered(sample_ids_B)
        self.values[ids] = gathered(rows_B.detach().to(self.values.dtype))
        self.written[ids] = True

    def _check(self, sample_ids_B: Tensor) -> None:
        if sample_ids_B.numel() and not 0 <= sample_ids_B.min() <= sample_ids_B.max() < len(self.values):
            raise FuseError(
                f"sample_ids are from {sample_ids_B.min()} to {sample_ids_B.max()}, but the training set has "
                f"{len(self.values)} samples. Number them from 0."
            )
