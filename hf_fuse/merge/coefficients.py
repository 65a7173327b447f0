"""The file of learned coefficients: written by estimators, named in a recipe as ``weight: {learned: FOLDER}``.

JSON: base and models with a fingerprint each, the method that the coefficients are weights of, and for every model one
list of numbers per tensor (one number, or one per chunk). A file is refused for other models than its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_fuse.checkpoint.adapter import base_fingerprint
from hf_fuse.checkpoint.reader import Checkpoint, read_json
from hf_fuse.errors import CheckpointError, RecipeError
from hf_fuse.merge.learned_weights import LearnedWeight
from hf_fuse.recipe import Recipe
from hf_fuse.registry import Method

FILE = "coefficients.json"
FORMAT = "hf_fuse coefficients 1"
AGAIN = "Make it again with hf-fuse learn."


@dataclass(frozen=True)
class Coefficients:
    """What a file holds.

    Attributes:
        method: the merge method that they are weights of, and ``parameters`` of it that they were learned with.
        base, models: (what the user called it, fingerprint).
        values: for each model one list of numbers per tensor.
        heads: tensors that belong to heads, of which every model kept its own.
        cut, seed: where the chunks of a tensor are, see :func:`~hf_fuse.merge.learned_weights.chunk_numbers`.
        facts: about the learning, for people.
    """

    estimator: str
    method: str
    parameters: Mapping[str, Any]
    base: tuple[str, str]
    models: list[tuple[str, str]]
    values: list[Mapping[str, list[float]]]
    heads: list[str] = field(default_factory=list)
    cut: str = "slices"
    seed: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The file's text; equal coefficients give equal bytes."""
        models = [
            {"model": ref, "fingerprint": fingerprint, "coefficients": dict(values)}
            for (ref, fingerprint), values in zip(self.models, self.values)
        ]
        content = {
            "format": FORMAT,
            "estimator": self.estimator,
            "method": self.method,
            "parameters": dict(self.parameters),
            "base_model": {"model": self.base[0], "fingerprint": self.base[1]},
            "chunks": {"cut": self.cut, "seed": self.seed},
            "heads": list(self.heads),
            "facts": dict(self.facts),
            "models": models,
        }
        return json.dumps(content, indent=1, allow_nan=False) + "\n"


def fingerprint(parent: Any) -> str:
    """Hash that tells one input of a merge from others: of an adapter's factors, else of the model.

    Args:
        parent: :class:`hf_fuse.merge.plan.Parent`.
    """
    if parent.adapter is None:
        return base_fingerprint(parent.checkpoint)
    return base_fingerprint(Checkpoint(parent.ref.key, parent.adapter_folder, parent.adapter.adapter.infos))


def read_coefficients(ref: str) -> Coefficients:
    """Reads a file, or the one of a folder that ``hf-fuse learn`` has made.

    Raises:
        CheckpointError: no such file, or it is not one of these.
    """
    path = Path(ref).expanduser()
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(
            f"{ref}: no learned coefficients found. Expected the folder that hf-fuse learn has made, or its {FILE}."
        )
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: its format is {content.get('format')!r}, expected {FORMAT!r}. {AGAIN}")
    try:
        models = [(str(entry["model"]), str(entry["fingerprint"])) for entry in content["models"]]
        values = [_numbers(entry["coefficients"]) for entry in content["models"]]
        base, chunks = content["base_model"], content["chunks"]
        found = Coefficients(
            str(content["estimator"]), str(content["method"]), dict(content["parameters"]),
            (str(base["model"]), str(base["fingerprint"])), models, values, [str(name) for name in content["heads"]],
            str(chunks["cut"]), int(chunks["seed"]), dict(content["facts"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{path}: is not what hf-fuse learn writes. {AGAIN}") from None
    if not models or found.cut not in ("slices", "scattered"):
        raise CheckpointError(f"{path}: is not what hf-fuse learn writes. {AGAIN}")
    return found


def _numbers(table: dict[str, Any]) -> dict[str, list[float]]:
    found = {str(name): [float(value) for value in values] for name, values in table.items()}
    if not all(values and all(map(math.isfinite, values)) for values in found.values()):
        raise ValueError
    return found


def with_learned(recipe: Recipe, method: Method, base: Any, models: Mapping[str, Any]) -> Recipe:
    """The recipe with every ``{learned: FOLDER}`` among its weights replaced by what the file says of that model.

    Args:
        base: the base's :class:`~hf_fuse.merge.plan.Parent`; None if it was not opened.
        models: those of the models, by key.

    Raises:
        CheckpointError: no such file, or a damaged one.
        RecipeError: it was learned for another base, other models, or another method.
    """
    shared = recipe.parameters.get("weight")
    opened: dict[str, Coefficients] = {}
    if not any(map(_asks, [shared, *(model.weight for model in recipe.models), *_others(recipe)])):
        return recipe
    if any(map(_asks, _others(recipe))) or recipe.slices:
        raise RecipeError(
            "weight: learned coefficients are the weight of whole models. Say weight: {learned: FOLDER} beside a model "
            "of models, or in the recipe's parameters."
        )

    def look_up(value: Any, key: str) -> Any:
        if isinstance(value, list):
            return [look_up(item, key) for item in value]
        if not isinstance(value, dict):
            return value
        if set(value) != {"learned"}:
            return {name: look_up(part, key) for name, part in value.items()}
        ref = str(value["learned"])
        if ref not in opened:
            opened[ref] = read_coefficients(ref)
            _check(opened[ref], ref, recipe, method, base, models)
        found = opened[ref]
        number = [its for _, its in found.models].index(fingerprint(models[key]))
        return LearnedWeight(ref, found.values[number], found.heads, found.cut, found.seed)

    entries = [
        model.model_copy(update={"weight": look_up(shared if model.weight is None else model.weight, model.key)})
        if model.key in models
        else model
        for model in recipe.models
    ]
    rest = {name: value for name, value in recipe.parameters.items() if name != "weight" or not _asks(value)}
    return recipe.model_copy(update={"models": entries, "parameters": rest})


def _asks(value: Any) -> bool:
    """Whether a recipe's value names a learned file somewhere in it."""
    if isinstance(value, dict):
        return "learned" in value or any(map(_asks, value.values()))
    return isinstance(value, list) and any(map(_asks, value))


def _others(recipe: Recipe) -> list[Any]:
    """Weights said elsewhere than beside a model or for all of them."""
    found = [model.parameters.get("weight") for model in recipe.models]
    for piece in recipe.slices or ():
        found += [piece.parameters.get("weight"), *(source.weight for source in piece.sources)]
        found += [source.parameters.get("weight") for source in piece.sources]
    return found


def _check(found: Coefficients, ref: str, recipe: Recipe, method: Method, base: Any, models: Mapping[str, Any]) -> None:
    """Whether a file is one for this merge."""
    if found.method != method.name:
        raise RecipeError(f"weight: {ref} holds weights for {found.method}, not for {method.name}. Use that method.")
    for name, value in found.parameters.items():
        option = method.option(name, ref)
        said = recipe.parameters.get(name, option.default)
        if said != value:
            raise RecipeError(
                f"parameters: {name} is {said!r}, but the coefficients in {ref} were learned with {value!r}. Say "
                f"{name}: {value}, or learn them again."
            )
    if base is not None and base_fingerprint(base.checkpoint) != found.base[1]:
        raise RecipeError(
            f"base_model: {base.ref.key} is not the base that {ref} was learned with ({found.base[0]}): its weights "
            "differ. Name that one, or learn the coefficients for this one."
        )
    known = {its: name for name, its in found.models}
    here = {key: fingerprint(parent) for key, parent in models.items()}
    for key, its in here.items():
        if its not in known:
            raise RecipeError(
                f"models: {key} is none of the models that {ref} was learned for ({', '.join(known.values())}): its "
                "weights differ. Learn the coefficients for these models."
            )
    if missing := [name for its, name in known.items() if its not in here.values()]:
        raise RecipeError(
            f"models: {ref} was learned for {missing[0]} too, which is not in the recipe. Add it, or learn the "
            "coefficients for these models."
        )
