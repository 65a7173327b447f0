"""Weights as MoE-PEFT and MixLoRA's own repository save them, in the names of this package.

    {method}.layers.{i}.mlp.moe_gate.weight                                  router of a feed-forward layer (MixLoRA)
    {method}.layers.{i}.{self_attn|mlp}.{projection}.moe_gate.weight         router of one Linear
    {method}.layers.{i}.{self_attn|mlp}.{projection}.experts.{e}.lora_{A|B}.weight
    {method}.layers.{i}.{self_attn|mlp}.{projection}.lora_{A|B}.weight       plain LoRA
    {method}.layers.{i}.gate.weight, ...experts.{e}.{projection}.lora_{A|B}.weight     older MixLoRA

Axes: E experts, r rank, i in, o out.
"""

from __future__ import annotations

import re
from collections import defaultdict

import torch
from torch import Tensor, nn

from hf_fuse.adapters.dora import row_norms
from hf_fuse.adapters.experts import FeedForwardExperts, PlainLora, innermost
from hf_fuse.adapters.routed_config import RoutedLoraConfig, layer_index
from hf_fuse.adapters.routed_layer import RoutedLayer, routed_layers
from hf_fuse.errors import CheckpointError

_KEY = re.compile(
    r"\w+\.layers\.(?P<layer>\d+)\.(?:(?:self_attn|mlp)\.)?(?:experts\.(?P<older_expert>\d+)\.)?"
    r"(?:(?P<projection>\w+)\.)?(?:experts\.(?P<expert>\d+)\.)?(?P<kind>moe_gate|gate|lora_A|lora_B)\.weight"
)


def from_reference(
    model: nn.Module, config: RoutedLoraConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The weights with PEFT's names, if they have the references'; else as they are.

    Raises:
        CheckpointError: a weight belongs nowhere in the model, or a router's experts are not all there.
    """
    if not any(key.startswith(f"{config.method}.layers.") for key in state_dict):
        return state_dict
    layers = [layer for layer in routed_layers(model) if adapter_name in layer.experts]
    by_index = defaultdict(list)
    for layer in layers:
        by_index[layer_index(layer.key)].append(layer)
    found: dict[tuple[str, str], dict[int, Tensor]] = defaultdict(dict)
    for key, value in state_dict.items():
        match = _KEY.fullmatch(key)
        place = match and _place(by_index[int(match["layer"])], match, adapter_name)
        if not place:
            raise CheckpointError(
                f"{key}: the base model with target_modules of adapter_config.json has no such place. Is "
                "base_model_name_or_path the model that the adapter was trained on?"
            )
        found[place][int(match["expert"] or match["older_expert"] or 0)] = value
    return {
        f"base_model.model.{layer.key}.{layer.adapter_layer_names[0]}.{name}": value
        for layer in layers
        for name, value in _parameters(layer, layer.experts[adapter_name], found).items()
    }


def _place(layers: list[RoutedLayer], match: re.Match, adapter_name: str) -> tuple[str, str] | None:
    """Key of the layer that the weight is for, and name of the parameter there."""
    projection, kind = match["projection"], match["kind"]
    for layer in layers:
        experts = layer.experts[adapter_name]
        whole = isinstance(experts, FeedForwardExperts)
        if "gate" in kind:
            if (whole and projection is None) or layer.key.endswith(f".{projection}"):
                return layer.key, "router"
        elif whole and projection in experts.targets.values():
            return layer.key, f"{kind[-1]}_{projection}"
        elif layer.key.endswith(f".{projection}"):
            return layer.key, kind[-1]
    return None


def _parameters(layer: RoutedLayer, experts: nn.Module, found: dict) -> dict[str, Tensor]:
    values = {}
    for name, parameter in experts.named_parameters():
        parts = found.get((layer.key, name), {})
        if name == "router" or isinstance(experts, PlainLora):
            values |= {name: parts[0]} if parts else {}
        elif parts:
            if sorted(parts) != list(range(len(parameter))):
                raise CheckpointError(f"{layer.key}.{name}: experts {sorted(parts)} are there of {len(parameter)}.")
            values[name] = torch.stack([parts[expert] for expert in range(len(parameter))])
    for name in [name for name in dict(experts.named_parameters()) if name.startswith("magnitude")]:
        # They are not saved, but begin anew as the norms of what was trained.
        projection = name.removeprefix("magnitude")
        A_Eri, B_Eor = values[f"A{projection}"], values[f"B{projection}"]
        whole = isinstance(experts, FeedForwardExperts)
        linear = getattr(innermost(layer), projection.removeprefix("_")) if whole else layer
        norms_Eo = row_norms(
            innermost(linear), *(v.view(-1, *v.shape[-2:]) for v in (A_Eri, B_Eor)), experts.lora.scaling
        )
        values[name] = norms_Eo.view(B_Eor.shape[:-1])
    return values
