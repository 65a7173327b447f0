"""Reads mergekit's YAML into a recipe that gives the same model, or says which feature can't be expressed.

Where mergekit's methods differ from the papers, the recipe asks for mergekit's formula. ``dialect: mergekit`` in the
recipe tells the engine its reading of filters (parts of the tensor's name) and gradients. Differences that stay: all
arithmetic is done in fp32 (``dtype`` is the type of the output), misspelt keys are errors, random draws are ours. SCE
weighs models by their changes however small these are (mergekit: equally, below a mean square of 1e-6), and Arcee
Fusion's quartiles are exact. Not expressible, and refused by name: rescaling after trimming (``rescale: true`` of ties
and breadcrumbs), modules of a model with several, ``override_architecture``, and the schemas of ``mergekit-moe`` and
``mergekit-multi``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hf_fuse.errors import RecipeError
from hf_fuse.recipe_mergekit_parameters import (
    MethodRule,
    axes,
    check_keys,
    expect,
    merged,
    method_rule,
    translate_parameters,
    with_defaults,
)
from hf_fuse.recipe_mergekit_references import key_of, reference, tokenizer

logger = logging.getLogger(__name__)

FILE_KEYS = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype",
    "tokenizer", "tokenizer_source", "chat_template",
)  # fmt: skip
DTYPES = ("float16", "bfloat16", "float32", "float64")
CHAT_TEMPLATES = ("alpaca", "auto", "chatml", "exaone", "llama3", "mistral")
# The module of an architecture that has only one.
WHOLE_MODEL = "default"


@dataclass(frozen=True)
class _Merge:
    """What all parts of one file have in common."""

    method: str
    rule: MethodRule
    base: dict | None
    shared: dict[str, Any]  # parameters of the file, or of all that lies around a slice


@dataclass(frozen=True)
class _Input:
    """One of the models to merge, or a range of its layers."""

    ref: dict
    where: str
    parameters: dict[str, Any]
    layers: list[int] | None = None


def translate(data: dict[str, Any], name: str) -> dict[str, Any]:
    """A mergekit configuration as a recipe.

    Args:
        data: the parsed YAML.
        name: the file's, for messages.

    Raises:
        RecipeError: mergekit would refuse the file, or the recipe can't say what it asks for; the key is named.
    """
    check_keys(data, FILE_KEYS, name)
    method = data["merge_method"]
    rule = method_rule(method, name)
    base = reference(data["base_model"], f"{name}: base_model") if data.get("base_model") is not None else None
    body, scopes = _body(data, name)
    shared = merged(translate_parameters(method, raw, where, at_model=False) for where, raw in scopes)
    merge = _Merge(method, rule, base, shared)

    recipe: dict[str, Any] = {"method": method}
    if base:
        recipe["base_model"] = base
    if body.get("models"):
        recipe["models"] = _models(body["models"], merge, f"{name}: models")
    else:
        expect(body["slices"], list, f"{name}: slices")
        recipe["slices"] = [_slice(entry, merge, f"{name}: slices.{i}") for i, entry in enumerate(body["slices"])]
    if method == "nuslerp":
        shared = axes(shared, {}, f"{name}: parameters")
    shared = with_defaults(rule, shared, list(_own_scopes(recipe, merge))) | rule.fixed
    if shared:
        recipe["parameters"] = shared
    recipe |= _dtypes(data, name) | tokenizer(data, recipe, name)
    if data.get("chat_template") is not None:
        recipe["chat_template"] = _chat_template(data["chat_template"], name)
    return recipe | {"dialect": "mergekit"}


def _body(data: dict, name: str) -> tuple[dict, list[tuple[str, Any]]]:
    """The mapping that holds ``models`` or ``slices``; parameters of module and file, the narrowest first."""
    given = [key for key in ("models", "slices", "modules") if data.get(key)]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise RecipeError(f"{name}: give exactly one of models, slices and modules, found {found}.")
    scopes = [(f"{name}: parameters", data.get("parameters"))]
    if given != ["modules"]:
        return data, scopes
    where, modules = f"{name}: modules", data["modules"]
    expect(modules, dict, where)
    if set(modules) != {WHOLE_MODEL}:
        raise RecipeError(
            f"{where}: only {WHOLE_MODEL!r}, the whole model, is supported, found {', '.join(map(str, modules))}. "
            "Give models or slices instead; filters in parameters can tell the parts of a model apart."
        )
    where, module = f"{where}.{WHOLE_MODEL}", modules[WHOLE_MODEL]
    expect(module, dict, where)
    check_keys(module, ("models", "slices", "parameters"), where)
    if bool(module.get("models")) == bool(module.get("slices")):
        raise RecipeError(f"{where}: give either models or slices.")
    return module, [(f"{where}.parameters", module.get("parameters")), *scopes]


def _models(entries: Any, merge: _Merge, where: str) -> list[dict]:
    expect(entries, list, where)
    inputs = [_input(entry, merge, f"{where}.{i}", ("model", "parameters")) for i, entry in enumerate(entries)]
    if merge.base and all(entry.ref != merge.base for entry in inputs):
        inputs.append(_Input(merge.base, f"{where} (base_model, which mergekit adds to them)", {}))
    base, others = _checked(inputs, merge, where)
    first = base if merge.rule.base_leads else []
    return [entry.ref | _model_keys(entry.parameters) for entry in first + others]


def _slice(entry: Any, merge: _Merge, where: str) -> dict:
    expect(entry, dict, where)
    check_keys(entry, ("sources", "base_model", "residual_weight", "parameters"), where)
    expect(entry.get("sources"), list, f"{where}.sources")
    if entry.get("residual_weight") is not None:
        logger.warning("%s.residual_weight: mergekit does not use this key. Ignored.", where)
    result: dict[str, Any] = {}
    parameters = translate_parameters(merge.method, entry.get("parameters"), f"{where}.parameters", at_model=False)
    around = merge.shared
    merge = replace(merge, shared=merged([parameters, around]))
    if entry.get("base_model") is not None:
        result["base_model"] = reference(entry["base_model"], f"{where}.base_model")
        merge = replace(merge, base=result["base_model"])
    inputs = []
    for position, source in enumerate(entry["sources"]):
        here = f"{where}.sources.{position}"
        found = _input(source, merge, here, ("model", "layer_range", "parameters"))
        inputs.append(replace(found, layers=_layers(source.get("layer_range"), here)))
    lengths = [found.layers[1] - found.layers[0] for found in inputs]
    if len(set(lengths)) > 1:
        raise RecipeError(f"{where}.sources: the layer ranges must have the same length, found {lengths}.")
    base, others = _checked(inputs, merge, f"{where}.sources")
    result["sources"] = [  # with the base, which tells its layers
        {"model": found.ref, "layers": found.layers} | _model_keys(found.parameters) for found in base + others
    ]
    if merge.method == "nuslerp":
        parameters = axes(parameters, around, where)
    return result | ({"parameters": parameters} if parameters else {})


def _input(entry: Any, merge: _Merge, where: str, keys: tuple[str, ...]) -> _Input:
    expect(entry, dict, where)
    check_keys(entry, keys, where)
    if entry.get("model") is None:
        raise RecipeError(f"{where}: the key 'model' is missing.")
    parameters = translate_parameters(merge.method, entry.get("parameters"), f"{where}.parameters", at_model=True)
    return _Input(reference(entry["model"], f"{where}.model"), where, parameters)


def _checked(inputs: list[_Input], merge: _Merge, where: str) -> tuple[list[_Input], list[_Input]]:
    """The base (if it is one to subtract or start from), and the models; both as mergekit would accept them."""
    method, rule = merge.method, merge.rule
    for position, entry in enumerate(inputs):
        if any(entry.ref == other.ref for other in inputs[:position]):
            raise RecipeError(f"{entry.where}: {key_of(entry.ref)} is listed twice; mergekit takes each model once.")
    base = [] if rule.base == "ignored" else [entry for entry in inputs if entry.ref == merge.base]
    others = [entry for entry in inputs if entry not in base]
    if rule.base == "required" and not merge.base:
        raise RecipeError(f"{where}: {method} needs base_model.")
    if rule.base != "ignored" and merge.base and not base:
        raise RecipeError(f"{where}: {method} needs the base model {key_of(merge.base)} among them.")
    if any(entry.parameters for entry in base):
        logger.warning("%s: mergekit does not read parameters of the base model. Ignored.", base[0].where)
        base = [replace(base[0], parameters={})]
    low, high = rule.models
    if len(others) < low or (high and len(others) > high):
        besides = "" if rule.base == "ignored" else " besides the base"
        count = str(low) if high == low else f"at least {low}"
        raise RecipeError(f"{where}: {method} takes {count} model(s){besides}, found {len(others)}.")
    for key, parameter in rule.parameters.items():
        owners = others if parameter.per_model else [_Input({}, where, {})]
        for owner in owners if parameter.required else ():
            if parameter.target not in owner.parameters | merge.shared:
                model = f" for {key_of(owner.ref)}" if owner.ref else ""
                raise RecipeError(f"{owner.where}: {method} needs the parameter {key!r}{model}.")
    return base, others


def _own_scopes(recipe: dict, merge: _Merge) -> Iterator[list[dict[str, Any]]]:
    """For each model to merge, the parameters said of it and of its slice."""
    pieces = recipe.get("slices") or [{"sources": recipe["models"]}]
    for piece in pieces:
        base = piece.get("base_model", merge.base) if merge.rule.base != "ignored" else None
        for entry in piece["sources"]:
            if base is None or entry.get("model") != base:
                weight = {"weight": entry["weight"]} if "weight" in entry else {}
                yield [entry.get("parameters", {}) | weight, piece.get("parameters", {})]


def _model_keys(parameters: dict[str, Any]) -> dict[str, Any]:
    """``weight`` has a place of its own in a recipe."""
    rest = {key: value for key, value in parameters.items() if key != "weight"}
    weight = {"weight": parameters["weight"]} if "weight" in parameters else {}
    return weight | ({"parameters": rest} if rest else {})


def _layers(value: Any, where: str) -> list[int]:
    if not isinstance(value, list) or len(value) != 2 or not all(type(bound) is int for bound in value):
        raise RecipeError(f"{where}.layer_range: expected [first, one past the last], got {value!r}.")
    if not 0 <= value[0] < value[1]:
        raise RecipeError(f"{where}.layer_range: {value} holds no layers.")
    return value


def _dtypes(data: dict, name: str) -> dict[str, str]:
    """mergekit's ``dtype`` is the type of work and, without ``out_dtype``, of the result. We never work below fp32."""
    given = {}
    for key in ("dtype", "out_dtype"):
        if data.get(key) is not None:
            given[key] = str(data[key]).removeprefix("torch.")
            if given[key] not in DTYPES:
                raise RecipeError(f"{name}: {key} is {data[key]!r}, expected one of {', '.join(DTYPES)}.")
    result = {"dtype": "float64"} if given.get("dtype") == "float64" else {}
    out = given.get("out_dtype", given.get("dtype"))
    return result | ({"out_dtype": out} if out else {})


def _chat_template(value: Any, name: str) -> str:
    if value in CHAT_TEMPLATES or (isinstance(value, str) and "{" in value and len(value) >= 20):
        return value
    known = ", ".join(CHAT_TEMPLATES)
    raise RecipeError(f"{name}: chat_template {value!r} is neither a Jinja template nor one of {known}.")
