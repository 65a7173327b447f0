"""Parameters of a model that are others for the time of a forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn


@contextlib.contextmanager
def replaced(parameters: list[nn.Parameter], values: list[Tensor]) -> Iterator[None]:
    """The parameters have ``values`` inside. What was computed before can still be differentiated afterwards."""
    own = [parameter.data for parameter in parameters]
    for parameter, value in zip(parameters, values, strict=True):
        # Another tensor and no copy into it: autograd would see its saved tensors changed.
        parameter.data = value.to(parameter)
    try:
        yield
    finally:
        for parameter, value in zip(parameters, own, strict=True):
            parameter.data = value
