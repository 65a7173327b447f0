"""The small files of an adapter folder: PEFT's config, tokenizer, resolved recipe and model card."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hf_fuse.card import merge_card, read_license
from hf_fuse.checkpoint.adapter_binding import CONFIG
from hf_fuse.checkpoint.reader import Checkpoint
from hf_fuse.checkpoint.tokenizer import copy_files, tokenizer_files
from hf_fuse.merge.adapter_plan import AdapterPlan
from hf_fuse.merge.carry import write_json
from hf_fuse.merge.finish import RECIPE_FILE, resolved_recipe, versions, without_paths
from hf_fuse.recipe import dump_recipe

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def write_merge_companions(plan: AdapterPlan, folder: Path) -> None:
    """Writes everything but the weights of a merged adapter. Deterministic: no dates, no paths but the base's."""
    write_json(folder / CONFIG, plan.config)
    parents = list(plan.inputs.parents.values())
    donor = next((parent.adapter_folder for parent in parents if tokenizer_files(parent.adapter_folder)), None)
    if donor:
        copy_files(tokenizer_files(donor), donor, folder)
    resolved = resolved_recipe(plan)
    (folder / RECIPE_FILE).write_text(dump_recipe(resolved), encoding="utf-8")
    recipe = plan.recipe
    weights = {model.key: model.weight for model in recipe.models}
    rows = [
        {"ref": parent.adapter.adapter.ref, "repo_id": parent.adapter_repo, "commit": parent.adapter_commit,
         "license": read_license(parent.adapter_folder), "role": "adapter", "weight": weights.get(key)}
        for key, parent in plan.inputs.parents.items()
    ]  # fmt: skip
    figures = (
        {} if plan.truncation is None else {"left out by the chosen rank, relative to the change": plan.truncation}
    )
    summary = f"{len(parents)} LoRA adapters of one base merged into one: {plan.way()}."
    info = {
        "title": Path(recipe.output).name if recipe.output else "merged adapter",
        "method": plan.method.name, "summary": summary,
        "paper": plan.method.paper, "recipe_yaml": dump_recipe(without_paths(resolved)),
        "parents": [*([base_row(plan.inputs.base)] if plan.inputs.known else []), *rows],
        "warnings": plan.warnings, "figures": figures,
    }  # fmt: skip
    write_card(folder, info, plan.config)


def base_row(base: Checkpoint) -> dict[str, Any]:
    """The base in the card's table of parents."""
    return {"ref": base.ref, "repo_id": base.repo_id, "commit": base.commit, "role": "base",
            "license": read_license(base.folder)}  # fmt: skip


def write_card(folder: Path, info: dict[str, Any], config: dict[str, Any]) -> None:
    """The adapter's README.md: ``info`` as :func:`~hf_fuse.card.merge_card` takes it, the rest from the config."""
    name = config["base_model_name_or_path"]
    on_hub = bool(name) and HUB_ID.fullmatch(name) is not None and not Path(name).exists()
    adapter = {"base": name if on_hub else None, "task_type": config["task_type"]}
    text = merge_card({"architecture": None, "versions": versions(), **info, "adapter": adapter})
    (folder / "README.md").write_text(text, encoding="utf-8")
