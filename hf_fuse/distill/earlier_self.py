"""A student as it was before: a teacher that costs no second model where only adapters train."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import TrainerCallback

from hf_fuse.errors import FuseError


class EarlierSelf(nn.Module):
    """A copy, or a moving average, of all that changes while a model trains, in fp32.

    Args:
        model: its trainable parameters and floating-point buffers are copied.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = []
        for number, (name, value) in enumerate(_changing(model)):
            self._names.append(name)
            self.register_buffer(f"value_{number}", value.detach().float().clone())
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float) -> None:
        """Moves to ``decay * old + (1 - decay) * model``; with 0 it is a copy of now."""
        for kept, (_, value) in zip(self._values(), _changing(model), strict=True):
            kept.lerp_(value.detach().float(), 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """The model's output with the earlier values, in evaluation mode."""
        now = dict(_changing(model))
        values = {name: kept.to(now[name].dtype) for name, kept in zip(self._names, self._values())}
        with evaluating(model):
            return functional_call(model, values, kwargs=inputs)

    def _values(self) -> list[Tensor]:
        return [getattr(self, f"value_{number}") for number in range(len(self._names))]


class Following(TrainerCallback):
    """Moves earlier selves after each optimizer step, or at the end of each epoch.

    Args:
        pairs: what is moved, and the model that it follows.
        decay: of an average over steps; None: a copy at the end of each epoch.
    """

    def __init__(self, pairs: list[tuple[EarlierSelf, nn.Module]], decay: float | None = None) -> None:
        self._pairs, self._decay = pairs, decay

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self._decay is not None:
            self._move(self._decay)

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        if self._decay is None:
            self._move(0.0)

    def _move(self, decay: float) -> None:
        for earlier, model in self._pairs:
            earlier.update(model, decay)


def _changing(model: nn.Module) -> list[tuple[str, Tensor]]:
    buffers = [(name, value) for name, value in model.named_buffers() if value.is_floating_point()]
    return [(name, value) for name, value in model.named_parameters() if value.requires_grad] + buffers


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards for each module what it was before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_whole(trainer: Any, where: str) -> None:
    """Refuses parameters that are split over processes.

    Raises:
        FuseError: FSDP or DeepSpeed is on.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise FuseError(
            f"{where}: needs the student's parameters whole on each process; FSDP and DeepSpeed split them."
        )


def check_start(trainer: Any, where: str, epoch: int) -> None:
    """Refuses a first epoch that the training doesn't reach.

    Raises:
        FuseError: it has too few.
    """
    epochs = trainer.args.num_train_epochs
    if trainer.args.max_steps <= 0 and epochs <= epoch:
        raise FuseError(f"{where}: counts from epoch {epoch} on, but there are {epochs:g}. Lower start_epoch (or gap).")
