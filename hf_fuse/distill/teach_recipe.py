"""A recipe for ``hf-fuse teach``: which teacher says what about which data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from hf_fuse.errors import RecipeError
from hf_fuse.recipe import Reference, explain, read_mapping
from hf_fuse.training_recipe import DataEntry


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


class GenerationEntry(_Strict):
    """How the teacher writes its answers. Greedy unless ``sample``; ``samples`` of each prompt need that."""

    max_new_tokens: int = Field(default=256, ge=1)
    sample: bool = False
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    samples: int = Field(default=1, ge=1)
    keep_unfinished: bool = False  # answers that max_new_tokens cut off, too

    @model_validator(mode="after")
    def _sampling(self) -> GenerationEntry:
        said = self.model_fields_set & {"temperature", "top_p", "samples"}
        if said and not self.sample:
            raise ValueError(f"{sorted(said)[0]} is for sampling. Set sample: true")
        return self


class TeachRecipe(_Strict):
    """What a teacher is asked once. ``data`` is the section of a training recipe, so that both read the same rows."""

    kind: Literal["predictions", "sequences"] = "predictions"
    teacher: Reference
    data: Annotated[DataEntry, BeforeValidator(lambda v: {"train": v} if isinstance(v, (str, list)) else v)]
    k: int = Field(default=64, ge=1)  # tokens kept of each prediction
    temperature: float = Field(default=1.0, gt=0)  # of the predictions; the student's loss must have the same
    generation: GenerationEntry = Field(default_factory=GenerationEntry)
    batch_size: int = Field(default=8, ge=1)
    device: str = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the teacher
    seed: int = Field(default=0, ge=0)
    output: str | None = None
    # Written into fuse_recipe.yaml for the record; ignored when the recipe is run again.
    provenance: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _of_its_kind(self) -> TeachRecipe:
        foreign = {"predictions": {"generation", "seed"}, "sequences": {"k", "temperature"}}[self.kind]
        if wrong := sorted(self.model_fields_set & foreign):
            advice = "belongs into generation" if wrong[0] == "temperature" else f"is not for kind: {self.kind}"
            raise ValueError(f"{wrong[0]} {advice}")
        if self.kind == "sequences" and self.data.eval:
            raise ValueError("data.eval is not for kind: sequences, which makes rows to train on")
        return self


def load_teach_recipe(source: str | Path | dict | TeachRecipe, overrides: dict[str, Any] | None = None) -> TeachRecipe:
    """Reads a recipe from a YAML file, a dictionary or a TeachRecipe; ``overrides`` are dotted keys and win.

    Raises:
        RecipeError: no such file, not YAML, unknown key (with the nearest name), wrong values.
    """
    data, name = read_mapping(source, overrides, "'teacher' and 'data'")
    if "model" in data:
        raise RecipeError(f"{name}: has a model to train. Run it with hf-fuse train; teaching has a teacher.")
    try:
        return TeachRecipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{name}: {explain(error, TeachRecipe)}") from None
