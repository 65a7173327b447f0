"""A recipe for compression: which model, by which method, calibrated and measured on which text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from hf_fuse import registry
from hf_fuse.errors import RecipeError
from hf_fuse.recipe import PushEntry, Reference, explain, parse_size, read_mapping


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


class TextEntry(_Strict):
    """Text without labels: a text file, or a column of a dataset (file, folder or Hub id).

    ``sequences`` pieces of ``length`` tokens are taken from all of it, evenly spread; fewer if there is less text.
    """

    path: str
    subset: str | None = None
    split: str = "train"
    column: str = "text"
    sequences: int = Field(default=256, ge=1)
    length: int | None = Field(default=None, ge=2)  # none: the model's context, at most 2048


Text = Annotated[TextEntry | None, BeforeValidator(lambda v: {"path": v} if isinstance(v, str) else v)]


class CompressRecipe(_Strict):
    """A whole compression."""

    method: str
    model: Reference
    parameters: dict[str, Any] = Field(default_factory=dict)
    calibration: Text = None  # what the method measures and learns on
    evaluation: Text = None  # held-out text for the perplexity before and after
    device: str = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the computation; the output keeps its own
    seed: int = Field(default=0, ge=0)
    max_shard_size: str | int = "5GB"
    output: str | None = None
    push: Annotated[PushEntry | None, BeforeValidator(lambda v: {"repo": v} if isinstance(v, str) else v)] = None
    # Written into fuse_recipe.yaml for the record; ignored when the recipe is run again.
    provenance: dict[str, Any] | None = None

    @property
    def max_shard_bytes(self) -> int:
        return parse_size(self.max_shard_size)

    @property
    def found_method(self) -> registry.Method:
        return registry.get("compress", self.method)

    @property
    def options(self) -> dict[str, Any]:
        return self.found_method.settings(self.parameters)


def load_compress_recipe(
    source: str | Path | dict | CompressRecipe, overrides: dict[str, Any] | None = None
) -> CompressRecipe:
    """Reads a recipe from a YAML file, a dictionary or a CompressRecipe; ``overrides`` are dotted keys
    (``{"parameters.drop": 4}``) and win. Relative paths are those of the working directory.

    Raises:
        RecipeError: no such file, not YAML, unknown key or method (with the nearest name), a parameter that is missing
            or out of range; one message each.
    """
    data, name = read_mapping(source, overrides, "'method' and 'model'")
    if "models" in data or "merge_method" in data:
        raise RecipeError(f"{name}: has several models, as a recipe for merging. Run it with hf-fuse merge.")
    try:
        recipe = CompressRecipe.model_validate(data)
    except ValidationError as error:
        reason = _misplaced(error, data.get("method")) or explain(error, CompressRecipe)
        raise RecipeError(f"{name}: {reason}") from None
    _ = recipe.options, recipe.max_shard_bytes
    if recipe.model.adapter:
        raise RecipeError(f"{name}: model is {recipe.model.key!r}. Merge the adapter into its base first.")
    if recipe.calibration is None and getattr(recipe.found_method.module, "NEEDS_TEXT", True):
        raise RecipeError(f"{name}: {recipe.method} needs calibration text. Say calibration: FILE, or a dataset's id.")
    return recipe


def _misplaced(error: ValidationError, method: Any) -> str | None:
    """What to say of a parameter that stands beside its method instead of under ``parameters``."""
    problem = error.errors()[0]
    if problem["type"] != "extra_forbidden" or len(problem["loc"]) != 1 or method not in registry.names("compress"):
        return None
    key = problem["loc"][0]
    if key not in registry.get("compress", method).options:
        return None
    return f"{key!r} is a parameter of {method}. It belongs under parameters; as a dotted key it is parameters.{key}."
