"""The plan of a merge of LoRA adapters into one (``output_kind: adapter``): units, ranks, names, config.

Methods that are weighted sums stay in the space of the factors; others see dense changes, one tensor at a time. What
adapters store whole (``modules_to_save``, biases) is merged as tensors are.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_fuse import registry
from hf_fuse.checkpoint.adapter import BoundAdapter
from hf_fuse.checkpoint.adapter_binding import listed
from hf_fuse.checkpoint.adapter_writer import PREFIX, Pair, adapter_config, adapter_layout, whole_name
from hf_fuse.checkpoint.reader import DTYPE_CODES, TensorInfo
from hf_fuse.checkpoint.tied import Tying
from hf_fuse.errors import CheckpointError, RecipeError
from hf_fuse.merge import adapter_inputs
from hf_fuse.merge.adapter_inputs import Inputs, Whole
from hf_fuse.merge.adapter_sources import AdapterChanges, BaseOfChanges
from hf_fuse.merge.coefficients import with_learned
from hf_fuse.merge.plan import Plan, check_room
from hf_fuse.merge.units import COPY, MEAN, MERGE, Input, Unit, build_units, takes_base
from hf_fuse.merge.workers import default_workers
from hf_fuse.recipe import ModelRef, Recipe
from hf_fuse.registry import Method

# Their result is a weighted sum of the changes, with weights that do not depend on the numbers.
WEIGHTED_SUMS = ("linear", "task_arithmetic", "wise_ft", "passthrough")
NO_BASE = "(base)"  # stands for a base that the recipe does not name
OUTPUT_CODES = ("F64", "F32", "F16", "BF16")


@dataclass
class AdapterPlan(Plan):
    """A merge of adapters, ready to run. ``pairs``: units that become factors; ``stored``: names of the other units;
    ``weights``: of the inputs of each unit, if the method is a weighted sum."""

    inputs: Inputs | None = None
    pairs: dict[str, Pair] = field(default_factory=dict)
    stored: dict[str, str] = field(default_factory=dict)
    weights: dict[str, list[float]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, Any] = field(default_factory=dict)
    base_bytes: int = 0  # read of the base, once
    cut: bool = False  # some sum of ranks exceeds the rank asked for
    # Of the tensors that were cut down: (what was left out, the whole), both squared. Known after the run.
    lost: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def dense(self) -> bool:
        """Whether dense changes have to be formed, one tensor at a time."""
        return not in_rank_space(self.recipe, self.method)

    @property
    def bytes_read(self) -> int:
        return sum(parent.adapter.adapter.nbytes for parent in self.inputs.parents.values()) + self.base_bytes

    @property
    def passes(self) -> int:
        return super().passes if self.dense else 1

    @property
    def peak_memory(self) -> int:
        largest = max((u.numel for u in self.units if u.name in self.pairs), default=0) if self.dense else 0
        return 300_000_000 + default_workers() * largest * 4 * 2 + 2 * self.layout.nbytes // max(len(self.pairs), 1)

    @property
    def truncation(self) -> float | None:
        """Share of the merged change (its norm) that the chosen rank could not hold; None before the run."""
        total = math.fsum(whole for _, whole in self.lost.values())
        return math.sqrt(math.fsum(error for error, _ in self.lost.values()) / total) if total else None

    def way(self) -> str:
        """How the ranks come about, in words."""
        ranks = sorted({pair.rank for pair in self.pairs.values()})
        if not ranks:
            return "tensors stored whole only"
        said = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        if self.dense:
            what = [self.method.name, *self.recipe.post][-1]
            return f"rank {said}; {what} needs dense changes: formed one tensor at a time, then cut by SVD"
        if not self.cut:
            return f"rank {said}: factors concatenated, exact"
        return f"rank {said}: truncated SVD in the space of the factors, no dense change"

    def to_dict(self) -> dict[str, Any]:
        facts = super().to_dict()
        parents = [self.inputs.base_parent.describe()] if self.inputs.known else []
        for parent in self.inputs.parents.values():
            adapter, bound = parent.adapter.adapter, parent.adapter
            codes = [info.dtype for info in adapter.infos.values()]
            parents.append(
                {
                    "role": "adapter",
                    "ref": adapter.ref,
                    "repo_id": parent.adapter_repo,
                    "commit": parent.adapter_commit,
                    "architecture": parent.checkpoint.architecture if self.inputs.known else None,
                    "dtypes": {code: codes.count(code) for code in dict.fromkeys(codes)},
                    "tensors": len(adapter.infos),
                    "bytes": adapter.nbytes,
                    "tokenizer": parent.tokenizer,
                    "ranks": sorted({change.rank for change in bound.low_rank.values()}),
                }
            )
        base = {"ref": self.config["base_model_name_or_path"], "opened": self.inputs.known}
        adapter = {"base": base, "modules": len(self.pairs), "way": self.way(), "truncation": self.truncation}
        return facts | {"parents": parents, "adapter": adapter, "parameters": sum(u.numel for u in self.units)}


def in_rank_space(recipe: Recipe, method: Method) -> bool:
    """Whether the result can be computed from the factors alone."""
    return method.name in WEIGHTED_SUMS and not recipe.post


def plan_adapter(recipe: Recipe, method: Method, *, overwrite: bool, allow_pickle: bool, verify: bool) -> AdapterPlan:
    """What :func:`hf_fuse.plan` does for ``output_kind: adapter``."""
    weighted, needs = in_rank_space(recipe, method), takes_base(method)
    what = method.name if method.name not in WEIGHTED_SUMS else next(iter(recipe.post), method.name)
    if method.name not in WEIGHTED_SUMS and needs is False:
        usable = [n for n in registry.names("merge") if n in WEIGHTED_SUMS or takes_base(registry.get("merge", n))]
        raise RecipeError(
            f"method: {method.name} merges whole weights, so what it makes is no low-rank change of the base. With "
            f"output_kind: adapter use one of {', '.join(usable)}."
        )
    inputs = adapter_inputs.open_inputs(
        recipe, base_may_be_listed=needs is not False, allow_pickle=allow_pickle, verify=verify
    )
    if not weighted and not inputs.known:
        raise RecipeError(f"base_model: {what} needs the layout of the base's tensors. Name the adapters' base.")
    if not weighted and recipe.rank is None:
        ranks = [max(_ranks(parent.adapter)) for parent in inputs.parents.values()]
        raise RecipeError(
            f"rank: {what} makes changes of full rank, which have to be cut down. Say for example rank: "
            f"{sum(ranks)} (the sum of the adapters' ranks)."
        )
    whole = adapter_inputs.whole_tensors(inputs)
    plan = _units(recipe, method, inputs, whole)
    _check_kinds(inputs, plan.pairs)
    check_room(recipe.output, plan.layout.nbytes, overwrite)
    return plan


def _ranks(bound: BoundAdapter) -> set[int]:
    return {change.rank for change in bound.low_rank.values()} or {1}


def _units(recipe: Recipe, method: Method, inputs: Inputs, whole: list[Whole]) -> AdapterPlan:
    base_key = recipe.base_model.key if recipe.base_model else NO_BASE
    bound = {key: parent.adapter for key, parent in inputs.parents.items()}
    changes = {}
    for adapter in bound.values():
        for name, change in adapter.low_rank.items():
            changes.setdefault(name, TensorInfo(name, "F32", change.shape, Path(), 0))
    # A resized and adapted embedding is both: then the tensor itself goes by another name here.
    names = {entry.name: f"{entry.name} (whole)" if entry.name in changes else entry.name for entry in whole}
    by_method = [entry for entry in whole if _by_method(entry, method, inputs)]
    sources: dict[str, Any] = {
        key: AdapterChanges(adapter, changes, {names[entry.name]: entry.infos[number] for entry in whole})
        for number, (key, adapter) in enumerate(bound.items())
    }
    looks = "base" in inspect.signature(method.function).parameters
    unread = {} if looks else changes
    read = {name: inputs.base.tensors[name] for name in (changes if looks else ())}
    sources[base_key] = BaseOfChanges(read | {names[e.name]: e.base for e in by_method if e.base}, unread)
    merged = [*changes, *(names[entry.name] for entry in by_method)]
    tables = {key: {name: source.tensors[name] for name in merged if name in source.tensors}
              for key, source in sources.items()}  # fmt: skip
    stated = recipe.model_copy(update={"base_model": recipe.base_model or ModelRef(path=NO_BASE)})
    stated = with_learned(stated, method, inputs.base_parent if inputs.known else None, inputs.parents)
    units = build_units(stated, method, tables, Tying())
    for entry in whole:
        if entry not in by_method:
            units.append(_kept(entry, names[entry.name], list(sources)[: len(bound)], recipe))
    base_parent = {base_key: inputs.base_parent} if recipe.base_model else {}
    plan = AdapterPlan(
        recipe, method, base_parent | inputs.parents, units, adapter_layout(()), Tying(), None, inputs.warnings,
        inputs=inputs, sources=sources,
        base_bytes=sum(info.nbytes for name, info in sources[base_key].tensors.items() if name not in unread),
    )  # fmt: skip
    _describe(plan, {names[entry.name]: entry for entry in whole})
    return plan


def _by_method(entry: Whole, method: Method, inputs: Inputs) -> bool:
    """Whether the method merges this tensor; else it is copied or averaged."""
    if takes_base(method) is False:
        return True
    if entry.base is None and not inputs.known and not (entry.equal and not entry.trained):
        raise RecipeError(
            f"base_model: {entry.name} is stored whole, and {method.name} needs the base's to tell the change. Name "
            "the adapters' base, or use linear."
        )
    return entry.base is not None


def _kept(entry: Whole, name: str, keys: list[str], recipe: Recipe) -> Unit:
    info = entry.infos[0]
    inputs = [Input(key, name) for key in (keys[:1] if entry.equal else keys)]
    dtype = DTYPE_CODES[recipe.out_dtype] if recipe.out_dtype and info.is_float else info.dtype
    if dtype == info.dtype and (entry.equal or not info.is_float):
        return Unit(name, dtype, info.shape, COPY, inputs[:1])
    return Unit(name, dtype, info.shape, MEAN, inputs, options={"weight": [1.0] * len(inputs)})


def _describe(plan: AdapterPlan, whole: Mapping[str, Whole]) -> None:
    """Fills in the pairs, the names of the rest, the layout and the config."""
    recipe, inputs, tensors = plan.recipe, plan.inputs, []
    code = DTYPE_CODES[recipe.out_dtype] if recipe.out_dtype else _widest(inputs)
    modules = {module for name, module in inputs.modules.items() if not _is_bias(inputs, name)}
    lora_bias = False
    for unit in plan.units:
        if not plan.dense and unit.action == MERGE:
            plan.weights[unit.name] = _weights(plan.method, unit)
        if unit.name in whole:
            if unit.action == MERGE and not recipe.out_dtype:
                unit.dtype = whole[unit.name].infos[0].dtype  # the adapters', not the base's
            _check_sum(unit, plan.weights.get(unit.name, [1.0]))
            plan.stored[unit.name] = whole_name(inputs.owners[whole[unit.name].name], modules)
            tensors.append((plan.stored[unit.name], unit.dtype, unit.shape))
            continue
        unit.dtype = code
        changes = [c for part in unit.inputs if (c := inputs.parents[part.key].adapter.low_rank.get(unit.name))]
        module = inputs.modules[unit.name]
        if _is_bias(inputs, unit.name):
            lora_bias = True
            plan.stored[unit.name] = f"{PREFIX}{module}.lora_B.bias"
            tensors.append((plan.stored[unit.name], code, unit.shape))
            continue
        rank = sum(change.rank for change in changes) or 1
        if recipe.rank is not None and (plan.dense or rank > recipe.rank):
            plan.cut = True
            rank = min(recipe.rank, unit.shape[0], unit.numel // unit.shape[0])
        first = next(adapter.low_rank[unit.name] for adapter in _bound(inputs) if unit.name in adapter.low_rank)
        pair = Pair(module, unit.shape, rank, first.transposed, "lora_embedding_" in first.up.name)
        plan.pairs[unit.name] = pair
        tensors += [(name, code, shape) for name, shape in pair.sides.items()]
    plan.layout = adapter_layout(tensors)
    configs = inputs.configs
    biases = {config.get("bias") for config in configs} & {"all", "lora_only"}
    if not any(name.endswith(".bias") for name in whole):
        biases = set()
    plan.config = adapter_config(
        plan.pairs.values(), base=adapter_inputs.base_name(inputs), fingerprint=adapter_inputs.fingerprint(inputs),
        targets=adapter_inputs.targets(inputs), inherited=adapter_inputs.inherited(inputs),
        modules_to_save={str(end) for config in configs for end in config.get("modules_to_save") or []},
        bias=min(biases, default="none"), lora_bias=lora_bias,
        fan_in_fan_out=inputs.fan_in_fan_out,
    )  # fmt: skip


def _bound(inputs: Inputs) -> list[BoundAdapter]:
    return [parent.adapter for parent in inputs.parents.values()]


def _is_bias(inputs: Inputs, name: str) -> bool:
    return any(name in a.low_rank and a.low_rank[name].down is None for a in _bound(inputs))


def _widest(inputs: Inputs) -> str:
    codes = {change.up.dtype for adapter in _bound(inputs) for change in adapter.low_rank.values()}
    if len(codes) == 1 and codes <= set(OUTPUT_CODES):
        return codes.pop()
    return "F64" if "F64" in codes else "F32"


def _check_sum(unit: Unit, weights: list[float]) -> None:
    """A weighted sum of whole tensors, and not of changes, makes sense only if its weights add up to 1."""
    if unit.action == MERGE and unit.base is None and abs(sum(weights) - 1) > 1e-6:
        raise RecipeError(
            f"parameters: the weights of {unit.name}, which the adapters store whole, sum to {sum(weights):g} and "
            "would rescale it. Say normalize: true, or use task_arithmetic with a base_model."
        )


def _check_kinds(inputs: Inputs, pairs: Mapping[str, Pair]) -> None:
    ends = {str(end) for config in inputs.configs for end in config.get("modules_to_save") or []}
    both = [pair.module for pair in pairs.values() if adapter_inputs.is_saved(f"{pair.module}.weight", ends)]
    if both:
        raise CheckpointError(
            f"modules {listed(both)}: one adapter has factors for them, another stores them whole (modules_to_save), "
            "and PEFT can load only one of the two. Merge these adapters into a model with output_kind: model."
        )
    if any(pair.embedding for pair in pairs.values()) and any(config.get("lora_bias") for config in inputs.configs):
        raise CheckpointError(
            "lora_bias: one adapter has it and another adapts an embedding, which PEFT can't load together. Merge "
            "these adapters into a model with output_kind: model."
        )


def _weights(method: Method, unit: Unit) -> list[float]:
    """The factor of each input in a weighted sum: what the method makes of the unit vectors."""
    return method.function(torch.eye(len(unit.inputs), dtype=torch.float64), **unit.options).tolist()
