"""``FuseConfig``: the settings of :class:`~hf_fuse.trainer.FuseTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from hf_fuse.errors import RecipeError
from hf_fuse.objectives import Objective, Schedule, read_objectives


@dataclass
class FuseConfig(TrainingArguments):
    """``TrainingArguments`` and the objectives.

    Raises:
        RecipeError: an objective that does not exist or has a wrong option.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "objectives"]

    objectives: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Losses added to the task loss: name -> weight, {start, end, after, until, shape}, or {weight, "
            "options of the loss}; 'task' is the weight of the task loss (1 unless given). A JSON string is read too."
        },
    )
    old_model: str | None = field(
        default=None,
        metadata={"help": "Folder or name of the model to stay compatible with, for losses that ask for it."},
    )
    mixup_alpha: float = field(
        default=0.0,
        metadata={
            "help": "Mix each training sample with another of its micro-batch, by a share from Beta(alpha, alpha). 0: "
            "off. For decoupled_mixup, usually 0.2."
        },
    )
    replay_batch_size: int | None = field(
        default=None,
        metadata={"help": "Samples of replay_dataset per micro-batch. Default: per_device_train_batch_size."},
    )
    attention_entropy_steps: int = field(
        default=0,
        metadata={
            "help": "Log the entropy of each layer's attention on one batch every so many steps, and warn if it "
            "collapses. 0: never."
        },
    )
    router_statistics: bool = field(
        default=True,
        metadata={"help": "Log load, entropy and dropped tokens of each router, and draw a heat map of expert usage."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.read_objectives()
        if self.mixup_alpha < 0:
            raise RecipeError(f"mixup_alpha is {self.mixup_alpha}, expected 0 (off) or more.")
        if self.replay_batch_size is not None and self.replay_batch_size < 1:
            raise RecipeError(f"replay_batch_size is {self.replay_batch_size}, expected 1 or more.")

    def read_objectives(self) -> tuple[Schedule, list[Objective]]:
        """The weight of the task loss, and the objectives."""
        return read_objectives(self.objectives or {})
