"""A sweep's trials as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from hf_fuse.merge.sweep_result import SweepResult, Trial

MOST_LINES = 7  # more series than colours can't be told apart


def print_sweep(result: SweepResult, console: Console | None = None) -> None:
    """All trials, the best on top and bold, failed ones last; then where things lie."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from hf_fuse.merge.sweep_result import short

    console = console or Console()
    settings = result.settings
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("trial", justify="right")
    for key in settings.parameters:
        table.add_column(escape(short(key)), justify="right", overflow="fold")
    table.add_column(f"{escape(settings.metric.name)} {'↓' if settings.lower_is_better else '↑'}", justify="right")
    if settings.second:
        table.add_column(escape(settings.second.name), justify="right")
    table.add_column("time", justify="right")
    if any(trial.note for trial in result.trials):
        table.add_column("note", overflow="fold")
    for trial in result.ranked:
        cells = [str(trial.number), *(escape(_value(trial.parameters[key])) for key in settings.parameters)]
        cells += [_value(trial.score)] + ([_value(trial.second)] if settings.second else [])
        cells += [f"{trial.seconds:.1f} s"] + ([escape(trial.note)] if len(table.columns) > len(cells) + 1 else [])
        style = "bold" if trial is result.best else "dim" if trial.score is None else ""
        table.add_row(*cells, style=style)
    console.print(table)
    failed = sum(trial.score is None for trial in result.trials)
    if failed:
        console.print(f"{failed} of {len(result.trials)} trials failed")
    for label, path in (("best", result.output), ("record", result.record), ("plot", result.plot)):
        if path:
            console.print(f"{label}: {path}", markup=False, highlight=False, soft_wrap=True)


def _value(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def plot_sweep(result: SweepResult, path: str | Path) -> Path | None:
    """The trade-off of two metrics, or the score against the parameter that was swept most finely."""
    from hf_fuse.merge.sweep_result import short
    from hf_fuse.plot_points import lines, scatter

    settings = result.settings
    done = [trial for trial in result.trials if trial.score is not None]
    ylabel = f"{settings.metric.name} ({'lower' if settings.lower_is_better else 'higher'} is better)"
    if settings.second and any(trial.second is not None for trial in done):
        points = {trial.label: (trial.second, trial.score) for trial in done if trial.second is not None}
        return scatter(
            points, path=path, title="Trade-off", xlabel=settings.second.name, ylabel=ylabel, best=result.best.label
        )
    axis = _axis(done, list(settings.parameters))
    if axis is None:
        points = {trial.label: (trial.number, trial.score) for trial in done}
        return scatter(points, path=path, title="Trials", xlabel="trial", ylabel=ylabel, best=result.best.label)
    series: dict[str, list[tuple[float, float]]] = {}
    for trial in done:
        rest = ", ".join(f"{short(key)} {_value(value)}" for key, value in trial.parameters.items() if key != axis)
        series.setdefault(rest, []).append((trial.parameters[axis], trial.score))
    title, best = f"Score against {short(axis)}", (result.best.parameters[axis], result.best.score)
    if len(series) <= MOST_LINES:
        return lines(series, path=path, title=title, xlabel=short(axis), ylabel=ylabel, best=best)
    points = {trial.label: (trial.parameters[axis], trial.score) for trial in done}
    return scatter(points, path=path, title=title, xlabel=short(axis), ylabel=ylabel, best=result.best.label)


def _axis(trials: list[Trial], keys: list[str]) -> str | None:
    """The parameter with the most different numbers."""
    different = {}
    for key in keys:
        values = [trial.parameters[key] for trial in trials]
        if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
            different[key] = len(set(values))
    return max(different, key=different.get) if different else None
