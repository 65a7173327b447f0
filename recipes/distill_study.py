# quick
"""Ways to teach a small student, each with the same steps and tries: from labels, from teachers, or from itself.

    python recipes/distill_study.py            # seconds: one seed, hardly trained; shows that everything runs
    python recipes/distill_study.py --full     # the study: settings on a seed of their own, then three seeds; minutes

A stopped run goes on when it is started again.

``digits``: a vision transformer has learnt scikit-learn's handwritten digits from 700 images; a student a twentieth as
large learns from 300 others, once with their labels, once with three in ten of them wrong.

``text``: one small language model has learnt library code, another the language reference; each has a tokenizer of its
own kind and vocabulary. A pivot with a third tokenizer has learnt docstrings, and its copies learn from text of both
that no teacher has read: from the text alone, or from what the teachers say about it, too. Bits per byte compare models
whatever their tokenizers. FuseChat trains one copy per teacher, each for as many steps as another method has in all,
and merges them; so "CLM, two merged" does that without teachers.

Settings are chosen on validation data with a seed that is not reported; tables show test data that nobody has seen.
Short of a real study: students take 50 to 100 steps, which some methods would use better with more; two settings each;
and the seeds share the two language teachers (pivots and orders of the text differ).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from study import distill_digits, distill_text
from study.distilling import FULL, QUICK, Effort, Half, Row

HALVES = {"digits": distill_digits.HALF, "text": distill_text.HALF}
HEADINGS = ("method", "settings chosen", "CPU ms per step")
LEGEND = """Means over seeds, ± the standard deviation over seeds, on test data; the best method first. Settings were
chosen on validation data with a further seed. What is compared is told at the head of `recipes/distill_study.py`."""

Runs = Sequence[dict[str, Row]]  # of one half: of each seed, name -> row


def findings(half: Half, runs: Runs) -> list[str]:
    """Sentences computed from the figures."""
    said = []
    for data in runs[0][half.baseline].test:
        groups: dict[str, list[str]] = {"ahead of": [], "neither ahead of nor behind": [], "behind": []}
        for name in half.methods:
            if name != half.baseline:
                verdict, gap = compared(half, runs, name, half.baseline, data)
                groups[verdict].append(f"{name} ({gap:+.3f})")
        for verdict, names in groups.items():
            if names:
                said.append(f"{data}: {verdict} {half.baseline}, by {half.unit}: {', '.join(names)}.")
        for one, other in half.pairs:
            verdict, gap = compared(half, runs, one, other, data)
            said.append(f"{data}: {one} is {verdict} {other} ({gap:+.3f}).")
    said.append(f"Ahead and behind mean: in {len(runs)} of {len(runs)} seeds.")
    return said


def compared(half: Half, runs: Runs, one: str, other: str, data: str) -> tuple[str, float]:
    """Whether every seed says so, and the mean difference of the scores."""
    gaps = [run[one].test[data] - run[other].test[data] for run in runs]
    better = [gap < 0 if half.lower_is_better else gap > 0 for gap in gaps]
    verdict = "neither ahead of nor behind"
    if all(gaps) and len(set(better)) == 1:
        verdict = "ahead of" if better[0] else "behind"
    return verdict, statistics.mean(gaps)


def table(half: Half, runs: Runs) -> list[tuple[str, ...]]:
    """A heading and a line for each row: what is no method first, then the best methods first."""
    data_sets = list(runs[0][half.baseline].test)
    mean = {name: statistics.mean(sum(run[name].test.values()) for run in runs) for name in runs[0]}
    order = sorted(half.methods, key=mean.__getitem__, reverse=not half.lower_is_better)
    lines = [(HEADINGS[0], *data_sets, *HEADINGS[1:])]
    for name in [*(name for name in runs[0] if name not in half.methods), *order]:
        cells = []
        for data in data_sets:
            scores = [run[name].test[data] for run in runs]
            spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
            cells.append(f"{statistics.mean(scores):.3f}{spread}")
        milliseconds = 1000 * statistics.mean(run[name].seconds for run in runs)
        lines.append((name, *cells, runs[0][name].setting, f"{milliseconds:.0f}" if milliseconds else ""))
    return lines


def report(name: str, half: Half, runs: Runs, output: Path) -> tuple[dict[str, Any], str]:
    """Prints a half's table and what follows from it, and draws its chart.

    Returns:
        Its part of the JSON, and its section in Markdown.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from hf_fuse.plots import bar_chart

    console, lines, said = Console(highlight=False), table(half, runs), findings(half, runs)
    better = "lower" if half.lower_is_better else "higher"
    title = f"{name}: {half.unit} of the student on test data ({better} is better)"
    shown = Table(*lines[0], box=SIMPLE_HEAD, pad_edge=False, title=title)
    for line in lines[1:]:
        shown.add_row(*line)
    console.print(shown)
    for sentence in said:
        console.print(f"  - {sentence}", markup=False)
    means = {
        row: {data: statistics.mean(run[row].test[data] for run in runs) for data in runs[0][row].test}
        for row in runs[0]
    }
    ylabel = f"{half.unit} on test data ({better} is better)"
    if half.start:  # bars from 0 would look all the same
        ylabel = f"{half.unit} that test data take less than with {half.start} (higher is better)"
        start = means[half.start]
        means = {row: {data: start[data] - score for data, score in each.items()} for row, each in means.items()}
    chart = bar_chart(
        {method: means[method] for method in half.methods}, path=output / f"{name}.png",
        title="Ways to teach a small student, equally many steps", ylabel=ylabel,
        lower_is_better=half.lower_is_better and not half.start,
        families={method: f"from {tried.family}" for method, tried in half.methods.items()},
    )  # fmt: skip
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    rows = [head, "|---|" + "---:|" * (len(lines[0]) - 3) + "---|---:|", *body]
    section = "\n".join([f"## {title}", "", *rows, "", *(f"- {sentence}" for sentence in said), ""])
    seeds = [{row: asdict(run[row]) for row in run} for run in runs]
    return {"findings": said, "chart": chart.name, "seeds": seeds}, section


def run(
    name: str, effort: Effort, seeds: int, folder: Path, settings: dict[str, dict[str, str]]
) -> tuple[dict[str, str], list[dict[str, Row]]]:
    """A half, start to end, in a process of its own with one thread: the settings, and the rows of each seed."""
    from hf_fuse.demo_training import quiet_and_reproducible

    half = HALVES[name]
    with quiet_and_reproducible():
        chosen = settings.get(name) or half.chosen(effort, folder / f"{name}-settings.json")
        wanted = {method: (method, setting) for method, setting in chosen.items()}
        return chosen, [half.rows(seed, effort, wanted, folder / f"{name}-{seed}.json") for seed in range(seeds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--full", action="store_true", help="three seeds, trained models (minutes)")
    parser.add_argument("--halves", nargs="+", default=list(HALVES), choices=HALVES)
    parser.add_argument("--seeds", type=int, help="number of seeds")
    parser.add_argument("--settings", type=Path, help="study.json of an earlier run, whose settings are taken over")
    parser.add_argument("--jobs", type=int, default=1, choices=(1, 2), help="halves at a time, one core each")
    parser.add_argument("--output", type=Path, default=Path("distill-study"), help="folder for results")
    given = parser.parse_args()
    effort, started = FULL if given.full else QUICK, time.perf_counter()
    seeds = given.seeds or effort.seeds
    settings = {} if given.full else {name: half.first() for name, half in HALVES.items()}
    if given.settings:
        settings = json.loads(given.settings.read_text(encoding="utf-8"))["settings"]
    alone = partial(run, effort=effort, seeds=seeds, folder=given.output / "rows", settings=settings)
    if given.jobs > 1 and len(given.halves) > 1:
        with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
            found = dict(zip(given.halves, pool.map(alone, given.halves)))
    else:
        found = {name: alone(name) for name in given.halves}
    given.output.mkdir(parents=True, exist_ok=True)
    reported = {name: report(name, HALVES[name], found[name][1], given.output) for name in given.halves}
    command = f"python recipes/distill_study.py{' --full' if given.full else ''}"
    facts = {
        "command": command, "versions": versions(), "seconds": round(time.perf_counter() - started, 1),
        "settings": {name: settings for name, (settings, _) in found.items()},
        "halves": {name: part for name, (part, _) in reported.items()},
    }  # fmt: skip
    (given.output / "study.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    used = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    heading = f"# Ways to teach a small student\n\n`{command}` (seeds: {seeds}; {used})\n\n{LEGEND}\n"
    warning = "This was a quick run: the models are hardly trained and the figures mean nothing. Use --full."
    sections = [heading, *([] if given.full else [warning + "\n"]), *(section for _, section in reported.values())]
    (given.output / "study.md").write_text("\n".join(sections), encoding="utf-8")
    if not given.full:
        print(f"\n{warning}")
    print(f"\n{given.output}: study.md, study.json and charts ({facts['seconds']:.0f} s)")


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name).split("+")[0] for name in ("hf-fuse", "torch", "transformers")}


if __name__ == "__main__":
    main()
