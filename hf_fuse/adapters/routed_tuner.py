"""The PEFT tuner that all adapters with a router share."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers, check_target_module_exists
from torch import Tensor, nn

from hf_fuse.adapters.experts import Experts, LinearExperts, innermost
from hf_fuse.adapters.ffn_families import is_feed_forward_projection
from hf_fuse.adapters.reference_weights import from_reference
from hf_fuse.adapters.routed_config import RoutedLoraConfig, layer_index
from hf_fuse.adapters.routed_layer import NO_MERGE, RoutedLayer
from hf_fuse.adapters.router_collector import collect_routes, stop_collecting


class RoutedLoraModel(BaseTuner):
    """Puts a router and LoRA experts on each targeted Linear. Subclasses are registered with PEFT.

    The losses of the routers are added to the output of the base model by hooks
    (:mod:`hf_fuse.adapters.router_collector`), so that they are there however the model is called.
    """

    tuner_layer_cls: type[RoutedLayer]
    target_module_mapping: dict[str, list[str]] = {}
    # Which Linear modules are adapted if target_modules is None.
    default_targets: str = "all-linear"

    def _prepare_adapter_config(self, peft_config: RoutedLoraConfig, model_config: dict) -> RoutedLoraConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = self.default_targets
        return peft_config

    def _prepare_model(self, peft_config: RoutedLoraConfig, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        self.num_layers = 1 + max((index for key in modules if (index := layer_index(key)) is not None), default=0)
        wanted = peft_config.target_modules
        if wanted in ("all-linear", "feed-forward"):
            names = self._linear_names(peft_config, model, modules)
            # By their last parts: whole names bypass layers_to_transform.
            ends = replace(
                peft_config, target_modules={name.rpartition(".")[2] for name in names}, exclude_modules=None
            )
            peft_config.target_modules = {name for name in names if check_target_module_exists(ends, name)}
            if not peft_config.target_modules:
                chosen = peft_config.layers_to_transform
                layers = "" if chosen is None else f" in layers {chosen}"
                raise ValueError(
                    f"target_modules: {type(model).__name__} has no Linear modules of the kind {wanted!r}{layers}. "
                    "Name them as for LoRA, or choose other layers."
                )
        _refuse_expert_stacks(peft_config, modules)

    def _linear_names(self, config: RoutedLoraConfig, model: nn.Module, modules: dict[str, nn.Module]) -> set[str]:
        """Full names for "all-linear" and "feed-forward"; an earlier adapter's layers are known by what they wrap."""
        only_feed_forward = config.target_modules == "feed-forward"
        config.target_modules = "all-linear"
        names = set(_maybe_include_all_linear_layers(config, model).target_modules)
        names |= {key for key, m in modules.items() if isinstance(m, RoutedLayer) and not [*innermost(m).children()]}
        if not only_feed_forward:
            return names
        return {name for name in names if in_feed_forward(name, modules)}

    def _create_and_replace(
        self,
        peft_config: RoutedLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        known = isinstance(target, self.tuner_layer_cls)
        experts = self._experts(peft_config, target.get_base_layer() if known else target, current_key)
        layer = target if known else self.tuner_layer_cls(target, current_key)
        layer.update_layer(adapter_name, experts, adapter_name in self.active_adapters)
        if not known:
            self._replace_module(parent, target_name, layer, target)

    def _experts(self, config: RoutedLoraConfig, target: nn.Module, key: str) -> nn.Module:
        return LinearExperts(config, config.lora_settings(key), target, config.experts_at(key, self.num_layers))

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # The experts are on their device already, and a wrapped feed-forward layer has no weight to look at.
        setattr(parent, child_name, new_module)

    def _post_injection_hook(self, model: nn.Module, config: RoutedLoraConfig, adapter_name: str) -> None:
        collect_routes(model)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any):
        if adapter_names is not None:
            raise ValueError(
                "adapter_names: routed experts can't differ from sample to sample. Use set_adapter, batch by batch."
            )
        yield

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(NO_MERGE)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        stop_collecting(model)
        return model

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: RoutedLoraConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        state_dict = from_reference(model, config, adapter_name, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def in_feed_forward(key: str, modules: dict[str, nn.Module]) -> bool:
    """Whether the module of that name is a projection of a feed-forward part of a model with these modules."""
    parent_key, _, name = key.rpartition(".")
    return is_feed_forward_projection(name, modules[parent_key], modules.get(parent_key.rpartition(".")[0]))


def _refuse_expert_stacks(config: RoutedLoraConfig, modules: dict[str, nn.Module]) -> None:
    """Mixtral, Qwen3-MoE and the like keep the experts that they have of their own as 3-d parameters.

    Raises:
        TypeError: one of them is targeted.
    """
    for key, module in modules.items():
        if isinstance(module, (Experts, nn.Conv1d)):
            continue
        stacks = [f"{key}.{name}" for name, weight in module.named_parameters(recurse=False) if weight.dim() == 3]
        single = [key] if re.search(r"\.experts\.\d+\.", key) else []
        for target in (*stacks, *single):
            if check_target_module_exists(config, target):
                raise TypeError(
                    f"{target} belongs to the experts of a model that is a mixture of experts already; routed LoRA "
                    "experts inside of them are not supported. Target the attention projections only, and leave "
                    f"{target.rpartition('.')[2]} out of target_modules."
                )
