"""A recipe for learning: which numbers, of which model, from which data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hf_fuse import registry
from hf_fuse.errors import RecipeError
from hf_fuse.recipe import Reference, explain, read_mapping
from hf_fuse.training_recipe import DataEntry, Format, Sources


class LearnRecipe(BaseModel):
    """A whole estimation. ``data`` are datasets as for training: files, folders or Hub ids, with their ``columns``."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    estimator: str
    model: Reference
    parameters: dict[str, Any] = Field(default_factory=dict)
    data: Sources
    examples: int = Field(default=256, ge=1)  # drawn from all of the data
    format: Format | None = None  # none: told from the columns
    max_length: int | None = Field(default=None, ge=2)  # in tokens; none: 1024, or the model's context if shorter
    batch_size: int = Field(default=8, ge=1)  # of estimators that need no gradient of each example
    device: str = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the model; sums are float32
    seed: int = Field(default=0, ge=0)
    output: str | None = None
    # Written into fuse_recipe.yaml for the record; ignored when the recipe is run again.
    provenance: dict[str, Any] | None = None

    @property
    def method(self) -> registry.Method:
        return registry.get("learn", self.estimator)

    @property
    def data_entry(self) -> DataEntry:
        return DataEntry(train=self.data, format=self.format, max_length=self.max_length)

    @property
    def options(self) -> dict[str, Any]:
        """The estimator's keyword arguments, checked.

        Raises:
            RecipeError: unknown parameter, or one out of range.
        """
        said = {self.method.option(name, "parameters"): value for name, value in self.parameters.items()}
        defaults = {option.keyword: option.default for option in self.method.options.values()}
        return defaults | {option.keyword: option.check(value, "parameters") for option, value in said.items()}


def load_learn_recipe(source: str | Path | dict | LearnRecipe, overrides: dict[str, Any] | None = None) -> LearnRecipe:
    """Reads a recipe from a YAML file, a dictionary or a LearnRecipe; ``overrides`` are dotted keys and win.

    Raises:
        RecipeError: no such file, not YAML, unknown key or estimator (with the nearest name), wrong values.
    """
    data, name = read_mapping(source, overrides, "'estimator', 'model' and 'data'")
    if "models" in data or "method" in data:
        raise RecipeError(f"{name}: is a recipe for merging. Run it with hf-fuse merge; learning has an estimator.")
    try:
        recipe = LearnRecipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{name}: {explain(error, LearnRecipe)}") from None
    _ = recipe.options
    if recipe.model.adapter:
        raise RecipeError(f"{name}: model is {recipe.model.key!r}. Merge the adapter into its base first.")
    return recipe
