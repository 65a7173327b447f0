"""What a sweep measures of each merge: a command's last line, perplexity, accuracy, or the length of its delta."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from hf_fuse.errors import FuseError, RecipeError

if TYPE_CHECKING:
    from hf_fuse.merge.sweep_result import Trial
    from hf_fuse.recipe import Recipe

KINDS = ("command", "perplexity", "dataset", "delta_norm", "key")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _spelled_out(value: Any) -> Any:
    return {"delta_norm": True} if value == "delta_norm" else value


class Metric(Strict):
    """One number per model, by exactly one of:

    ``command``: runs without a shell; ``{model}`` is the merged folder. The last line of its standard output is a
    number, or a JSON object of numbers, of which ``key`` (else the first) counts. ``perplexity``: text files; the
    geometric mean over several. ``dataset``: with ``label_column`` the accuracy, or the ``figure`` asked for, else the
    perplexity of ``text_column``. ``delta_norm`` (second metric only): norm of merged - base over the mean norm of
    model - base. ``key`` alone (second metric only): another number of the first metric's command.
    """

    command: str | None = None
    key: str | None = None
    timeout: float | None = Field(default=3600, gt=0)
    perplexity: Annotated[list[str] | None, BeforeValidator(_listed)] = None
    dataset: str | None = None
    subset: str | None = None
    split: str = "test"
    text_column: str = "text"
    label_column: str | None = None
    figure: Literal["accuracy", "macro_f1"] = "accuracy"
    batch_size: int = Field(default=8, ge=1)
    max_length: int | None = Field(default=None, ge=2)
    stride: int | None = Field(default=None, ge=1)
    limit: int | None = Field(default=None, ge=1)
    delta_norm: bool = False

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return _spelled_out(value)

    @model_validator(mode="after")
    def _one_kind(self) -> Metric:
        given = [kind for kind in KINDS if getattr(self, kind)]
        if given not in ([kind] for kind in KINDS) and given != ["command", "key"]:
            raise ValueError("give exactly one of command, perplexity, dataset (and delta_norm for second)")
        if self.command is not None:
            try:
                words = shlex.split(self.command)
            except ValueError as error:
                raise ValueError(f"command: {error}") from None
            if not any("{model}" in word for word in words[1:]):
                raise ValueError("command: has no {model} after the program, where the merged folder is to stand")
        return self

    @property
    def name(self) -> str:
        """For tables and axes."""
        if self.command or self.key:
            return self.key or "score"
        if self.delta_norm:
            return "delta norm"
        return self.figure.replace("_", " ") if self.label_column else "perplexity"

    @property
    def goal(self) -> str | None:
        if self.command or self.key or self.delta_norm:
            return None
        return "maximize" if self.label_column else "minimize"


class Scorer:
    """Measures merged folders. What can be checked without a model is checked when it is made.

    Raises:
        FuseError: no such program, text file, dataset or column.
    """

    def __init__(self, metric: Metric, second: Metric | None, recipe: Recipe, *, device: str = "cpu"):
        self.metric, self.second, self.device = metric, second, device
        self._base = recipe.base_model.key if recipe.base_model else None
        self._models = [model.key for model in recipe.models]
        self._mean_norm: float | None = None
        for wanted in filter(None, (metric, second)):
            self._check(wanted)

    def _check(self, metric: Metric) -> None:
        if metric.command and shutil.which(shlex.split(metric.command)[0]) is None:
            raise RecipeError(f"sweep: command: no program {shlex.split(metric.command)[0]!r} is found.")
        if metric.perplexity:
            from hf_fuse.evaluation_data import read_text_files

            read_text_files(metric.perplexity)
        if metric.dataset:
            from hf_fuse.evaluation_data import labelled_set, load_rows, text_set

            name, rows = load_rows(metric.dataset, subset=metric.subset, split=metric.split, limit=metric.limit)
            if metric.label_column:
                labelled_set(name, rows, metric.text_column, metric.label_column)
            else:
                text_set(name, rows, metric.text_column)
        if metric.delta_norm and not (self._base and self._models):
            raise RecipeError("sweep: second: delta_norm needs base_model and models in the recipe.")
        if metric.key and not metric.command and not self.metric.command:
            raise RecipeError(f"sweep: second: key {metric.key!r} names a number of the first metric's command.")

    def __call__(self, folder: Path, trial: Trial) -> None:
        """Puts score, second score and all figures into ``trial``.

        Raises:
            FuseError: the score can't be had. A second metric that fails is only noted.
        """
        trial.score, trial.figures = self._measure(self.metric, folder)
        if self.second is None:
            return
        try:
            if self.second.key and not self.second.command:
                trial.second = _chosen(trial.figures, self.second.key)
            else:
                trial.second, figures = self._measure(self.second, folder)
                trial.figures = figures | trial.figures
        except FuseError as error:
            trial.note = f"second metric: {error}"

    def _measure(self, metric: Metric, folder: Path) -> tuple[float, dict[str, float]]:
        if metric.command:
            figures = run_command(metric.command, folder, timeout=metric.timeout)
            score = _chosen(figures, metric.key)
        elif metric.delta_norm:
            score = self._delta_norm(folder)
            figures = {metric.name: score}
        else:
            score, figures = _evaluated(metric, folder, self.device)
        if not math.isfinite(score):
            raise FuseError(f"the {metric.name} is {score}, which is not finite")
        return score, figures

    def _delta_norm(self, folder: Path) -> float:
        from hf_fuse.diagnostics.task_vectors import inspect_models

        if self._mean_norm is None:
            norms = inspect_models(self._models, self._base).total.norms
            self._mean_norm = sum(norms) / len(norms)
        norm = inspect_models([str(folder)], self._base).total.norms[0]
        return norm / self._mean_norm if self._mean_norm else float("inf")


def _evaluated(metric: Metric, folder: Path, device: str) -> tuple[float, dict[str, float]]:
    from hf_fuse.evaluation import evaluate_models

    report = evaluate_models(
        [folder], texts=metric.perplexity or [], dataset=metric.dataset, subset=metric.subset, split=metric.split,
        text_column=metric.text_column, label_column=metric.label_column, batch_size=metric.batch_size,
        max_length=metric.max_length, stride=metric.stride, limit=metric.limit, device=device,
    )  # fmt: skip
    figures = {f"{row.metric} {row.dataset}": row.value for row in report.rows}
    wanted = metric.figure if metric.label_column else "perplexity"
    values = [row.value for row in report.rows if row.metric == wanted]
    if metric.label_column:
        return values[0], figures
    if not all(math.isfinite(value) and value > 0 for value in values):
        return math.nan, figures
    return math.exp(sum(map(math.log, values)) / len(values)), figures


def run_command(command: str, folder: Path, *, timeout: float | None) -> dict[str, float]:
    """Runs a scoring command without a shell -> its numbers by name (``score`` for a bare number).

    Raises:
        FuseError: it failed, took longer than ``timeout`` seconds, or its last line holds no number.
    """
    words = [word.replace("{model}", str(folder)) for word in shlex.split(command)]
    try:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise FuseError(f"command: {words[0]} can't be run ({error.strerror})") from None
    with process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException as error:
            # With what it started itself: a scorer that launches others must not outlive the sweep.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise FuseError(f"command: took longer than {timeout:g} s and was ended") from None
            raise
    if process.returncode:
        said = (err.strip() or out.strip() or "it said nothing").splitlines()[-1]
        raise FuseError(f"command: ended with status {process.returncode}: {said[:200]}")
    return _numbers(out)


def _numbers(out: str) -> dict[str, float]:
    lines = out.strip().splitlines()
    last = lines[-1].strip() if lines else ""
    with suppress(ValueError):
        return {"score": float(last)}
    with suppress(ValueError):
        found = json.loads(last)
        if isinstance(found, dict):
            numbers = {
                str(key): float(value)
                for key, value in found.items()
                if isinstance(value, (int, float)) and not isinstance(value, bool)
            }
            if numbers:
                return numbers
    raise FuseError(
        f"command: the last line of its output is {last[:80]!r}, expected a number or a JSON object with numbers"
    )


def _chosen(figures: dict[str, float], key: str | None) -> float:
    if key is None:
        return next(iter(figures.values()))
    if key not in figures:
        raise FuseError(f"command: printed no {key!r}, only {', '.join(figures)}")
    return figures[key]
