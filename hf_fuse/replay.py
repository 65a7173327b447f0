"""A second data set beside the one that is trained on: batches of it that a loss may ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hf_fuse.errors import FuseError

REPLAY = "replay"


class ReplayStream:
    """Micro-batches of a data set, cycled, each cycle in another order.

    What comes at an optimizer step follows from its number alone: resumed runs go on with the same samples, and those
    of a whole batch don't depend on how it is split.

    Args:
        dataset: of known length.
        collate: rows to a batch with labels.
        batch_size: samples of a micro-batch.
        accumulation: micro-batches of an optimizer step on each process.
        seed: of the orders.
        process: which one this is.
        processes: how many there are.

    Raises:
        FuseError: the data set is empty, or a stream.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list], dict[str, Any]],
        *,
        batch_size: int,
        accumulation: int,
        seed: int = 0,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        if not hasattr(dataset, "__len__") or not len(dataset):
            raise FuseError("replay_dataset: is empty or a stream. Give one of known length, that can be cycled.")
        self._dataset, self._collate, self._batch_size, self._seed = dataset, collate, batch_size, seed
        self._process, self._processes, self._accumulation = process, processes, accumulation
        self._order: tuple[int, list[int]] = (-1, [])

    def of(self, dataset: Any) -> ReplayStream:
        """The same for another data set."""
        return ReplayStream(
            dataset, self._collate, batch_size=self._batch_size, accumulation=self._accumulation, seed=self._seed,
            process=self._process, processes=self._processes,
        )  # fmt: skip

    def micro_batches(self, step: int, count: int) -> list[dict[str, Any]]:
        """The first ``count`` of this process at the optimizer step number ``step``."""
        whole = self._accumulation * self._processes
        places = [step * whole + index * self._processes + self._process for index in range(count)]
        return [self._collate([self._sample(place * self._batch_size + row) for row in range(self._batch_size)])
                for place in places]  # fmt: skip

    def _sample(self, place: int) -> Any:
        cycle, index = divmod(place, len(self._dataset))
        if cycle != self._order[0]:
            random = torch.Generator().manual_seed(self._seed + cycle)
            self._order = cycle, torch.randperm(len(self._dataset), generator=random).tolist()
        return self._dataset[self._order[1][index]]
