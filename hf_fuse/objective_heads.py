"""Heads that objectives train beside the model: in the optimizer and in checkpoints, and no part of the saved model."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from hf_fuse.errors import FuseError
from hf_fuse.objectives import Objective


def prepare(
    objectives: list[Objective], model: nn.Module, train_dataset: Any, *, seed: int, device: torch.device
) -> None:
    """Lets losses make what depends on the model and the data: heads, and tables of a row per sample.

    The same on every process: they start from ``seed``, and random numbers elsewhere stay what they were.
    """
    for loss in (objective.loss for objective in objectives if isinstance(objective.loss, nn.Module)):
        if hasattr(loss, "prepare"):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                loss.prepare(model, train_dataset)
        loss.to(device)


def trained_parameters(objectives: list[Objective], accelerator: Accelerator) -> list[nn.Parameter]:
    """Those of the losses' own layers.

    Raises:
        FuseError: the parameters of the model are split over processes in a way that knows no others.
    """
    found = [parameter for objective in objectives for parameter in objective.loss.parameters()]
    sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if found and accelerator.distributed_type in sharded:
        names = [objective.name for objective in objectives if any(True for _ in objective.loss.parameters())]
        raise FuseError(
            f"objectives: {', '.join(names)}: trains layers of its own, which {accelerator.distributed_type.value} "
            "doesn't know. Use plain data parallelism: accelerate launch --multi_gpu."
        )
    return found


def average_gradients(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    """What DDP does for the parameters of the model."""
    if accelerator.num_processes == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = accelerator.reduce(parameter.grad, "mean")
