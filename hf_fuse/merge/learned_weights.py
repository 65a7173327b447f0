"""Weights that come from a file of learned coefficients: a number per tensor, or one per chunk of a tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_fuse.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor


def chunk_numbers(name: str, numel: int, count: int, cut: str, seed: int, start: int, stop: int) -> Tensor:
    """For elements ``[start, stop)`` of a flattened tensor the chunk that each is in, ``int64 [stop - start]``.

    Args:
        cut: ``slices`` are contiguous, equal up to one element, the longer ones first (``torch.tensor_split``);
            ``scattered`` draws the chunk of each element, the same for any ``start``.
        seed: of the draw; the tensor's name counts too.
    """
    import torch

    from hf_fuse.merge.methods._random import STEPS, TensorRandom

    if cut == "scattered":
        bits = torch.from_numpy(TensorRandom(seed, name, start).bits(0, stop - start).astype("int64"))
        return bits * count // STEPS
    short, longer = divmod(numel, count)
    places = torch.arange(start, stop)
    edge = longer * (short + 1)
    return torch.where(places < edge, places // (short + 1), longer + (places - edge) // max(short, 1))


@dataclass(frozen=True)
class Chunked:
    """The coefficients of one tensor's chunks."""

    values: tuple[float, ...]
    cut: str
    seed: int

    def at(self, name: str, numel: int, start: int, stop: int, like: Tensor) -> Tensor:
        """The coefficient of each of the elements ``[start, stop)``."""
        numbers = chunk_numbers(name, numel, len(self.values), self.cut, self.seed, start, stop)
        return like.new_tensor(self.values)[numbers.to(like.device)]


@dataclass(frozen=True)
class LearnedWeight:
    """One model's weight for every tensor, as a recipe's value."""

    ref: str  # the file, for messages
    coefficients: Mapping[str, Sequence[float]]  # by tensor, one number per chunk
    heads: Sequence[str]  # tensors that were not merged while they were learned
    cut: str
    seed: int

    def of(self, name: str) -> float | Chunked:
        """The weight of one tensor.

        Raises:
            RecipeError: the file has none for it.
        """
        if name in self.coefficients:
            values = self.coefficients[name]
            return values[0] if len(values) == 1 else Chunked(tuple(values), self.cut, self.seed)
        if name in self.heads:
            raise RecipeError(
                f"weight: {self.ref} has no coefficient for {name}, because every model kept its own head. Say whose "
                "head the result has with heads: MODEL in the recipe."
            )
        raise RecipeError(f"weight: {self.ref} has no coefficient for tensor {name}. Learn it for these models.")


def expanded(weights: Iterable[Any], name: str, numel: int, start: int, stop: int, like: Tensor) -> list[Any]:
    """Weights as methods take them: numbers, and for chunked ones the number of each of the elements of a block."""
    return [one.at(name, numel, start, stop, like) if isinstance(one, Chunked) else one for one in weights]
