"""Stores of several fine-tunes in the room of few: made by ``hf-fuse store``, read back by ``hf-fuse extract``.

A store is a folder whose ``store.json`` says its ``kind``. Each kind is a module with a function that makes it and one
that restores a model from it; :data:`KINDS` says which.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fuse.errors import CheckpointError, RecipeError
from hf_fuse.merge.store import STORE_FILE, read_description
from hf_fuse.registry import nearest

if TYPE_CHECKING:
    from hf_fuse.recipe import Recipe


@dataclass(frozen=True)
class Kind:
    """Where a kind's two functions are, ``module:function``; ``mixes``: it restores weighted mixes of tasks."""

    make: str
    restore: str
    mixes: bool


KINDS = {
    "tall-masks": Kind("hf_fuse.merge.tall_store:compress_tall", "hf_fuse.merge.tall_restore:extract_tall", False),
    "twin": Kind("hf_fuse.merge.twin_store:compress_twin", "hf_fuse.merge.twin_restore:extract_twin", True),
}


def _function(kind: str, place: str, options: dict[str, Any]) -> Callable[..., Path]:
    module, _, name = place.partition(":")
    function = getattr(import_module(module), name)
    if strange := sorted(set(options) - set(inspect.signature(function).parameters)):
        raise RecipeError(f"{strange[0]} is not something that a store of kind {kind} knows. Leave it out.")
    return function


def store(kind: str, recipe: str | Path | dict | Recipe, output: str | Path | None = None, **options: Any) -> Path:
    """Makes a store of the recipe's models.

    Args:
        kind: ``tall-masks`` (https://arxiv.org/abs/2405.07813: the multi-task vector, and one bit per weight and task)
            or ``twin`` (https://arxiv.org/abs/2406.15479: a merged model, and a low-rank difference per task).
        recipe: as for a merge; see the functions named in :data:`KINDS` for what each kind makes of it.
        output: the folder to make; else the recipe's.
        **options: of that function, such as ``tasks`` (names of the models) and ``overwrite``.

    Returns:
        The store's folder.

    Raises:
        FuseError: with one message that says what, where and what to do.
    """
    if kind not in KINDS:
        raise RecipeError(f"kind: no store is called {kind!r}. {nearest(kind, KINDS)}")
    return _function(kind, KINDS[kind].make, options)(recipe, output, **options)


def extract(
    source: str | Path,
    output: str | Path,
    *,
    task: str | None = None,
    weights: Mapping[str, float] | None = None,
    **options: Any,
) -> Path:
    """Restores a model from a store.

    Args:
        source: the store's folder.
        output: the folder to make.
        task: the task whose model is wanted.
        weights: instead, a number for each of several tasks to mix (kind ``twin``).
        **options: of the kind's own function, such as ``overwrite``.

    Returns:
        The output folder, a checkpoint that transformers loads.

    Raises:
        FuseError: not a store, no such task, or an output that can't be made.
    """
    folder = Path(source).expanduser().absolute()
    facts = read_description(folder)
    if facts.get("kind") not in KINDS:
        raise CheckpointError(
            f"{folder}: {STORE_FILE} says kind {facts.get('kind')!r}, expected {' or '.join(map(repr, KINDS))}. A "
            "newer hf_fuse may know it."
        )
    if (task is None) == (not weights):
        known = ", ".join(facts["tasks"]) if isinstance(facts.get("tasks"), dict) else "unknown"
        raise RecipeError(f"{folder}: say which task is wanted, or weights of several. Its tasks: {known}.")
    kind = KINDS[facts["kind"]]
    restore = _function(facts["kind"], kind.restore, options)
    if kind.mixes:
        return restore(folder, output, weights or {task: 1.0}, **options)
    if task is None:
        raise RecipeError(f"weights: a store of kind {facts['kind']} restores one task at a time. Say which.")
    return restore(folder, task, output, **options)


def parse_weights(said: Sequence[str]) -> dict[str, float]:
    """``["math=0.5", "code=0.5"]`` -> ``{"math": 0.5, "code": 0.5}``."""
    found: dict[str, float] = {}
    for text in said:
        name, given, value = text.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            given = ""
        if not given or not name or name in found:
            raise RecipeError(f"--weight {text!r}: expected TASK=NUMBER, each task once.")
        found[name] = number
    return found
