"""Mixture-of-experts blocks whose experts form groups: found in a live model, and kept once per group.

In a checkpoint every old expert number has its group's weights, which every loader understands but which saves nothing;
in a live model a group's weights are there once and the router's choices are translated (:func:`share_experts`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_fuse.errors import FuseError
from hf_fuse.merge.parameters import layer_of

GROUPS_KEY = "expert_groups"  # of config.json: layer -> for each expert the number of the one that it became


def layer_key(name: str) -> str | None:
    """``"model.layers.3.mlp.gate"`` -> ``"model.layers.3"``."""
    layer = layer_of(f"{name}.")
    return f"{layer[0]}.{layer[1]}" if layer else None


def expert_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Layer -> its block with ``experts`` and a router, in the order of the layers."""
    return {
        layer_key(name): module
        for name, module in model.named_modules()
        if hasattr(module, "experts") and router_of(module) is not None and layer_key(name)
    }


def router_of(block: nn.Module) -> nn.Module | None:
    return getattr(block, "gate", None) or getattr(block, "router", None)


def share_experts(model: nn.Module) -> None:
    """Keeps the weights of each group of experts once, in place, as the model's config groups them."""
    groups = getattr(model.config.get_text_config(), GROUPS_KEY, None)
    if not groups:
        return
    blocks = expert_blocks(model)
    for layer, became in groups.items():
        if layer not in blocks:
            raise FuseError(f"{type(model).__name__}: its config groups experts of {layer}, which has none.")
        _share(blocks[layer].experts, became)


def _share(experts: nn.Module, became: list[int]) -> None:
    if isinstance(experts, nn.ModuleDict):
        for index, leader in enumerate(became):
            experts[f"expert_{index}"] = experts[f"expert_{leader}"]
        return
    leaders = sorted(set(became))
    for name, stacked_EXX in list(experts.named_parameters(recurse=False)):
        setattr(experts, name, nn.Parameter(stacked_EXX.detach()[leaders].clone(), stacked_EXX.requires_grad))
    experts.num_experts = len(leaders)
    place_E = torch.tensor([leaders.index(leader) for leader in became])
    experts.register_buffer("place_of_expert", place_E.to(stacked_EXX.device), persistent=False)
    experts.register_forward_pre_hook(_translated)


def _translated(experts: nn.Module, args: tuple) -> tuple[Any, ...]:
    hidden_TD, chosen_Tk, *rest = args
    return (hidden_TD, experts.place_of_expert[chosen_Tk], *rest)
