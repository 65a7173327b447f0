"""MoLA (arXiv 2402.08562): a router and top-k LoRA experts on every Linear, more experts in higher layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from hf_fuse.adapters._peft import register
from hf_fuse.adapters.routed_config import RoutedLoraConfig
from hf_fuse.adapters.routed_layer import RoutedLayer
from hf_fuse.adapters.routed_tuner import RoutedLoraModel
from hf_fuse.losses.load_balance import load_balance


@dataclass
class MolaConfig(RoutedLoraConfig):
    """Configuration of MoLA: `y = W x + s sum_e w_e B_e A_e x` on each targeted Linear, with a router of its own.

    The fields of `RoutedLoraConfig`, and:

    Args:
        num_experts (`Union[int, list[int]]`): `[2, 4, 6, 8]`, the authors' best, in quarters of the layers.
        top_k (`int`): Experts per token; their probabilities are renormalised.
        router_aux_loss_coef (`float`):
            Weight of the load balance, 1 at uniform routing, summed over the routers. The authors use 1e-3, and only
            if asked to; 0 here.
    """

    method = "mola"

    top_k: int = field(default=2, metadata={"help": "Experts per token."})
    num_experts: int | list[int] = field(
        default_factory=lambda: [2, 4, 6, 8], metadata={"help": "Experts per router, a list for parts of the layers."}
    )
    routing_strategy: str = field(default="mola", metadata={"help": "How experts are chosen."})
    aux_reduction: Literal["global", "per_layer", "sum"] = field(
        default="sum", metadata={"help": "How the load balance goes over layers."}
    )

    def load_balance(self, logits, weights, attention_mask) -> Tensor:
        return load_balance(logits, attention_mask, weights, reduction=self.aux_reduction, normalize_topk=True)


class MolaLayer(RoutedLayer):
    adapter_layer_names = ("mola_experts",)


class MolaModel(RoutedLoraModel):
    """The tuner of :class:`MolaConfig`."""

    prefix = "mola_"
    tuner_layer_cls = MolaLayer


register("mola", MolaConfig, MolaModel)
