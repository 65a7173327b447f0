"""Least squares for linear layers: weights that make of merged inputs what the two models made of their own.

Shapes: N tokens, I inputs (and a one where the layer has a bias), O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hf_fuse.merge.align.live import MEMORY, LivePair, forward, tokens
from hf_fuse.merge.align.partial_merge import Splits, side_by_side
from hf_fuse.merge.align.spaces import Axes, Part


@dataclass(frozen=True)
class Linear:
    """A layer to solve for: stored name of its weight, its axes, and which of the two is that of the inputs."""

    name: str
    axes: Axes
    input_axis: int
    bias: str | None

    @property
    def inputs(self) -> tuple[Part, ...]:
        """Inputs as units that are seen, not read: nothing is halved."""
        return tuple(replace(part, reads=False) for part in self.axes[self.input_axis])

    @property
    def outputs(self) -> tuple[Part, ...]:
        return self.axes[1 - self.input_axis]


@dataclass
class Sums:
    """Products over all tokens, fp64."""

    gram_II: Tensor
    cross_IO: Tensor
    square: float = 0.0

    def add(self, inputs_NI: Tensor, outputs_NO: Tensor) -> None:
        inputs_NI, outputs_NO = inputs_NI.double(), outputs_NO.double()
        self.gram_II += (inputs_NI.T @ inputs_NI).cpu()
        self.cross_IO += (inputs_NI.T @ outputs_NO).cpu()
        self.square += outputs_NO.square().sum().item()

    def error(self, weight_IO: Tensor) -> float:
        """Squared error over all tokens, relative to the squared outputs."""
        left = (weight_IO * (self.gram_II @ weight_IO)).sum() - 2 * (weight_IO * self.cross_IO).sum()
        return max(left.item() + self.square, 0.0) / self.square if self.square else 0.0


def solve(gram_II: Tensor, cross_IO: Tensor, prior_IO: Tensor, ridge: float) -> Tensor:
    """Weights ``[I, O]`` with the least squared error plus ``ridge`` times the mean square of an input for each squared
    difference from the prior; fp64. With ``ridge`` 0 the solution of least length of what differs from the prior."""
    rest_IO = cross_IO - gram_II @ prior_IO
    if ridge == 0:
        return prior_IO + torch.linalg.pinv(gram_II, hermitian=True) @ rest_IO
    strength = ridge * gram_II.diagonal().mean().clamp_min(1e-30)
    return prior_IO + torch.linalg.solve(gram_II + strength * torch.eye(len(gram_II)).double(), rest_IO)


def linears(live: LivePair) -> list[Linear]:
    """All linear layers but those whose weight is an embedding as well."""
    from transformers.pytorch_utils import Conv1D

    found = []
    for name, module in live.stored[1].items():
        axes = live.spaces[1].axes.get(name, ())
        reading = [axis for axis, parts in enumerate(axes) if any(part.reads for part in parts)]
        if name.endswith(".weight") and isinstance(module, (nn.Linear, Conv1D)) and len(axes) == 2 and reading:
            bias = name.removesuffix("weight") + "bias"
            found.append(Linear(name, axes, reading[0], bias if bias in live.spaces[1].axes else None))
    return found


@torch.no_grad()
def solved(
    live: LivePair, layers: Sequence[Linear], splits: Splits, prior: Callable[[str], Tensor], ridge: float
) -> Iterator[tuple[Linear, Tensor, Tensor | None, float, float]]:
    """Weight and bias of every layer, and its error with the prior and with them; in as many passes over the data as
    memory asks for."""
    for some in _passes(layers, prior):
        priors = {layer.name: _prior(layer, prior) for layer in some}
        sums = {
            name: Sums(torch.zeros(len(one), len(one)).double(), torch.zeros(one.shape).double())
            for name, one in priors.items()
        }
        for batch in live.batches("least squares"):
            seen = [_seen(live, side, some, batch) for side in (0, 1)]
            mask_BT = batch.get("attention_mask")
            for layer in some:
                (read_b, made_b), (read_a, made_a) = (side[layer.name] for side in seen)
                inputs = side_by_side(read_a, read_b, -1, layer.inputs, splits)
                outputs = side_by_side(made_a, made_b, -1, layer.outputs, splits)
                inputs_NI, outputs_NO = tokens(inputs, mask_BT), tokens(outputs, mask_BT)
                if layer.bias:
                    inputs_NI = torch.cat([inputs_NI, inputs_NI.new_ones(len(inputs_NI), 1)], 1)
                sums[layer.name].add(inputs_NI, outputs_NO)
        for layer in some:
            one, start_IO = sums[layer.name], priors[layer.name]
            weight_IO = solve(one.gram_II, one.cross_IO, start_IO, ridge)
            errors = one.error(start_IO), one.error(weight_IO)
            bias = weight_IO[-1].float() if layer.bias else None
            weight_IO = (weight_IO[:-1] if layer.bias else weight_IO).float()
            yield layer, weight_IO if layer.input_axis == 0 else weight_IO.T, bias, *errors


def _prior(layer: Linear, prior: Callable[[str], Tensor]) -> Tensor:
    weight = prior(layer.name).double()
    weight_IO = weight if layer.input_axis == 0 else weight.T
    return torch.cat([weight_IO, prior(layer.bias).double()[None]]) if layer.bias else weight_IO


def _passes(layers: Sequence[Linear], prior: Callable[[str], Tensor]) -> Iterator[list[Linear]]:
    some: list[Linear] = []
    used = 0
    for layer in layers:
        inputs, outputs = prior(layer.name).movedim(layer.input_axis, 0).shape
        size = 8 * (inputs + 1) * (inputs + 1 + 2 * outputs)
        if some and used + size > MEMORY:
            yield some
            some, used = [], 0
        some.append(layer)
        used += size
    yield some


def _seen(
    live: LivePair, side: int, layers: Sequence[Linear], batch: dict[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """What each layer of one model reads and makes."""
    caught: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable:
        def look(_: nn.Module, args: tuple, output: Tensor) -> None:
            caught[name] = (args[0].float(), output.float())

        return look

    handles = [live.stored[side][layer.name].register_forward_hook(watch(layer.name)) for layer in layers]
    try:
        forward(live.models[side], batch)
    finally:
        for handle in handles:
            handle.remove()
    return caught
