"""``hf-fuse merge --continue-from EARLIER``: one more model into an earlier merge, without its models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_fuse import registry
from hf_fuse.checkpoint.adapter import base_fingerprint
from hf_fuse.checkpoint.reader import open_checkpoint, resolve
from hf_fuse.errors import RecipeError
from hf_fuse.merge.finish import RECIPE_FILE
from hf_fuse.recipe import Recipe, load_recipe, read_yaml


def continued(recipe: Recipe, earlier: str | Path) -> Recipe:
    """The recipe with the earlier merge as its first model, and with the parameters that this merge left for it.

    Args:
        recipe: names the new models only; the base may be left out, it is the earlier merge's.
        earlier: output folder or Hub id (``org/name@revision``) of a merge by the same method.

    Raises:
        RecipeError: the method can't go on, the earlier folder isn't such a merge, or it has another base.
    """
    path, _, revision = (
        str(earlier).partition("@") if not Path(earlier).expanduser().is_dir() else (str(earlier), "", "")
    )
    if not hasattr(registry.get("merge", recipe.method).module, "rescale"):
        able = [name for name in registry.names("merge") if hasattr(registry.get("merge", name).module, "rescale")]
        raise RecipeError(
            f"continue_from: {recipe.method} can't go on from an earlier merge. Expected {', '.join(able)}."
        )
    if recipe.slices:
        raise RecipeError("continue_from: slices can't go on from an earlier merge. List whole models.")
    found, made = _record(path, revision or None)
    if made.method != recipe.method:
        raise RecipeError(f"continue_from: {earlier} was merged by {made.method}, the recipe says {recipe.method}.")
    base = recipe.base_model or made.base_model
    if base_fingerprint(open_checkpoint(base.path, base.revision)) != found["base"]:
        raise RecipeError(f"continue_from: {earlier} was merged on another base than {base.key}. Name the right one.")
    known = registry.get("merge", recipe.method).options
    if said := sorted(set(recipe.parameters) & set(found["parameters"])):
        raise RecipeError(f"parameters: {said[0]} comes from {earlier}. Leave it out.")
    data = recipe.model_dump(exclude_unset=True)
    first: dict[str, Any] = {"path": path} | ({"revision": revision} if revision else {})
    data["models"] = [first, *data["models"]]
    data["base_model"] = base.model_dump(exclude_unset=True)
    data["parameters"] = recipe.parameters | {key: value for key, value in found["parameters"].items() if key in known}
    return load_recipe(data)


def _record(path: str, revision: str | None) -> tuple[dict[str, Any], Recipe]:
    folder, _, _ = resolve(path, revision)
    file = folder / RECIPE_FILE
    data = read_yaml(file.read_text(encoding="utf-8"), str(file)) if file.is_file() else None
    made = load_recipe(data) if isinstance(data, dict) else None
    found = (made.provenance or {}).get("continuation") if made else None
    parameters = found.get("parameters") if isinstance(found, dict) else None
    if not isinstance(parameters, dict) or not isinstance(found.get("base"), str):
        raise RecipeError(
            f"continue_from: {path} has no {RECIPE_FILE} that says how to go on. Expected the output of a merge by a "
            "method that adds one model after the other (opcm)."
        )
    return found, made
