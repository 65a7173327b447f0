"""What attention does during training: its entropy in the logs, and an alarm when it collapses."""

from __future__ import annotations

import contextlib
import logging
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_fuse.attention_capture import attention_layers, eager_attention
from hf_fuse.diagnostics.attention_entropy import attention_entropy
from hf_fuse.trainer_logs import Averages

logger = logging.getLogger(__name__)
FALLEN, LOW = 0.5, 0.05  # an alarm: of the first value, and in itself


class AttentionWatch:
    """Entropy of each layer's attention, on one batch every so many optimizer steps.

    The batch goes through the model once more, without gradients or dropout and with eager attention; of its weights
    those of one layer exist at a time.

    Args:
        every: optimizer steps between looks.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._looked_at = -1
        self._averages = Averages()
        self._first: dict[str, float] = {}
        self._alarmed: set[str] = set()

    def due(self, step: int) -> bool:
        """Whether this micro-batch is to be observed: the first one of every so many steps."""
        return step % self._every == 0 and step != self._looked_at

    @torch.no_grad()
    def observe(self, model: nn.Module, inputs: dict[str, Any], step: int) -> None:
        """Runs ``model`` on the batch.

        Args:
            model: the transformers model inside of wrappers.
            inputs: of its forward pass.
            step: of the optimizer.
        """
        self._looked_at = step
        mask = inputs.get("attention_mask")
        inputs = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            with eager_attention(model), contextlib.ExitStack() as stack:
                for name, (layer, index) in attention_layers(model).items():
                    hook = layer.register_forward_hook(partial(self._see, name, index, mask))
                    stack.callback(hook.remove)
                model(**inputs)
        finally:
            for module in training:
                module.training = True

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Log entries since the last call, over all processes; a collective operation.

        ``attention/<layer>/entropy`` in nats, ``share`` of the most there can be, and ``least_share`` of any head.
        Warns once of a layer whose share is below 0.05 or has fallen to half of its first value.
        """
        found = self._averages.take(accelerator)
        for name, share in found.items():
            if not name.endswith("/share"):
                continue
            first = self._first.setdefault(name, share)
            if (share < LOW or share < FALLEN * first) and name not in self._alarmed:
                self._alarmed.add(name)
                logger.warning(
                    "%s: attention collapses: %.3f of the entropy there can be, %.3f at first. Lower the learning "
                    "rate, or train with hf_fuse.sigma_reparametrise.",
                    name.removesuffix("/share"),
                    share,
                    first,
                )
        return found

    def _see(self, name: str, index: int, mask: Tensor | None, layer: nn.Module, args: Any, output: Any) -> None:
        weights = output[index]
        fits = mask is not None and mask.shape == (len(weights), weights.shape[-1])
        entropy_H, share_H = attention_entropy(weights, mask if fits else None)
        for key, value in (("entropy", entropy_H.mean()), ("share", share_H.mean()), ("least_share", share_H.min())):
            self._averages.add(f"attention/{name}/{key}", value, 1.0)
