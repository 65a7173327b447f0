"""Many merges of one recipe, scored, the best kept: a search over parameters, weights, or whole methods.

A sweep file is a recipe with a section more::

    sweep:
      parameters:
        parameters.density: [0.1, 0.2, 0.5]
        models.0.weight: {low: 0, high: 1}
      search: random          # or grid (lists only), or optuna
      trials: 20
      metric: {perplexity: [held_out.txt]}
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError, model_validator

from hf_fuse.checkpoint.writer import PartialFolder, exclusive_output
from hf_fuse.errors import FuseError, OutputError, RecipeError
from hf_fuse.merge.sweep_metrics import Metric, Scorer, Strict
from hf_fuse.merge.sweep_search import Range, Values, asked, probes
from hf_fuse.recipe import explain, read_yaml
from hf_fuse.registry import nearest

if TYPE_CHECKING:
    from rich.console import Console

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


@dataclass
class Trial:
    """One merge of a sweep. A failed one has no score and says why in ``note``."""

    number: int
    parameters: dict[str, Any]
    score: float | None = None
    second: float | None = None
    figures: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    note: str = ""

    @property
    def label(self) -> str:
        shown = {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in self.parameters.items()}
        return ", ".join(f"{short(key)} {value}" for key, value in shown.items())


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found: ``output`` holds the merge of ``best``; ``record`` and ``plot`` lie beside it."""

    output: Path
    best: Trial
    trials: list[Trial]
    settings: SweepSettings
    record: Path
    plot: Path | None = None

    @property
    def ranked(self) -> list[Trial]:
        """Best first; failed trials last, in their order."""
        done = [trial for trial in self.trials if trial.score is not None]
        sign = 1 if self.settings.lower_is_better else -1
        failed = [trial for trial in self.trials if trial.score is None]
        return [*sorted(done, key=lambda trial: (sign * trial.score, trial.number)), *failed]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what ``sweep.json`` holds and ``hf-fuse sweep --json`` prints."""
        second = self.settings.second
        return {
            "output": self.output.name,
            "metric": self.settings.metric.name,
            "goal": "minimize" if self.settings.lower_is_better else "maximize",
            "second": second.name if second else None,
            "best": self.best.number,
            "trials": [asdict(trial) for trial in self.trials],
            "sweep": self.settings.model_dump(exclude_unset=True),
        }

    def print(self, console: Console | None = None) -> None:
        """A table of all trials, best first."""
        from hf_fuse.merge.sweep_report import print_sweep

        print_sweep(self, console)


def short(key: str) -> str:
    """``parameters.density`` -> ``density``; other keys as they are."""
    return key.removeprefix("parameters.")


def sweep(
    recipe: str | Path | dict,
    output: str | Path | None = None,
    *,
    overrides: dict[str, Any] | None = None,
    trials: int | None = None,
    overwrite: bool = False,
    device: str = "cpu",
    allow_pickle: bool = False,
    workers: int | None = None,
    plot: str | Path | None = None,
) -> SweepResult:
    """Merges with each set of parameters, scores each merge, and keeps the best as ``output``.

    All trials are planned before the first is merged (for optuna: the ends of its ranges). Trials lie in
    ``<output>.partial`` while they are scored; at most two at a time are on disk. A trial that fails is noted and
    skipped. Beside the output appear ``<output>.sweep.json`` with all trials and, where matplotlib is installed,
    ``<output>.sweep.png``.

    Args:
        recipe: a sweep file, or the same as a dictionary.
        output: the folder to make; else the recipe's.
        overrides: dotted recipe keys that hold for every trial.
        trials: wins over the file's.
        overwrite: replace an existing output and its record when the sweep is complete.
        device: where merges and this library's evaluations run.
        allow_pickle: accept ``.bin`` inputs.
        workers: threads of each merge.
        plot: draw to this file instead.

    Raises:
        FuseError: something in the file is wrong (before any work), or no trial succeeded. No output is left then.
    """
    from hf_fuse.merge.plan import plan as make_plan
    from hf_fuse.merge.workers import World

    data, settings = read_sweep(recipe, trials)
    target = output or (overrides or {}).get("output") or data.get("output")
    if target is None:
        raise RecipeError("output: no folder is given. Pass --output DIR, or say output in the recipe.")
    folder = Path(target).expanduser().absolute()
    record, chart = _companions(folder, plot, overwrite)
    if data.get("push") or (overrides or {}).get("push"):
        raise RecipeError("push: a sweep does not push. Remove it, and push the kept model with hf-fuse push.")
    if World().size > 1:
        raise RecipeError("sweep: runs in one process. Start it without a launcher.")

    def planned(parameters: dict[str, Any], place: Path, **options: Any) -> Any:
        fixed = {key: value for key, value in (overrides or {}).items() if key != "output"}
        return make_plan(data, overrides=fixed | parameters, output=place, allow_pickle=allow_pickle, **options)

    first, notes = None, {}
    for parameters in probes(settings):
        try:
            made = planned(parameters, folder, overwrite=overwrite)
        except RecipeError as error:
            tried = ", ".join(f"{key}: {value}" for key, value in parameters.items())
            raise RecipeError(f"{error} (sweep with {tried})") from None
        first = first or made.recipe
        notes |= dict.fromkeys(made.warnings)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    score = Scorer(settings.metric, settings.second, first, device=device)

    with exclusive_output(folder, overwrite=overwrite) as partial:
        partial.folder.mkdir()
        runs = _Runs(settings, partial, folder.name, planned, score, device=device, workers=workers)
        runs.run()
        best = runs.best
        if best is None:
            reasons = next((trial.note for trial in runs.trials), "no trial was run")
            raise FuseError(f"sweep: none of {len(runs.trials)} trials succeeded. The first: {reasons}")
        runs.unpack()
        partial.publish()
    result = SweepResult(folder, best, runs.trials, settings, record)
    _write(record, json.dumps(result.to_dict(), indent=2, default=str) + "\n")
    if chart is not None:
        from hf_fuse.merge.sweep_report import plot_sweep

        result = SweepResult(folder, best, runs.trials, settings, record, plot_sweep(result, chart))
    return result


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


def _companions(folder: Path, plot: str | Path | None, overwrite: bool) -> tuple[Path, Path | None]:
    """Where the record and the plot go: refused now rather than after hours of work."""
    record = folder.with_name(folder.name + ".sweep.json")
    if record.exists() and not overwrite:
        raise OutputError(f"{record}: exists. Choose another output, or replace it with --overwrite.")
    if plot is not None:
        from hf_fuse.plots import FORMATS

        if Path(plot).suffix.lower() not in FORMATS:
            raise FuseError(f"{plot}: charts are written as {', '.join(FORMATS)}. Give the file one of these endings.")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        if plot is not None:
            raise FuseError(
                f'{plot}: charts need matplotlib, which is not installed. Run: pip install "hf-fuse[plot]"'
            ) from None
        return record, None
    return record, Path(plot) if plot else folder.with_name(folder.name + ".sweep.png")


def _write(path: Path, text: str) -> None:
    try:
        fresh = path.with_name(f".{path.name}.new")
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}). The merged model is complete.") from None


@contextmanager
def _said_once() -> Iterator[None]:
    """Every merge warns of the same missing licences: once is enough."""
    logger, seen = logging.getLogger("hf_fuse.card"), set()

    def fresh(record: logging.LogRecord) -> bool:
        known = record.getMessage() in seen
        seen.add(record.getMessage())
        return not known

    logger.addFilter(fresh)
    try:
        yield
    finally:
        logger.removeFilter(fresh)


@dataclass
class _Runs:
    """The trials of one sweep, as they happen."""

    settings: SweepSettings
    partial: PartialFolder
    name: str  # of the output: model cards take their title from it
    planned: Any
    score: Scorer
    device: str
    workers: int | None
    trials: list[Trial] = field(default_factory=list)
    best: Trial | None = None

    def run(self) -> None:
        search = asked(self.settings)
        parameters = next(search)
        with _said_once(), suppress(StopIteration):
            while True:
                trial = Trial(len(self.trials) + 1, parameters)
                self.trials.append(trial)
                self._try(trial)
                self._report(trial)
                parameters = search.send(trial.score)

    def _folder(self, trial: Trial) -> Path:
        return self.partial.folder / f"trial-{trial.number}" / self.name

    def _try(self, trial: Trial) -> None:
        from hf_fuse.merge.engine import merge

        place, started = self._folder(trial), time.perf_counter()
        try:
            made = self.planned(trial.parameters, place)
            merge(made, device=self.device, workers=self.workers)
            self.score(place, trial)
        except FuseError as error:
            trial.score, trial.note = None, str(error)
        trial.seconds = round(time.perf_counter() - started, 3)
        beaten = trial
        if trial.score is not None and (self.best is None or self._better(trial, self.best)):
            beaten, self.best = self.best, trial
        if beaten is not None:
            shutil.rmtree(self._folder(beaten).parent, ignore_errors=True)

    def _better(self, trial: Trial, other: Trial) -> bool:
        return trial.score < other.score if self.settings.lower_is_better else trial.score > other.score

    def _report(self, trial: Trial) -> None:
        total = f"/{self.settings.trials}" if self.settings.trials else ""
        outcome = f"failed: {trial.note}" if trial.score is None else f"{self.settings.metric.name} {trial.score:.6g}"
        text = f"trial {trial.number}{total}: {trial.label}: {outcome}"
        print("".join(c if c.isprintable() else " " for c in text), file=sys.stderr)

    def unpack(self) -> None:
        """Moves the best trial's files up into the partial folder, which then is the output."""
        place = self._folder(self.best)
        for path in list(place.iterdir()):
            path.rename(self.partial.folder / path.name)
        shutil.rmtree(place.parent)
