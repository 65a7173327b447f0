"""LoRAMoE (arXiv 2312.09979): LoRA experts on the feed-forward Linears, all of them mixed by a dense router."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from hf_fuse.adapters._peft import register
from hf_fuse.adapters.routed_config import RoutedLoraConfig
from hf_fuse.adapters.routed_layer import RoutedLayer
from hf_fuse.adapters.routed_tuner import RoutedLoraModel
from hf_fuse.losses.localized_balance import localized_balance


@dataclass
class LoraMoeConfig(RoutedLoraConfig):
    """Configuration of LoRAMoE: `y = W x + s sum_e softmax(G x)_e B_e A_e x`.

    The fields of `RoutedLoraConfig`, and:

    Args:
        target_modules (`Union[list[str], str]`, *optional*): The feed-forward projections by default.
        blc_weight (`float`):
            Weight of the localized balance: the squared coefficient of variation of the experts' load. 0 in the
            authors' script.
        blc_alpha (`float`):
            How strongly half of the experts are to serve one kind of task. Needs `task_types`, 0 or 1 for each sample,
            among the model's inputs (with the Trainer: `remove_unused_columns=False`).
        lora_nums (`int`, *optional*): The authors' name of `num_experts`.
    """

    method = "loramoe"

    r: int = field(default=4, metadata={"help": "Rank of each expert."})
    lora_alpha: float = field(default=32, metadata={"help": "The experts' outputs are scaled by lora_alpha / r."})
    num_experts: int | list[int] = field(default=6, metadata={"help": "Experts per router."})
    routing_strategy: str = field(default="loramoe", metadata={"help": "How experts are chosen."})
    blc_weight: float = field(default=0.0, metadata={"help": "Weight of the localized balance."})
    blc_alpha: float = field(default=0.0, metadata={"help": "How strongly experts specialise by kind of task."})
    lora_nums: int | None = field(default=None, metadata={"help": "The authors' name of num_experts."})

    def __post_init__(self):
        if self.lora_nums is not None:
            self.num_experts, self.lora_nums = self.lora_nums, None
        super().__post_init__()

    def _check(self) -> None:
        super()._check()
        self._expect("blc_weight", self.blc_weight >= 0, "a number >= 0")
        self._expect("blc_alpha", 0 <= self.blc_alpha <= 1, "a number in [0, 1]")

    def auxiliary_loss(self, logits, weights, attention_mask, task_types) -> Tensor | None:
        loss = super().auxiliary_loss(logits, weights, attention_mask, task_types)
        if not self.blc_weight:
            return loss
        balance = localized_balance(weights, attention_mask, task_types, delta=self.blc_alpha)
        balance = self.blc_weight * self._reduced(balance, len(weights))
        return balance if loss is None else loss + balance


class LoraMoeLayer(RoutedLayer):
    adapter_layer_names = ("loramoe_experts",)


class LoraMoeModel(RoutedLoraModel):
    """The tuner of :class:`LoraMoeConfig`."""

    prefix = "loramoe_"
    tuner_layer_cls = LoraMoeLayer
    default_targets = "feed-forward"


register("loramoe", LoraMoeConfig, LoraMoeModel)
