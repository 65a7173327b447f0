"""Averages of what was measured in a logging window or an evaluation, the same on every process."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor


class Averages:
    """Weighted means of named scalars. They stay on the device until :meth:`take` reads them all at once."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor, weight: Tensor | float) -> None:
        """Counts ``value`` (a scalar) ``weight`` times. Every process must add the same names."""
        value = value.detach().float()
        weight = torch.as_tensor(weight, dtype=torch.float32, device=value.device)
        # where() and not a product: the mean over nothing is NaN and counts 0 times.
        pair = torch.stack([torch.where(weight > 0, value * weight, 0.0), weight])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def clear(self) -> None:
        self._sums.clear()

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all processes, in the order of their first :meth:`add`; empties the sums.

        A collective operation: all processes must call it.
        """
        if not self._sums:
            return {}
        names = list(self._sums)
        sums_N2 = accelerator.reduce(torch.stack(list(self._sums.values())), "sum")
        self.clear()
        return {name: total / weight for name, (total, weight) in zip(names, sums_N2.tolist()) if weight > 0}
