"""A sweep file: a recipe with a section that says what to try and how to judge it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from hf_fuse.errors import RecipeError
from hf_fuse.merge.sweep_metrics import Metric, Strict
from hf_fuse.merge.sweep_search import Range, Values
from hf_fuse.recipe import explain, read_yaml
from hf_fuse.registry import nearest

FIXED = ("output", "push", "provenance", "sweep")  # the sweep's own business, or nobody's


class SweepSettings(Strict):
    """The section ``sweep`` of a sweep file.

    Attributes:
        parameters: dotted key of the recipe -> the values to try: a list, or a range
            ``{low: 0, high: 1, log: false, integer: false}`` (random and optuna).
        search: every combination of the lists, draws, or optuna's tree-structured Parzen estimator.
        trials: number of merges; a grid takes as many as it has combinations and refuses to have more than this.
        metric: what is measured of each merge.
        goal: known for every metric but a command's.
        second: measured too, for the trade-off in the table and the plot.
        seed: of draws and of optuna.
    """

    parameters: dict[str, Values] = Field(min_length=1)
    search: Literal["grid", "random", "optuna"] = "grid"
    trials: int | None = Field(default=None, ge=1)
    metric: Metric
    goal: Literal["minimize", "maximize"] | None = None
    second: Metric | None = None
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> SweepSettings:
        for key, values in self.parameters.items():
            if key.split(".")[0] in FIXED:
                raise ValueError(f"parameters: {key} can't be swept")
            if self.search == "grid" and isinstance(values, Range):
                raise ValueError(f"parameters: {key} is a range; a grid needs a list of values, or say search: random")
        if self.search != "grid" and self.trials is None:
            raise ValueError(f"trials: say how many merges the {self.search} search may try")
        if self.metric.delta_norm:
            raise ValueError("metric: delta_norm says nothing about how good a model is; it can be the second metric")
        if self.metric.key and not self.metric.command:
            raise ValueError("metric: key names one of the numbers of a command, but there is no command")
        if self.goal is None and self.metric.goal is None:
            raise ValueError("goal: say minimize or maximize; it can't be known for a command")
        return self

    @property
    def lower_is_better(self) -> bool:
        return (self.goal or self.metric.goal) == "minimize"


def read_sweep(source: str | Path | dict, trials: int | None = None) -> tuple[dict[str, Any], SweepSettings]:
    """A sweep file -> (the recipe in it, unchecked; the checked section ``sweep``).

    Raises:
        RecipeError: unreadable, no section, an unknown key (with the nearest name) or a wrong value.
    """
    name = "recipe"
    if isinstance(source, dict):
        data = dict(source)
    else:
        name = str(source)
        try:
            text = Path(source).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise RecipeError(f"{source}: cannot be read ({reason}). Expected a recipe with a sweep section.") from None
        data = read_yaml(text, name)
    section = data.pop("sweep", None) if isinstance(data, dict) else None
    if not isinstance(section, dict):
        raise RecipeError(
            f"{name}: has no section sweep. Expected a recipe and, for example, "
            "sweep: {parameters: {parameters.density: [0.1, 0.3]}, metric: {perplexity: [text.txt]}}."
        )
    if trials is not None:
        section = section | {"trials": trials}
    try:
        return data, SweepSettings.model_validate(section)
    except ValidationError as error:
        raise RecipeError(f"{name}: sweep: {_explained(error)}") from None


def _explained(error: ValidationError) -> str:
    problem = error.errors()[0]
    if problem["type"] != "extra_forbidden":
        return explain(error, SweepSettings)
    *parents, key = problem["loc"]
    model = Metric if parents[:1] in (["metric"], ["second"]) else SweepSettings
    place = f" in {'.'.join(map(str, parents))}" if parents else ""
    return f"unknown key {key!r}{place}. {nearest(str(key), model.model_fields)}"
