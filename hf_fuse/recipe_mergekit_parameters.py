"""What mergekit's methods mean by their parameters, and how the same is said in a recipe."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from hf_fuse.errors import RecipeError
from hf_fuse.registry import nearest

logger = logging.getLogger(__name__)

WORDS = {
    True: ("true", "yes", "on", "y", "t", "1"),
    False: ("false", "no", "off", "n", "f", "0"),
}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a mergekit method.

    Args:
        kind: float or bool.
        per_model: mergekit looks for it at the model first; others it reads from the slice, module or file only.
        required: mergekit stops if a model (or the slice) has no value.
        target: the recipe's name.
        default: in the recipe's terms, where mergekit's default is not ours.
        only: the one value that can be expressed; then ``target`` is not used.
        convert: one value in the recipe's terms.
    """

    kind: type = float
    per_model: bool = False
    required: bool = False
    target: str = ""
    default: Any = None
    only: Any = None
    convert: Callable[[Any], Any] = staticmethod(lambda value: value)


@dataclass(frozen=True)
class MethodRule:
    """A mergekit method: its parameters, its use of ``base_model``, and the recipe options that fix its formula.

    Args:
        base: ``required``; ``optional``; ``ignored`` (the base is a model like the others).
        models: fewest and most models, without the base unless it is ignored.
        base_leads: the base is the first of the models (SLERP).
    """

    parameters: dict[str, Parameter]
    base: str = "required"
    models: tuple[int, int | None] = (1, None)
    base_leads: bool = False
    fixed: dict[str, Any] = field(default_factory=dict)


def _norm(rescale: bool) -> str:
    return "l1_norm" if rescale else "none"


WEIGHT = Parameter(per_model=True, required=True, target="weight")
DENSITY = Parameter(per_model=True, target="density", default=1.0)
NORMALIZE = Parameter(bool, target="normalize")
LAMBDA = Parameter(target="lambda")
LAMBDA_1 = Parameter(target="lambda", default=1.0)
RESCALE = Parameter(bool, target="rescale", default="l1_norm", convert=_norm)
NO_RESCALE = Parameter(bool, only=False)
_SUM = {"weight": WEIGHT, "normalize": NORMALIZE, "lambda": LAMBDA}
_DARE = _SUM | {"density": DENSITY, "rescale": RESCALE}
_DELLA = _DARE | {"epsilon": Parameter(per_model=True, target="epsilon", default=0.15), "lambda": LAMBDA_1}
_CRUMBS = _SUM | {
    "lambda": LAMBDA_1,
    "density": DENSITY,
    "gamma": Parameter(per_model=True, target="gamma", default=0.01),
    "rescale": NO_RESCALE,
}

METHODS = {
    "linear": MethodRule({"weight": WEIGHT, "normalize": NORMALIZE}, base="ignored"),
    "slerp": MethodRule({"t": Parameter(required=True, target="t")}, models=(1, 1), base_leads=True),
    # The two flags become one option, see axes().
    "nuslerp": MethodRule(
        {
            "weight": WEIGHT,
            "nuslerp_flatten": Parameter(bool, target="nuslerp_flatten"),
            "nuslerp_row_wise": Parameter(bool, target="nuslerp_row_wise"),
        },
        base="optional",
        models=(2, 2),
    ),
    "multislerp": MethodRule(
        {
            "weight": WEIGHT,
            "normalize_weights": Parameter(bool, target="normalize"),
            # Only guards divisions there; directions that balance out are told relative to their lengths here.
            "eps": Parameter(only=1e-8),
        },
        base="optional",
    ),
    "karcher": MethodRule(
        {"max_iter": Parameter(target="max_iter"), "tol": Parameter(target="tol")}, base="ignored"
    ),
    "task_arithmetic": MethodRule(_SUM),
    "ties": MethodRule(
        _SUM | {"density": DENSITY, "rescale": NO_RESCALE},
        fixed={"scope": "tensor", "trim": "exact", "tie": "positive"},
    ),
    "dare_linear": MethodRule(_DARE),
    "dare_ties": MethodRule(_DARE),
    "della": MethodRule(_DELLA),
    "della_linear": MethodRule(_DELLA),
    "breadcrumbs": MethodRule(_CRUMBS, fixed={"precedence": "density"}),
    "breadcrumbs_ties": MethodRule(_CRUMBS, fixed={"precedence": "density"}),
    "sce": MethodRule({"select_topk": Parameter(target="density", default=1.0)}, models=(2, None)),
    "ram": MethodRule({"epsilon": Parameter(target="epsilon")}),
    "ramplus_tl": MethodRule(
        {"epsilon": Parameter(target="epsilon"), "r": Parameter(target="r"), "alpha": Parameter(target="alpha")}
    ),
    "nearswap": MethodRule({"t": Parameter(required=True, target="t")}, models=(1, 1)),
    "arcee_fusion": MethodRule({}, models=(1, 1)),
    "model_stock": MethodRule(
        {"filter_wise": Parameter(bool, target="rows")}, models=(2, None), fixed={"clamp": False}
    ),
    "passthrough": MethodRule({"scale": Parameter(per_model=True, target="scale")}, base="ignored", models=(1, 1)),
}  # fmt: skip
NOT_GIVEN = "given by no filter"
# Parameters of any method of any version. mergekit passes over those that the method does not read.
KNOWN = {name for rule in METHODS.values() for name in rule.parameters} | {"embed_slerp", "int8_mask"}
# Saves memory in mergekit, and is in very many files where it does nothing at all.
SILENT = {"int8_mask"}


def method_rule(name: Any, file: str) -> MethodRule:
    """The rule of a ``merge_method``.

    Raises:
        RecipeError: mergekit has no such method.
    """
    if isinstance(name, str) and name in METHODS:
        return METHODS[name]
    raise RecipeError(f"{file}: merge_method {name!r} is unknown. {nearest(str(name), METHODS)}")


def translate_parameters(method: str, raw: Any, where: str, *, at_model: bool) -> dict[str, Any]:
    """The ``parameters`` of one model, slice, module or file in the recipe's terms; ``at_model`` for those of a model.

    Raises:
        RecipeError: a name that mergekit does not know, or a value that it would not take.
    """
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise RecipeError(f"{where}: expected a mapping from parameter to value, got {raw!r}.")
    rule, found = METHODS[method], {}
    for name, value in raw.items():
        parameter = rule.parameters.get(name)
        if parameter is None and name not in KNOWN:
            raise RecipeError(f"{where}: {method} has no parameter {name!r}. {nearest(str(name), rule.parameters)}")
        if parameter is None or value is None:
            if name not in SILENT and value is not None:
                logger.warning("%s.%s: mergekit's %s does not read this parameter. Ignored.", where, name, method)
            continue
        setting = _setting(value, parameter, f"{where}.{name}")
        if name == "density" and _largest(setting) > 1:
            logger.warning("%s.density: above 1 everything is kept, as at 1. Is it a percentage?", where)
        if at_model and not parameter.per_model:
            logger.warning("%s.%s: mergekit reads this from slices or the whole file only. Ignored.", where, name)
        elif parameter.only is not None:
            if setting != parameter.only:
                only = str(parameter.only).lower()
                raise RecipeError(f"{where}.{name}: {method} is supported with {name}: {only} only. Remove the key.")
        else:
            found[parameter.target] = setting
    return found


def _setting(value: Any, parameter: Parameter, where: str) -> Any:
    """A number or flag; a list of them (over depth); or a list of ``{filter, value}``, the first match counts."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return _scalar(value, parameter, where)
    if not value:
        raise RecipeError(f"{where}: the list is empty.")
    if not any(isinstance(entry, dict) for entry in value):
        return [_scalar(entry, parameter, where) for entry in value]
    conditions = []
    for position, entry in enumerate(value):
        here = f"{where}.{position}"
        if not isinstance(entry, dict):
            raise RecipeError(f"{here}: numbers and filters can't be mixed in one list, got {entry!r}.")
        check_keys(entry, ("filter", "value"), here)
        if "value" not in entry:
            raise RecipeError(f"{here}: the key 'value' is missing.")
        inner = entry["value"]
        inner = [_scalar(v, parameter, here) for v in inner] if isinstance(inner, list) else inner
        if inner == []:
            raise RecipeError(f"{here}: the list is empty.")
        condition = {"value": inner if isinstance(inner, list) else _scalar(inner, parameter, here)}
        pattern = entry.get("filter")
        if pattern not in (None, "", "*"):
            condition = {"filter": str(pattern)} | condition
        conditions.append(condition)
        if "filter" not in condition:
            break  # nothing gets past it
    return conditions


def _largest(setting: Any) -> float:
    if isinstance(setting, dict):
        return _largest(setting["value"])
    return max(map(_largest, setting)) if isinstance(setting, list) else setting


def _scalar(value: Any, parameter: Parameter, where: str) -> Any:
    expected = RecipeError(f"{where}: {value!r} is not a {'flag' if parameter.kind is bool else 'number'}.")
    if parameter.kind is bool:
        for flag, words in WORDS.items():
            if isinstance(value, (bool, int, float, str)) and (value == flag or str(value).lower() in words):
                return parameter.convert(flag)
        raise expected
    try:
        number = float(value) if isinstance(value, (int, float, str)) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise expected
    return parameter.convert(number)


def always(setting: Any) -> bool:
    """Whether a setting has a value for every tensor."""
    conditional = isinstance(setting, list) and isinstance(setting[0], dict)
    return not conditional or "filter" not in setting[-1]


def first_found(*settings: Any) -> Any:
    """One setting that does what looking through several in turn does; None stands for 'not given'."""
    result = None
    for setting in settings:
        if setting is None:
            continue
        if result is None:
            result = setting
        elif not always(result):
            conditional = isinstance(setting, list) and isinstance(setting[0], dict)
            result = [*result, *(setting if conditional else [{"value": setting}])]
    return result


def merged(scopes: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The parameters of several scopes, the narrowest first, as those of one."""
    scopes = list(scopes)
    names = dict.fromkeys(name for scope in scopes for name in scope)
    return {name: first_found(*(scope.get(name) for scope in scopes)) for name in names}


def with_defaults(rule: MethodRule, shared: dict[str, Any], models: Iterable[list[dict[str, Any]]]) -> dict[str, Any]:
    """The file's parameters, completed by mergekit's defaults where they are not ours.

    Args:
        models: for each model the parameters that are looked through before the file's.
    """
    shared, models = dict(shared), list(models)
    for parameter in rule.parameters.values():
        name = parameter.target
        if parameter.default is not None:
            shared[name] = first_found(shared.get(name), parameter.default)
        elif parameter.required and not all(
            always(first_found(*(scope.get(name) for scope in [*scopes, shared]))) for scopes in models
        ):
            # mergekit stops at a tensor that no filter matches. So will the check of this value, and only there.
            shared[name] = first_found(shared.get(name), [{"value": NOT_GIVEN}])
    return shared


def axes(parameters: dict[str, Any], wider: dict[str, Any], where: str) -> dict[str, Any]:
    """NuSLERP's two flags as ``axis``. mergekit's ``nuslerp_row_wise: true`` makes columns of ``[out, in]`` matrices
    the vectors, whatever its name says."""
    flags = ("nuslerp_flatten", "nuslerp_row_wise")
    result = {name: value for name, value in parameters.items() if name not in flags}
    if not any(name in parameters for name in flags):
        return result
    flatten, row_wise = (
        first_found(parameters.get(name), wider.get(name), default) for name, default in zip(flags, (True, False))
    )
    if flatten is True or flatten is False:
        result["axis"] = _each(row_wise, lambda rows: _axis(flatten, rows))
    elif row_wise is True or row_wise is False:
        result["axis"] = _each(flatten, lambda flat: _axis(flat, row_wise))
    else:
        raise RecipeError(f"{where}: nuslerp_flatten and nuslerp_row_wise can't both vary. Make one of them a flag.")
    return result


def _axis(flatten: bool, row_wise: bool) -> str:
    return "tensor" if flatten else "columns" if row_wise else "rows"


def _each(setting: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(setting, dict):
        return setting | {"value": _each(setting["value"], function)}
    return [_each(entry, function) for entry in setting] if isinstance(setting, list) else function(setting)


def check_keys(mapping: dict, known: Iterable[str], where: str) -> None:
    """Raises RecipeError for a key that mergekit does not have (mergekit itself would pass over it)."""
    for key in mapping:
        if key not in known and key in KNOWN and "parameters" in known:
            raise RecipeError(f"{where}: {key} belongs under 'parameters'.")
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}. {nearest(str(key), list(known))}")


def expect(value: Any, kind: type, where: str) -> None:
    """Raises RecipeError for anything but a list or a mapping."""
    if not isinstance(value, kind):
        expected = "a list" if kind is list else "a mapping"
        raise RecipeError(f"{where}: expected {expected}, got {value!r}.")
