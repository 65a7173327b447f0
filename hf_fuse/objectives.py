"""What a training run minimises: the task loss plus losses of ``hf_fuse/losses``, each with a weight or a schedule.

``objectives`` maps names to weights::

    {"logit_z": 1e-4}                                              # a number
    {"load_balance": {"start": 0, "end": 0.01, "until": 0.1}}      # a schedule
    {"comp_sum": {"weight": 1.0, "tau": 0.7}, "task": 0}           # a weight and the loss's own options

``task`` is the loss that the model (or ``compute_loss_func``) computes; its weight is 1 unless given.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_fuse import registry
from hf_fuse.batch_counts import PREDICTIONS, SAMPLES, TOKENS, UNITS
from hf_fuse.errors import CheckpointError, RecipeError
from hf_fuse.replay import REPLAY

TASK = "task"
SHAPES = ("linear", "cosine", "quadratic")
STATE_FILE = "objective_states_{}.safetensors"


@dataclass(frozen=True)
class Schedule:
    """A weight that moves from ``start`` to ``end`` between two moments of the training and is constant around them.

    Attributes:
        start: weight up to ``after``.
        end: weight from ``until`` on.
        after: a share of the training (a float in [0, 1]) or an optimizer step (an integer).
        until: likewise.
        shape: ``linear``; ``cosine``: half a cosine, flat at both ends; ``quadratic``: slow first.
    """

    start: float
    end: float
    after: float = 0.0
    until: float = 1.0
    shape: str = "linear"

    @property
    def constant(self) -> bool:
        return self.start == self.end

    def __call__(self, step: int, max_steps: int) -> float:
        """The weight of the optimizer step number ``step`` (the first is 0) of ``max_steps``."""
        first, last = (m if isinstance(m, int) else m * max_steps for m in (self.after, self.until))
        done = min(max((step - first) / (last - first), 0.0), 1.0) if last > first else float(step >= first)
        if self.shape == "cosine":
            done = 0.5 - 0.5 * math.cos(math.pi * done)
        elif self.shape == "quadratic":
            done = done**2
        return self.start + done * (self.end - self.start)


@dataclass(frozen=True)
class Objective:
    """A loss with its options bound, and how much it counts.

    Attributes:
        name: of the loss, and in the logs.
        weight: constant or not.
        loss: called with the tensors that it needs, by keyword; a module if it carries state.
        needs: parameter of the loss -> name of the tensor it gets.
        optional: parameters that have a default.
        mean_over: what the value is a mean over, one of ``UNITS``.
    """

    name: str
    weight: Schedule
    loss: Callable[..., Tensor]
    needs: dict[str, str]
    optional: frozenset[str]
    mean_over: str

    @property
    def stateful(self) -> bool:
        """Whether the loss has buffers or layers."""
        return isinstance(self.loss, nn.Module) and bool(self.loss.state_dict())

    @property
    def required(self) -> set[str]:
        """Names of the tensors that the loss can't do without."""
        return {name for keyword, name in self.needs.items() if keyword not in self.optional}

    def arguments(self, available: Mapping[str, Any]) -> dict[str, Any] | None:
        """The loss's arguments, or None if one that it can't do without is missing."""
        given = {keyword: available[name] for keyword, name in self.needs.items() if available.get(name) is not None}
        return given if all(keyword in given or keyword in self.optional for keyword in self.needs) else None


def read_objectives(
    settings: Mapping[str, Any], *, kinds: Sequence[str] = ("losses",)
) -> tuple[Schedule, list[Objective]]:
    """Checks ``objectives`` as a user writes them.

    Args:
        settings: name -> number, schedule, or weight with options (see the module).
        kinds: of the registry.

    Returns:
        The weight of the task loss, and the objectives in the given order.

    Raises:
        RecipeError: unknown loss, option or schedule key (the nearest name is given), or a value out of range.
    """
    if not isinstance(settings, Mapping):
        raise RecipeError(f"objectives is {settings!r}, expected a mapping of names to weights: {{logit_z: 0.0001}}.")
    task, found = Schedule(1.0, 1.0), []
    for name, entry in settings.items():
        where = f"objectives.{name}"
        weight, options = _weight_and_options(entry, where)
        if name != TASK:
            found.append(_objective(name, weight, options, kinds, where))
        elif options:
            raise RecipeError(f"{where}: the task loss has no options, got {', '.join(options)}. Give a weight alone.")
        else:
            task = weight
    return task, found


def _objective(name: str, weight: Schedule, options: Mapping[str, Any], kinds: Sequence[str], where: str) -> Objective:
    kind_of = {known: kind for kind in kinds for known in registry.names(kind)}
    if name not in kind_of:
        elsewhere = any(name in registry.names(kind) for kind in ("distill", "attached"))
        hint = "Use DistillConfig and DistillTrainer." if elsewhere else registry.nearest(name, [TASK, *kind_of])
        raise RecipeError(f"objectives: there is no loss {name!r}{' in FuseConfig' if elsewhere else ''}. {hint}")
    method = registry.get(kind_of[name], name)
    bound = {}
    for key, value in options.items():
        option = method.option(key, where)
        bound[option.keyword] = option.check(value, where)
    missing = [option.name for option in method.options.values() if option.required and option.keyword not in bound]
    if missing:
        raise RecipeError(f"{where}: {name} needs {', '.join(missing)}. Write {{weight: ..., {missing[0]}: ...}}.")
    stateful = isinstance(method.function, type)
    loss = method.function(**bound) if stateful else partial(method.function, **bound)
    if stateful and any(True for _ in loss.parameters()):
        raise RecipeError(
            f"{where}: {name} has trainable parameters from the start. Make them in its method prepare(model, "
            "train_dataset), which is called with the same random numbers on every process."
        )
    needs, optional = _needs(loss.forward if isinstance(loss, nn.Module) else method.function)
    names = {*needs.values()}
    default = PREDICTIONS if "labels" in names else TOKENS if "attention_mask" in names else SAMPLES
    mean_over = getattr(method.module, "MEAN_OVER", default)
    if mean_over not in {*UNITS, REPLAY, *names}:
        raise RecipeError(
            f"{method.module.__name__}: MEAN_OVER is {mean_over!r}, expected {', '.join(UNITS)}, {REPLAY}, or a column "
            "that the loss needs."
        )
    return Objective(name, weight, loss, needs, optional, mean_over)


def _needs(function: Callable) -> tuple[dict[str, str], frozenset[str]]:
    """Parameters before the keyword-only ones; a shape suffix is not part of a tensor's name (``logits_NC``)."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    needs = {p.name: re.sub(r"_[A-Z][A-Z0-9]*$", "", p.name) for p in parameters}
    return needs, frozenset(p.name for p in parameters if p.default is not p.empty)


def _weight_and_options(entry: Any, where: str) -> tuple[Schedule, dict[str, Any]]:
    if not isinstance(entry, Mapping):
        return _schedule(entry, where), {}
    if "start" in entry or "end" in entry:
        return _schedule(entry, where), {}
    options = dict(entry)
    return _schedule(options.pop("weight", 1.0), f"{where}.weight"), options


def _schedule(entry: Any, where: str) -> Schedule:
    if not isinstance(entry, Mapping):
        weight = _number(entry, where, "a number or a schedule {start, end, after, until, shape}")
        return Schedule(weight, weight)
    known = ("start", "end", "after", "until", "shape")
    for key in entry:
        if key not in known:
            raise RecipeError(f"{where}: a schedule has no {key!r}. {registry.nearest(str(key), known)}")
    for key in ("start", "end"):
        if key not in entry:
            raise RecipeError(f"{where}: the schedule lacks {key!r}. Example: {{start: 0, end: 0.1, until: 0.2}}.")
    shape = entry.get("shape", "linear")
    if shape not in SHAPES:
        raise RecipeError(f"{where}: shape is {shape!r}. {registry.nearest(str(shape), SHAPES)}")
    after, until = (
        _moment(entry.get(key, default), f"{where}.{key}") for key, default in (("after", 0), ("until", 1.0))
    )
    if type(after) is type(until) and after > until:
        raise RecipeError(f"{where}: after ({after}) comes later than until ({until}). Swap them.")
    return Schedule(
        *(_number(entry[key], f"{where}.{key}", "a number") for key in ("start", "end")), after, until, shape
    )


def _number(value: Any, where: str, expected: str) -> float:
    # YAML 1.1 reads 1e-4 as text.
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RecipeError(f"{where} is {value!r}, expected {expected}.")
    return float(value)


def _moment(value: Any, where: str) -> float:
    number = _number(value, where, "a share of the training (0.1) or a step (100)")
    is_step = isinstance(value, int)
    if number < 0 or (not is_step and number > 1):
        raise RecipeError(f"{where} is {value!r}, expected a share of the training from 0.0 to 1.0 or a step >= 0.")
    return int(value) if is_step else number


def save_states(objectives: list[Objective], folder: str | Path, process: int) -> None:
    """Writes the buffers and layers of the losses that have some; each process has its own."""
    tensors = {
        f"{objective.name}.{name}": value.detach().cpu().clone().contiguous()
        for objective in objectives
        if objective.stateful
        for name, value in objective.loss.state_dict().items()
    }
    if tensors:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(tensors, Path(folder, STATE_FILE.format(process)))


def load_states(objectives: list[Objective], folder: str | Path, process: int) -> None:
    """Restores what :func:`save_states` wrote.

    Raises:
        CheckpointError: the checkpoint has no such states, or other ones.
    """
    stateful = [objective for objective in objectives if objective.stateful]
    if not stateful:
        return
    path = Path(folder, STATE_FILE.format(process))
    if not path.is_file():
        raise CheckpointError(
            f"{path}: missing, but {', '.join(o.name for o in stateful)} carries state. Resume from a checkpoint "
            "written with the same objectives and number of processes, or start anew."
        )
    tensors = load_file(path)
    for objective in stateful:
        prefix = f"{objective.name}."
        own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        try:
            objective.loss.load_state_dict(own)
        except RuntimeError as error:
            raise CheckpointError(f"{path}: doesn't fit objectives.{objective.name}: {error}") from None
