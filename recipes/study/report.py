"""The study for people: a table per suite in the terminal and in Markdown, what it says, and a picture."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from study.findings import NOT_MERGES, Summary, findings, summarise

HEADINGS = ("model", "defaults", "change", "tuned", "change", "of experts", "worst task", "chosen on validation data")
LEGEND = """Means over tasks and seeds, ± the standard deviation over seeds.

- *change*: the length of the merged change, |merged - base|, over the mean |expert - base|.
- *of experts*: the share of what each expert reaches on its own task; *worst task*: the lowest score of a task. Both of
  the better column.
- *chosen*: by the seeds, from a small grid, on validation data that no column shows."""


def table(summaries: list[Summary]) -> list[tuple[str, ...]]:
    """What is not a merge first; then methods, the best first: one row each, defaults beside the tuned."""
    by = {summary.label: summary for summary in summaries}
    lines = [
        (s.label, _mean(s), f"{s.norm:.2f}", "", "", f"{s.normalised:.0%}", f"{s.worst:.3f}", "")
        for s in summaries
        if s.label in NOT_MERGES
    ]
    merges = []
    for s in summaries:
        if s.label in NOT_MERGES or s.label.endswith(" (tuned)"):
            continue
        tuned = by.get(f"{s.label} (tuned)")
        better = max((s, tuned or s), key=lambda one: one.mean)
        label = "linear (the soup)" if s.label == "linear" else s.label
        last = (_mean(tuned), f"{tuned.norm:.2f}") if tuned else ("", "")
        shown = (f"{better.normalised:.0%}", f"{better.worst:.3f}", _chosen(tuned) if tuned else "")
        merges.append((better.mean, (label, _mean(s), f"{s.norm:.2f}", *last, *shown)))
    return lines + [line for _, line in sorted(merges, key=lambda entry: -entry[0])]


def _mean(summary: Summary) -> str:
    return f"{summary.mean:.3f} ± {summary.spread:.3f}" if len(summary.seeds) > 1 else f"{summary.mean:.3f}"


def _chosen(summary: Summary) -> str:
    said = {", ".join(f"{key} {value}".strip() for key, value in p.items()) for p in summary.parameters if p}
    return "; ".join(sorted(said))


def markdown(name: str, part: dict[str, Any], lines: list[tuple[str, ...]]) -> str:
    """One suite as a section."""
    head, *body = ["| " + " | ".join(line) + " |" for line in [HEADINGS, *lines]]
    rows = [head, "|---|" + "---:|" * (len(HEADINGS) - 2) + "---|", *body]
    left_out = [f"- Left out: {label} ({reason})" for label, reason in part["skipped"].items()]
    said = [f"- {sentence}" for sentence in part["findings"]]
    title = f"## {name}: {part['unit']}, {len(part['tasks'])} tasks ({', '.join(part['tasks'])})"
    return "\n".join([title, "", *rows, "", *said, *left_out, ""])


def report(name: str, runs: list[dict[str, Any]], output: Path) -> tuple[dict[str, Any], str]:
    """Prints one suite's table and findings and draws its picture.

    Returns:
        Its part of the JSON, and its section in Markdown.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from hf_fuse.plot_points import scatter

    summaries, unit, tasks = summarise(runs), runs[0]["unit"], runs[0]["tasks"]
    lines, console = table(summaries), Console(highlight=False)
    console.print(f"\n[bold]{name}[/]: {unit} on held-out data, {len(tasks)} tasks ({', '.join(tasks)})")
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    for number, heading in enumerate(HEADINGS):
        side = "left" if number in (0, len(HEADINGS) - 1) else "right"
        shown.add_column(heading, justify=side, no_wrap=number == 0, overflow="fold")
    for number, line in enumerate(lines):
        best = number == len(NOT_MERGES)
        shown.add_row(*map(escape, line), style="bold" if best else "dim" if number < len(NOT_MERGES) else "")
        if number == len(NOT_MERGES) - 1:
            shown.add_section()
    console.print(shown)
    said = findings(summaries, [run["conflict"] for run in runs])
    for sentence in said:
        console.print(f"  - {sentence}", markup=False)
    for label, reason in runs[0]["skipped"].items():
        console.print(f"  - Left out: {label} ({reason})", markup=False, style="dim")
    families = {s.label: "reference" if s.label in NOT_MERGES else "tuned" if "(tuned)" in s.label else "defaults"
                for s in summaries}  # fmt: skip
    best = max((s for s in summaries if s.label not in NOT_MERGES), key=lambda s: s.mean)
    picture = scatter(
        {summary.label: (summary.norm, summary.mean) for summary in summaries}, path=output / f"{name}.png",
        title=f"{name}: {unit} against the length of the merged change", ylabel=f"{unit}, mean over tasks",
        xlabel="|merged - base| / mean |expert - base|", families=families, best=best.label,
        spread={summary.label: summary.spread for summary in summaries},
    )  # fmt: skip
    part = {
        "unit": unit, "tasks": tasks, "summaries": [asdict(summary) for summary in summaries], "findings": said,
        "skipped": runs[0]["skipped"], "conflict": [run["conflict"] for run in runs], "plot": picture.name,
        "scores": [{label: asdict(row) for label, row in run["rows"].items()} for run in runs],
    }  # fmt: skip
    return part, markdown(name, part, lines)
