"""Which parameters a sweep tries: every combination, seeded draws, or what optuna suggests from the scores so far."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Generator
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from hf_fuse.errors import RecipeError
from hf_fuse.recipe import explain
from hf_fuse.registry import nearest

if TYPE_CHECKING:
    from hf_fuse.merge.sweep_settings import SweepSettings

MOST = 10_000  # a larger grid is a slip of the pen


class Range(BaseModel):
    """Numbers from ``low`` to ``high``, both included; ``log`` draws their logarithm, ``integer`` whole numbers."""

    model_config = ConfigDict(extra="forbid", strict=False)
    low: float
    high: float
    log: bool = False
    integer: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low < self.high or not math.isfinite(self.high - self.low):
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs low above 0, not {self.low:g}")
        if self.integer and (self.low % 1 or self.high % 1):
            raise ValueError(f"integer needs whole numbers, not {self.low:g} and {self.high:g}")
        return self

    @property
    def ends(self) -> list[float]:
        return [int(self.low), int(self.high)] if self.integer else [self.low, self.high]

    def draw(self, source: random.Random) -> float:
        if self.integer and not self.log:
            return source.randint(int(self.low), int(self.high))
        if self.log:
            value = math.exp(source.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = source.uniform(self.low, self.high)
        value = min(max(value, self.low), self.high)
        return round(value) if self.integer else value


def _values(given: Any) -> Any:
    if isinstance(given, list):
        if not given:
            raise ValueError("an empty list of values")
        return given
    if isinstance(given, dict):
        for key in given:
            if key not in Range.model_fields:
                raise ValueError(f"unknown key {key!r} of a range. {nearest(str(key), Range.model_fields)}")
        try:
            return Range.model_validate(given)
        except ValidationError as error:
            raise ValueError(explain(error, Range).rstrip(".")) from None
    if not isinstance(given, Range):
        raise ValueError("expected a list of values or {low: ..., high: ...}")
    return given


Values = Annotated[list[Any] | Range, BeforeValidator(_values)]


def probes(settings: SweepSettings) -> list[dict[str, Any]]:
    """Sets of parameters to plan before any work: all that will be tried, or for optuna each value that its lists and
    the ends of its ranges hold, once.

    Raises:
        RecipeError: too large a grid, or optuna is missing.
    """
    if settings.search == "optuna":
        _optuna()
        return _each_once(settings.parameters)
    return list(_known(settings))


def asked(settings: SweepSettings) -> Generator[dict[str, Any], float | None, None]:
    """Yields sets of parameters; each is answered with its score, None if it failed."""
    if settings.search == "optuna":
        yield from _suggested(settings)
    else:
        for parameters in _known(settings):  # noqa: UP028 - what is sent here would be sent to a list
            yield parameters


def _known(settings: SweepSettings) -> list[dict[str, Any]]:
    if settings.search == "random":
        return _drawn(settings)
    lists = settings.parameters
    count = math.prod(map(len, lists.values()))
    if count > (settings.trials or MOST):
        raise RecipeError(
            f"sweep: the grid has {count} combinations, more than trials allows ({settings.trials or MOST}). Shorten "
            "the lists, raise trials, or say search: random."
        )
    return [dict(zip(lists, values)) for values in itertools.product(*lists.values())]


def _drawn(settings: SweepSettings) -> list[dict[str, Any]]:
    source, found = random.Random(settings.seed), []
    for _ in range(100 * settings.trials):  # lists alone have only so many combinations
        drawn = {
            key: values.draw(source) if isinstance(values, Range) else source.choice(values)
            for key, values in settings.parameters.items()
        }
        if drawn not in found:
            found.append(drawn)
        if len(found) == settings.trials:
            break
    return found


def _each_once(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    choices = {key: values.ends if isinstance(values, Range) else values for key, values in parameters.items()}
    longest = max(map(len, choices.values()))
    return [{key: values[min(i, len(values) - 1)] for key, values in choices.items()} for i in range(longest)]


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise RecipeError(
            'sweep: search optuna needs optuna, which is not installed. Run: pip install "hf-fuse[tune]", or say '
            "search: random."
        ) from None
    return optuna


def _suggested(settings: SweepSettings) -> Generator[dict[str, Any], float | None, None]:
    optuna = _optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    direction = "minimize" if settings.lower_is_better else "maximize"
    study = optuna.create_study(direction=direction, sampler=optuna.samplers.TPESampler(seed=settings.seed))
    for _ in range(settings.trials):
        trial = study.ask()
        score = yield {key: _suggestion(trial, key, values) for key, values in settings.parameters.items()}
        if score is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, score)


def _suggestion(trial: Any, key: str, values: Any) -> Any:
    if not isinstance(values, Range):
        # By place: optuna's categories can't be lists, which a value may be (a gradient over depth).
        return values[trial.suggest_categorical(key, list(range(len(values))))]
    if values.integer:
        return trial.suggest_int(key, int(values.low), int(values.high), log=values.log)
    return trial.suggest_float(key, values.low, values.high, log=values.log)
