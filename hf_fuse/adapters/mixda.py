"""Mixture of domain adapters (arXiv 2306.05406): knowledge of several domains beside the feed-forward layers.

``y = sum_j g_j W_up_j gelu(W_down_j u) + g_0 W u``, where ``u`` is the feed-forward layer's intermediate activation,
``W`` its frozen output projection, and ``g`` a softmax over the N domains and the original. The projections of all
domains are two matrix products: the gate's weights act between them. Axes: B samples, S tokens, f intermediate, b
bottleneck, o out.

Stage one trains the domain adapters and the gate (:mod:`hf_fuse.adapters.mixda_training` has its losses), stage two
freezes the former and trains the gate and a task adapter.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn

from hf_fuse.adapters._peft import register
from hf_fuse.adapters.ffn_families import FAMILIES, is_feed_forward_projection
from hf_fuse.adapters.last_tokens import EndsReader, stop_telling_ends, tell_ends
from hf_fuse.adapters.low_rank import linear_size
from hf_fuse.adapters.targeted_config import TargetedConfig

NO_MERGE = (
    "Domain adapters can't be merged: they are nonlinear and weighed by the input, so there is no one weight matrix "
    "that does the same. Keep the adapter (save_pretrained), or call unload() to get the base model back without it."
)


@dataclass
class MixDaConfig(TargetedConfig):
    """Settings of a mixture of domain adapters (arXiv 2306.05406).

    Args:
        num_domains (`int`): Domain adapters per layer.
        stage (`str`):
            `"domain"` trains domain adapters and gate; `"task"` freezes the domain adapters (see
            `hf_fuse.adapters.mixda_training.load_domain_adapters`) and adds a task adapter behind the mixture.
        down_scale (`int`): A domain adapter's bottleneck is the intermediate size over this.
        gate (`str`):
            What the gate reads: `"sequence"`, each sequence's last token, for all its tokens (the paper's, for
            encoders); `"token"`, each token for itself, which a causal model needs, as its last token knows the answers
            to the earlier ones; `"none"`: no gate, the adapters' outputs are added to the original.
        gate_size (`int`): Width of the gate's hidden layers.
        gate_layers (`int`): Number of the gate's hidden layers (ReLU).
        gate_dropout (`float`): Dropout before each of the gate's layers.
        task_reduction (`int`): The task adapter's bottleneck is the hidden size over this.
        target_modules (`Union[list[str], str]`, *optional*):
            Names of Linear modules beside which the adapters are put; they read its input. By default the output
            projections of all feed-forward layers.
        exclude_modules, modules_to_save, layers_to_transform, layers_pattern:
            As for LoRA. The paper uses layers 7 and 11 of RoBERTa-large.

    At the start the gate is random and the domain adapters are zero, so the model is not the base: each layer's output
    is scaled by the original's weight, about `1 / (num_domains + 1)`. With `gate="none"` it is the base.
    """

    num_domains: int = field(default=1, metadata={"help": "Domain adapters per layer."})
    stage: Literal["domain", "task"] = field(default="domain", metadata={"help": "'domain' or 'task'."})
    down_scale: int = field(default=16, metadata={"help": "Intermediate size over the domain adapters' bottleneck."})
    gate: Literal["sequence", "token", "none"] = field(
        default="sequence", metadata={"help": "What the gate reads: 'sequence', 'token' or 'none'."}
    )
    gate_size: int = field(default=768, metadata={"help": "Width of the gate's hidden layers."})
    gate_layers: int = field(default=3, metadata={"help": "Number of the gate's hidden layers."})
    gate_dropout: float = field(default=0.2, metadata={"help": "Dropout in the gate."})
    task_reduction: int = field(default=16, metadata={"help": "Hidden size over the task adapter's bottleneck."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Linear modules to put adapters beside; by default feed-forward outputs."}
    )
    # PEFT reads these of every configuration.
    bias: str = field(default="none", metadata={"help": "'none': biases are not trained."})
    target_parameters: list[str] | None = field(default=None, metadata={"help": "Not supported."})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType["MIXDA"]
        for name in ("num_domains", "down_scale", "gate_size", "gate_layers", "task_reduction"):
            self._expect(name, type(getattr(self, name)) is int and getattr(self, name) >= 1, "an integer >= 1")
        self._expect("stage", self.stage in ("domain", "task"), "'domain' or 'task'")
        self._expect("gate", self.gate in ("sequence", "token", "none"), "'sequence', 'token' or 'none'")
        self._expect("gate_dropout", 0 <= self.gate_dropout < 1, "a number in [0, 1)")
        self._expect("bias", self.bias == "none", "'none'")
        self._expect("target_parameters", not self.target_parameters, "None: only Linear modules have adapters")

    def _expect(self, name: str, fulfilled: bool, expected: str) -> None:
        if not fulfilled:
            raise ValueError(f"{name} is {getattr(self, name)!r}, expected {expected}.")


class Bottlenecks(nn.Module):
    """N two-layer networks on the same input: ``down`` ``(N, b, f)``, ``up`` ``(N, o, b)``, each with a bias."""

    def __init__(self, count: int, size: tuple[int, int], width: int):
        super().__init__()
        f, o = size
        self.down_weight = nn.Parameter(torch.empty(count, width, f))
        self.down_bias = nn.Parameter(torch.zeros(count, width))
        self.up_weight = nn.Parameter(torch.zeros(count, o, width))
        self.up_bias = nn.Parameter(torch.zeros(count, o))
        nn.init.uniform_(self.down_weight, -(f**-0.5), f**-0.5)  # Kaiming, a = sqrt(5)

    def forward(self, x: Tensor, activation: Any, weights: Tensor | None = None) -> Tensor:
        """Sum of the outputs, ``(..., o)``, each times its ``weights`` ``(..., N)``."""
        count, out, _ = self.up_weight.shape
        x = x.to(self.down_weight.dtype)
        hidden = activation(F.linear(x, self.down_weight.flatten(0, 1), self.down_bias.flatten()))
        hidden = hidden.unflatten(-1, (count, -1))
        bias = self.up_bias.sum(0)
        if weights is not None:
            weights = weights.to(hidden.dtype)
            hidden = hidden * weights.unsqueeze(-1)
            bias = weights @ self.up_bias
        return F.linear(hidden.flatten(-2), self.up_weight.transpose(0, 1).reshape(out, -1)) + bias


class Gate(nn.Module):
    """A multilayer perceptron with a softmax: ``(..., f)`` to weights ``(..., N + 1)``, the original's last; fp32."""

    def __init__(self, inputs: int, outputs: int, config: MixDaConfig):
        super().__init__()
        sizes = [inputs, *[config.gate_size] * config.gate_layers, outputs]
        self.layers, self.dropout = len(sizes) - 1, config.gate_dropout
        # Flat names: PEFT finds an adapter's parameters only right below the adapter's name.
        for number, (before, after) in enumerate(zip(sizes, sizes[1:])):
            weight, bias = (nn.Parameter(torch.empty(shape)) for shape in ((after, before), (after,)))
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            nn.init.uniform_(bias, -(before**-0.5), before**-0.5)
            self.register_parameter(f"weight_{number}", weight)
            self.register_parameter(f"bias_{number}", bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight_0.dtype)
        for number in range(self.layers):
            x = F.dropout(F.relu(x) if number else x, self.dropout, self.training)
            x = F.linear(x, getattr(self, f"weight_{number}"), getattr(self, f"bias_{number}"))
        return x.float().softmax(-1)


class MixDaLayer(EndsReader, BaseTunerLayer):
    """A frozen Linear with domain adapters, a gate and a task adapter beside it."""

    adapter_layer_names = ("mixda_domain", "mixda_gate", "mixda_task")
    other_param_names = ("gate_reads",)

    def __init__(self, base_layer: nn.Module, key: str):
        super().__init__()
        self.base_layer = base_layer
        self.key = key
        self.size = linear_size(self.get_base_layer(), key)
        self.mixda_domain, self.mixda_gate, self.mixda_task = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.gate_reads: dict[str, str] = {}
        self.frozen_peft_weight_names = {}
        # (output with adapters, output without) of each call, while somebody collects them.
        self.recorded: list[tuple[Tensor, Tensor]] | None = None

    def update_layer(self, adapter_name: str, config: MixDaConfig) -> None:
        f, o = self.size
        self.gate_reads[adapter_name] = config.gate
        self.mixda_domain[adapter_name] = Bottlenecks(config.num_domains, self.size, max(f // config.down_scale, 1))
        if config.gate != "none":
            self.mixda_gate[adapter_name] = Gate(f, config.num_domains + 1, config)
        if config.stage == "task":
            self.mixda_task[adapter_name] = Bottlenecks(1, (o, o), max(o // config.task_reduction, 1))
            self.frozen_peft_weight_names[adapter_name] = ("mixda_domain",)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        own = [name for name in names if name in self.mixda_domain]
        if len(own) > 1:
            raise ValueError(
                f"{self.key}: the adapters {', '.join(own)} all weigh the original output of this layer and can't be "
                "active together. Activate one of them."
            )
        super().set_adapter(adapter_names, inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        original = self.base_layer(x, *args, **kwargs)
        adapter = next((name for name in self.active_adapters if name in self.mixda_domain), None)
        if adapter is None or self.disable_adapters:
            return original
        mixed = self.mixture(adapter, x, original)
        # Not in the second pass of gradient checkpointing.
        if self.recorded is not None and self.ends is not None:
            self.recorded.append((mixed, original))
        if adapter in self.mixda_task:
            mixed = mixed + self.mixda_task[adapter](mixed, F.silu)
        return mixed.to(original.dtype)

    def mixture(self, adapter: str, x: Tensor, original: Tensor) -> Tensor:
        """Domain adapters and the original output, weighed by the gate."""
        domains = self.mixda_domain[adapter]
        if adapter not in self.mixda_gate:
            return original + domains(x, F.gelu)
        weights = self.gate_weights(adapter, x)
        return domains(x, F.gelu, weights[..., :-1]) + weights[..., -1:] * original

    def gate_weights(self, adapter: str, x: Tensor) -> Tensor:
        """``(..., N + 1)`` for the leading axes of ``x``, the original's last; axes of size 1 where tokens share it."""
        gate = self.mixda_gate[adapter]
        if self.gate_reads[adapter] == "token":
            return gate(x)
        weights_BN = gate(self.last_tokens(x))
        if x.dim() == 2:
            return weights_BN.repeat_interleave(len(x) // len(weights_BN), 0)
        return weights_BN.view(len(weights_BN), *[1] * (x.dim() - 2), -1)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(NO_MERGE)

    def unmerge(self) -> None:
        raise NotImplementedError(NO_MERGE)


class MixDaModel(BaseTuner):
    """Adds domain adapters to a model; made by ``get_peft_model(model, MixDaConfig(...))``."""

    prefix = "mixda_"
    tuner_layer_cls = MixDaLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: MixDaConfig, model_config: dict) -> MixDaConfig:
        if peft_config.target_modules is None:
            found = feed_forward_outputs(self.model)
            # By their last parts: whole names would bypass layers_to_transform.
            named = replace(peft_config, target_modules={name.rpartition(".")[2] for name in found})
            peft_config.target_modules = {name for name in found if check_target_module_exists(named, name)}
        return peft_config

    def _create_and_replace(
        self,
        peft_config: MixDaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        layer = target if isinstance(target, MixDaLayer) else MixDaLayer(target, current_key)
        layer.update_layer(adapter_name, peft_config)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        tell_ends(model)
        causal = "CausalLM" in type(model).__name__ or type(model).__name__.endswith("LMHeadModel")
        if causal and self.peft_config[adapter_name].gate == "sequence":
            warnings.warn(
                "The gate reads the last token of a sequence, which knows what a causal model is to predict for the "
                "earlier ones. Set gate='token'.",
                stacklevel=2,
            )

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(NO_MERGE)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        stop_telling_ends(model)
        return model


def feed_forward_outputs(model: nn.Module) -> set[str]:
    """Names of the output projections of all feed-forward layers, found by their structure.

    Raises:
        ValueError: there are none of a known kind.
    """
    modules = dict(model.named_modules())
    outputs = {family.down for family in FAMILIES}
    found = set()
    for key, module in modules.items():
        parent, _, name = key.rpartition(".")
        above = modules.get(parent.rpartition(".")[0])
        is_output = name in outputs or (name == "dense" and modules[parent] is getattr(above, "output", None))
        linear = isinstance(module, BaseTunerLayer) or hasattr(module, "weight")
        if key and linear and is_output and is_feed_forward_projection(name, modules[parent], above):
            found.add(key)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no feed-forward layers of a known kind. Name the Linear modules that make "
            "their outputs in target_modules."
        )
    return found


register("mixda", MixDaConfig, MixDaModel)
