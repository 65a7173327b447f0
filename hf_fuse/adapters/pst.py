"""PST: fine-tuning that makes a model sparse, with few trained numbers for both the weights and which of them stay.

``W' = W + beta U V`` and a score ``S = |W'| + alpha_1 A B + alpha_2 (R 1' + 1 C')``; in each matrix the entries
of ``W'`` with the smallest scores become zero. The gradient of the mask is taken as that of the score. Merged, the
adapter is a stock checkpoint with zeros in it. Axes: o out, i in, r rank.

Formulas, schedule and defaults are those of the authors' code; the paper (arXiv 2205.11005, recalled) speaks of fewer
trained parameters than its ranks give.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import PeftType
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_fuse.adapters._peft import register
from hf_fuse.adapters.low_rank import LowRankLayer, LowRankModel
from hf_fuse.adapters.targeted_config import TargetedConfig
from hf_fuse.errors import FuseError
from hf_fuse.merge.parameters import layer_of

if TYPE_CHECKING:
    from transformers import TrainerCallback

NAMES = ("pst_u", "pst_v", "pst_a", "pst_b", "pst_rows", "pst_columns")
DENSE, LAST = 0.1, 0.3  # shares of the training: without zeros at first, with the final number of them at last


@dataclass
class PstConfig(TargetedConfig):
    """Settings of PST (arXiv 2205.11005).

    Args:
        sparsity: share of zeros in each adapted matrix, exactly ``floor(sparsity * numel)`` of them. With
            :class:`PstSchedule` (which ``FuseTrainer`` adds by itself) it is reached step by step, without it applies
            from the first step on.
        r: rank of the change of the weights.
        score_r: rank of the change of the scores.
        beta: factor of the change of the weights.
        alpha_1: factor of the low-rank part of the score.
        alpha_2: factor of the scores of whole rows and columns.
        target_modules: names of Linear layers as for LoRA; default: all of the blocks.
        exclude_modules, modules_to_save, layers_to_transform, layers_pattern: as for LoRA.

    The reference trains with learning rate 3e-5 (BERT) to 1e-4 (GPT-2).
    """

    sparsity: float = field(default=0.5, metadata={"help": "Share of zeros in each adapted matrix."})
    r: int = field(default=8, metadata={"help": "Rank of the change of the weights."})
    score_r: int = field(default=8, metadata={"help": "Rank of the change of the scores."})
    beta: float = field(default=1.0, metadata={"help": "Factor of the change of the weights."})
    alpha_1: float = field(default=1.0, metadata={"help": "Factor of the low-rank part of the score."})
    alpha_2: float = field(default=1.0, metadata={"help": "Factor of the scores of whole rows and columns."})

    target_parameters = None
    bias = "none"

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType["PST"]
        for name in ("r", "score_r"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a positive integer.")
        if isinstance(self.sparsity, bool) or not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity is {self.sparsity!r}, expected a share of zeros from 0 to below 1.")


class PstLayer(LowRankLayer):
    """A linear layer with the factors of PST: ``U [o, r]``, ``V [r, i]``, ``A [o, r]``, ``B [r, i]``, ``R``, ``C``."""

    adapter_layer_names = NAMES
    other_param_names = ("settings", "sparsity")

    def __init__(self, base_layer: nn.Module, name: str):
        super().__init__(base_layer, name)
        for part in NAMES:
            setattr(self, part, nn.ParameterDict())
        self.settings: dict[str, PstConfig] = {}
        self.sparsity: dict[str, float] = {}  # at this moment of the training
        self.before_merging: Tensor | None = None

    def update_layer(self, adapter_name: str, config: PstConfig) -> None:
        self.settings[adapter_name], self.sparsity[adapter_name] = config, config.sparsity
        out, inputs = self.out_features, self.in_features
        shapes = [(out, config.r), (config.r, inputs), (out, config.score_r), (config.score_r, inputs), (out,),
                  (inputs,)]  # fmt: skip
        for name, shape in zip(NAMES, shapes):
            # With V and B at zero, the model starts as its magnitude-pruned self.
            start = torch.randn(shape) if name in ("pst_u", "pst_a") else torch.zeros(shape)
            getattr(self, name)[adapter_name] = nn.Parameter(start)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        raise FuseError("PST makes zeros, which no LoRA can. Merge the adapter and save the model instead.")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = self._held(self.active_adapters)
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        weight_oi = self.sparse_weight(self._single(active)).to(self.get_base_layer().weight.dtype)
        return F.linear(x, weight_oi, self.get_base_layer().bias)

    def sparse_weight(self, adapter_name: str) -> Tensor:
        """``M * W'`` ``[o, i]`` in at least fp32, with straight-through gradients."""
        config = self.settings[adapter_name]
        u, v, a, b, rows_o, columns_i = (getattr(self, name)[adapter_name].float() for name in NAMES)
        with torch.autocast(u.device.type, enabled=False):
            changed_oi = self._base_weight().float() + config.beta * (u @ v)
            score_oi = changed_oi.abs() + config.alpha_1 * (a @ b) + config.alpha_2 * (rows_o[:, None] + columns_i)
            mask_oi = kept_entries(score_oi.detach(), self.sparsity[adapter_name]).to(score_oi.dtype)
            if torch.is_grad_enabled():
                mask_oi = mask_oi + (score_oi - score_oi.detach())
            return mask_oi * changed_oi

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        delta = (self.sparse_weight(adapter_name) - self._base_weight().float()).detach()
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts the sparse weight in the place of the base's, of which a copy is kept to :meth:`unmerge`."""
        adapters = self._held(check_adapters_to_merge(self, adapter_names))
        if not adapters:
            return
        adapter = self._single([*self.merged_adapters, *adapters])
        merged = self.sparse_weight(adapter)
        if safe_merge and not merged.isfinite().all():
            raise ValueError(f"{self.name}: adapter {adapter!r} makes NaN or infinite weights. It was not merged.")
        weight = self._base_weight()
        self.before_merging = weight.clone()
        weight.copy_(merged)
        self.merged_adapters.append(adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Brings the base's weight back, bit by bit."""
        if self.merged_adapters:
            self.merged_adapters.clear()
            self._base_weight().copy_(self.before_merging)
            self.before_merging = None

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def _base_weight(self) -> Tensor:
        """``[o, i]``, sharing memory with the base's."""
        base = self.get_base_layer()
        if not base.weight.is_floating_point():
            raise TypeError(
                f"{self.name}: the base's weight is quantised and can't be made sparse. Load it unquantised."
            )
        return base.weight.T if isinstance(base, Conv1D) else base.weight

    def _single(self, adapters: list[str]) -> str:
        if len(adapters) > 1:
            raise ValueError(f"{self.name}: adapters {adapters} would each choose zeros. Activate one of them.")
        return adapters[0]


class PstModel(LowRankModel):
    """Adds PST to a model; made by ``get_peft_model(model, PstConfig(...))``."""

    prefix = "pst_"
    tuner_layer_cls = PstLayer

    def _prepare_adapter_config(self, peft_config: PstConfig, model_config: dict) -> PstConfig:
        if peft_config.target_modules is None:
            chosen = peft_config.layers_to_transform
            chosen = {chosen} if isinstance(chosen, int) else chosen
            peft_config.target_modules = {
                name
                for name, module in self.model.named_modules()
                if isinstance(module, (nn.Linear, Conv1D, PstLayer)) and not name.endswith(".base_layer")
                if (layer := layer_of(f"{name}.")) and (chosen is None or layer[1] in chosen)
            }
        return super()._prepare_adapter_config(peft_config, model_config)

    @property
    def trainer_callbacks(self) -> list[TrainerCallback]:
        """What a ``FuseTrainer`` needs beside the adapter."""
        from hf_fuse.adapters.pst_schedule import PstSchedule

        return [PstSchedule()]


def kept_entries(score_oi: Tensor, sparsity: float) -> Tensor:
    """False for the ``floor(sparsity * numel)`` smallest scores; of equal ones the first entries go first."""
    count = math.floor(sparsity * score_oi.numel() + 1e-9)  # 0.29 * 100 is a little less than 29
    if not count:
        return torch.ones_like(score_oi, dtype=torch.bool)
    flat = score_oi.flatten()
    limit = flat.kthvalue(count).values
    kept = flat > limit
    level = (flat == limit).nonzero()[:, 0]
    missing = count - int((flat < limit).sum())
    kept[level[missing:]] = True
    return kept.view_as(score_oi)


def scheduled_sparsity(step: int, steps: int, final: float) -> float:
    """Zero for the first tenth of the training, ``final`` for the last three tenths, in between rising as a cube."""
    done = (step / max(steps, 1) - DENSE) / (1 - DENSE - LAST)
    return final * (1 - (1 - min(max(done, 0.0), 1.0)) ** 3)


register("pst", PstConfig, PstModel)
