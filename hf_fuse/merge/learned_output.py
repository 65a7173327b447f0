"""The output folder of learned coefficients: the file, the recipe that uses it, the recipe that made it, a chart."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file
from torch import Tensor

from hf_fuse import registry
from hf_fuse.checkpoint.adapter import base_fingerprint
from hf_fuse.errors import FuseError
from hf_fuse.evaluation_data import unique_names
from hf_fuse.merge.coefficient_chart import coefficient_chart
from hf_fuse.merge.coefficients import FILE, Coefficients, fingerprint
from hf_fuse.merge.columns import Columns
from hf_fuse.merge.family import Family
from hf_fuse.merge.finish import RECIPE_FILE, resolved_recipe, versions
from hf_fuse.recipe import dump_recipe

MERGE_FILE, CHART_FILE, HISTORY_FILE = "merge.yaml", "coefficients.png", "history.json"
PINNED = {"revision", "adapter_revision"}  # of a model, the commits that it was read from
MASK_FILE, MASKED = "mask.safetensors", "masked_task_arithmetic"


@dataclass(frozen=True)
class LearnedCoefficients:
    """What an estimator of coefficients has found.

    Attributes:
        values_KG: a number per model and column.
        layout: columns of each tensor; a tensor that it leaves out stays the base's.
        cut: where the chunks of a tensor are, see :func:`~hf_fuse.merge.learned_weights.chunk_numbers`.
        facts: for the summary: name -> number or text.
        history: a row of figures per epoch or check.
        mask: a factor for each element of all task vectors, by tensor; then the merge is masked_task_arithmetic.
    """

    values_KG: Tensor
    layout: Mapping[str, Columns]
    cut: str = "slices"
    facts: Mapping[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    mask: Mapping[str, Tensor] | None = None


def write_coefficients(family: Family, found: LearnedCoefficients, folder: Path, output: Path) -> None:
    """Writes everything into ``folder``, which will be ``output``; the chart only if matplotlib is there.

    Raises:
        FuseError: a coefficient is not finite.
    """
    recipe, plan = family.recipe, family.plan
    if not found.values_KG.isfinite().all():
        raise FuseError(f"{recipe.estimator}: the coefficients are not finite. Try a smaller learning_rate.")
    base = plan.parents[recipe.base_model.key]
    rows = found.values_KG.detach().cpu().tolist()
    values = [{unit.name: _row(row, found.layout.get(unit.name)) for unit in family.units} for row in rows]
    made = Coefficients(
        recipe.estimator, MASKED if found.mask else plan.method.name, dict(plan.recipe.parameters),
        (base.ref.key, base_fingerprint(base.checkpoint)),
        [(parent.ref.key, fingerprint(parent)) for parent in family.models], values, family.heads, found.cut,
        recipe.seed, dict(found.facts),
    )  # fmt: skip
    (folder / FILE).write_text(made.to_json(), encoding="utf-8")
    (folder / HISTORY_FILE).write_text(json.dumps(found.history, indent=1) + "\n", encoding="utf-8")
    provenance = {"versions": versions(), "learned": dict(found.facts)}
    pinned = resolved_recipe(plan)
    models = [
        model.model_copy(update=its.model_dump(include=PINNED)) for model, its in zip(recipe.models, pinned.models)
    ]
    pins = {"base_model": pinned.base_model, "models": models}
    record = recipe.model_copy(update=pins | {"output": None, "provenance": provenance})
    (folder / RECIPE_FILE).write_text(dump_recipe(record), encoding="utf-8")
    merging = pinned.model_dump(exclude_unset=True, exclude_none=True, exclude={"seed", "provenance"})
    merging["parameters"] = {"weight": {"learned": str(output)}} | merging["parameters"]
    if found.mask:
        metadata = {"statistics": registry.get("merge", MASKED).module.STATISTICS}
        save_file({name: values.contiguous() for name, values in found.mask.items()}, folder / MASK_FILE, metadata)
        merging["method"] = MASKED
        for model in merging["models"]:
            model["statistics"] = str(output)
    (folder / MERGE_FILE).write_text(yaml.safe_dump(merging, sort_keys=False, allow_unicode=True), encoding="utf-8")
    # The base's tensors, whose coefficients are 0 by definition, would only pull the means down.
    learned = {name for name, own in found.layout.items() if own.learned}
    merged = {name for name in values[0] if name in learned or any(one[name] != [0.0] for one in values)}
    shown = [{name: row for name, row in one.items() if name in merged} for one in values]
    names = dict(zip(unique_names([Path(parent.ref.key) for parent in family.models]), shown))
    with contextlib.suppress(FuseError):  # without matplotlib the numbers are all there is
        coefficient_chart(names, folder / CHART_FILE, title=f"{recipe.estimator}: learned coefficients")


def _row(values: list[float], own: Columns | None) -> list[float]:
    return [0.0] if own is None else values[own.first : own.first + own.count]
