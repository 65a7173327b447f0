"""What the figures say: summaries over seeds, and which known orderings hold, fail or stay open."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass
from typing import Any

NOT_MERGES = ("base", "experts, each on its own", "experts, on all tasks", "trained on all tasks")
SUBSPACE = ("tsv_m", "iso_c", "iso_cts", "task_arithmetic + subspace_boosting")


@dataclass
class Summary:
    """One label over all seeds: mean and sample standard deviation."""

    label: str
    mean: float
    spread: float
    normalised: float
    worst: float
    norm: float
    seeds: list[float]  # mean over tasks, seed by seed
    parameters: list[dict[str, Any]]


def summarise(runs: list[dict[str, Any]]) -> list[Summary]:
    found = []
    labels = [label for label in runs[0]["rows"] if all(label in run["rows"] for run in runs)]
    for label in labels:
        rows = [run["rows"][label] for run in runs]
        own = [run["rows"]["experts, each on its own"].scores for run in runs]
        means = [statistics.mean(row.scores) for row in rows]
        shares = [statistics.mean(s / max(e, 1e-9) for s, e in zip(row.scores, best)) for row, best in zip(rows, own)]
        found.append(
            Summary(
                label, statistics.mean(means), statistics.stdev(means) if len(means) > 1 else 0.0,
                statistics.mean(shares), statistics.mean(min(row.scores) for row in rows),
                statistics.mean(row.norm for row in rows), means, [row.parameters for row in rows],
            )
        )  # fmt: skip
    return found


def findings(summaries: list[Summary], conflicts: list[dict[str, float]]) -> list[str]:
    """Sentences about known orderings, computed from the figures: they hold, fail or stay open."""
    by = {summary.label: summary for summary in summaries}
    said = [
        f"Task vectors of two experts have a mean cosine of {statistics.mean(c['cosine'] for c in conflicts):.2f} and "
        f"opposite signs in {statistics.mean(c['opposite signs'] for c in conflicts):.0%} of the elements."
    ]
    chain = ["linear", "task_arithmetic (tuned)", "ties (tuned)"]
    said += [compared(by, low, high) for low, high in itertools.pairwise(chain) if {low, high} <= set(by)]
    if {"task_arithmetic (tuned)", "consensus (tuned)"} <= set(by):
        said.append(compared(by, "task_arithmetic (tuned)", "consensus (tuned)"))
    for name in SUBSPACE:
        for label in (name, f"{name} (tuned)"):
            if label in by:
                rival = "linear" if label == name else "task_arithmetic (tuned)"
                said.append(compared(by, label, rival, warning=True))
    merges = [summary for summary in summaries if summary.label not in NOT_MERGES]
    free = [summary for summary in merges if "(tuned)" not in summary.label]
    tuned = [summary for summary in merges if "(tuned)" in summary.label]
    for kind, group in (("with defaults", free), ("tuned", tuned)):
        if group:
            best = max(group, key=lambda summary: summary.mean)
            ahead = by["trained on all tasks"].mean - best.mean
            said.append(
                f"Best {kind}: {best.label}, {best.mean:.3f}, {best.normalised:.0%} of the experts; training on all "
                f"tasks gives {by['trained on all tasks'].mean:.3f} ({ahead:+.3f})."
            )
    long = [summary for summary in free if summary.norm > 1.5]
    if long:
        names = ", ".join(summary.label for summary in long)
        below = sum(summary.mean < by["linear"].mean for summary in long)
        said.append(
            f"Defaults that move further than 1.5 expert lengths: {names}; {below} of {len(long)} score below the soup."
        )
    return said


def compared(by: dict[str, Summary], low: str, high: str, *, warning: bool = False) -> str:
    """Whether ``low`` < ``high``, judged seed by seed."""
    gaps = [b - a for a, b in zip(by[low].seeds, by[high].seeds)]
    wins = sum(gap > 0 for gap in gaps)
    verdict = "holds" if wins == len(gaps) else "does not hold" if not any(gap > 0 for gap in gaps) else "is open"
    what = "The warning about subspace methods, " if warning else "The order "
    return (
        f"{what}{low} < {high}, {verdict} here: {by[low].mean:.3f} and {by[high].mean:.3f}, the second ahead in {wins} "
        f"of {len(gaps)} seed{'s' if len(gaps) > 1 else ''}."
    )
