"""``FuseConfig``: the settings of :class:`~hf_fuse.trainer.FuseTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

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
    router_statistics: bool = field(
        default=True,
        metadata={"help": "Log load, entropy and dropped tokens of each router, and draw a heat map of expert usage."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.read_objectives()

    def read_objectives(self) -> tuple[Schedule, list[Objective]]:
        """The weight of the task loss, and the objectives."""
        return read_objectives(self.objectives or {})
