"""Forward passes from other points than a batch's own: pixels, sound, or word embeddings that were moved or mixed.

B samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Inputs that are points themselves; of all others the word embeddings are.
CONTINUOUS = ("pixel_values", "input_features", "input_values", "inputs_embeds")
PARTNERS, SHARES = "partners", "shares"

Move = Callable[[Tensor], Tensor]


@contextlib.contextmanager
def moved(model: nn.Module, inputs: dict[str, Any], move: Move) -> Iterator[dict[str, Any]]:
    """The inputs for a forward pass inside, which starts from ``move`` of the batch's points.

    Token ids stay what they are: models look for padding in them.

    Args:
        model: the transformers model inside of wrappers.
        inputs: of the forward pass.
        move: a point (any shape that begins with B) to another of the same shape.
    """
    name = next((name for name in CONTINUOUS if inputs.get(name) is not None), None)
    if name is not None:
        yield inputs | {name: move(inputs[name])}
        return
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, points: move(points))
    try:
        yield inputs
    finally:
        hook.remove()


def mixture(partners_B: Tensor, shares_B: Tensor) -> Move:
    """``share * x + (1 - share) * x of the partner``, sample by sample."""

    def move(points_B: Tensor) -> Tensor:
        shares = shares_B.to(points_B).view(-1, *[1] * (points_B.dim() - 1))
        return shares * points_B + (1 - shares) * points_B[partners_B]

    return move


def with_united_masks(inputs: dict[str, Any], partners_B: Tensor) -> dict[str, Any]:
    """The inputs, with a mask that shows what either of two mixed samples has."""
    mask = inputs.get("attention_mask")
    return inputs if mask is None else inputs | {"attention_mask": mask | mask[partners_B]}


def drawing_partners(collate: Callable[[list], Any], alpha: float) -> Callable[[list], Any]:
    """``collate``, and a partner in the batch for each sample with the share that it keeps, from Beta(alpha, alpha).

    Adds the columns ``partners`` ``(B,)``, indices, and ``shares`` ``(B,)``.
    """
    beta = torch.distributions.Beta(alpha, alpha)

    def collate_and_draw(rows: list) -> Any:
        batch = collate(rows)
        batch[PARTNERS] = torch.randperm(len(rows))
        batch[SHARES] = beta.sample((len(rows),))
        return batch

    return collate_and_draw
