"""What the configurations of all routed LoRA adapters have in common."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from peft import PeftType
from peft.utils.other import get_pattern_key
from torch import Tensor

from hf_fuse.adapters import routing
from hf_fuse.adapters.targeted_config import TargetedConfig
from hf_fuse.losses.load_balance import load_balance
from hf_fuse.losses.router_z import router_z
from hf_fuse.registry import nearest


class LoraSettings(NamedTuple):
    """Of one module: rank, scaling, dropout, kind of initialisation, whether DoRA."""

    r: int
    scaling: float
    dropout: float
    init: str
    dora: bool = False


@dataclass
class RoutedLoraConfig(TargetedConfig):
    """Fields of every adapter whose LoRA experts are chosen by a router. The subclasses set the defaults.

    Args:
        r (`int`): Rank of each expert.
        target_modules (`Union[list[str], str]`, *optional*):
            Names of the Linear modules to adapt, as for LoRA: a list of suffixes, a regular expression, or
            `"all-linear"`; also `"feed-forward"`, for those of feed-forward layers.
        exclude_modules (`Union[list[str], str]`, *optional*): Modules that are not adapted though they match.
        lora_alpha (`float`): The experts' outputs are scaled by `lora_alpha / r`.
        lora_dropout (`float`): Dropout of the experts' input; all experts of a module share one mask.
        use_rslora (`bool`): Scale by `lora_alpha / sqrt(r)` instead.
        lora_init (`str`): `"original"` (Kaiming uniform) or `"gaussian"` (standard deviation `1 / r`) for A. B is 0.
        num_experts (`Union[int, list[int]]`):
            Experts per router. A list goes from the first layer to the last in (nearly) equal parts: `[2, 4, 6, 8]`
            gives each quarter of the layers its number.
        num_experts_pattern (`dict[str, int]`):
            Other numbers for some modules, in the manner of `rank_pattern`.
        rank_pattern (`dict[str, int]`): Module name or regular expression -> rank.
        alpha_pattern (`dict[str, float]`): Module name or regular expression -> alpha.
        routing_strategy (`str`): How experts are chosen, a name of `hf_fuse.adapters.routing.STRATEGIES`.
        router_init_range (`float`): Spread of the router's initial weights.
        router_activation (`str`, *optional*):
            `"tanh"`, `"gelu"` or `"sigmoid"` of the router's logits, before they are divided by the temperature.
        router_temperature (`float`): Divides the logits. Lowering it in the course of training leads from dense to
            sparse routing.
        jitter_noise (`float`): In training the input is multiplied by noise in `[1 - jitter, 1 + jitter]`.
        router_loss (`bool`): Whether the losses below are added to the model's loss in training.
        router_aux_loss_coef (`float`): Weight of the load balance.
        router_z_loss_coef (`float`): Weight of the router z-loss.
        aux_reduction (`str`):
            `"global"` pools the layers' statistics before the load balance is taken (MixLoRA, Mixtral), `"per_layer"`
            is the mean of the layers' losses, which is stronger, `"sum"` their sum (MoLA). The other losses are means
            over the routers, for `"sum"` sums.
        bias (`str`): `"none"`; biases are not trained.
        modules_to_save (`list[str]`, *optional*): Further modules that are trained and saved, such as a new head.
        layers_to_transform (`Union[list[int], int]`, *optional*): Only these layers are adapted.
        layers_pattern (`Union[list[str], str]`, *optional*): Name of the list of layers, where it is not usual.
    """

    # The method's name in PEFT's tables, and how `router_init_range` is meant.
    method: ClassVar[str]
    router_init: ClassVar[Literal["normal", "kaiming"]] = "kaiming"

    r: int = field(default=8, metadata={"help": "Rank of each expert."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names of Linear modules, a regular expression, 'all-linear' or 'feed-forward'."},
    )
    lora_alpha: float = field(default=16, metadata={"help": "The experts' outputs are scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the experts' input."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r) instead."})
    lora_init: str = field(default="original", metadata={"help": "Initialisation of A: 'original' or 'gaussian'."})
    num_experts: int | list[int] = field(
        default=8, metadata={"help": "Experts per router; a list is spread over the layers in equal parts."}
    )
    num_experts_pattern: dict = field(
        default_factory=dict, metadata={"help": "Module name or regular expression -> number of experts."}
    )
    rank_pattern: dict = field(default_factory=dict, metadata={"help": "Module name or regular expression -> rank."})
    alpha_pattern: dict = field(default_factory=dict, metadata={"help": "Module name or regular expression -> alpha."})
    routing_strategy: str = field(default="top_k", metadata={"help": "How experts are chosen."})
    router_init_range: float = field(default=5.0, metadata={"help": "Spread of the router's initial weights."})
    router_activation: str | None = field(
        default=None, metadata={"help": "Nonlinearity of the router's logits: 'tanh', 'gelu', 'sigmoid' or None."}
    )
    router_temperature: float = field(default=1.0, metadata={"help": "Divides the router's logits."})
    jitter_noise: float = field(default=0.0, metadata={"help": "Relative noise of the input in training."})
    router_loss: bool = field(default=True, metadata={"help": "Whether the routers' losses are added in training."})
    router_aux_loss_coef: float = field(default=0.0, metadata={"help": "Weight of the load balance."})
    router_z_loss_coef: float = field(default=0.0, metadata={"help": "Weight of the router z-loss."})
    aux_reduction: Literal["global", "per_layer", "sum"] = field(
        default="global", metadata={"help": "How the load balance goes over layers: 'global', 'per_layer' or 'sum'."}
    )
    bias: str = field(default="none", metadata={"help": "'none': biases are not trained."})
    # PEFT reads it of every configuration.
    target_parameters: list[str] | None = field(default=None, metadata={"help": "Not supported."})

    def __post_init__(self):
        if isinstance(self.target_modules, dict):  # MoE-PEFT: name -> whether it is adapted
            self.target_modules = [name for name, adapted in self.target_modules.items() if adapted]
        super().__post_init__()
        self.peft_type = PeftType[self.method.upper()]
        self._check()

    def _check(self) -> None:
        experts = self.num_experts if isinstance(self.num_experts, list) else [self.num_experts]
        self._expect("num_experts", bool(experts) and all(map(is_count, experts)), "an integer >= 1, or a list of them")
        self._expect("num_experts_pattern", all(map(is_count, self.num_experts_pattern.values())), "integers >= 1")
        self._expect("rank_pattern", all(map(is_count, self.rank_pattern.values())), "integers >= 1")
        self._expect("r", is_count(self.r), "an integer >= 1")
        self._expect("lora_dropout", 0 <= self.lora_dropout < 1, "a number in [0, 1)")
        self._expect("lora_init", self.lora_init in ("original", "gaussian"), "'original' or 'gaussian'")
        self._expect("router_init_range", self.router_init_range >= 0, "a number >= 0")
        self._expect("router_temperature", self.router_temperature > 0, "a number > 0")
        self._expect("jitter_noise", 0 <= self.jitter_noise < 1, "a number in [0, 1)")
        self._expect("router_aux_loss_coef", self.router_aux_loss_coef >= 0, "a number >= 0")
        self._expect("router_z_loss_coef", self.router_z_loss_coef >= 0, "a number >= 0")
        self._expect("bias", self.bias == "none", "'none': routed experts have no biases to train")
        self._expect("target_parameters", not self.target_parameters, "None: only Linear modules have experts")
        self._expect(
            "aux_reduction", self.aux_reduction in ("global", "per_layer", "sum"), "'global', 'per_layer' or 'sum'"
        )
        if self.routing_strategy not in routing.STRATEGIES:
            advice = nearest(self.routing_strategy, routing.STRATEGIES)
            raise ValueError(f"routing_strategy: there is no {self.routing_strategy!r}. {advice}")
        activations = (None, "tanh", "gelu", "sigmoid")
        self._expect("router_activation", self.router_activation in activations, f"one of {activations}")
        for name in ("top_k", "keep_top_k"):
            if name in self.routing_options():
                self._check_choices(name, min([*experts, *self.num_experts_pattern.values()]))

    def _check_choices(self, name: str, fewest: int) -> None:
        fits = is_count(getattr(self, name)) and getattr(self, name) <= fewest
        self._expect(name, fits, f"1 to {fewest}, the (smallest) number of experts of a router")

    def _expect(self, name: str, fulfilled: bool, expected: str) -> None:
        if not fulfilled:
            raise ValueError(f"{name} is {getattr(self, name)!r}, expected {expected}.")

    def routing_options(self, training: bool = False) -> dict[str, Any]:
        """Options of ``routing_strategy`` for :func:`~hf_fuse.adapters.routing.route`: the fields of their names."""
        names = routing.routing_options(self.routing_strategy)
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def experts_at(self, key: str, num_layers: int) -> int:
        """Number of experts of the module of that name in a model of ``num_layers`` layers.

        Raises:
            ValueError: ``num_experts`` is a list and the module belongs to no layer, or it is longer than the model.
        """
        pattern = get_pattern_key(self.num_experts_pattern, key)
        if pattern in self.num_experts_pattern:
            return self.num_experts_pattern[pattern]
        if not isinstance(self.num_experts, list):
            return self.num_experts
        layer = layer_index(key)
        if layer is None:
            raise ValueError(
                f"num_experts is a list, but {key} is in no numbered layer. Use num_experts_pattern or exclude_modules."
            )
        if len(self.num_experts) > num_layers:
            raise ValueError(f"num_experts has {len(self.num_experts)} entries for {num_layers} layers.")
        return self.num_experts[layer * len(self.num_experts) // num_layers]

    def lora_settings(self, key: str, *, expert: bool = True) -> LoraSettings:
        """Of the module of that name, as an expert or (MixLoRA's attention) as plain LoRA."""
        return self._settings(key, self.r, self.lora_alpha, self.lora_dropout, self.use_rslora)

    def _settings(
        self, key: str, r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool, use_dora: bool = False
    ) -> LoraSettings:
        r = self.rank_pattern.get(get_pattern_key(self.rank_pattern, key), r)
        alpha = self.alpha_pattern.get(get_pattern_key(self.alpha_pattern, key), lora_alpha)
        return LoraSettings(r, alpha / (math.sqrt(r) if use_rslora else r), lora_dropout, self.lora_init, use_dora)

    def auxiliary_loss(
        self,
        logits: tuple[Tensor, ...],
        weights: tuple[Tensor, ...],
        attention_mask: Tensor | None,
        task_types: Tensor | None,
    ) -> Tensor | None:
        """Weighted sum of the losses of routers that saw the same tokens, or None if there are none.

        Args:
            logits: per router ``(B, S, E)``, with the same E for all.
            weights: of the experts, of the same shapes.
            attention_mask: ``(B, S)``, or None to count all tokens.
            task_types: ``(B,)``, for LoRAMoE.
        """
        terms = []
        if self.router_aux_loss_coef:
            terms.append(self.router_aux_loss_coef * self.load_balance(logits, weights, attention_mask))
        if self.router_z_loss_coef:
            terms.append(self.router_z_loss_coef * self._reduced(router_z(logits, attention_mask), len(logits)))
        return sum(terms) if terms else None

    def _reduced(self, mean: Tensor, routers: int) -> Tensor:
        """A mean over routers, as ``aux_reduction`` wants it."""
        return mean * routers if self.aux_reduction == "sum" else mean

    def load_balance(
        self, logits: tuple[Tensor, ...], weights: tuple[Tensor, ...], attention_mask: Tensor | None
    ) -> Tensor:
        return load_balance(logits, attention_mask, weights, reduction=self.aux_reduction)


def is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def layer_index(key: str) -> int | None:
    """The first number among the parts of a module's name."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", key)
    return int(found.group(1)) if found else None
