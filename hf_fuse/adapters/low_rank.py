"""A frozen linear layer plus a low-rank change that an adapter computes anew in every forward pass.

NOLA and aTLAS differ only in where the two factors come from; both are LoRAs at every moment of training, so they
merge, unmerge and export alike. Axes: r rank, i in, o out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, get_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_fuse.errors import FuseError

if TYPE_CHECKING:
    from peft import PeftConfig


class LowRankLayer(nn.Module, BaseTunerLayer):
    """Wraps a Linear (also a quantised one) or a Conv1D.

    A subclass lists its parameters in ``adapter_layer_names`` and all else that it keeps per adapter, ``dropout`` among
    it, in ``other_param_names``; it makes them in :meth:`update_layer` and gives :meth:`factors`.
    """

    def __init__(self, base_layer: nn.Module, name: str):
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.in_features, self.out_features = linear_size(self.get_base_layer(), name)
        self.dropout: dict[str, float] = {}
        self.merged_adapters = []

    def update_layer(self, adapter_name: str, config: PeftConfig) -> None:
        """Makes the parameters of a new adapter, on the device of the base layer."""
        raise NotImplementedError

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """``(down_ri, up_or)``: the change of the weight is ``up @ down``, scale included."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        for adapter in self._held(self.active_adapters):
            down_ri, up_or = self.factors(adapter)
            inputs = F.dropout(x.to(down_ri.dtype), self.dropout.get(adapter, 0.0), self.training)
            result = result + F.linear(F.linear(inputs, down_ri), up_or)
        return result.to(dtype)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The change in the shape of the base's weight, at least fp32."""
        down_ri, up_or = (factor.to(_working_dtype(factor)) for factor in self.factors(adapter_name))
        delta = up_or @ down_ri
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the change to the base's weight; ``safe_merge`` first checks that the sum is finite."""
        for adapter in self._held(check_adapters_to_merge(self, adapter_names)):
            self._add_to_base(adapter, 1, check=safe_merge)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Subtracts what was merged: the base's weight comes back up to rounding in its own dtype."""
        while self.merged_adapters:
            self._add_to_base(self.merged_adapters.pop(), -1)

    @torch.no_grad()
    def _add_to_base(self, adapter: str, sign: int, check: bool = False) -> None:
        weight = getattr(self.get_base_layer(), "weight", None)
        if weight is None or not weight.is_floating_point():
            raise TypeError(
                f"{self.name}: the base's weight is quantised, so nothing can be added to it. Load the base "
                "unquantised to merge, or use the adapter unmerged."
            )
        total = weight.to(_working_dtype(weight)) + sign * self.get_delta_weight(adapter).to(weight.device)
        if check and not total.isfinite().all():
            raise ValueError(f"{self.name}: adapter {adapter!r} makes NaN or infinite weights. It was not merged.")
        weight.copy_(total)

    def _held(self, adapter_names: list[str]) -> list[str]:
        return [adapter for adapter in adapter_names if adapter in self._get_available_adapters()]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class LowRankModel(BaseTuner):
    """The tuner of a :class:`LowRankLayer`. ``target_modules`` default to those of PEFT's LoRA for the architecture."""

    tuner_layer_cls: type[LowRankLayer]
    _layer_arguments: tuple = ()  # what a layer needs to know of a new adapter besides its config
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            layer = target
        else:
            layer = self.tuner_layer_cls(target, current_key)
        layer.update_layer(adapter_name, peft_config, *self._layer_arguments)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)


def linear_size(layer: nn.Module, name: str) -> tuple[int, int]:
    """``(in, out)`` of a Linear, quantised or not, or a Conv1D.

    Raises:
        TypeError: the layer is of another kind.
    """
    if isinstance(layer, Conv1D):
        return tuple(layer.weight.shape)
    for size in ("in_features", "out_features"), ("infeatures", "outfeatures"):
        if all(hasattr(layer, end) for end in size):
            return tuple(getattr(layer, end) for end in size)
    raise TypeError(
        f"{name}: is a {type(layer).__name__}, and only Linear and Conv1D layers can be adapted. Change target_modules."
    )


def to_lora(model: PeftModel, folder: str | Path, *, adapter_name: str | None = None) -> Path:
    """Writes an adapter of this kind as a plain PEFT LoRA of the same model: exact, not an approximation.

    The folder loads with ``PeftModel.from_pretrained`` wherever PEFT is, and can be merged with others by
    ``hf-fuse merge``. Modules in ``modules_to_save`` come along.

    Args:
        model: a PEFT model with an adapter whose layers are :class:`LowRankLayer` (NOLA, aTLAS).
        folder: where to write; made if missing.
        adapter_name: default: the active adapter.

    Raises:
        FuseError: the adapter is of another kind, or several are active and none is named.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    from hf_fuse.checkpoint.adapter_writer import Pair, adapter_config

    folder = Path(folder)
    if adapter_name is None:
        if len(model.active_adapters) != 1:
            raise FuseError(f"adapters {model.active_adapters} are active. Say which one with adapter_name.")
        adapter_name = model.active_adapters[0]
    layers = {
        module.name: module
        for module in model.modules()
        if isinstance(module, LowRankLayer) and adapter_name in module._get_available_adapters()
    }
    if not layers:
        raise FuseError(f"adapter {adapter_name!r}: is none of those that are low-rank at heart (NOLA, aTLAS).")
    prefix = model.base_model.prefix
    stored = get_peft_model_state_dict(model, adapter_name=adapter_name)
    # modules_to_save and the like are stored as they are.
    tensors = {name: value.contiguous() for name, value in stored.items() if f".{prefix}" not in name}
    pairs = []
    with torch.no_grad():
        for name, layer in layers.items():
            down_ri, up_or = layer.factors(adapter_name)
            pair = Pair(name, (layer.out_features, layer.in_features), len(down_ri))
            factors = pair.stored(up_or, down_ri)
            tensors |= {key: value.cpu().contiguous() for key, value in factors.items()}
            pairs.append(pair)
    ours = model.peft_config[adapter_name]
    conv = any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values())
    config = adapter_config(
        pairs,
        base=ours.base_model_name_or_path,
        targets=sorted(layers),
        inherited={"task_type": ours.task_type},
        modules_to_save=ours.modules_to_save or (),
        fan_in_fan_out=conv,
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig.from_peft_type(**json.loads(json.dumps(config))).save_pretrained(folder)
    return folder


def _working_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
