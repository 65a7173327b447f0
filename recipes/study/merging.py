"""Every method on one suite: with its defaults, and with the best of a small grid by validation data."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from study.suites import Effort, State, Suite

from hf_fuse import FuseError, merge_state_dicts, registry

# Values tried for every method that has a parameter of this name, unless GRIDS says otherwise for the method. They go
# below 1/K for all suites: a grid that ends above it would lose to the mean for no other reason.
COMMON = {"lambda": (0.05, 0.1, 0.15, 0.25, 0.4, 0.7, 1.0, 1.5), "density": (0.1, 0.4)}
# Method -> parameter -> values. Named here where a common grid would miss the method's own scale or main parameter.
GRIDS: dict[str, dict[str, tuple]] = {
    "consensus": {"lambda": COMMON["lambda"], "mask_scale": (0.2, 0.5)},
    "dare_linear": {"lambda": COMMON["lambda"], "density": (0.5, 0.8)},
    "dare_ties": {"lambda": COMMON["lambda"], "density": (0.5, 0.8)},
    "della": {"lambda": COMMON["lambda"], "density": (0.4, 0.7)},
    "della_linear": {"lambda": COMMON["lambda"], "density": (0.4, 0.7)},
    "sce": {"density": (0.1, 0.3, 0.6, 1.0)},
}


@dataclass
class Row:
    """One model of one seed: scores per task on test data, and the length of its change."""

    scores: list[float]
    norm: float  # |model - base| over the mean |expert - base|
    parameters: dict[str, Any] = field(default_factory=dict)


def length(state: State, base: State) -> float:
    return math.sqrt(sum(float((state[name].double() - base[name].double()).square().sum()) for name in base))


def grid(method: Any, limit: int | None) -> list[dict[str, Any]]:
    """Sets of parameters to choose from; empty where the method has nothing that the study knows how to tune."""
    values = GRIDS.get(method.name) or {name: COMMON[name] for name in COMMON if name in method.options}
    values = {name: tried for name, tried in values.items() if name in method.options}
    if limit:
        values = {name: tried[1 : 1 + limit] for name, tried in values.items()}
    return [dict(zip(values, chosen)) for chosen in itertools.product(*values.values())] if values else []


def contenders(wanted: Sequence[str]) -> list[tuple[str, str, str | None]]:
    """(label, merge method, step after it): all methods, and the steps after the sums that they are meant for."""
    found = [(name, name, None) for name in registry.names("merge")]
    for step in registry.names("post"):
        found += [(f"{name} + {step}", name, step) for name in ("task_arithmetic", "ties")]
    return [entry for entry in found if not wanted or entry[1] in wanted]


def run_suite(suite: Suite, seed: int, effort: Effort) -> dict[str, Any]:
    """Scores base, experts, reference and every method -> rows by label, skipped methods with the reason, conflicts."""
    mean_length = statistics.mean(length(expert, suite.base) for expert in suite.experts)

    def row(state: State, parameters: dict[str, Any] | None = None) -> Row:
        return Row(suite.score(state, "test"), length(state, suite.base) / mean_length, parameters or {})

    rows, skipped = {"base": row(suite.base)}, {}
    own = [suite.score(expert, "test") for expert in suite.experts]
    rows["experts, each on its own"] = Row([scores[k] for k, scores in enumerate(own)], 1.0)
    rows["experts, on all tasks"] = Row([statistics.mean(column) for column in zip(*own)], 1.0)
    rows["trained on all tasks"] = row(suite.reference)
    for label, name, step in contenders(effort.methods):
        try:
            default, tuned, chosen = merged_and_tuned(suite, registry.get("merge", name), step, seed, effort.grid)
        except FuseError as error:
            skipped[label] = str(error)
            continue
        rows[label] = row(default)
        if tuned is not None:
            rows[f"{label} (tuned)"] = row(tuned, chosen)
    return {"rows": rows, "skipped": skipped, "conflict": conflict(suite)}


def merged_and_tuned(
    suite: Suite, method: Any, step: str | None, seed: int, limit: int | None
) -> tuple[State, State | None, dict[str, Any]]:
    """The merge with defaults; the one of the grid (defaults included) that is best on validation data, and with what.

    Raises:
        FuseError: the method does not merge this many models.
    """
    from hf_fuse.merge.units import takes_base

    base = None if takes_base(method) is False else suite.base

    def merged(parameters: dict[str, Any]) -> State:
        return merge_state_dicts(
            suite.experts, method.name, base=base, parameters=parameters, post=step, seed=seed, workers=1
        )

    default = merged({})
    tried = grid(method, limit)
    if not tried:
        return default, None, {}
    state, chosen, highest = default, {"defaults": ""}, statistics.mean(suite.score(default, "validation"))
    for parameters in tried:
        other = merged(parameters)
        score = statistics.mean(suite.score(other, "validation"))
        if score > highest:
            state, chosen, highest = other, parameters, score
    return default, state, chosen


def conflict(suite: Suite) -> dict[str, float]:
    """Mean cosine of two task vectors, and the share of elements in which two have opposite signs."""
    flat_KN = torch.stack([torch.cat([(e[n] - suite.base[n]).flatten() for n in suite.base]) for e in suite.experts])
    unit_KN = torch.nn.functional.normalize(flat_KN, dim=1)
    pairs = list(itertools.combinations(range(len(flat_KN)), 2))
    return {
        "cosine": statistics.mean(float(unit_KN[i] @ unit_KN[j]) for i, j in pairs),
        "opposite signs": statistics.mean(float((flat_KN[i] * flat_KN[j] < 0).float().mean()) for i, j in pairs),
    }
