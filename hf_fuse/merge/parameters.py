"""From what a recipe says about a parameter to the number that one tensor gets."""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from hf_fuse.errors import RecipeError
from hf_fuse.merge.learned_weights import Chunked, LearnedWeight
from hf_fuse.registry import Method, Option

_LAYER = re.compile(r"^(.*?)\.(\d+)\.")


def layer_of(name: str) -> tuple[str, int] | None:
    """``"model.layers.3.mlp.up_proj.weight"`` -> ``("model.layers", 3)``; None outside a stack of layers.

    The first number in a name counts: experts inside a layer are part of the layer.
    """
    match = _LAYER.match(name)
    return (match[1], int(match[2])) if match else None


def stacks(names: Iterable[str]) -> dict[str, int]:
    """Layer stacks and their heights: ``{"model.layers": 32}``."""
    heights: dict[str, int] = {}
    for name in names:
        if found := layer_of(name):
            heights[found[0]] = max(heights.get(found[0], 0), found[1] + 1)
    return heights


def depth_of(name: str, heights: Mapping[str, int], dialect: str) -> float:
    """Position of a tensor in depth, 0 (input) to 1 (output), at which lists of numbers are interpolated.

    Outside the layers, embeddings are at 0, final norms and heads at 1; mergekit has all of them at 0, and a one-layer
    stack at 1.
    """
    found = layer_of(name)
    if found:
        height = heights[found[0]]
        if height > 1:
            return found[1] / (height - 1)
        return 1.0 if dialect == "mergekit" else 0.0
    if dialect == "mergekit":
        return 0.0
    return 1.0 if is_at_the_end(name) else 0.0


def is_at_the_end(name: str) -> bool:
    """Whether a tensor outside the layers comes after them (final norm, pooler, head) and not before (embeddings)."""
    return not re.search(r"embed|wte|wpe|shared|patch|conv1", name)


def resolve_value(value: Any, name: str, depth: float, dialect: str) -> Any:
    """A recipe's value at one tensor; None if no filter matches."""
    if isinstance(value, LearnedWeight):
        return value.of(name)
    if not isinstance(value, (list, tuple)):
        return value
    if not value:
        return None
    if all(isinstance(item, dict) for item in value):
        for item in value:
            if set(item) - {"filter", "value"} or "value" not in item:
                raise RecipeError(f"parameters: {item} is not a filter. Expected {{filter: pattern, value: number}}.")
            if _matches(item.get("filter"), name, dialect):
                return resolve_value(item["value"], name, depth, dialect)
        return None
    if all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in value):
        position = depth * (len(value) - 1)
        left = min(int(position), len(value) - 1)
        right = min(left + 1, len(value) - 1)
        return value[left] + (value[right] - value[left]) * (position - left)
    return value[int(depth * (len(value) - 1))]


def _matches(pattern: Any, name: str, dialect: str) -> bool:
    if pattern in (None, "*"):
        return True
    if dialect != "mergekit" and any(c in str(pattern) for c in "*?["):
        return fnmatch.fnmatchcase(name, str(pattern))
    return str(pattern) in name


Scope = tuple[str, Mapping[str, Any], float]  # where it was said (for messages), what was said, depth for lists


def method_options(
    method: Method, name: str, shared: list[Scope], per_model: list[list[Scope]], names: list[str], dialect: str
) -> dict[str, Any]:
    """All keyword arguments of a method for the tensor ``name``.

    Args:
        shared: scopes that hold for all models, innermost first.
        per_model: for each model its own scopes, innermost first.
        names: for each model the tensor name that its own parameters' filters see.

    Raises:
        RecipeError: a required parameter is missing, or a value is out of range; place and expectation are named.
    """
    shared = [*shared, ("default", getattr(method.module, "DEFAULTS", {}), 0.0)]
    arguments = {}
    for option in method.options.values():
        if option.per_model:
            values = [option_value(option, its, [*own, *shared], dialect) for its, own in zip(names, per_model)]
        else:
            scopes = [*(per_model[0] if len(per_model) == 1 else []), *shared]
            values = option_value(option, name, scopes, dialect)
        arguments[option.keyword] = values
    return arguments


def option_value(option: Option, name: str, scopes: list[Scope], dialect: str) -> Any:
    """One parameter's value at one tensor: of the first scope that has any for it, checked; else the default."""
    for where, parameters, depth in scopes:
        if option.name in parameters:
            value = resolve_value(parameters[option.name], name, depth, dialect)
            if value is not None:
                if dialect == "mergekit" and option.name == "density" and isinstance(value, (int, float)):
                    value = min(value, 1.0)  # mergekit takes every density from 1 on for "all of it"
                return value if isinstance(value, Chunked) else option.check(value, f"{where} (tensor {name})")
    if option.required:
        raise RecipeError(f"parameters: {option.name} is missing. Expected {option.describe()}.")
    return option.default


def check_together(method: Method, options: dict[str, Any], tensor: str) -> None:
    """Asks a method that has a ``check`` whether its options go together at one tensor.

    Raises:
        RecipeError: they do not.
    """
    check = getattr(method.module, "check", None)
    if check is None:
        return
    try:
        check(**{name: options[name] for name in inspect.signature(check).parameters})
    except RecipeError as error:
        raise RecipeError(f"{error} (tensor {tensor})") from None


def check_names(method: Method, scopes: Iterable[tuple[str, Mapping[str, Any], bool]]) -> None:
    """Every parameter that the recipe names must exist, and be one that may differ by model where it is said of one.

    Args:
        scopes: (where, parameters, whether it is said of one model among several).
    """
    for where, parameters, single in scopes:
        for key in parameters:
            option = method.option(key, where)
            if single and not option.per_model:
                raise RecipeError(f"{where}: {key} is the same for all models. Move it to the recipe's parameters.")
