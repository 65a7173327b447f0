"""Tasks of EleutherAI's lm-evaluation-harness, run on a live model.

https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_fuse.errors import FuseError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task. ``stderr`` is the harness's bootstrap or sample standard error, where it gives one."""

    task: str
    metric: str
    value: float
    n: int
    higher_is_better: bool
    stderr: float | None


def find_tasks(tasks: Sequence[str]) -> tuple[list[str], TaskManager]:
    """Task names or .yaml files of tasks -> (names, the harness's index that knows them).

    Raises:
        FuseError: the harness is not installed, or has no such task (near names are given).
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise FuseError(
            f"tasks {', '.join(tasks)}: need the lm-evaluation-harness, which is not installed. "
            'Install it with: pip install "hf-fuse[eval]"'
        ) from None
    files = [Path(task) for task in tasks if Path(task).suffix in (".yaml", ".yml")]
    names = [_name_in(Path(task)) if Path(task) in files else str(task) for task in tasks]
    manager = TaskManager(include_path=sorted({str(file.parent) for file in files}) or None)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=4)
            hint = f"Did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them."
            raise FuseError(f"task {name!r}: unknown to the lm-evaluation-harness. {hint}")
    return names, manager


def _name_in(file: Path) -> str:
    """The name of the group or task that a .yaml file defines."""
    if not file.is_file():
        raise FuseError(f"{file}: no such task file.")
    # Not parsed as YAML: the harness's own tags (!function) are not for us to resolve.
    found = dict(re.findall(r"^(group|task):[ \t]*[\"']?([\w.+-]+)", file.read_text(encoding="utf-8"), re.MULTILINE))
    name = found.get("group") or found.get("task")
    if not name:
        raise FuseError(f"{file}: names no task. Expected a line such as `task: my_task`.")
    return name


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    manager: TaskManager,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    limit: int | None = None,
) -> list[TaskScore]:
    """Runs ``tasks`` on ``model`` where it is, with the harness's own prompts and metrics.

    A group (such as ``mmlu``) gives one score where the harness aggregates it, otherwise one per member. Tasks that run
    code written by the model are refused by the harness.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    # The harness logs its settings at length; the report says what matters.
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
        found = lm_eval.simple_evaluate(
            wrapped, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False, bootstrap_iters=1000
        )
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise FuseError(f"tasks {', '.join(tasks)}: the lm-evaluation-harness stopped: {reason}") from error
    finally:
        logger.setLevel(level)
    return _scores(found)


def _scores(found: dict) -> list[TaskScore]:
    scores = []
    groups = found.get("groups") or {}
    # Members of an aggregated group would repeat it, sixty times over for mmlu.
    subtasks = found.get("group_subtasks") or {}
    members = {name for group, names in subtasks.items() if group in groups for name in names}
    for task, metrics in {**found["results"], **groups}.items():
        if task in members:
            continue
        n = _examples(found, task)
        for key, value in metrics.items():
            name, _, filter_name = key.partition(",")
            if not filter_name or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{name}_stderr,{filter_name}")
            higher = (found.get("higher_is_better") or {}).get(task, {}).get(name)
            if higher is None:
                # The harness leaves it open for a few metrics; those that are not scores are perplexities and errors.
                higher = not any(word in name for word in ("perplexity", "bits_per", "err"))
            scores.append(
                TaskScore(
                    task,
                    name if filter_name == "none" else f"{name} ({filter_name})",
                    float(value),
                    n,
                    higher,
                    float(stderr) if isinstance(stderr, int | float) else None,
                )
            )
    return scores


def _examples(found: dict, task: str) -> int:
    sizes = found.get("n-samples") or {}
    if task in sizes:
        return int(sizes[task]["effective"])
    if "sample_len" in found["results"].get(task, {}):
        return int(found["results"][task]["sample_len"])
    return sum(_examples(found, member) for member in (found.get("group_subtasks") or {}).get(task, ()))
