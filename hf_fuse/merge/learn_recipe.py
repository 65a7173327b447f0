"""A recipe for learning: which numbers, of which model, from which data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from hf_fuse import registry
from hf_fuse.errors import RecipeError
from hf_fuse.recipe import ModelRef, Reference, _split_reference, explain, read_mapping
from hf_fuse.training_recipe import DataEntry, Format, Sources


class LearnedModel(ModelRef):
    """One of several models, with examples of what it was trained for."""

    data: Sources | None = None


class LearnRecipe(BaseModel):
    """A whole estimation. ``data`` are datasets as for training: files, folders or Hub ids, with their ``columns``.

    Estimators of one model have ``model`` and ``data``; those of coefficients have ``base_model`` and ``models``, each
    of these with ``data`` of its own, or one ``data`` for what the merged model is to do.
    """

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    estimator: str
    model: Reference | None = None
    base_model: Reference | None = None
    models: list[Annotated[LearnedModel, BeforeValidator(_split_reference)]] = Field(default_factory=list)
    parameters: dict[str, Any] = Field(default_factory=dict)
    data: Sources | None = None
    control: Sources | None = None  # what is to stay as it is, while something else is unlearned
    heads: Literal["own", "merged"] = "own"  # of classifiers: each model keeps its own, or they are merged too
    examples: int = Field(default=256, ge=1)  # drawn from all of each of the data
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

    def data_entry(self, sources: Sources) -> DataEntry:
        return DataEntry(train=sources, format=self.format, max_length=self.max_length)

    @property
    def options(self) -> dict[str, Any]:
        return self.method.settings(self.parameters)


def load_learn_recipe(source: str | Path | dict | LearnRecipe, overrides: dict[str, Any] | None = None) -> LearnRecipe:
    """Reads a recipe from a YAML file, a dictionary or a LearnRecipe; ``overrides`` are dotted keys and win.

    Raises:
        RecipeError: no such file, not YAML, unknown key or estimator (with the nearest name), wrong values.
    """
    data, name = read_mapping(source, overrides, "'estimator', 'data', and 'model' or 'models'")
    if "method" in data or ("models" in data and "estimator" not in data):
        raise RecipeError(f"{name}: is a recipe for merging. Run it with hf-fuse merge; learning has an estimator.")
    try:
        recipe = LearnRecipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{name}: {explain(error, LearnRecipe)}") from None
    _ = recipe.options
    if recipe.method.argument == "family":
        _check_family(recipe, name)
    else:
        _check_subject(recipe, name)
    return recipe


def _check_subject(recipe: LearnRecipe, name: str) -> None:
    for key in ("model", "data"):
        if getattr(recipe, key) is None:
            raise RecipeError(f"{name}: the key {key!r} is missing.")
    for key in ("base_model", "models", "control"):
        if getattr(recipe, key):
            raise RecipeError(f"{name}: {key} has no meaning for {recipe.estimator}, which looks at one model.")
    if recipe.model.adapter:
        raise RecipeError(f"{name}: model is {recipe.model.key!r}. Merge the adapter into its base first.")


def _check_family(recipe: LearnRecipe, name: str) -> None:
    for key in ("base_model", "models"):
        if not getattr(recipe, key):
            raise RecipeError(f"{name}: the key {key!r} is missing; {recipe.estimator} learns how to merge models.")
    if recipe.model:
        raise RecipeError(f"{name}: model has no meaning for {recipe.estimator}. Say base_model and models.")
    without = [model.key for model in recipe.models if not model.data]
    own = len(without) < len(recipe.models)
    if getattr(recipe.method.module, "DATA", "models") == "models":
        if without:
            raise RecipeError(f"{name}: {without[0]} has no data. Say data: beside the model; {recipe.estimator} needs "
                              "examples of what each model was trained for.")  # fmt: skip
        if recipe.data:
            raise RecipeError(f"{name}: {recipe.estimator} learns from each model's own data. Move data to the models.")
    elif own == bool(recipe.data):
        raise RecipeError(f"{name}: give either data (of what the merged model is to do), or data beside the models.")
    if recipe.control and getattr(recipe.method.module, "DATA", "models") == "models":
        raise RecipeError(f"{name}: control has no meaning for {recipe.estimator}. Remove it.")
