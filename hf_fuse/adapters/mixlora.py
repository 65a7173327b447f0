"""MixLoRA (arXiv 2404.15159): LoRA experts of whole feed-forward layers, one router each; plain LoRA elsewhere."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from torch import nn
from transformers.activations import ACT2FN

from hf_fuse.adapters._peft import register
from hf_fuse.adapters.experts import FeedForwardExperts, LinearExperts, PlainLora
from hf_fuse.adapters.ffn_families import Family, computes, family_of
from hf_fuse.adapters.routed_config import LoraSettings, RoutedLoraConfig, is_count
from hf_fuse.adapters.routed_layer import RoutedLayer
from hf_fuse.adapters.routed_tuner import RoutedLoraModel, in_feed_forward

_EXPERT_LORA = ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora")


@dataclass
class MixLoraConfig(RoutedLoraConfig):
    """Configuration of MixLoRA.

    Name Linear modules as for LoRA: projections of feed-forward layers become experts, chosen by one router per layer;
    all others get one plain LoRA. Feed-forward projections that are not together in a module of their own (BERT, OPT)
    get a router each.
    The fields of `RoutedLoraConfig`, and:

    Args:
        target_modules (`Union[list[str], str]`, *optional*): All Linear modules by default.
        use_dora (`bool`): DoRA for experts and plain LoRA. Slower: experts then share less work.
        expert_lora (`dict`, *optional*):
            `r`, `lora_alpha`, `lora_dropout`, `use_dora` or `use_rslora` of the experts, if they are to differ from
            the plain LoRA's.
        routing_strategy (`str`):
            `"mixlora"` (top-k, renormalised), `"mixlora-dynamic"` (top-p) or `"mixlora-switch"` (one expert, with a
            capacity). `"mixtral"`, of older checkpoints, is `"mixlora"`.
        top_k (`int`): Experts per token, for `"mixlora"`.
        top_p (`float`): Sum of the probabilities that the experts of a token exceed, for `"mixlora-dynamic"`.
        temperature (`float`):
            For `"mixlora-dynamic"`: divides the router's logits; 0 is off. (MoE-PEFT divides the probabilities, which
            then no longer sum to 1.)
        expert_capacity (`int`):
            Tokens of a sequence that an expert takes in training, for `"mixlora-switch"`; others pass unchanged.
        router_init_range (`float`): Standard deviation of the router's initial weights.
        router_aux_loss_coef (`float`):
            Weight of the load balance, which is `top_k` at uniform routing. The code's 1e-3; 1e-2 in its examples.
        act_fn (`str`, *optional*): Activation of the experts instead of the layer's own.
    """

    method = "mixlora"
    router_init: ClassVar = "normal"

    r: int = field(default=16, metadata={"help": "Rank of each expert, and of the plain LoRA."})
    lora_alpha: float = field(default=32, metadata={"help": "The experts' outputs are scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of the experts' input."})
    use_dora: bool = field(default=False, metadata={"help": "DoRA for experts and plain LoRA."})
    expert_lora: dict | None = field(default=None, metadata={"help": "Settings of the experts that differ."})
    num_experts: int | list[int] = field(default=8, metadata={"help": "Experts per feed-forward layer."})
    routing_strategy: str = field(
        default="mixlora", metadata={"help": "'mixlora', 'mixlora-dynamic' or 'mixlora-switch'."}
    )
    top_k: int = field(default=2, metadata={"help": "Experts per token."})
    top_p: float = field(default=0.8, metadata={"help": "Sum of probabilities, for 'mixlora-dynamic'."})
    temperature: float = field(default=0.0, metadata={"help": "Divides the logits of 'mixlora-dynamic'; 0 is off."})
    expert_capacity: int = field(default=32, metadata={"help": "Tokens per sequence and expert, 'mixlora-switch'."})
    router_init_range: float | None = field(
        default=None, metadata={"help": "Standard deviation of the router's weights; 0.02, or 1 for 'mixlora-switch'."}
    )
    jitter_noise: float | None = field(
        default=None, metadata={"help": "Relative noise of the input in training; 0, or 0.01 for 'mixlora-switch'."}
    )
    router_aux_loss_coef: float = field(default=1e-3, metadata={"help": "Weight of the load balance."})
    router_z_loss_coef: float | None = field(
        default=None, metadata={"help": "Weight of the router z-loss; 0, or 1e-3 for 'mixlora-switch'."}
    )
    aux_reduction: Literal["global", "per_layer", "sum"] = field(
        default="global", metadata={"help": "How the load balance goes over layers."}
    )
    act_fn: str | None = field(default=None, metadata={"help": "Activation of the experts."})

    def __post_init__(self):
        if self.routing_strategy == "mixtral":
            self.routing_strategy = "mixlora"
        switch = self.routing_strategy in ("switch", "mixlora-switch")
        for name, usual, for_switch in (
            ("router_init_range", 0.02, 1.0),
            ("jitter_noise", 0.0, 0.01),
            ("router_z_loss_coef", 0.0, 1e-3),
        ):
            if getattr(self, name) is None:
                setattr(self, name, for_switch if switch else usual)
        if self.routing_strategy == "mixlora-dynamic" and self.temperature:
            self.router_temperature = self.temperature
        super().__post_init__()

    def _check(self) -> None:
        super()._check()
        self._expect("top_p", 0 < self.top_p <= 1, "a number in (0, 1]")
        self._expect("temperature", self.temperature >= 0, "a number >= 0")
        self._expect("expert_capacity", self.expert_capacity >= 1, "an integer >= 1")
        self._expect(
            "act_fn", self.act_fn is None or self.act_fn in ACT2FN, "a name of transformers.activations.ACT2FN"
        )
        if (own := self.expert_lora) is not None:
            fits = isinstance(own, dict) and bool(own.keys() & set(_EXPERT_LORA))
            fits = fits and is_count(own.get("r", 1)) and 0 <= own.get("lora_dropout", 0) < 1
            expected = f"a dict with some of {', '.join(_EXPERT_LORA)}; r an integer >= 1, lora_dropout in [0, 1)"
            self._expect("expert_lora", fits, expected)

    def routing_options(self, training: bool = False) -> dict[str, Any]:
        options = super().routing_options(training)
        if self.routing_strategy in ("switch", "mixlora-switch"):
            options["capacity"] = self.expert_capacity if training else None
        return options

    def lora_settings(self, key: str, *, expert: bool = True) -> LoraSettings:
        settings = {name: getattr(self, name) for name in _EXPERT_LORA}
        if expert and self.expert_lora:
            settings |= {name: value for name, value in self.expert_lora.items() if name in settings}
        return self._settings(key, **settings)


class MixLoraLayer(RoutedLayer):
    adapter_layer_names = ("mixlora_experts",)


class MixLoraModel(RoutedLoraModel):
    """The tuner of :class:`MixLoraConfig`."""

    prefix = "mixlora_"
    tuner_layer_cls = MixLoraLayer

    def _prepare_model(self, peft_config: MixLoraConfig, model: nn.Module) -> None:
        self.families = _feed_forward_layers(model)
        super()._prepare_model(peft_config, model)
        modules = dict(model.named_modules())
        self.split_projections = {
            key
            for key, module in modules.items()
            if key and not any(key.startswith(f"{layer}.") for layer in self.families) and in_feed_forward(key, modules)
        }
        apart = sorted(key for key in self.split_projections if check_target_module_exists(peft_config, key))
        if not apart and not any(self._targets(peft_config, key) for key in self.families):
            warnings.warn(
                "target_modules names no projection of a feed-forward layer: there will be no router, only plain LoRA.",
                stacklevel=2,
            )
        if apart:
            warnings.warn(
                f"{apart[0]} and {len(apart) - 1} more are projections of feed-forward layers that are not together in "
                "one module, or compute something else with them. Each gets a router of its own.",
                stacklevel=2,
            )

    def _linear_names(self, config: MixLoraConfig, model: nn.Module, modules: dict[str, nn.Module]) -> set[str]:
        # An earlier adapter's feed-forward layers hide their projections.
        hidden = {key: family for key, family in self.families.items() if isinstance(modules[key], RoutedLayer)}
        return super()._linear_names(config, model, modules) | {
            f"{key}.{name}" for key, family in hidden.items() for name in family.projections.values()
        }

    def _check_target_module_exists(self, peft_config: MixLoraConfig, key: str):
        if key in self.families:
            return bool(self._targets(peft_config, key))
        if key.rpartition(".")[0] in self.families:
            # Spoken for by the layer. Excluded ones are told, so that PEFT sees that exclude_modules was of use.
            result = check_target_module_exists(peft_config, key)
            return result if isinstance(result, _ExcludedModule) else False
        return check_target_module_exists(peft_config, key)

    def _targets(self, config: MixLoraConfig, key: str) -> list[str]:
        names = self.families[key].projections.values()
        return [name for name in names if check_target_module_exists(config, f"{key}.{name}")]

    def _experts(self, config: MixLoraConfig, target: nn.Module, key: str) -> nn.Module:
        if key in self.families:
            experts = config.experts_at(key, self.num_layers)
            settings = config.lora_settings(key)
            return FeedForwardExperts(config, settings, target, self.families[key], self._targets(config, key), experts)
        if key in self.split_projections:
            if config.lora_settings(key).dora:
                raise ValueError(f"use_dora: {key} gets a router of its own, and its experts can't be DoRA.")
            return LinearExperts(config, config.lora_settings(key), target, config.experts_at(key, self.num_layers))
        return PlainLora(config, config.lora_settings(key, expert=False), target)


def _feed_forward_layers(model: nn.Module) -> dict[str, Family]:
    """Name -> family, for the layers that compute what their family says; one of each class is tried."""
    found: dict[str, Family] = {}
    tried: dict[tuple, bool] = {}
    for key, module in model.named_modules():
        layer = module.get_base_layer() if isinstance(module, MixLoraLayer) else module
        family = family_of(layer)
        if family is None or key.endswith(".base_layer"):
            continue
        kind = (type(layer), family)
        if kind not in tried:
            tried[kind] = computes(layer, family)
        if tried[kind]:
            found[key] = family
    return found


register("mixlora", MixLoraConfig, MixLoraModel)
