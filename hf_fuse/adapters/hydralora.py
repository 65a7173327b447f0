"""HydraLoRA (arXiv 2404.19245): one shared A and several B, mixed by a dense router."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from hf_fuse.adapters._peft import register
from hf_fuse.adapters.experts import LinearExperts
from hf_fuse.adapters.routed_config import RoutedLoraConfig
from hf_fuse.adapters.routed_layer import RoutedLayer
from hf_fuse.adapters.routed_tuner import RoutedLoraModel


@dataclass
class HydraLoraConfig(RoutedLoraConfig):
    """Configuration of HydraLoRA: `y = W x + s sum_e softmax(G x)_e B_e A x`.

    The fields of `RoutedLoraConfig`, and:

    Args:
        num_experts (`Union[int, list[int]]`): Heads B. The paper finds their number by clustering the corpus; the
            authors' script uses 4.
        lora_nums (`int`, *optional*): The authors' name of `num_experts`.
    """

    method = "hydralora"

    r: int = field(default=4, metadata={"help": "Rank of A and of every B."})
    lora_alpha: float = field(default=32, metadata={"help": "The output of the heads is scaled by lora_alpha / r."})
    num_experts: int | list[int] = field(default=4, metadata={"help": "Heads B."})
    routing_strategy: str = field(default="hydralora", metadata={"help": "How heads are mixed."})
    lora_nums: int | None = field(default=None, metadata={"help": "The authors' name of num_experts."})

    def __post_init__(self):
        if self.lora_nums is not None:
            self.num_experts, self.lora_nums = self.lora_nums, None
        super().__post_init__()


class HydraLoraLayer(RoutedLayer):
    adapter_layer_names = ("hydralora_experts",)


class HydraLoraModel(RoutedLoraModel):
    """The tuner of :class:`HydraLoraConfig`."""

    prefix = "hydralora_"
    tuner_layer_cls = HydraLoraLayer

    def _experts(self, config: HydraLoraConfig, target: nn.Module, key: str) -> LinearExperts:
        experts = config.experts_at(key, self.num_layers)
        return LinearExperts(config, config.lora_settings(key), target, experts, shared_A=True)


register("hydralora", HydraLoraConfig, HydraLoraModel)
