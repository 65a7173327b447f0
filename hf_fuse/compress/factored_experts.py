"""Experts whose matrices are a low-rank product plus a few rows: ``W = L R + S`` where most rows of ``S`` are zero.

The checkpoint holds ``W``, which every loader understands but which saves nothing; the parts lie beside it in
``expert_factors.safetensors``, and in a live model they can stand in its place (:func:`factor_experts`). A checkpoint
without that file is complete.

Shapes: T tokens, O outputs, I inputs, r rank, k rows that are left, G groups of experts, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from hf_fuse.compress.grouped_experts import expert_blocks
from hf_fuse.errors import CheckpointError, FuseError

FACTORS_FILE = "expert_factors.safetensors"
PARTS = ("left", "right", "rows", "kept")
# Matrices by what they do, under their stored names: Mixtral's, those of most others, Switch's.
ROLES = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
         "wi": "wi", "wo": "wo"}  # fmt: skip
FUSED = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


class FactoredLinear(nn.Module):
    """``x -> x (L R + S)^T``, which costs ``r (I + O) + k I`` numbers instead of ``I O``."""

    weight = None  # Switch looks here for a dtype to cast to

    def __init__(self, left_Or: Tensor, right_rI: Tensor, rows_kI: Tensor, kept_k: Tensor):
        super().__init__()
        self.left_Or, self.right_rI, self.rows_kI = map(nn.Parameter, (left_Or, right_rI, rows_kI))
        self.register_buffer("kept_k", kept_k, persistent=False)

    def forward(self, x_TI: Tensor) -> Tensor:
        out_TO = linear(linear(x_TI, self.right_rI), self.left_Or)
        return out_TO.index_add(-1, self.kept_k, linear(x_TI, self.rows_kI))


def composed(left_Or: Tensor, right_rI: Tensor, rows_kI: Tensor, kept_k: Tensor) -> Tensor:
    """``L R + S`` in fp32."""
    return (left_Or.float() @ right_rI.float()).index_add(0, kept_k, rows_kI.float())


class FactoredExperts(nn.Module):
    """Stands where a block's stacked experts were. ``place_E``: which of the matrices each expert number uses."""

    def __init__(self, experts: nn.Module, matrices: list[dict[str, FactoredLinear]], place_E: Tensor):
        super().__init__()
        for name in FUSED:
            delattr(experts, name)
        self.stacked = experts  # knows the activation
        self.experts = nn.ModuleList(nn.ModuleDict(one) for one in matrices)
        self.register_buffer("place_E", place_E, persistent=False)

    def forward(self, hidden_TD: Tensor, chosen_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        out_TD = torch.zeros_like(hidden_TD)
        places_Tk = self.place_E[chosen_Tk]
        for place in places_Tk.unique().tolist():
            tokens, slots = torch.where(places_Tk == place)
            expert, x = self.experts[place], hidden_TD[tokens]
            inner = self.stacked._apply_gate(torch.cat([expert["gate"](x), expert["up"](x)], dim=-1))
            values = expert["down"](inner) * weights_Tk[tokens, slots, None]
            out_TD.index_add_(0, tokens, values.to(out_TD.dtype))
        return out_TD


def places(experts: nn.Module) -> list[int]:
    """For each expert number the index of its group's matrices among those that the module holds."""
    if isinstance(experts, nn.ModuleDict):
        modules = list({id(expert): None for expert in experts.values()})
        return [modules.index(id(expert)) for expert in experts.values()]
    held = getattr(experts, "place_of_expert", None)
    return list(range(len(experts.down_proj))) if held is None else held.tolist()


def expert_matrices(experts: nn.Module) -> Iterator[tuple[nn.Module, str, int | None, dict[str, slice]]]:
    """(module, name of its parameter, place or None, role -> rows of it): all that a block's experts hold.

    A parameter without a place holds all of them, along its first axis.

    Raises:
        FuseError: the experts are built in a way that is not known here.
    """
    if isinstance(experts, nn.ModuleDict):
        for place, module in enumerate({id(expert): expert for expert in experts.values()}.values()):
            if {name for name, _ in module.named_parameters()} != {"wi.weight", "wo.weight"}:
                raise FuseError(f"{type(module).__name__}: experts of this make can't be factored.")
            for role in ("wi", "wo"):
                yield getattr(module, role), "weight", place, {role: slice(None)}
        return
    shapes = {name: parameter.shape for name, parameter in experts.named_parameters()}
    if set(shapes) != set(FUSED) or shapes["gate_up_proj"][1] != 2 * shapes["down_proj"][2]:
        raise FuseError(f"{type(experts).__name__}: experts of this make can't be factored.")
    for name, roles in FUSED.items():
        rows = shapes[name][1] // len(roles)
        yield experts, name, None, {role: slice(n * rows, (n + 1) * rows) for n, role in enumerate(roles)}


def factor_experts(model: nn.Module, folder: str | Path) -> None:
    """Puts the factors that lie in ``folder`` (or a Hub repository) in the place of the experts, if there are any.

    Raises:
        CheckpointError: the factors are damaged, or their products are not the model's weights.
    """
    from safetensors.torch import load_file

    path = _factors_file(folder)
    if path is None:
        return
    try:
        stored, blocks = load_file(path), expert_blocks(model)
        layers = dict.fromkeys(name.partition(".experts.")[0] for name in stored)
        for layer in layers:
            block = blocks[layer]
            _factor(block, f"{layer}.experts", stored)
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        raise CheckpointError(f"{path}: does not fit the model ({error}). Remove it, or compress anew.") from None


def is_factored(folder: Path) -> bool:
    """Whether the experts' factors lie in a local folder."""
    return (folder / FACTORS_FILE).is_file()


def _factors_file(folder: str | Path) -> Path | None:
    if Path(folder).is_dir():
        return Path(folder, FACTORS_FILE) if is_factored(Path(folder)) else None
    from transformers.utils import cached_file

    found = cached_file(str(folder), FACTORS_FILE, _raise_exceptions_for_missing_entries=False)
    return found and Path(found)


def _factor(block: nn.Module, prefix: str, stored: Mapping[str, Tensor]) -> None:
    experts = block.experts
    place_E = places(experts)
    made: list[dict[str, Any]] = [{} for _ in range(max(place_E) + 1)]
    for module, name, own_place, roles in list(expert_matrices(experts)):
        weight = getattr(module, name)
        for place in range(len(made)) if own_place is None else [own_place]:
            for role, rows in roles.items():
                parts = [stored[f"{prefix}.{place}.{role}.{part}"].to(weight.device) for part in PARTS]
                dense_OI = (weight[place] if own_place is None else weight)[rows].detach()
                if not _same(composed(*parts), dense_OI, parts[0].dtype):
                    raise ValueError(f"{prefix}.{place}.{role} is another matrix")
                made[place][role] = FactoredLinear(*(part.to(weight.dtype) for part in parts[:3]), parts[3])
    if isinstance(experts, nn.ModuleDict):
        for expert, place in zip(experts.values(), place_E):
            expert.wi, expert.wo = made[place]["wi"], made[place]["wo"]
    else:
        block.experts = FactoredExperts(experts, made, torch.tensor(place_E, device=weight.device))


def _same(one_OI: Tensor, other_OI: Tensor, stored: torch.dtype) -> bool:
    tolerance = 4 * max(torch.finfo(dtype).eps for dtype in (other_OI.dtype, stored))
    largest = other_OI.abs().max().float()
    return one_OI.shape == other_OI.shape and bool((one_OI - other_OI.float()).abs().max() <= tolerance * largest)
