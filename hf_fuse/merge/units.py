"""Which output tensor is made of which inputs, by which numbers: one :class:`Unit` per output tensor."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_fuse.checkpoint.reader import DTYPE_CODES, TensorInfo
from hf_fuse.checkpoint.tied import Tying
from hf_fuse.errors import CheckpointError, RecipeError
from hf_fuse.merge.learned_weights import Chunked
from hf_fuse.merge.parameters import (
    Scope,
    check_names,
    check_together,
    depth_of,
    is_at_the_end,
    layer_of,
    method_options,
    stacks,
)
from hf_fuse.merge.post_steps import PostStep, check_post, post_steps
from hf_fuse.merge.statistics import Statistics, check_statistics, elementwise, input_axis
from hf_fuse.recipe import Recipe, Slice
from hf_fuse.registry import Method

Tables = Mapping[str, Mapping[str, TensorInfo]]  # model key -> tensor name -> header entry
MERGE, COPY, MEAN = "merge", "copy", "mean"


@dataclass
class Input:
    """One tensor of one source."""

    key: str
    name: str


@dataclass
class Unit:
    """One output tensor. ``action``: merge by the method, copy from the first input, or take the mean."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    action: str
    inputs: list[Input]
    base: Input | None = None
    options: dict[str, Any] = field(default_factory=dict)
    aliases: list[str] = field(default_factory=list)  # other names under which the same result is stored
    post: list[PostStep] = field(default_factory=list)  # what the merged difference goes through, in one piece
    statistics: list[Input] = field(default_factory=list)  # of each input, if the method uses any of this tensor

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def chunked(self) -> bool:
        """Whether some weight differs from element to element."""
        weight = self.options.get("weight")
        return isinstance(weight, list) and any(isinstance(one, Chunked) for one in weight)

    @property
    def matrix(self) -> tuple[int, ...]:
        """Shape of what counts as one matrix: a layer's experts may be stored as a stack of them, ``[E, M, N]``."""
        return self.shape[1:] if len(self.shape) == 3 and "experts" in self.name else self.shape


@dataclass
class _Entry:
    """One model's part in a group of output tensors."""

    key: str
    where: str
    parameters: dict[str, Any]
    rename: Callable[[str], str]


@dataclass
class _Group:
    """Output tensors that are made of the same models: all of them, or the layers of one slice."""

    names: list[str]
    entries: list[_Entry]
    base: _Entry | None
    shared: list[tuple[str, dict[str, Any]]]
    span: tuple[int, int] | None = None  # output layers of a slice


def _said(parameters: Mapping[str, Any], weight: Any) -> dict[str, Any]:
    return {**parameters, **({} if weight is None else {"weight": weight})}


def takes_base(method: Method) -> bool | None:
    """True: needs a base (task vectors); False: does without; None: uses one if there is one."""
    return {"models_KN": False, "deltas_KN": True, "vectors_KN": None}[method.argument]


def build_units(
    recipe: Recipe,
    method: Method,
    tables: Tables,
    tying: Tying,
    statistics: Mapping[str, Statistics] | None = None,
    heads: Iterable[str] = (),
) -> list[Unit]:
    """Units in the order of the reference's files.

    Args:
        tables: for each model key its tensors, in the output vocabulary.
        statistics: by model key.
        heads: tensors that are taken from the model ``recipe.heads`` as they are.

    Raises:
        CheckpointError: tensors that some models lack or have in another shape (all are listed, up to ten).
        RecipeError: parameters or slices that do not fit.
    """
    groups = _slice_groups(recipe, method, tables) if recipe.slices else [_whole_group(recipe, method, tables)]
    _check_groups(recipe, method, groups)
    statistics = statistics or {}
    check_statistics(method, [(entry.where, entry.key) for group in groups for entry in group.entries], statistics)
    heights = stacks(name for group in groups for name in group.names)
    units, faults = [], []
    taken = dict.fromkeys(heads)
    if taken:
        groups[0].names = list(dict.fromkeys([*groups[0].names, *taken]))
    for group in groups:
        for name in group.names:
            if name in taken:
                units.append(_taken(recipe, name, tables))
                continue
            unit = _unit(recipe, method, group, name, tables, heights, faults)
            if unit is not None:
                units.append(unit)
                _add_statistics(unit, method, tables, statistics, faults)
    if faults:
        rest = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise CheckpointError("The models do not fit together: " + "; ".join(faults[:10]) + rest + ".")
    if statistics and not any(unit.statistics for unit in units):
        raise CheckpointError(f"statistics {next(iter(statistics.values())).ref} fit no tensor of the models.")
    if tying.store_twice:
        for unit in units:
            if unit.name == tying.embedding:
                unit.aliases.append(tying.head)
    return units


def _add_statistics(
    unit: Unit, method: Method, tables: Tables, statistics: Mapping[str, Statistics], faults: list[str]
) -> None:
    """Tells a unit which statistics its tensor has, or notes what is wrong with them."""
    kind = getattr(method.module, "STATISTICS", None)
    if kind is None or unit.action != MERGE:
        return
    names = [part.name for part in unit.inputs]
    try:
        if kind == "gram":
            axis = input_axis([(statistics[part.key], part.name) for part in unit.inputs], unit.shape)
            unit.options["input_axis"] = axis
            if axis is None:
                return
        else:
            names = [elementwise(statistics[p.key], tables[p.key][p.name], p.name) for p in unit.inputs]
    except CheckpointError as fault:
        faults.append(str(fault))
        return
    unit.statistics = [Input(part.key, name) for part, name in zip(unit.inputs, names)]


def _same(name: str) -> str:
    return name


def _whole_group(recipe: Recipe, method: Method, tables: Tables) -> _Group:
    entries = [
        _Entry(model.key, f"models.{i}", _said(model.parameters, model.weight), _same)
        for i, model in enumerate(recipe.models)
    ]
    base = _Entry(recipe.base_model.key, "base_model", {}, _same) if recipe.base_model else None
    base, entries = _place_base(method, base, entries)
    reference = base.key if base else entries[0].key
    return _Group(list(tables[reference]), entries, base, [("parameters", recipe.parameters)])


def _place_base(method: Method, base: _Entry | None, entries: list[_Entry]) -> tuple[_Entry | None, list[_Entry]]:
    """A base listed among the models has no task vector, so it is dropped there; methods on whole weights that take
    just two models (SLERP) start from it."""
    needs = takes_base(method)
    if base is None:
        if needs:
            raise RecipeError(f"base_model: {method.name} merges differences from a base, so it needs a base_model.")
        return None, entries
    others = [entry for entry in entries if entry.key != base.key]
    if needs or needs is None:
        return base, others
    low, high = getattr(method.module, "MODELS", (1, None))
    if low == high == 2:
        listed = [entry for entry in entries if entry.key == base.key]
        entries = [*(listed or ([base] if len(others) == 1 else [])), *others]
    return None, entries


def _check_groups(recipe: Recipe, method: Method, groups: list[_Group]) -> None:
    low, high = getattr(method.module, "MODELS", (1, None))
    for group in groups:
        count = len(group.entries)
        if count < low or (high is not None and count > high):
            wanted = f"exactly {low}" if low == high else f"at least {low}" + (f", at most {high}" if high else "")
            besides = " besides the base" if group.base else ""
            raise RecipeError(f"models: {method.name} takes {wanted} model(s){besides}, the recipe gives {count}.")
        several = count > 1
        check_names(
            method,
            [*((where, said, False) for where, said in group.shared),
             *((entry.where, entry.parameters, several) for entry in group.entries)],
        )  # fmt: skip
        check_post(recipe, method, group.base is not None)


def _slice_groups(recipe: Recipe, method: Method, tables: Tables) -> list[_Group]:
    """One group per slice, between what comes before the layers and what comes after them."""
    assert recipe.slices
    stack = _the_stack(recipe, tables)
    groups, position = [], 0
    for number, piece in enumerate(recipe.slices):
        height = _slice_height(piece, number, stack, tables)
        entries = [
            _Entry(s.model.key, f"slices.{number}.sources.{i}", _said(s.parameters, s.weight),
                   _renamer(stack, position, s.layers[0]))
            for i, s in enumerate(piece.sources)
        ]  # fmt: skip
        base_ref = piece.base_model or recipe.base_model
        base = None
        if base_ref is not None:
            base = _Entry(
                base_ref.key, f"slices.{number}.base_model", {}, _base_renamer(piece, base_ref.key, stack, position)
            )
        base, entries = _place_base(method, base, entries)
        first = base or entries[0]
        # First output layer minus first layer of the source whose tensor names are taken.
        shift = position - layer_of(first.rename(f"{stack}.{position}.x"))[1]
        names = []
        for name in tables[first.key]:
            found = layer_of(name)
            if found and found[0] == stack and position <= found[1] + shift < position + height:
                names.append(f"{stack}.{found[1] + shift}." + name.removeprefix(f"{stack}.{found[1]}."))
        shared = [(f"slices.{number}.parameters", piece.parameters), ("parameters", recipe.parameters)]
        groups.append(_Group(names, entries, base, shared, (position, position + height)))
        position += height
    return [
        _ends_group(recipe, method, stack, tables, 0),
        *groups,
        _ends_group(recipe, method, stack, tables, -1),
    ]


def _the_stack(recipe: Recipe, tables: Tables) -> str:
    first = recipe.slices[0].sources[0].model.key
    found = stacks(tables[first])
    if len(found) != 1:
        raise RecipeError(
            f"slices: {first} has {len(found)} stacks of layers ({', '.join(sorted(found)) or 'none'}); slices need "
            "exactly one."
        )
    return next(iter(found))


def _slice_height(piece: Slice, number: int, stack: str, tables: Tables) -> int:
    heights = set()
    for i, source in enumerate(piece.sources):
        low, high = source.layers
        there = stacks(tables[source.model.key]).get(stack, 0)
        if not 0 <= low < high <= there:
            raise RecipeError(
                f"slices.{number}.sources.{i}: layers [{low}, {high}) of {source.model.key}, which has {there} layers "
                f"in {stack}. Expected 0 <= first < last <= {there}."
            )
        heights.add(high - low)
    if len(heights) > 1:
        raise RecipeError(f"slices.{number}: its sources have {sorted(heights)} layers; they must be equally many.")
    return heights.pop()


def _renamer(stack: str, position: int, source_first: int) -> Callable[[str], str]:
    """Output name -> name in a source whose layer ``source_first`` becomes output layer ``position``."""

    def rename(name: str) -> str:
        found = layer_of(name)
        if not found or found[0] != stack:
            return name
        return f"{stack}.{found[1] - position + source_first}." + name.removeprefix(f"{stack}.{found[1]}.")

    return rename


def _base_renamer(piece: Slice, key: str, stack: str, position: int) -> Callable[[str], str]:
    """The base's layers: those it is listed with, else those of the first source."""
    own = next((s for s in piece.sources if s.model.key == key), piece.sources[0])
    return _renamer(stack, position, own.layers[0])


def _ends_group(recipe: Recipe, method: Method, stack: str, tables: Tables, number: int) -> _Group:
    """What lies outside the layers: embeddings are made as the first slice is, final norm and head as the last."""
    piece = recipe.slices[number]
    entries = [
        _Entry(s.model.key, f"slices.{number}.sources.{i}", _said(s.parameters, s.weight), _same)
        for i, s in enumerate(piece.sources)
    ]
    base_ref = piece.base_model or recipe.base_model
    base = _Entry(base_ref.key, "base_model", {}, _same) if base_ref else None
    base, entries = _place_base(method, base, entries)
    names = [
        name
        for name in tables[(base or entries[0]).key]
        if (layer_of(name) or ("",))[0] != stack and is_at_the_end(name) == (number != 0)
    ]
    shared = [(f"slices.{number}.parameters", piece.parameters), ("parameters", recipe.parameters)]
    return _Group(names, entries, base, shared, None)


def _depth(recipe: Recipe, group: _Group, name: str, heights: Mapping[str, int]) -> tuple[float, float]:
    """Depth of a tensor within its slice and within the whole output."""
    whole = depth_of(name, heights, recipe.dialect)
    found = layer_of(name)
    if group.span is None or not found:
        return whole, whole
    low, high = group.span
    if high - low == 1:
        inside = 1.0 if recipe.dialect == "mergekit" else 0.0
    else:
        inside = (found[1] - low) / (high - low - 1)
    return inside, inside if recipe.dialect == "mergekit" else whole


def _unit(
    recipe: Recipe,
    method: Method,
    group: _Group,
    name: str,
    tables: Tables,
    heights: Mapping[str, int],
    faults: list[str],
) -> Unit | None:
    inside, whole = _depth(recipe, group, name, heights)
    optional = any(fnmatch.fnmatchcase(name, pattern) for pattern in recipe.optional_tensors)
    base = Input(group.base.key, group.base.rename(name)) if group.base else None
    present, inputs = [], []
    for entry in group.entries:
        source = entry.rename(name)
        if source in tables[entry.key]:
            present.append(entry)
            inputs.append(Input(entry.key, source))
        elif not optional:
            faults.append(f"tensor {source} is missing in {entry.key}")
            return None
    if base and base.name not in tables[base.key]:
        if not optional:
            faults.append(f"tensor {base.name} is missing in the base {base.key}")
            return None
        base = None
    first = base or (inputs[0] if inputs else None)
    if first is None:
        return None
    info = tables[first.key][first.name]
    for other in inputs:
        theirs = tables[other.key][other.name]
        if theirs.shape != info.shape:
            faults.append(_shape_fault(first, info, other, theirs))
            return None
        if theirs.is_float != info.is_float:
            faults.append(f"tensor {name} is {info.dtype} in {first.key} and {theirs.dtype} in {other.key}")
            return None
    dtype = DTYPE_CODES[recipe.out_dtype] if recipe.out_dtype and info.is_float else info.dtype
    if recipe.dialect == "mergekit" and not recipe.out_dtype and info.is_float:
        dtype = _widest([info.dtype, *(tables[part.key][part.name].dtype for part in inputs)])
    if not info.is_float:
        return Unit(name, dtype, info.shape, COPY, [first])
    if not inputs or (group.base and base is None):
        return Unit(name, dtype, info.shape, MEAN, inputs or [first], options={"weight": [1.0] * max(len(inputs), 1)})
    shared: list[Scope] = [(w, said, inside if w.startswith("slices") else whole) for w, said in group.shared]
    per_model: list[list[Scope]] = [[(e.where, e.parameters, inside)] for e in present]
    # mergekit looks a model's own parameters up by the name that the tensor has in that model.
    names = [part.name if recipe.dialect == "mergekit" else name for part in inputs]
    options = method_options(method, name, shared, per_model, names, recipe.dialect)
    for option in method.options.values():
        if option.per_model and not isinstance(options[option.keyword], list):
            options[option.keyword] = [options[option.keyword]] * len(inputs)
    check_together(method, options, name)
    if info.shape == () and getattr(method.module, "SCALARS", None) == "mean":
        weight = options.get("weight") or [1.0] * len(inputs)
        return Unit(name, dtype, info.shape, MEAN, inputs, options={"weight": weight})
    unit = Unit(name, dtype, info.shape, MERGE, inputs, base, options)
    if unit.chunked:
        _check_chunked(recipe, method, unit)
    unit.post = post_steps(recipe, name, unit.matrix, whole)
    return unit


def _taken(recipe: Recipe, name: str, tables: Tables) -> Unit:
    """A tensor of the head that the result has."""
    info = tables[recipe.heads.key][name]
    dtype = DTYPE_CODES[recipe.out_dtype] if recipe.out_dtype and info.is_float else info.dtype
    action = COPY if dtype == info.dtype else MEAN
    return Unit(name, dtype, info.shape, action, [Input(recipe.heads.key, name)], options={"weight": [1.0]})


def _check_chunked(recipe: Recipe, method: Method, unit: Unit) -> None:
    where = f"weight: the learned coefficients of {unit.name} differ from chunk to chunk, and"
    if not getattr(method.module, "CHUNKED_WEIGHTS", False):
        raise RecipeError(f"{where} {method.name} takes one weight per tensor. Use task_arithmetic.")
    if unit.options.get("normalize"):
        raise RecipeError(f"{where} normalize would need their sum. Remove it.")
    if recipe.output_kind == "adapter":
        raise RecipeError(f"{where} such a sum of adapters is no adapter. Make a model, or learn one per tensor.")


def _widest(codes: Iterable[str]) -> str:
    """The type that holds the numbers of all: F32 for BF16 with F16."""
    kinds = set(codes)
    return kinds.pop() if len(kinds) == 1 else "F64" if "F64" in kinds else "F32"


def _shape_fault(first: Input, info: TensorInfo, other: Input, theirs: TensorInfo) -> str:
    text = f"tensor {other.name} is {list(theirs.shape)} in {other.key}, {list(info.shape)} in {first.key}"
    if info.shape[1:] == theirs.shape[1:] and ("embed" in other.name or "head" in other.name or "wte" in other.name):
        text += " (the vocabulary axis: say `tokenizer: base` or `tokenizer: union` to align rows by token)"
    return text


def unexpected(units: Iterable[Unit], tables: Tables, recipe: Recipe, tying: Tying) -> None:
    """Refuses tensors that a model has and the output would lose.

    Raises:
        CheckpointError: naming model and tensor, and how to allow it.
    """
    if recipe.slices:
        return  # a choice of layers leaves tensors out by intent
    made = {alias for unit in units for alias in (unit.name, *unit.aliases)} | {tying.head}
    for key, table in tables.items():
        lost = [
            n for n in table if n not in made and not any(fnmatch.fnmatchcase(n, p) for p in recipe.optional_tensors)
        ]
        if lost:
            raise CheckpointError(
                f"{key}: has {len(lost)} tensor(s) that the reference model lacks, first {lost[0]}. List them under "
                "optional_tensors in the recipe to leave them out."
            )
