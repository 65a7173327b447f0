"""Probe regression: a linear layer on a hidden state is to tell a number that the answer depends on.

For tasks with intermediate results that the model doesn't find by itself, such as the running sums of a long
multiplication, and data that has them in a column ``probe_targets``. The layer is thrown away afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_fuse.errors import FuseError

PAPER = "https://arxiv.org/abs/2510.00184"
MEAN_OVER = "probe_targets"


class probe_regression(nn.Module):
    """Mean squared error of ``W h`` against the targets that aren't NaN, h the hidden state of ``layer``.

    ``probe_targets`` is ``(B, T)`` or ``(B, T, M)``. The paper probes the heads of the second layer; its weight of
    the loss and choice of layer are not verified, and the training code isn't public.

    Args:
        layer: of ``hidden_states``: 0 are the embeddings, -1 is the last.
        outputs: M.
        target_mean: subtracted from the targets, which may reach hundreds.
        target_std: divides them.
    """

    def __init__(self, *, layer: int = -1, outputs: int = 1, target_mean: float = 0.0, target_std: float = 1.0) -> None:
        super().__init__()
        self.layer, self.outputs, self.target_mean, self.target_std = layer, outputs, target_mean, target_std

    def prepare(self, model: nn.Module, train_dataset: object) -> None:
        self.probe = nn.Linear(model.config.get_text_config().hidden_size, self.outputs, bias=False)

    def forward(self, hidden_states: tuple[Tensor, ...], probe_targets: Tensor) -> Tensor:
        predicted_BTM = self.probe(hidden_states[self.layer].float())
        targets_BTM = probe_targets.float()
        if targets_BTM.dim() == 2:
            targets_BTM = targets_BTM.unsqueeze(-1)
        if targets_BTM.shape != predicted_BTM.shape:
            raise FuseError(
                f"probe_targets have shape {list(probe_targets.shape)}, the probe gives {list(predicted_BTM.shape)}. "
                "Pad them like input_ids, with NaN."
            )
        kept_BTM = ~targets_BTM.isnan()
        # where() before the square: NaN times 0 is NaN, in the gradient too.
        wanted_BTM = torch.where(kept_BTM, (targets_BTM - self.target_mean) / self.target_std, 0)
        errors_BTM = torch.where(kept_BTM, predicted_BTM - wanted_BTM, 0).square()
        return errors_BTM.sum() / kept_BTM.sum().clamp(min=1)


def running_sums(first: list[int], second: list[int]) -> list[int]:
    """``c_t = sum of a_i b_(t - i) + floor(c_(t - 1) / 10)`` of two numbers given as digits, the lowest first.

    ``c_t mod 10`` is the product's digit t.
    """
    sums, carry = [], 0
    for place in range(len(first) + len(second)):
        products = sum(digit * second[place - i] for i, digit in enumerate(first) if 0 <= place - i < len(second))
        sums.append(products + carry)
        carry = sums[-1] // 10
    return sums
