"""A method is a file: its name is its registration, its keyword-only arguments are its schema.

``names("merge")`` lists the files of the kind's folder without importing them; ``get("merge", "ties")`` imports one.
Third parties add methods through the entry point group ``hf_fuse.<kind>`` (name = method, value = ``module``).
"""

from __future__ import annotations

import difflib
import inspect
import pkgutil
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType
from typing import Annotated, Any, Literal

from hf_fuse.errors import RecipeError

KINDS = {
    "merge": "hf_fuse.merge.methods",
    "post": "hf_fuse.merge.post",
    "learn": "hf_fuse.merge.learn",
    "align": "hf_fuse.merge.align.methods",
    "losses": "hf_fuse.losses",
    "compress": "hf_fuse.compress.methods",
    "distill": "hf_fuse.distill.methods",
    "data": "hf_fuse.data.methods",
    "attached": "hf_fuse.distill.attached",
    "decode": "hf_fuse.decode.methods",
}
LARGEST = 3.4028234663852886e38  # float32's
# Filled in by the engine, not by the user.
SUPPLIED = ("state", "random", "base", "place", "statistics", "input_axis")


@dataclass(frozen=True)
class Between:
    """Range of a number: ``Annotated[float, Between(0, 1)]``. ``open_low`` excludes the lower end."""

    low: float = float("-inf")
    high: float = float("inf")
    open_low: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.open_low else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        if self.high == float("inf"):
            return "any number" if self.low == float("-inf") else f"{'>' if self.open_low else '>='} {self.low:g}"
        return f"{'(' if self.open_low else '['}{self.low:g}, {self.high:g}]"


# An option that may differ from model to model: the method receives a list of K numbers.
PerModel = Sequence[float]


@dataclass(frozen=True)
class Option:
    """One keyword of a method as recipes see it (``lambda_`` in Python is ``lambda`` in a recipe)."""

    name: str
    keyword: str
    default: Any
    kind: type  # bool, int, float or str
    per_model: bool = False
    range: Between | None = None
    choices: tuple[str, ...] = ()
    optional: bool = False  # None allowed

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    def describe(self) -> str:
        text = " | ".join(self.choices) or self.kind.__name__
        if self.range:
            text += f" {self.range}"
        return text + (", per model" if self.per_model else "")

    def check(self, value: Any, where: str) -> Any:
        """Returns ``value`` in the option's type or raises RecipeError naming ``where``."""
        if value is None and self.optional:
            return None
        expected = f"{where}: {self.name} is {value!r}, expected {self.describe()}."
        if self.choices:
            if value not in self.choices:
                raise RecipeError(expected)
            return value
        if self.kind is bool:
            if not isinstance(value, (bool, int)) or value not in (0, 1):
                raise RecipeError(expected)
            return bool(value)
        if isinstance(value, bool) and self.kind is not str:
            raise RecipeError(expected)
        try:
            number = self.kind(value)
        except (TypeError, ValueError, OverflowError):
            raise RecipeError(expected) from None
        if self.kind is int and number != value or number != number:
            raise RecipeError(expected)
        if self.kind is float and LARGEST < abs(number) < float("inf"):
            raise RecipeError(f"{expected} It is beyond the range of float32.")
        if self.range and number not in self.range:
            raise RecipeError(expected)
        return number


@dataclass(frozen=True)
class Method:
    """A registered function with what its file says about it."""

    name: str
    kind: str
    function: Callable
    module: ModuleType
    summary: str
    paper: str | None
    options: dict[str, Option]

    @property
    def argument(self) -> str:
        """Name of the first parameter: what the method works on."""
        return next(iter(inspect.signature(self.function).parameters))

    def option(self, name: str, where: str) -> Option:
        if name not in self.options:
            raise RecipeError(f"{where}: {self.name} has no parameter {name!r}. {nearest(name, self.options)}")
        return self.options[name]

    def settings(self, said: Mapping[str, Any], where: str = "parameters") -> dict[str, Any]:
        """All keyword arguments, checked: what a recipe says (a list of options that are per model), and defaults.

        Raises:
            RecipeError: unknown or missing parameter, or one out of range.
        """
        given = {self.option(name, where): value for name, value in said.items()}
        for option in self.options.values():
            if option.required and option not in given:
                raise RecipeError(f"{where}: {option.name} is missing. Expected {option.describe()}.")
        found = {option.keyword: option.default for option in self.options.values()}
        for option, value in given.items():
            several = option.per_model and isinstance(value, list)
            found[option.keyword] = [option.check(v, where) for v in value] if several else option.check(value, where)
        return found


def nearest(name: str, known: Sequence[str] | dict) -> str:
    """'Did you mean 'density'?' or the list of what exists."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"Known: {', '.join(sorted(known))}." if known else "It takes none."


def _third_party(kind: str) -> dict[str, Any]:
    return {entry.name: entry for entry in entry_points(group=f"hf_fuse.{kind}")}


def names(kind: str) -> list[str]:
    """Names of all methods of a kind, sorted; files with a leading underscore hold shared maths."""
    folder = import_module(KINDS[kind])
    own = [m.name for m in pkgutil.iter_modules(folder.__path__) if not m.name.startswith("_")]
    return sorted({*own, *_third_party(kind)})


@cache
def get(kind: str, name: str) -> Method:
    """Imports one method.

    Raises:
        RecipeError: no such method; the nearest name is given.
    """
    known = names(kind)
    if name not in known:
        raise RecipeError(f"method: no {kind} method is called {name!r}. {nearest(name, known)}")
    extra = _third_party(kind)
    module = extra[name].load() if name in extra else import_module(f"{KINDS[kind]}.{name}")
    function = getattr(module, name)
    summary = inspect.cleandoc(module.__doc__ or function.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    return Method(name, kind, function, module, summary, getattr(module, "PAPER", None), _options(function))


def _options(function: Callable) -> dict[str, Option]:
    hints = typing.get_type_hints(function.__init__ if isinstance(function, type) else function, include_extras=True)
    found = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY or parameter.name in SUPPLIED:
            continue
        option = _option(parameter, hints[parameter.name])
        found[option.name] = option
    return found


def _option(parameter: inspect.Parameter, hint: Any) -> Option:
    bounds, choices, optional = None, (), False
    # Annotated[int, Between(1)], | None within it or around it.
    while typing.get_origin(hint) is Annotated or type(None) in typing.get_args(hint):
        if typing.get_origin(hint) is Annotated:
            hint, *extras = typing.get_args(hint)
            bounds = next((extra for extra in extras if isinstance(extra, Between)), None)
        else:
            optional, (hint,) = True, [a for a in typing.get_args(hint) if a is not type(None)]
    per_model = hint == PerModel
    if typing.get_origin(hint) is Literal:
        choices, hint = typing.get_args(hint), str
    name = re.sub("_$", "", parameter.name)
    kind = float if per_model else hint
    return Option(name, parameter.name, parameter.default, kind, per_model, bounds, choices, optional)
