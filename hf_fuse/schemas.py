"""JSON schemas of recipes and of the methods' parameters, for editors and for programs that write recipes."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

from hf_fuse import method_list, registry
from hf_fuse.errors import RecipeError
from hf_fuse.registry import Option

# Command -> the model of its recipe.
RECIPES = {
    "merge": "hf_fuse.recipe.Recipe",
    "train": "hf_fuse.training_recipe.TrainingRecipe",
    "compress": "hf_fuse.compress.recipe.CompressRecipe",
    "learn": "hf_fuse.merge.learn_recipe.LearnRecipe",
    "align": "hf_fuse.merge.align.recipe.AlignRecipe",
    "select": "hf_fuse.data.select_recipe.SelectRecipe",
    "generate": "hf_fuse.decode.recipe.DecodeRecipe",
    "teach": "hf_fuse.distill.teach_recipe.TeachRecipe",
    "fuse": "hf_fuse.distill.fusion_recipe.FusionRecipe",
}
TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


def recipe_schema(command: str) -> dict[str, Any]:
    """Of the recipe that ``hf-fuse <command>`` takes.

    Raises:
        RecipeError: no such command, or one without a recipe.
    """
    if command not in RECIPES:
        raise RecipeError(f"schema: {command!r} has no recipe. {registry.nearest(command, RECIPES)}")
    module, _, name = RECIPES[command].rpartition(".")
    return getattr(import_module(module), name).model_json_schema()


def method_schema(name: str, kind: str | None = None) -> dict[str, Any]:
    """Of a method's parameters, as they stand in a recipe.

    Raises:
        RecipeError: no method of this name, or several.
    """
    found = method_list.find(name, kind)
    if len(found) > 1:
        of = ", ".join(method.kind for method in found)
        raise RecipeError(f"schema: {name} is the name of methods of several kinds ({of}). Say which with --kind.")
    (method,) = found
    meanings = method_list.described_arguments(method)
    return {
        "title": name,
        "description": method.summary,
        "type": "object",
        "properties": {
            option.name: _property(option, meanings.get(option.keyword)) for option in method.options.values()
        },
        "required": [option.name for option in method.options.values() if option.required],
        "additionalProperties": False,
    }


def _property(option: Option, meaning: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {"type": TYPES[option.kind]}
    if option.choices:
        found["enum"] = list(option.choices)
    if option.range:
        low = "exclusiveMinimum" if option.range.open_low else "minimum"
        ends = {low: option.range.low, "maximum": option.range.high}
        found |= {key: end for key, end in ends.items() if math.isfinite(end)}
    if option.optional:
        found = {"anyOf": [found, {"type": "null"}]}
    if not option.required and (option.default is None or isinstance(option.default, tuple(TYPES))):
        found["default"] = option.default
    return found | ({"description": meaning} if meaning else {})
