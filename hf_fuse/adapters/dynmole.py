"""DynMoLE (arXiv 2504.00661): each token uses as many LoRA experts as its router's entropy asks for."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from hf_fuse.adapters._peft import register
from hf_fuse.adapters.routed_config import RoutedLoraConfig
from hf_fuse.adapters.routed_layer import RoutedLayer
from hf_fuse.adapters.routed_tuner import RoutedLoraModel
from hf_fuse.losses.router_entropy import router_entropy
from hf_fuse.losses.soft_load_balance import soft_load_balance


@dataclass
class DynMoleConfig(RoutedLoraConfig):
    """Configuration of DynMoLE: a router on each targeted Linear, `y = W x + s sum_e g_e B_e A_e x`.

    Tokens whose normalised entropy is above the threshold use all experts; others the likeliest ones within `top_p`,
    at least `keep_top_k`. The weights g are probabilities and not renormalised.
    The fields of `RoutedLoraConfig`, and:

    Args:
        target_modules (`Union[list[str], str]`, *optional*): The feed-forward projections by default.
        entropy_threshold (`float`): In [0, 1]; 1 and more switch the use of all experts off.
        entropy_index (`float`): q of the entropy, in (0, 2].
        entropy_type (`str`): `"tsallis"` or `"renyi"`.
        entropy_eps (`float`): Read from the authors' configurations and not used: entropies are computed from
            log-probabilities, which need no guard.
        keep_top_k (`int`): Experts that are always used.
        top_p (`float`): Sum of the probabilities of the experts that are used, the one that exceeds it left out.
        router_aux_loss_coef (`float`): Weight of the load balance, 1 at uniform routing.
        router_dyn_loss_coef (`float`): Weight of the mean entropy.
    """

    method = "dynmole"

    r: int = field(default=24, metadata={"help": "Rank of each expert."})
    lora_alpha: float = field(default=48, metadata={"help": "The experts' outputs are scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of the experts' input."})
    num_experts: int | list[int] = field(default=6, metadata={"help": "Experts per router."})
    routing_strategy: str = field(default="dynmole", metadata={"help": "How experts are chosen."})
    entropy_threshold: float = field(default=0.9, metadata={"help": "Tokens with more entropy use all experts."})
    entropy_index: float = field(default=1.1, metadata={"help": "q of the entropy."})
    entropy_type: str = field(default="tsallis", metadata={"help": "'tsallis' or 'renyi'."})
    entropy_eps: float = field(default=1e-5, metadata={"help": "Not used; read from the authors' configurations."})
    keep_top_k: int = field(default=2, metadata={"help": "Experts that are always used."})
    top_p: float = field(default=0.75, metadata={"help": "Sum of the probabilities of the experts that are used."})
    router_aux_loss_coef: float = field(default=1e-3, metadata={"help": "Weight of the load balance."})
    router_dyn_loss_coef: float = field(default=1e-2, metadata={"help": "Weight of the mean entropy."})

    def _check(self) -> None:
        super()._check()
        self._expect("entropy_threshold", self.entropy_threshold > 0, "a number > 0")
        self._expect("entropy_index", 0 < self.entropy_index <= 2, "a number in (0, 2]")
        self._expect("entropy_type", self.entropy_type in ("tsallis", "renyi"), "'tsallis' or 'renyi'")
        self._expect("top_p", 0 < self.top_p <= 1, "a number in (0, 1]")
        self._expect("router_dyn_loss_coef", self.router_dyn_loss_coef >= 0, "a number >= 0")

    def load_balance(self, logits, weights, attention_mask) -> Tensor:
        return soft_load_balance(logits, weights, attention_mask, reduction=self.aux_reduction)

    def auxiliary_loss(self, logits, weights, attention_mask, task_types) -> Tensor | None:
        loss = super().auxiliary_loss(logits, weights, attention_mask, task_types)
        if not self.router_dyn_loss_coef:
            return loss
        entropy = router_entropy(logits, attention_mask, entropy=self.entropy_type, entropy_index=self.entropy_index)
        entropy = self.router_dyn_loss_coef * self._reduced(entropy, len(logits))
        return entropy if loss is None else loss + entropy


class DynMoleLayer(RoutedLayer):
    adapter_layer_names = ("dynmole_experts",)


class DynMoleModel(RoutedLoraModel):
    """The tuner of :class:`DynMoleConfig`."""

    prefix = "dynmole_"
    tuner_layer_cls = DynMoleLayer
    default_targets = "feed-forward"


register("dynmole", DynMoleConfig, DynMoleModel)
