"""A recipe for ``hf-fuse fuse``: a pivot, the models whose knowledge it gets, and the text that they all read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from hf_fuse.errors import RecipeError
from hf_fuse.recipe import ModelRef, _split_reference, explain, read_mapping
from hf_fuse.registry import get, nearest
from hf_fuse.training_recipe import DataEntry, TrainedModel


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


class FusedModel(ModelRef):
    """A model to learn from, with a chat template of its own or a named one."""

    chat_template: str | None = None


class MergeEntry(_Strict):
    """How the targets become one model: a merge method and its parameters."""

    method: str = "sce"
    parameters: dict[str, Any] = Field(default_factory=dict)


def _method(value: Any) -> Any:
    return {"method": value} if isinstance(value, str) else value


class FusionRecipe(_Strict):
    """FuseChat (``pairwise``): a copy of the pivot learns from the pivot and one source, for each of the sources, and
    the copies are merged. FuseLLM (``together``): one copy learns from the pivot and all sources, nothing is merged.

    ``train`` has the keys of a training recipe's section; ``objectives`` are there, too.
    """

    pivot: Annotated[TrainedModel, BeforeValidator(_split_reference)]
    sources: list[Annotated[FusedModel, BeforeValidator(_split_reference)]] = Field(min_length=1)
    strategy: Literal["pairwise", "together"] = "pairwise"
    data: Annotated[DataEntry, BeforeValidator(lambda v: {"train": v} if isinstance(v, (str, list)) else v)]
    k: int = Field(default=16, ge=1)  # tokens kept of each prediction; 10 in the papers
    vocabulary: Literal["exact", "min_ed", "statistical"] = "min_ed"
    align: Literal["boundaries", "dtw", "dtw_suffix"] = "boundaries"
    collisions: Literal["sum", "first"] = "sum"
    train: dict[str, Any] = Field(default_factory=dict)
    merge: Annotated[MergeEntry, BeforeValidator(_method)] = Field(default_factory=MergeEntry)
    keep_targets: bool = False  # in the output, to merge them in other ways
    batch_size: int = Field(default=8, ge=1)  # of the teachers
    device: str = "cpu"  # of the teachers
    num_processes: int | None = Field(default=None, ge=1)  # of each training
    accelerate_config: str | None = None
    output: str | None = None
    # Written into fuse_recipe.yaml for the record; ignored when the recipe is run again.
    provenance: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_row_one_text(self) -> FusionRecipe:
        if self.data.packing:
            raise ValueError("data.packing puts several texts into a row, which other tokenizers can't read. Remove it")
        if self.pivot.adapter or any(source.adapter for source in self.sources):
            raise ValueError("adapters can't be fused. Merge each into its base first")
        return self


def load_fusion_recipe(
    source: str | Path | dict | FusionRecipe, overrides: dict[str, Any] | None = None
) -> FusionRecipe:
    """Reads a recipe from a YAML file, a dictionary or a FusionRecipe; ``overrides`` are dotted keys and win.

    Raises:
        RecipeError: no such file, not YAML, unknown key (with the nearest name), wrong values.
    """
    data, name = read_mapping(source, overrides, "'pivot', 'sources' and 'data'")
    for key, verb in (("models", "merge"), ("teacher", "teach"), ("model", "train")):
        if key in data:
            raise RecipeError(
                f"{name}: has the key {key!r}. Run it with hf-fuse {verb}; fusing has a pivot and sources."
            )
    try:
        recipe = FusionRecipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{name}: {explain(error, FusionRecipe)}") from None
    _check_merge(recipe)
    return recipe


def _check_merge(recipe: FusionRecipe) -> None:
    method = get("merge", recipe.merge.method)
    for key, value in recipe.merge.parameters.items():
        if key not in method.options:
            raise RecipeError(f"merge.parameters: {method.name} has no {key!r}. {nearest(key, method.options)}")
        if not isinstance(value, (list, dict)):  # of one model or layer each, which planning the merge looks at
            method.options[key].check(value, "merge.parameters")
