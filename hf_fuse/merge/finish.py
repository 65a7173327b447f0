"""The small files of a merged model: config, generation config, tokenizer, resolved recipe and model card."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import hf_fuse
from hf_fuse.card import merge_card, read_license
from hf_fuse.checkpoint.adapter import base_fingerprint
from hf_fuse.checkpoint.chat_template import chat_template
from hf_fuse.checkpoint.reader import FLOAT_DTYPES, read_json
from hf_fuse.checkpoint.tokenizer import copy_files, read_tokenizer, tokenizer_files
from hf_fuse.merge.carry import output_config, write_json
from hf_fuse.merge.heads import with_head
from hf_fuse.merge.parameters import layer_of
from hf_fuse.merge.plan import Parent, Plan
from hf_fuse.recipe import ModelRef, Recipe, dump_recipe

RECIPE_FILE = "fuse_recipe.yaml"


def write_companions(plan: Plan, folder: Path) -> None:
    """Writes everything but the weights into ``folder``. Deterministic: no dates, no paths of this machine."""
    donor = plan.reference
    if donor.checkpoint.config:
        write_json(folder / "config.json", _config(plan))
    generation = donor.checkpoint.folder / "generation_config.json"
    if generation.exists():
        settings = read_json(generation)
        if plan.alignment is not None:
            settings = _renumbered(settings, plan)
        write_json(folder / "generation_config.json", settings)
    if plan.alignment is not None:
        plan.alignment.write(folder)
    else:
        copy_files(tokenizer_files(donor.tokenizer_folder), donor.tokenizer_folder, folder)
    _forget_code(folder / "tokenizer_config.json")
    if plan.recipe.chat_template:
        tokenizers = [read_tokenizer(parent.tokenizer_folder) for parent in plan.parents.values()]
        text = chat_template(plan.recipe.chat_template, tokenizers)
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    resolved = resolved_recipe(plan)
    if plan.record:
        base = base_fingerprint(donor.checkpoint)
        resolved.provenance |= {"continuation": {"base": base, "parameters": plan.record}}
    (folder / RECIPE_FILE).write_text(dump_recipe(resolved), encoding="utf-8")
    (folder / "README.md").write_text(_card(plan, resolved, folder), encoding="utf-8")


def _forget_code(path: Path) -> None:
    """Code files are not carried over, so nothing may ask for them."""
    if path.exists() and "auto_map" in (settings := read_json(path)):
        del settings["auto_map"]
        write_json(path, settings)


def _renumbered(settings: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """Generation settings with token ids of the output's vocabulary; ids that it does not have are dropped."""

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [new for new in map(moved, value) if new is not None]
        return plan.alignment.output_id(plan.reference.ref.key, value) if isinstance(value, int) else value

    return {key: moved(value) if key.endswith("_token_id") else value for key, value in settings.items()}


def versions() -> dict[str, str]:
    found = {"hf_fuse": hf_fuse.__version__}
    for package in ("torch", "transformers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _config(plan: Plan) -> dict[str, Any]:
    floats = {unit.dtype for unit in plan.units if unit.dtype in FLOAT_DTYPES}
    may_change = plan.recipe.out_dtype is not None or plan.recipe.dialect == "mergekit"  # there the widest input counts
    changed_dtype = may_change and len(floats) == 1
    config = plan.reference.checkpoint.config
    if plan.recipe.heads is not None:
        config = with_head(config, plan.parents[plan.recipe.heads.key].checkpoint.config)
    return output_config(
        config,
        out_dtype=floats.pop() if changed_dtype else None,
        layers=_layers(plan) if plan.recipe.slices else None,
        vocab_size=plan.alignment.size if plan.alignment else None,
        special_ids=plan.alignment.special_ids if plan.alignment else {},
        tied=plan.tying.tied if plan.tying.changed else None,
    )


def _layers(plan: Plan) -> list[tuple[dict[str, Any], int]]:
    """For each output layer the config of its first source and the layer's index there."""
    found: dict[int, tuple[dict[str, Any], int]] = {}
    for unit in plan.units:
        layer = layer_of(unit.name)
        if layer is not None and layer[1] not in found:
            first = unit.base or unit.inputs[0]
            found[layer[1]] = (plan.parents[first.key].checkpoint.config, layer_of(first.name)[1])
    return [found[index] for index in sorted(found)]


def resolved_recipe(plan: Plan) -> Recipe:
    """The recipe with every Hub input pinned to its commit and the versions that made it. Run again, it makes the same
    bytes. Where the result went is left out: it is not part of what was made."""

    def pin(ref: ModelRef) -> ModelRef:
        parent = plan.parents[ref.key]
        update: dict[str, Any] = {}
        if ref.adapter is None and parent.adapter is not None:
            update["revision"] = parent.adapter_commit
        else:
            update["revision"] = parent.checkpoint.commit
            update["adapter_revision"] = parent.adapter_commit
        update = {key: value for key, value in update.items() if value}
        return ref.model_copy(update=update)

    recipe = plan.recipe
    update: dict[str, Any] = {"models": [pin(model) for model in recipe.models]}
    update |= {key: pin(ref) for key in ("base_model", "heads") if (ref := getattr(recipe, key))}
    if recipe.slices:
        update["slices"] = [
            piece.model_copy(
                update={"sources": [s.model_copy(update={"model": pin(s.model)}) for s in piece.sources]}
                | ({"base_model": pin(piece.base_model)} if piece.base_model else {})
            )
            for piece in recipe.slices
        ]
    update |= {"output": None, "push": None, "seed": recipe.seed, "provenance": {"versions": versions()}}
    if not recipe.models:
        del update["models"]
    return recipe.model_copy(update=update)


def _card(plan: Plan, resolved: Recipe, folder: Path) -> str:
    recipe = plan.recipe
    title = Path(recipe.output).name if recipe.output else "merged model"
    parents = []
    weights = {model.key: _without_folder(model.weight) for model in recipe.models}
    for parent in plan.parents.values():
        for ref, repo_id, commit, folder in _origins(parent):
            parents.append(
                {"ref": ref, "repo_id": repo_id, "commit": commit, "license": read_license(folder), "role": parent.role,
                 "weight": weights.get(parent.ref.key)}
            )  # fmt: skip
    return merge_card(
        {
            "title": title,
            "method": plan.method.name,
            "summary": plan.method.summary,
            "paper": plan.method.paper,
            "architecture": plan.reference.checkpoint.architecture,
            "recipe_yaml": dump_recipe(without_paths(resolved)),
            "parents": parents,
            "versions": versions(),
            "warnings": plan.warnings,
            "figures": {},
            "has_tokenizer": bool(tokenizer_files(folder)),
        }
    )


def _origins(parent: Parent) -> list[tuple[str, str | None, str | None, Path]]:
    """The repositories or folders a parent comes from: the full model, and the adapter if there is one."""
    checkpoint = parent.checkpoint
    full = (checkpoint.ref, checkpoint.repo_id, checkpoint.commit, checkpoint.folder)
    if parent.adapter is None:
        return [full]
    name = parent.ref.adapter or parent.ref.path
    return [full, (name, parent.adapter_repo, parent.adapter_commit, parent.adapter_folder)]


def without_paths(recipe: Recipe) -> Recipe:
    """Local folders by their names only: a card is published, the layout of somebody's disk is not."""

    def strip(ref: ModelRef) -> ModelRef:
        update = {}
        for field in ("path", "adapter", "statistics"):
            value = getattr(ref, field, None)
            if value and (Path(value).expanduser().is_dir() or value.count("/") != 1):
                update[field] = Path(value).name
        if getattr(ref, "weight", None) is not None:
            update["weight"] = _without_folder(ref.weight)
        return ref.model_copy(update=update)

    update: dict[str, Any] = {key: strip(ref) for key in ("base_model", "heads") if (ref := getattr(recipe, key))}
    if recipe.models:
        update["models"] = [strip(model) for model in recipe.models]
    if recipe.parameters:
        update["parameters"] = _without_folder(recipe.parameters)
    if recipe.slices:
        update["slices"] = [
            piece.model_copy(
                update={"sources": [s.model_copy(update={"model": strip(s.model)}) for s in piece.sources]}
                | ({"base_model": strip(piece.base_model)} if piece.base_model else {})
            )
            for piece in recipe.slices
        ]
    return recipe.model_copy(update=update)


def _without_folder(value: Any) -> Any:
    """A recipe's value in which learned files go by their names."""
    if isinstance(value, list):
        return [_without_folder(item) for item in value]
    if isinstance(value, dict):
        return {key: Path(part).name if key == "learned" else _without_folder(part) for key, part in value.items()}
    return value
