"""A recipe for choosing training data: from which texts, by which method, how many."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from hf_fuse import registry
from hf_fuse.errors import RecipeError
from hf_fuse.recipe import Reference, explain, read_mapping
from hf_fuse.training_recipe import Sources


def _share_or_count(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("expected a share of the rows, as 0.1, or a number of rows, as 5000")
    if isinstance(value, float) and not 0 < value <= 1 or isinstance(value, int) and value < 1:
        raise ValueError("expected a share above 0 and up to 1.0, or a whole number of rows, at least 1")
    return value


class SelectRecipe(BaseModel):
    """A whole selection. ``data`` and ``target`` are datasets as for training, with a column ``text``."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    method: str
    data: Sources
    keep: Annotated[float | int, BeforeValidator(_share_or_count)]
    target: Sources | None = None
    prior: Reference | None = None
    conditional: Reference | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    seed: int = Field(default=0, ge=0)
    device: str = "cpu"
    output: str | None = None
    # Written into fuse_recipe.yaml for the record; ignored when the recipe is run again.
    provenance: dict[str, Any] | None = None

    @property
    def found_method(self) -> registry.Method:
        return registry.get("data", self.method)

    @property
    def needs(self) -> list[str]:
        """What the method compares the texts with: the names of its arguments after the first."""
        kinds = inspect.signature(self.found_method.function).parameters.values()
        return [p.name for p in kinds if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD][1:]

    @property
    def options(self) -> dict[str, Any]:
        return self.found_method.settings(self.parameters)


def load_select_recipe(source: str | Path | dict | SelectRecipe, overrides: dict[str, Any] | None = None):
    """Reads a recipe from a YAML file, a dictionary or a SelectRecipe; ``overrides`` are dotted keys and win.

    Raises:
        RecipeError: no such file, not YAML, unknown key or method (with the nearest name), wrong or missing values.
    """
    data, name = read_mapping(source, overrides, "'method', 'data' and 'keep'")
    try:
        recipe = SelectRecipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{name}: {explain(error, SelectRecipe)}") from None
    _ = recipe.options
    for key in ("target", "prior", "conditional"):
        if key in recipe.needs and getattr(recipe, key) is None:
            raise RecipeError(f"{name}: {key} is missing; {recipe.method} needs {' and '.join(recipe.needs)}.")
        if key not in recipe.needs and getattr(recipe, key) is not None:
            raise RecipeError(
                f"{name}: {recipe.method} takes no {key}, but {' and '.join(recipe.needs)}. Leave it out."
            )
    return recipe
