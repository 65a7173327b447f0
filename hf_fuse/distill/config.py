"""``DistillConfig``: the settings of :class:`~hf_fuse.distill.trainer.DistillTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hf_fuse import registry
from hf_fuse.errors import RecipeError
from hf_fuse.objectives import Objective, Schedule, read_objectives
from hf_fuse.trainer_config import FuseConfig


@dataclass
class DistillConfig(FuseConfig):
    """``FuseConfig`` whose objectives may be distillation methods (:mod:`hf_fuse.distill.methods`,
    :mod:`hf_fuse.distill.attached`) as well.

    Raises:
        RecipeError: an objective that does not exist, one that has a wrong option or can't be computed in chunks, or no
            distillation method at all.
    """

    _VALID_DICT_FIELDS = [*FuseConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

    objectives: dict[str, Any] | str | None = field(
        default_factory=lambda: {"forward_kl": 1.0},
        metadata={
            "help": "As in FuseConfig, with distillation methods: {'task': 0.5, 'forward_kl': {'weight': 0.5, "
            "'temperature': 2}}."
        },
    )
    teacher_weights: list[float] | None = field(
        default=None, metadata={"help": "How much each of several teachers counts. Default: equally, 1 in all."}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of from_pretrained for teachers given by name. A JSON string too."}
    )
    chunk_size: int = field(
        default=0,
        metadata={
            "help": "Predictions whose logits exist at a time; 0: all. Causal language models with big vocabularies: "
            "256 needs a fraction of the memory, and runs the output layers a second time."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        attached = registry.names("attached")
        if not any(is_distillation(o) or o.name in attached for o in self.read_objectives()[1]):
            raise RecipeError("objectives: none of them is a distillation method. Add {'forward_kl': 1.0}.")
        if self.chunk_size < 0:
            raise RecipeError(f"chunk_size is {self.chunk_size}, expected a number of predictions, or 0 for all.")
        for objective in self.read_objectives()[1] if self.chunk_size else ():
            needs = set(objective.needs.values())
            if "sequences" in needs:
                raise RecipeError(f"objectives.{objective.name}: compares whole sequences. Set chunk_size to 0.")
            if needs & {"logits", "second_logits", "teacher_logits"}:
                raise RecipeError(
                    f"objectives.{objective.name}: needs all logits, which chunks never make. Set chunk_size to 0."
                )

    def read_objectives(self) -> tuple[Schedule, list[Objective]]:
        return read_objectives(self.objectives or {}, kinds=("losses", "distill", "attached"))


def is_distillation(objective: Objective) -> bool:
    """Whether it is computed where the teacher's logits are, chunk by chunk if need be."""
    return not {"teacher", "sources"}.isdisjoint(objective.needs.values())
