"""What both halves of the study of distillation share: methods, their settings, and how well students do."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Effort:
    """Sizes of a run."""

    teacher_steps: int = 300  # of the vision transformer
    steps: int = 100  # of each student on digits
    text_steps: tuple[int, int, int] = (200, 80, 50)  # of teachers, pivot, students
    characters: int = 1_200_000  # of the standard library's code
    read: int = 280_000  # characters of its domain that a teacher or pivot reads
    rows: int = 240  # of text, of each domain, that the students learn from
    held_out: int = 32  # rows of each domain to choose by, and as many to test on
    seeds: int = 3


FULL = Effort()
QUICK = Effort(
    teacher_steps=5, steps=2, text_steps=(3, 2, 2), characters=300_000, read=40_000, rows=8, held_out=4, seeds=1
)
CHOOSING = 1000  # the seed that settings are chosen on; none of those reported


@dataclass(frozen=True)
class Method:
    """Settings under the names that the table shows: arguments of the trainer's configuration."""

    family: str  # what the student learns from
    settings: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """A student, or what it is compared with: a score of each data set."""

    validation: dict[str, float]
    test: dict[str, float]
    setting: str = ""
    seconds: float = 0.0  # of the processor, per training step


@dataclass(frozen=True)
class Half:
    """One half of the study.

    Attributes:
        baseline: the method that all others are compared with.
        unit: of the scores.
        lower_is_better: whether the least score is the best.
        methods: by name.
        start: the row that the chart counts from; nothing, if empty.
        pairs: of methods that are compared with each other, too.
        prepare: (seed, effort) -> rows of what is no method, and ``learn``: (name of a method, one of its settings) ->
            row.
    """

    baseline: str
    unit: str
    lower_is_better: bool
    methods: dict[str, Method]
    start: str
    pairs: tuple[tuple[str, str], ...]
    prepare: Callable[[int, Effort], tuple[dict[str, Row], Callable[[str, str], Row]]]

    def first(self) -> dict[str, str]:
        """Of each method the first setting."""
        return {name: next(iter(method.settings)) for name, method in self.methods.items()}

    def chosen(self, effort: Effort, file: Path) -> dict[str, str]:
        """Of each method the setting that validation data prefer, on a seed that is not reported."""
        wanted = {f"{m}, {setting}": (m, setting) for m, method in self.methods.items() for setting in method.settings}
        rows = self.rows(CHOOSING, effort, wanted, file)
        return {
            name: best((rows[f"{name}, {s}"] for s in method.settings), lower_is_better=self.lower_is_better).setting
            for name, method in self.methods.items()
        }

    def rows(self, seed: int, effort: Effort, wanted: dict[str, tuple[str, str]], file: Path) -> dict[str, Row]:
        """What is no method, then name -> (method, setting) as wanted; ``file`` keeps what is done for a next try."""
        done, learn = _read(file, effort), None
        for name, (method, setting) in wanted.items():
            if name in done and done[name].setting == setting:
                continue
            if learn is None:
                references, learn = self.prepare(seed, effort)
                done = references | {key: row for key, row in done.items() if key not in references}
            done[name] = learn(method, setting)
            _write(file, effort, done)
            print(f"seed {seed}: {name}, {setting}: done", file=sys.stderr, flush=True)
        return done


def _read(file: Path, effort: Effort) -> dict[str, Row]:
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if kept.get("effort") != json.loads(json.dumps(asdict(effort))):
        return {}
    return {name: Row(**row) for name, row in kept["rows"].items()}


def _write(file: Path, effort: Effort, rows: dict[str, Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = {"effort": asdict(effort), "rows": {name: asdict(row) for name, row in rows.items()}}
    unfinished = file.with_suffix(".partial")
    unfinished.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(file)


def best(rows: Iterable[Row], *, lower_is_better: bool) -> Row:
    """The one that does best on the validation data of all data sets together."""
    return (min if lower_is_better else max)(rows, key=lambda row: sum(row.validation.values()))


def trainer_settings(folder: str, steps: int, seed: int) -> dict[str, Any]:
    """Of every student's training."""
    return {
        "output_dir": folder, "max_steps": steps, "lr_scheduler_type": "cosine", "warmup_steps": steps // 10,
        "weight_decay": 0.05, "seed": seed, "use_cpu": True, "dataloader_pin_memory": False, "save_strategy": "no",
        "logging_strategy": "no", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
