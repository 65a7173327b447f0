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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_fuse.checkpoint.writer import PartialFolder, exclusive_output
from hf_fuse.errors import FuseError, OutputError, RecipeError
from hf_fuse.merge.sweep_metrics import Scorer
from hf_fuse.merge.sweep_result import SweepResult, Trial
from hf_fuse.merge.sweep_search import asked, probes
from hf_fuse.merge.sweep_settings import SweepSettings, read_sweep


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
