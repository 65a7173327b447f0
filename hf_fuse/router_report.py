"""What the routers of a mixture of experts do during training: numbers for the logs, and a heat map of expert usage."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_fuse.errors import FuseError

if TYPE_CHECKING:
    from hf_fuse.trainer import FuseTrainer

logger = logging.getLogger(__name__)
CHART = "expert_usage.png"


class RouterUsage:
    """Load, entropy and dropped tokens of each router, averaged over the tokens of a logging window.

    Attributes:
        loads: router -> share of the choices that went to each expert ``(E,)``, of the latest window.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self.loads: dict[str, list[float]] = {}

    def observe(self, model: nn.Module, outputs: Any, attention_mask: Tensor | None, tokens: Tensor) -> None:
        """Counts a micro-batch of ``tokens`` tokens, if the model's output has ``router_logits``.

        Args:
            model: the transformers model, with or without adapters.
            outputs: of the model.
            attention_mask: ``(B, T)``, 0 for padding.
            tokens: how many are not padding.
        """
        router_logits = getattr(outputs, "router_logits", None)
        if not router_logits:
            return
        if hasattr(outputs, "aux_loss_folded"):
            from hf_fuse.adapters.router_collector import router_statistics

            statistics = router_statistics(model)
        else:
            top_k = model.config.get_text_config().num_experts_per_tok
            statistics = top_k_statistics(router_logits, top_k, attention_mask)
        for router, values in statistics.items():
            load_E = values["load"].detach().float()
            rest = torch.stack([values["entropy"], values["dropped"], torch.ones_like(values["entropy"])])
            sums = torch.cat([load_E, rest.detach().to(load_E)]).to(tokens.device) * tokens
            self._sums[router] = self._sums[router] + sums if router in self._sums else sums

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Log entries of the window over all processes, which it ends; a collective operation.

        ``router/<router>/load_max`` and ``load_min`` (of an even load, each 1 / E), ``entropy`` (1 if undecided), and
        ``dropped`` where tokens exceeded an expert's capacity.
        """
        means = self.means(accelerator)
        self._sums.clear()
        logs = {}
        for router, (load, entropy, dropped) in means.items():
            self.loads[router] = load
            logs |= {f"router/{router}/load_max": max(load), f"router/{router}/load_min": min(load)}
            logs[f"router/{router}/entropy"] = entropy
            if dropped:
                logs[f"router/{router}/dropped"] = dropped
        return logs

    def means(self, accelerator: Accelerator) -> dict[str, tuple[list[float], float, float]]:
        """Router -> load of each expert, entropy and dropped share since the window began; a collective operation."""
        if not self._sums:
            return {}
        sums = accelerator.reduce(torch.cat([*self._sums.values()]), "sum").cpu()
        found = {}
        for router, own in zip(self._sums, sums.split([len(own) for own in self._sums.values()])):
            *load, entropy, dropped = (own[:-1] / own[-1].clamp(min=1)).tolist()
            found[router] = load, entropy, dropped
        return found


class ExpertUsageChart(TrainerCallback):
    """Draws the expert usage of the latest logging window into each checkpoint and, at the end, ``output_dir``."""

    def __init__(self, trainer: FuseTrainer) -> None:
        self._usage = trainer.router_usage
        self._accelerator = trainer.accelerator

    def on_save(self, args, state, control, **kwargs):
        self._draw(Path(args.output_dir, f"checkpoint-{state.global_step}"), state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self._draw(Path(args.output_dir), state.global_step)

    def _draw(self, folder: Path, step: int) -> None:
        # Before the end of the first window: what there is of it.
        loads = self._usage.loads or {
            router: load for router, (load, *_) in self._usage.means(self._accelerator).items()
        }
        if not loads or not self._accelerator.is_main_process:
            return
        try:
            expert_usage_chart(loads, folder / CHART, f"Expert usage at step {step}")
        except FuseError as error:  # a missing chart is no reason to lose a training run
            logger.warning("%s", error)


def expert_usage_chart(loads: dict[str, Sequence[float]], path: Path, title: str) -> Path:
    """Heat map of the share of the choices, in percent, that went to each expert (columns) of each router (rows).

    Raises:
        FuseError: matplotlib is missing.
        OutputError: the file can't be written.
    """
    from hf_fuse.plots import heat_map

    experts = max(len(load) for load in loads.values())
    rows = [[round(100 * share, 2) for share in load] + [math.nan] * (experts - len(load)) for load in loads.values()]
    return heat_map(
        rows,
        row_labels=_short(list(loads)),
        column_labels=[str(index) for index in range(experts)],
        path=path,
        title=f"{title} (% of choices)",
        value_range=(0, max(share for row in rows for share in row if share == share) or 1),
    )


def _short(names: list[str]) -> list[str]:
    """Names without the leading and trailing parts that all of them share."""
    parts = [name.split(".") for name in names]
    shortest = min(len(part) for part in parts)
    start = next((i for i in range(shortest) if len({part[i] for part in parts}) > 1), 0)
    end = next((i for i in range(shortest) if len({part[-1 - i] for part in parts}) > 1), 0)
    return [".".join(part[max(start - 1, 0) : len(part) - end]) for part in parts]


def top_k_statistics(
    router_logits: tuple[Tensor, ...], top_k: int, attention_mask: Tensor | None
) -> dict[str, dict[str, Tensor]]:
    """Statistics of a mixture-of-experts model's own top-k routers, as :class:`RouterUsage` takes them.

    Args:
        router_logits: per layer ``(B * T, E)``.
        top_k: experts per token.
        attention_mask: ``(B, T)``, 0 for padding.
    """
    found = {}
    for index, logits in enumerate(router_logits):
        log_p_TE = logits.detach().float().log_softmax(-1)
        experts = log_p_TE.shape[-1]
        chosen_TE = torch.zeros_like(log_p_TE).scatter(-1, log_p_TE.topk(top_k, dim=-1).indices, 1)
        entropy_T = -(log_p_TE.exp() * log_p_TE.clamp(min=-80)).sum(-1) / math.log(max(experts, 2))
        kept_T = log_p_TE.new_ones(len(log_p_TE))
        if attention_mask is not None and attention_mask.numel() == len(log_p_TE):
            kept_T = attention_mask.reshape(-1).to(kept_T)
        tokens = kept_T.sum().clamp(min=1)
        found[f"layer_{index}"] = {
            "load": kept_T @ chosen_TE / (tokens * top_k),
            "entropy": kept_T @ entropy_T / tokens,
            "dropped": tokens.new_zeros(()),
        }
    return found
