# quick
"""Merges that learn from data against merges that don't, on small real data, over several seeds.

    python recipes/learned_merge_study.py           # one seed, hardly trained; shows that everything runs
    python recipes/learned_merge_study.py --full    # the study: three seeds, minutes on two cores

Base and experts are those of ``merge_study.py``: ``digits`` (four experts that disagree), ``pairs`` (four, of two
classes each) and ``text`` (three domains). They are written to folders, and everything is learned and merged from
those, by ``hf_fuse.learn`` and ``hf_fuse.merge``. A merge is one model with one head, whatever the task; its score is
on test data. Statistics and prompts are the experts' own training inputs; few labels, and AdaMerging's inputs, are
validation data. The oracle learns from the labels of the test data themselves: it is what coefficients could do.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from study import suites
from study.suites import Suite

import hf_fuse

SUITES = ("digits", "pairs", "text")
EXPERTS, MEAN, TUNED, ORACLE = (
    "experts, each on its own", "mean", "task arithmetic, tuned", "oracle: aTLAS on test labels"
)  # fmt: skip
# AdaMerging's coefficients start from the best weight of task arithmetic, or from the paper's.
STARTS, NO_STOP = ("tuned", "0.3"), ", no stop"
MOMENTS = ("start", "stop", "end")
# What each model is made with, in the order of the table.
FAMILIES = {
    "base": "reference", EXPERTS: "reference", MEAN: "no data", TUNED: "labels", "Fisher": "inputs",
    "RegMean": "inputs", "Expert Merging": "inputs", "Expert Merging++": "inputs", "AdaMerging from tuned": "inputs",
    "AdaMerging from tuned, no stop": "inputs", "AdaMerging from 0.3": "inputs",
    "AdaMerging from 0.3, no stop": "inputs", "aTLAS, few labels": "labels", ORACLE: "test labels",
}  # fmt: skip
# Of coefficients. With it, AdaMerging comes as far in 25 steps as in the paper's 500 at 1e-3.
RATE = 2e-2
PIXELS = 3.0  # images are stored with 8 bits for values from -PIXELS to PIXELS


@dataclass(frozen=True)
class Effort:
    """Sizes of a run; examples are per task."""

    models: suites.Effort = replace(suites.FULL, tasks=4, reference=False)
    weights: tuple[float, ...] = (0.05, 0.1, 0.15, 0.25, 0.4, 0.7)
    labels: int = 25
    inputs: int = 64
    statistics: int = 64
    prompts: int = 8
    test: int = 1000  # of the oracle
    steps: int = 25  # of AdaMerging
    epochs: int = 3  # of what learns from labels, at least ten steps each


FULL = Effort()
QUICK = Effort(replace(suites.QUICK, tasks=2, reference=False), (0.1, 0.4), 4, 8, 4, 2, 8, 2, 1)


@dataclass
class Row:
    """One model of one seed.

    Attributes:
        scores: per task, on test data.
        note: what was chosen, or how it ended.
    """

    scores: list[float]
    note: str = ""

    @property
    def mean(self) -> float:
        return statistics.mean(self.scores)


@dataclass(frozen=True)
class Files:
    """A suite as a user has it: folders of models, and a file of examples for each task and part."""

    suite: Suite
    folder: Path
    seed: int

    @property
    def base(self) -> str:
        return str(self.folder / "base")

    @property
    def experts(self) -> list[str]:
        return [str(self.folder / f"expert-{number}") for number in range(len(self.suite.experts))]

    @property
    def images(self) -> bool:
        return self.suite.unit == "accuracy"

    def examples(self, task: int, part: str) -> str:
        return str(self.folder / f"{task}-{part}.{'parquet' if self.images else 'jsonl'}")

    def scores(self, folder: str | Path, part: str = "test") -> list[float]:
        """Of the model in a folder."""
        live = type(self.suite.model).from_pretrained(folder)
        return self.suite.score(live.state_dict(), part)


def written(suite: Suite, folder: Path, seed: int) -> Files:
    """Writes models, their tokenizer or image processor, and examples."""
    from hf_fuse.demo_training import byte_tokenizer

    files = Files(suite, folder, seed)
    if files.images:
        from transformers import ViTImageProcessorPil

        processor: Any = ViTImageProcessorPil(do_resize=False, image_mean=[0.5], image_std=[0.5 / PIXELS])
    else:
        processor = byte_tokenizer(suite.model.config.max_position_embeddings)
    for path, state in zip([files.base, *files.experts], [suite.base, *suite.experts]):
        suite.model.load_state_dict(state)
        suite.model.save_pretrained(path)
        processor.save_pretrained(path)
    for (number, task), part in itertools.product(enumerate(suite.tasks), ("train", "validation", "test")):
        target, examples = Path(files.examples(number, part)), suite.parts[task][part]
        if files.images:
            write_images(target, *examples)
        else:
            texts = processor.batch_decode(examples[:500], skip_special_tokens=True)
            target.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return files


def write_images(target: Path, images: Any, labels: Any) -> None:
    import datasets
    from PIL import Image

    grey = ((images[:, 0] / PIXELS + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [Image.fromarray(one) for one in grey], "label": labels.tolist()}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(target)


def run_suite(files: Files, effort: Effort) -> dict[str, Any]:
    """Every row of one suite and seed, and where AdaMerging goes from each start: (entropy, score) by moment."""
    suite, numbers, paths = files.suite, itertools.count(), {}
    own = [suite.score(expert, "test")[number] for number, expert in enumerate(suite.experts)]
    rows = {"base": Row(suite.score(suite.base, "test")), EXPERTS: Row(own)}

    def merge(recipe: Any) -> Path:
        return hf_fuse.merge(recipe, files.folder / f"merged-{next(numbers)}")

    def arithmetic(weight: float) -> Path:
        models = {"base_model": files.base, "models": files.experts}
        return merge({"method": "task_arithmetic", **models, "parameters": {"lambda": weight}})

    def coefficients(estimator: str, part: str, examples: int, **parameters: Any) -> Path:
        models = [{"path": path, "data": files.examples(k, part)} for k, path in enumerate(files.experts)]
        recipe = {"estimator": estimator, "base_model": files.base, "models": models, "parameters": parameters}
        sizes = {"examples": examples, "batch_size": 16, "seed": files.seed, "heads": "merged"}
        return hf_fuse.learn(recipe | sizes, files.folder / f"learned-{next(numbers)}")

    def by_statistics(method: str, estimator: str) -> Path:
        models, sizes = [], {"examples": effort.statistics, "batch_size": 16, "seed": files.seed}
        for number, path in enumerate(files.experts):
            recipe = {"estimator": estimator, "model": path, "data": files.examples(number, "train")}
            folder = hf_fuse.learn(recipe | sizes, files.folder / f"{estimator}-{number}")
            models.append({"path": path, "statistics": str(folder)})
        return merge({"method": method, "models": models})

    def add(label: str, made: Path) -> dict[str, Any]:
        """Adds the row of a merged model, or of learned coefficients, whose facts are returned."""
        facts: dict[str, Any] = {}
        if (file := made / "coefficients.json").exists():
            made, facts = merge(made / "merge.yaml"), json.loads(file.read_text(encoding="utf-8"))["facts"]
        rows[label] = Row(files.scores(made))
        return facts

    tried = {weight: arithmetic(weight) for weight in effort.weights}
    best = max(tried, key=lambda weight: statistics.mean(files.scores(tried[weight], "validation")))
    rows[TUNED] = Row(files.scores(tried[best]), f"weight {best}")
    add(MEAN, merge({"method": "linear", "models": files.experts}))
    add("Fisher", by_statistics("fisher", "fisher"))
    add("RegMean", by_statistics("regmean", "gram"))
    add("Expert Merging", coefficients("expert_merging", "train", effort.prompts, init=best))
    add("Expert Merging++", coefficients("expert_merging", "train", effort.prompts, init=best, chunk_budget=1.0))
    labelled = {"learning_rate": RATE, "epochs": effort.epochs}
    add("aTLAS, few labels", coefficients("atlas_merging", "validation", effort.labels, **labelled))
    add(ORACLE, coefficients("atlas_merging", "test", effort.test, **labelled))
    for start, weight in zip(STARTS, (best, float(STARTS[1]))):
        label, given = f"AdaMerging from {start}", {"init": weight, "learning_rate": RATE, "steps": effort.steps}
        kept = add(label, coefficients("ada_merging", "validation", effort.inputs, **given, check_every=5))
        if kept["stopped by collapse"]:
            rows[label].note = f"stopped, step {kept['steps']} counts"
            last = add(label + NO_STOP, coefficients("ada_merging", "validation", effort.inputs, **given, collapse=1.0))
        else:
            rows[label + NO_STOP], last = rows[label], kept
        paths[start] = {
            "start": (kept["entropy before"], statistics.mean(files.scores(arithmetic(weight)))),
            "stop": (kept["entropy after"], rows[label].mean),
            "end": (last["entropy after"], rows[label + NO_STOP].mean),
        }
    rows = {label: rows[label] for label in FAMILIES}
    return {"rows": rows, "paths": paths, "tasks": suite.tasks, "unit": suite.unit}


def run_seed(seed: int, effort: Effort, wanted: Sequence[str]) -> dict[str, dict[str, Any]]:
    """One seed, start to end, in a process of its own with one thread."""
    from datasets.utils.logging import disable_progress_bar

    from hf_fuse.demo_training import quiet_and_reproducible

    disable_progress_bar()
    found = {}
    with quiet_and_reproducible():
        made = suites.digit_suites(seed, effort.models, wanted) if {"digits", "pairs"} & set(wanted) else []
        made += [suites.text_suite(seed, effort.models)] if "text" in wanted else []
        for suite in made:
            started = time.perf_counter()
            with tempfile.TemporaryDirectory(prefix="hf-fuse-study-") as folder:
                found[suite.name] = run_suite(written(suite, Path(folder), seed), effort)
            spent = time.perf_counter() - started
            print(f"seed {seed}: {suite.name} learned, merged and scored in {spent:.0f} s", file=sys.stderr)
    return found


# -- report ----------------------------------------------------------------------------------------------------------


def findings(name: str, runs: list[dict[str, Any]]) -> list[str]:
    """Sentences about one suite, computed from the figures."""
    scores = {label: [run["rows"][label].mean for run in runs] for label in runs[0]["rows"]}
    groups: dict[str, list[str]] = {"ahead of": [], "neither ahead of nor behind": [], "behind": []}
    for label, own in scores.items():
        if FAMILIES[label] not in ("reference", "test labels") and label != TUNED:
            verdict, gap = compared(own, scores[TUNED])
            groups[verdict].append(f"{label} ({gap:+.1f})")
    said = [f"{name}: {verdict} {TUNED}, in points: {', '.join(g)}." for verdict, g in groups.items() if g]
    for start in STARTS:
        paths = [run["paths"][start] for run in runs]
        (before, was), (after, now) = (means(path[moment] for path in paths) for moment in ("start", "end"))
        said.append(
            f"{name}: AdaMerging from {start} takes the entropy from {before:.2f} to {after:.2f} and the score from "
            f"{was:.3f} to {now:.3f}; with its stop to {means(path['stop'] for path in paths)[1]:.3f}."
        )
    gap = compared(scores[ORACLE], scores[TUNED])[1]
    said.append(
        f"{name}: coefficients learned from the test labels are worth {gap:+.1f} points more than the tuned one."
    )
    return said


def compared(one: list[float], other: list[float]) -> tuple[str, float]:
    """Whether every seed says so, and the mean difference in points."""
    gaps = [100 * (left - right) for left, right in zip(one, other)]
    verdict = "neither ahead of nor behind"
    if all(gap > 0 for gap in gaps) or all(gap < 0 for gap in gaps):
        verdict = "ahead of" if gaps[0] > 0 else "behind"
    return verdict, statistics.mean(gaps)


def means(rows: Iterable[Sequence[float]]) -> tuple[float, ...]:
    """Of each column."""
    return tuple(map(statistics.mean, zip(*rows)))


HEADINGS = ("model", "learns from", "score", "of experts", "worst task", "note")


def table(runs: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A line per model: means over the seeds."""
    lines = []
    for label in runs[0]["rows"]:
        rows = [run["rows"][label] for run in runs]
        scores = [row.mean for row in rows]
        spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
        share = statistics.mean(row.mean / max(run["rows"][EXPERTS].mean, 1e-9) for row, run in zip(rows, runs))
        worst = statistics.mean(min(row.scores) for row in rows)
        notes = "; ".join(sorted({row.note for row in rows if row.note}))
        shown = (f"{statistics.mean(scores):.3f}{spread}", f"{share:.0%}", f"{worst:.3f}")
        lines.append((label, FAMILIES[label], *shown, notes))
    return lines


def report(results: dict[str, list[dict[str, Any]]], output: Path) -> tuple[dict[str, Any], str]:
    """Prints tables and findings and draws the charts. -> the JSON's part, and the sections in Markdown."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from hf_fuse import plot_points
    from hf_fuse.plots import bar_chart

    console, sections, facts = Console(highlight=False), [], {}
    panels = {label: {} for label, family in FAMILIES.items() if family != "reference" and label != TUNED}
    for name, runs in results.items():
        unit, tasks, body, said = runs[0]["unit"], runs[0]["tasks"], table(runs), findings(name, runs)
        title = f"{name}: {unit} on test data, {len(tasks)} tasks ({', '.join(tasks)})"
        shown = Table(box=SIMPLE_HEAD, pad_edge=False, title=title)
        for number, heading in enumerate(HEADINGS):
            shown.add_column(heading, justify="right" if 2 <= number <= 4 else "left")
        for line in body:
            shown.add_row(*line)
        console.print(shown)
        for sentence in said:
            console.print(f"  - {sentence}", markup=False)
        lines = ["| " + " | ".join(line) + " |" for line in (HEADINGS, *body)]
        lines.insert(1, "|---|---|---:|---:|---:|---|")
        sections.append("\n".join([f"## {title}", "", *lines, "", *(f"- {one}" for one in said), ""]))
        seeds = [{"rows": {k: asdict(row) for k, row in run["rows"].items()}, "paths": run["paths"]} for run in runs]
        facts[name] = {"unit": unit, "tasks": tasks, "findings": said, "seeds": seeds}
        scores = {label: [run["rows"][label].mean for run in runs] for label in FAMILIES}
        for label in panels:
            panels[label][name] = compared(scores[label], scores[TUNED])[1]
        paths = {
            f"from {start}": [means(run["paths"][start][moment] for run in runs) for moment in MOMENTS]
            for start in STARTS
        }
        plot_points.lines(
            paths,
            path=output / f"adamerging_{name}.png", title=f"{name}: AdaMerging moves to the left, not always up",
            xlabel="mean entropy of a prediction", ylabel=f"{unit} on test data", logarithmic=False,
        )  # fmt: skip
    bar_chart(
        panels, path=output / "scores.png", title="Merges that learn from data",
        ylabel=f"points more than {TUNED}, mean over tasks and seeds", families=FAMILIES,
    )  # fmt: skip
    return facts, "\n".join(sections)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--full", action="store_true", help="three seeds, trained models (minutes)")
    parser.add_argument("--suites", nargs="+", default=list(SUITES), choices=SUITES)
    parser.add_argument("--seeds", type=int, help="number of seeds")
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time, one core each")
    parser.add_argument("--output", type=Path, default=Path("learned-merge-study"), help="folder for tables and charts")
    given = parser.parse_args()
    effort, started = FULL if given.full else QUICK, time.perf_counter()
    seeds = range(given.seeds or effort.models.seeds)
    if given.jobs > 1 and len(seeds) > 1:
        with ProcessPoolExecutor(min(given.jobs, len(seeds)), mp_context=get_context("spawn")) as pool:
            runs = list(pool.map(run_seed, seeds, itertools.repeat(effort), itertools.repeat(given.suites)))
    else:
        runs = [run_seed(seed, effort, given.suites) for seed in seeds]
    given.output.mkdir(parents=True, exist_ok=True)
    facts, sections = report({name: [run[name] for run in runs] for name in given.suites}, given.output)
    about = {"full": given.full, "seeds": len(seeds), "seconds": round(time.perf_counter() - started, 1)}
    (given.output / "study.json").write_text(json.dumps(about | {"suites": facts}, indent=2) + "\n", encoding="utf-8")
    command = f"python recipes/learned_merge_study.py{' --full' if given.full else ''}"
    warning = "This was a quick run: the models are hardly trained and the figures mean nothing. Use --full."
    heading = [
        "# Merges that learn from data",
        f"`{command}` (seeds: {len(seeds)})",
        *([] if given.full else [warning]),
    ]
    (given.output / "study.md").write_text("\n\n".join([*heading, sections]), encoding="utf-8")
    if not given.full:
        print(f"\n{warning}")
    print(f"\n{given.output}: study.md, study.json and charts ({about['seconds']:.0f} s)")


if __name__ == "__main__":
    main()
