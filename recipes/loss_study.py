# quick
"""Losses, heads, data selection and unlearning against the plain way, each judged by what it is made for.

    python recipes/loss_study.py            # under a minute: one seed, hardly trained, few losses; shows how it runs
    python recipes/loss_study.py --full     # the study: three seeds, several minutes on two cores

``digits``: a small vision transformer that has learned images in guises learns others from few labels, wrong labels,
a long tail of classes, and so on. ``text``: a small BERT learns which package of the standard library a passage of code
is from. Each method has up to two settings, the plain way two starts; validation data chooses, and the tables show test
data that neither has seen. With ``--settings 1`` each has its first one.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from study import heads, losses, selection, unlearning
from study.trials import FULL, QUICK, Effort, Found, Question

QUESTIONS: dict[str, Question] = losses.QUESTIONS | heads.QUESTIONS | selection.QUESTIONS | unlearning.QUESTIONS
# Each answers some of the questions for a seed.
SUITES: tuple[Callable[[int, Effort], Found], ...] = (
    losses.digit_losses,
    losses.text_losses,
    heads.heads_of_seed,
    selection.selection_of_seed,
    unlearning.unlearning_of_seed,
)
AHEAD, OPEN, BEHIND = "ahead", "neither", "behind"


# -- what the figures say --------------------------------------------------------------------------------------------


def verdict(ones: Sequence[float], others: Sequence[float], *, lower_is_better: bool) -> tuple[str, float, int]:
    """Whether all seeds agree that the first figures are better; the mean gain; in how many seeds there is one."""
    gains = [(other - one) if lower_is_better else (one - other) for one, other in zip(ones, others)]
    wins, losses = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    said = AHEAD if wins == len(gains) else BEHIND if losses == len(gains) else OPEN
    return said, statistics.mean(gains), wins


def scores_of(runs: Sequence[Found], question: str) -> dict[str, list[float]]:
    """Method -> its figure in each seed."""
    return {method: [run[question][method].score for run in runs] for method in runs[0][question]}


def findings(runs: Sequence[Found], questions: dict[str, Question]) -> dict[str, str]:
    """A sentence per question, computed from the figures."""
    said = {}
    for name, question in questions.items():
        scores = scores_of(runs, name)
        groups: dict[str, list[str]] = {AHEAD: [], OPEN: [], BEHIND: []}
        for method, values in scores.items():
            if method != question.baseline and method not in question.references:
                which, gain, wins = verdict(values, scores[question.baseline], lower_is_better=question.lower_is_better)
                wins_said = f", {wins} of {len(values)}" if which == OPEN else ""
                groups[which].append(f"{method} ({gain:+.3f}{wins_said})")
        words = {AHEAD: f"ahead of {question.baseline}", OPEN: "neither", BEHIND: "behind"}
        said[name] = "; ".join(f"{words[which]}: {', '.join(names)}" for which, names in groups.items() if names) + "."
    return said


def by_chance(runs: Sequence[Found], questions: dict[str, Question]) -> str:
    """How many comparisons came out one way, and how many would without any difference."""
    counts = {AHEAD: 0, OPEN: 0, BEHIND: 0}
    for name, question in questions.items():
        scores = scores_of(runs, name)
        for method, values in scores.items():
            if method != question.baseline and method not in question.references:
                which, *_ = verdict(values, scores[question.baseline], lower_is_better=question.lower_is_better)
                counts[which] += 1
    total = sum(counts.values())
    return (
        f"Of {total} comparisons {counts[AHEAD]} are ahead and {counts[BEHIND]} behind in {len(runs)} of {len(runs)} "
        f"seeds; methods without any effect would be in about {total / 2 ** len(runs):.0f} each."
    )


# -- report ----------------------------------------------------------------------------------------------------------


def rows_of(runs: Sequence[Found], name: str, question: Question) -> list[tuple[str, ...]]:
    """Cells: method, mean and deviation over seeds, gain, seeds ahead, settings. The baseline first, then the best."""
    scores = scores_of(runs, name)
    lines = []
    for method, values in scores.items():
        mean = statistics.mean(values)
        shown = f"{mean:.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")
        compared = method != question.baseline and method not in question.references
        _, gain, wins = verdict(values, scores[question.baseline], lower_is_better=question.lower_is_better)
        settings = ", ".join(dict.fromkeys(run[name][method].setting for run in runs if run[name][method].setting))
        against = (f"{gain:+.3f}", f"{wins} of {len(values)}") if compared else ("", "")
        rank = (method != question.baseline, -gain)
        lines.append((rank, (method, shown, *against, settings)))
    return [line for _, line in sorted(lines, key=lambda entry: entry[0])]


HEADINGS = ("method", "mean ± seeds", "gain", "seeds ahead", "settings chosen")


def markdown(runs: Sequence[Found], said: dict[str, str], chance: str, effort: Effort) -> str:
    from importlib.metadata import version

    packages = ", ".join(f"{name} {version(name)}" for name in ("hf-fuse", "torch", "transformers"))
    text = [
        "# Losses, heads, data selection and unlearning on small real data", "",
        f"`python recipes/loss_study.py --full --settings {effort.settings}` (seeds: {len(runs)}; {packages})", "",
        "*gain*: of the method over the plain way, positive where it is better. Ahead and behind mean: in all seeds.",
        f"{chance} Each classifier is trained for {effort.steps} steps,",
        "too few for what shows late in training: what helps to learn fast is ahead.", "",
    ]  # fmt: skip
    for name, question in QUESTIONS.items():
        direction = " (lower is better)" if question.lower_is_better else ""
        cells = [HEADINGS, ("---", "---:", "---:", "---:", "---"), *rows_of(runs, name, question)]
        text += [f"## {name}: {question.figure}{direction}", ""]
        text += ["| " + " | ".join(line) + " |" for line in cells] + ["", said[name], ""]
    return "\n".join(text)


def charts(runs: Sequence[Found], output: Path) -> list[str]:
    """Gains, with a panel per kind of data: losses where labels are few, losses on other questions, heads."""
    from hf_fuse.plots import bar_chart

    parts = {
        "few_labels": [name for name in losses.QUESTIONS if name.endswith("few labels")],
        "losses": [name for name in losses.QUESTIONS if not name.endswith("few labels")],
        "heads": list(heads.QUESTIONS),
    }
    drawn = []
    for part, names in parts.items():
        values: dict[str, dict[str, float]] = {}
        families = {}
        for name in names:
            question, scores = QUESTIONS[name], scores_of(runs, name)
            data, asked = name.split(", ", 1)
            for method, of_seeds in scores.items():
                _, gain, _ = verdict(of_seeds, scores[question.baseline], lower_is_better=question.lower_is_better)
                if method != question.baseline and method not in question.references:
                    row = f"{asked.removeprefix('heads, ')}: {method}"
                    values.setdefault(row, {})[data] = gain
                    families[row] = asked.removeprefix("heads, ").split(", ")[0]
        drawn.append(
            bar_chart(
                values, path=output / f"{part}.png", title="Gain over the plain way", families=families,
                ylabel="gain in the figure of each question (higher is better)",
            ).name
        )  # fmt: skip
    return drawn


def report(runs: Sequence[Found], output: Path, effort: Effort) -> dict[str, Any]:
    """Prints a table per question and what follows from them, writes Markdown and charts, returns the JSON."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console, said, chance = Console(highlight=False), findings(runs, QUESTIONS), by_chance(runs, QUESTIONS)
    for name, question in QUESTIONS.items():
        table = Table(box=SIMPLE_HEAD, pad_edge=False, title=f"{name}: {question.figure}", title_justify="left")
        for number, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="right" if 0 < number < 4 else "left")
        for line in rows_of(runs, name, question):
            table.add_row(*line)
        console.print(table)
        console.print(f"  - {said[name]}", markup=False)
    console.print(f"\n{chance}", markup=False)
    output.mkdir(parents=True, exist_ok=True)
    (output / "study.md").write_text(markdown(runs, said, chance, effort), encoding="utf-8")
    return {
        "findings": said, "by chance": chance, "charts": charts(runs, output),
        "seeds": [{q: {m: asdict(row) for m, row in rows.items()} for q, rows in run.items()} for run in runs],
    }  # fmt: skip


def run_part(number: int, seed: int, effort: Effort) -> Found:
    """One suite and seed, in a process of its own with one thread."""
    from hf_fuse.demo_training import quiet_and_reproducible

    # Every training would walk through all that was imported.
    gc.freeze()
    with quiet_and_reproducible():
        return SUITES[number](seed, effort)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--full", action="store_true", help="three seeds, trained models (minutes)")
    parser.add_argument("--seeds", type=int, help="number of seeds")
    parser.add_argument("--settings", type=int, choices=(1, 2), help="settings of each method; of two the better")
    parser.add_argument("--jobs", type=int, default=2, help="parts at a time, one core each")
    parser.add_argument("--output", type=Path, default=Path("loss-study"), help="folder for results")
    given = parser.parse_args()
    effort, started = FULL if given.full else QUICK, time.perf_counter()
    effort = replace(effort, settings=given.settings or effort.settings)
    parts = list(itertools.product(range(len(SUITES)), range(given.seeds or effort.seeds)))
    if given.full and given.jobs > 1:
        with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
            answers = list(pool.map(run_part, *zip(*parts), itertools.repeat(effort)))
    else:
        answers = [run_part(*part, effort) for part in parts]
    runs: list[Found] = [{} for _ in range(given.seeds or effort.seeds)]
    for (_, seed), found in zip(parts, answers):
        runs[seed] |= found
    seconds = time.perf_counter() - started
    facts = {"full": given.full, "seconds": round(seconds, 1), **report(runs, given.output, effort)}
    (given.output / "study.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if not given.full:
        print("\nThis was a quick run: the models are hardly trained and the figures mean nothing. Use --full.")
    print(f"\n{given.output / 'study.json'}, study.md and charts in {given.output} ({seconds:.0f} s)")


if __name__ == "__main__":
    main()
