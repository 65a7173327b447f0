"""What a sweep found: its trials, ranked, and where the best one lies."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from hf_fuse.merge.sweep_settings import SweepSettings


@dataclass
class Trial:
    """One merge of a sweep. A failed one has no score and says why in ``note``."""

    number: int
    parameters: dict[str, Any]
    score: float | None = None
    second: float | None = None
    figures: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    note: str = ""

    @property
    def label(self) -> str:
        shown = {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in self.parameters.items()}
        return ", ".join(f"{short(key)} {value}" for key, value in shown.items())


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found: ``output`` holds the merge of ``best``; ``record`` and ``plot`` lie beside it."""

    output: Path
    best: Trial
    trials: list[Trial]
    settings: SweepSettings
    record: Path
    plot: Path | None = None

    @property
    def ranked(self) -> list[Trial]:
        """Best first; failed trials last, in their order."""
        done = [trial for trial in self.trials if trial.score is not None]
        sign = 1 if self.settings.lower_is_better else -1
        failed = [trial for trial in self.trials if trial.score is None]
        return [*sorted(done, key=lambda trial: (sign * trial.score, trial.number)), *failed]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what ``sweep.json`` holds and ``hf-fuse sweep --json`` prints."""
        second = self.settings.second
        return {
            "output": self.output.name,
            "metric": self.settings.metric.name,
            "goal": "minimize" if self.settings.lower_is_better else "maximize",
            "second": second.name if second else None,
            "best": self.best.number,
            "trials": [asdict(trial) for trial in self.trials],
            "sweep": self.settings.model_dump(exclude_unset=True),
        }

    def print(self, console: Console | None = None) -> None:
        """A table of all trials, best first."""
        from hf_fuse.merge.sweep_report import print_sweep

        print_sweep(self, console)


def short(key: str) -> str:
    """``parameters.density`` -> ``density``; other keys as they are."""
    return key.removeprefix("parameters.")
