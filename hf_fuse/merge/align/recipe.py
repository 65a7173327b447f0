"""A recipe for an alignment: which model to which reference, by which method, watched on which data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hf_fuse import registry
from hf_fuse.errors import RecipeError
from hf_fuse.recipe import Reference, explain, parse_size, read_mapping
from hf_fuse.training_recipe import DataEntry, Format, Sources


class AlignRecipe(BaseModel):
    """A whole alignment. ``data`` are datasets as for training: files, folders or Hub ids, with their ``columns``."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    method: str
    model: Reference  # the one whose units are put into order
    reference: Reference | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    data: Sources | None = None
    examples: int = Field(default=256, ge=1)  # drawn from all of the data
    format: Format | None = None  # none: told from the columns
    max_length: int | None = Field(default=None, ge=2)  # in tokens; none: 1024, or the model's context if shorter
    batch_size: int = Field(default=8, ge=1)
    path: int = Field(default=0, ge=0)  # points between the models at which to measure the loss, before and after
    verify: bool = True  # load both and compare; off where the model does not fit into memory
    device: str = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of running models; weights are float32
    seed: int = Field(default=0, ge=0)
    max_shard_size: str | int = "5GB"
    output: str | None = None
    # Written into fuse_recipe.yaml for the record; ignored when the recipe is run again.
    provenance: dict[str, Any] | None = None

    @property
    def found_method(self) -> registry.Method:
        return registry.get("align", self.method)

    @property
    def max_shard_bytes(self) -> int:
        return parse_size(self.max_shard_size)

    @property
    def data_entry(self) -> DataEntry:
        return DataEntry(train=self.data, format=self.format, max_length=self.max_length)

    @property
    def options(self) -> dict[str, Any]:
        return self.found_method.settings(self.parameters)


def load_align_recipe(source: str | Path | dict | AlignRecipe, overrides: dict[str, Any] | None = None) -> AlignRecipe:
    """Reads a recipe from a YAML file, a dictionary or an AlignRecipe; ``overrides`` are dotted keys
    (``{"parameters.sweeps": 4}``) and win. Relative paths are those of the working directory.

    Raises:
        RecipeError: no such file, not YAML, unknown key or method (with the nearest name), a parameter that is missing
            or out of range, no data for a method that needs some; one message each.
    """
    data, name = read_mapping(source, overrides, "'method', 'model' and 'reference'")
    if "models" in data or "merge_method" in data:
        raise RecipeError(f"{name}: has models, as a recipe for merging. Run it with hf-fuse merge.")
    try:
        recipe = AlignRecipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{name}: {explain(error, AlignRecipe)}") from None
    options, _ = recipe.options, recipe.max_shard_bytes
    for key in ("model", "reference"):
        ref = getattr(recipe, key)
        if ref is not None and ref.adapter:
            raise RecipeError(f"{name}: {key} is {ref.key!r}. Merge the adapter into its base first.")
    module = recipe.found_method.module
    needs_reference = getattr(module, "NEEDS_REFERENCE", True)
    if needs_reference and recipe.reference is None:
        raise RecipeError(f"{name}: the key 'reference' is missing: the model whose order counts.")
    if not needs_reference and recipe.reference is not None:
        raise RecipeError(f"{name}: {recipe.method} has no reference. Remove it.")
    if recipe.path and (recipe.path < 3 or not needs_reference or getattr(module, "FUSES", False)):
        reason = f"{recipe.method} writes no model to go to" if recipe.path >= 3 else "it takes 3 points at least"
        raise RecipeError(f"{name}: path is {recipe.path}, but {reason}. Set it to 0.")
    needs_data = module.needs_data(options) or recipe.path > 0
    if needs_data and recipe.data is None:
        who = recipe.method if module.needs_data(options) else "path"
        raise RecipeError(f"{name}: {who} watches the models on data. Say data: FILE, or a dataset's id.")
    if not needs_data and recipe.data is not None:
        raise RecipeError(f"{name}: {recipe.method} uses no data with these parameters. Remove it.")
    return recipe
