# quick
"""Ways to teach a small student, each with the same tries: the labels alone, from a teacher, or from itself.

    python recipes/distill_study.py            # under a minute: one seed, hardly trained; shows that everything runs
    python recipes/distill_study.py --full     # the study: three seeds, several minutes on two cores

``digits``: a vision transformer has learnt scikit-learn's handwritten digits from 700 images; a student a twentieth as
large learns from 300 others. ``digits, wrong labels``: three in ten of the student's labels are wrong. Every method
trains for the same number of steps with each of its two settings; validation images decide, and the table shows test
images that neither has seen.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from study.suites import fit, new_vit
from torch import Tensor
from transformers import PrinterCallback

from hf_fuse import DistillConfig, DistillTrainer, FuseConfig, FuseTrainer

TEACHER, LABELS = "the teacher", "labels alone"
WRONG = 0.3


@dataclass(frozen=True)
class Effort:
    """Sizes of a run."""

    teacher_steps: int = 600
    steps: int = 400
    seeds: int = 3
    settings: int = 2  # of each method


FULL, QUICK = Effort(), Effort(teacher_steps=20, steps=4, seeds=1, settings=1)


@dataclass
class Row:
    """A method on the data of one seed."""

    score: float  # accuracy on test images
    setting: str  # the one that validation chose
    seconds: float  # per training step


# -- methods ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """Two settings: arguments of the trainer's configuration under the name that the table shows."""

    family: str  # what the student learns from
    settings: dict[str, dict[str, Any]]


def _objectives(task: float, name: str, **settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {label: {"objectives": {"task": task, name: options}} for label, options in settings.items()}


def methods() -> dict[str, Method]:
    """Name -> what is tried, around the values of the papers."""
    teacher, itself = partial(Method, "the teacher"), partial(Method, "itself")
    return {
        LABELS: Method("the labels", {"plain": {}, "smoothed 0.1": {"label_smoothing_factor": 0.1}}),
        "KD": teacher(
            {
                f"T {degree:g}": {"objectives": {"task": 0.1, "forward_kl": {"weight": 0.9, "temperature": degree}}}
                for degree in (2.0, 4.0)
            }
        ),
        "DHKD": teacher(_objectives(1.0, "dual_head", **{"weight 0.1": {"weight": 0.1}, "weight 1": {"weight": 1.0}})),
        "DHKD, one head": teacher(
            _objectives(1.0, "dhkd", **{"weight 0.1": {"weight": 0.1}, "weight 1": {"weight": 1.0}})
        ),
        "PLD": teacher(_objectives(0.0, "pld", **{"T 1": {"temperature": 1.0}, "T 4": {"temperature": 4.0}})),
        "TGeo-KD": teacher(_objectives(0.0, "tgeo", **{"T 1.5": {"temperature": 1.5}, "T 4": {"temperature": 4.0}})),
        "mutual learning": itself(_objectives(1.0, "mutual", **{"one peer": {"peers": 1}, "two peers": {"peers": 2}})),
        "MESA": itself(
            _objectives(1.0, "mesa", **{f"decay {d}": {"weight": 0.8, "decay": d} for d in (0.9, 0.99)})
        ),
        "SAF": itself(_objectives(1.0, "saf", **{"weight 0.3": {"weight": 0.3}, "weight 1": {"weight": 1.0}})),
        "SLA": itself(_objectives(1.0, "sla", **{"T 1": {"temperature": 1.0}, "T 3": {"temperature": 3.0}})),
        "LSSKD": itself(_objectives(1.0, "lsskd", **{"weight 0.3": {"weight": 0.3}, "weight 1": {"weight": 1.0}})),
    }  # fmt: skip


# -- digits ----------------------------------------------------------------------------------------------------------


Part = tuple[Tensor, Tensor]


def digits_of_seed(seed: int, effort: Effort) -> dict[str, dict[str, Row]]:
    """Data set -> method -> row."""
    parts = digit_parts(seed)
    teacher = new_vit(seed)
    fit(teacher, *parts["teacher"], effort.teacher_steps, 2e-3, seed)
    images, labels = parts["train"]
    found: dict[str, dict[str, Row]] = {}
    for name, given in {"digits": labels, "digits, wrong labels": with_wrong(labels, seed)}.items():
        rows = found[name] = {TEACHER: Row(accuracy(teacher, *parts["test"]), "", 0.0)}
        for method, tried in methods().items():
            asked = teacher if tried.family == "the teacher" else None
            learn = partial(student_of, (images, given), asked, seed, effort)
            rows[method] = best(tried, learn, parts, effort)
            print(f"seed {seed}, {name}: {method} done", file=sys.stderr)
    return found


def digit_parts(seed: int) -> dict[str, Part]:
    """Images and labels for the teacher, the student, the choice of settings, and the table: 700, 300, 300 and 497."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(seed))
    images = (torch.tensor(data.images, dtype=torch.float32)[order, None] - 8) / 8
    labels = torch.tensor(data.target)[order]
    names = ("teacher", "train", "validation", "test")
    return dict(zip(names, zip(*(values.split([700, 300, 300, 497]) for values in (images, labels)))))


def with_wrong(labels: Tensor, seed: int) -> Tensor:
    """The labels, of which a share of ``WRONG`` is another class."""
    random = torch.Generator().manual_seed(seed)
    other = (labels + torch.randint(1, 10, labels.shape, generator=random)) % 10
    return torch.where(torch.rand(labels.shape, generator=random) < WRONG, other, labels)


def new_student(seed: int) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
        num_channels=1, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(config)


def student_of(data: Part, teacher: Any, seed: int, effort: Effort, setting: dict[str, Any]) -> tuple[Any, float]:
    """A trained student, and the seconds of a step."""
    rows = [{"pixel_values": image, "labels": int(label)} for image, label in zip(*data)]
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder, "max_steps": effort.steps, "learning_rate": 1e-2, "lr_scheduler_type": "cosine",
            "warmup_steps": effort.steps // 10, "weight_decay": 0.05, "per_device_train_batch_size": 32, "seed": seed,
            "use_cpu": True, "dataloader_pin_memory": False, "save_strategy": "no", "logging_strategy": "no",
            "report_to": "none", "disable_tqdm": True,
        } | setting  # fmt: skip
        if "objectives" in setting:
            trainer = DistillTrainer(new_student(seed), DistillConfig(**settings), teacher=teacher, train_dataset=rows)
        else:
            trainer = FuseTrainer(new_student(seed), FuseConfig(**settings), train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        trainer.train()
        return trainer.model, (time.perf_counter() - started) / effort.steps


def best(
    method: Method, learn: Callable[[dict[str, Any]], tuple[Any, float]], parts: dict[str, Part], effort: Effort
) -> Row:
    """The row of the setting that validation images prefer."""
    reached, row = -1.0, None
    for label, setting in itertools.islice(method.settings.items(), effort.settings):
        model, seconds = learn(setting)
        score = accuracy(model, *parts["validation"])
        if score > reached:
            reached, row = score, Row(accuracy(model, *parts["test"]), label, seconds)
    return row


@torch.no_grad()
def accuracy(model: Any, images: Tensor, labels: Tensor) -> float:
    return (model.eval()(images).logits.argmax(1) == labels).float().mean().item()


# -- report ----------------------------------------------------------------------------------------------------------


def findings(runs: list[dict[str, dict[str, Row]]]) -> list[str]:
    """Sentences computed from the figures."""
    said = []
    for data in runs[0]:
        scores = {name: [run[data][name].score for run in runs] for name in runs[0][data]}
        groups: dict[str, list[str]] = {"ahead of": [], "neither ahead of nor behind": [], "behind": []}
        for name in scores:
            if name not in (TEACHER, LABELS):
                verdict, gap = compared(scores[name], scores[LABELS])
                groups[verdict].append(f"{name} ({gap:+.1f})")
        for verdict, names in groups.items():
            if names:
                said.append(f"{data}: {verdict} {LABELS}, in points of accuracy: {', '.join(names)}.")
        if {"DHKD", "DHKD, one head"} <= scores.keys():
            verdict, gap = compared(scores["DHKD"], scores["DHKD, one head"])
            said.append(f"{data}: DHKD is {verdict} its ablation with one head ({gap:+.1f}).")
    said.append(f"Ahead and behind mean: in {len(runs)} of {len(runs)} seeds.")
    return said


def compared(one: list[float], other: list[float]) -> tuple[str, float]:
    """Whether every seed says so, and the mean difference in points."""
    gaps = [100 * (left - right) for left, right in zip(one, other)]
    verdict = "neither ahead of nor behind"
    if all(gap > 0 for gap in gaps) or all(gap < 0 for gap in gaps):
        verdict = "ahead of" if gaps[0] > 0 else "behind"
    return verdict, statistics.mean(gaps)


def report(runs: list[dict[str, dict[str, Row]]], output: Path) -> dict[str, Any]:
    """Prints a table per data set and what follows from them, draws the chart, and returns the study's JSON."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from hf_fuse.plots import bar_chart

    console, means = Console(highlight=False), {}
    for data, names in runs[0].items():
        table = Table(box=SIMPLE_HEAD, pad_edge=False, title=f"{data}: accuracy of the student on test images")
        for column in ("method", "accuracy", "± seeds", "settings chosen", "ms per step"):
            table.add_column(column, justify="left" if column in ("method", "settings chosen") else "right")
        for name in names:
            rows = [run[data][name] for run in runs]
            scores = [row.score for row in rows]
            means.setdefault(name, {})[data] = statistics.mean(scores)
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            milliseconds = 1000 * statistics.mean(row.seconds for row in rows)
            table.add_row(
                name, f"{means[name][data]:.3f}", f"{spread:.3f}", ", ".join(row.setting for row in rows),
                f"{milliseconds:.0f}" if milliseconds else "",
            )  # fmt: skip
        console.print(table)
    said = findings(runs)
    for sentence in said:
        console.print(f"  - {sentence}", markup=False)
    output.mkdir(parents=True, exist_ok=True)
    students = {name: by_data for name, by_data in means.items() if name != TEACHER}
    chart = bar_chart(
        students, path=output / "accuracy.png", title="Ways to teach a small student, equally many steps",
        ylabel="accuracy on test images (higher is better)",
        families={name: f"from {methods()[name].family}" for name in students},
    )  # fmt: skip
    return {
        "means": means, "findings": said, "charts": [chart.name],
        "seeds": [{data: {n: asdict(r) for n, r in rows.items()} for data, rows in run.items()} for run in runs],
    }  # fmt: skip


# Each makes the rows of some data sets from a seed and an effort.
SUITES = {"digits": digits_of_seed}


def run_seed(seed: int, effort: Effort) -> dict[str, dict[str, Row]]:
    """One seed, start to end, in a process of its own with one thread."""
    from hf_fuse.demo_training import quiet_and_reproducible

    with quiet_and_reproducible():
        return {data: rows for suite in SUITES.values() for data, rows in suite(seed, effort).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--full", action="store_true", help="three seeds, trained models (minutes)")
    parser.add_argument("--seeds", type=int, help="number of seeds")
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time, one core each")
    parser.add_argument("--output", type=Path, default=Path("distill-study"), help="folder for results")
    given = parser.parse_args()
    effort, started = FULL if given.full else QUICK, time.perf_counter()
    seeds = range(given.seeds or effort.seeds)
    if given.jobs > 1 and len(seeds) > 1:
        with ProcessPoolExecutor(min(given.jobs, len(seeds)), mp_context=get_context("spawn")) as pool:
            runs = list(pool.map(run_seed, seeds, itertools.repeat(effort)))
    else:
        runs = [run_seed(seed, effort) for seed in seeds]
    facts = {"full": given.full, "seconds": round(time.perf_counter() - started, 1), **report(runs, given.output)}
    (given.output / "study.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if not given.full:
        print("\nThis was a quick run: the models are hardly trained and the figures mean nothing. Use --full.")
    print(f"\n{given.output / 'study.json'} and a chart in {given.output} ({facts['seconds']:.0f} s)")


if __name__ == "__main__":
    main()
