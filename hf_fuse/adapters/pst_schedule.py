"""The sparsity of a PST adapter during a training.

Apart from the adapter, since importing transformers' trainer imports PEFT, which imports the adapters.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from hf_fuse.adapters.pst import PstLayer, scheduled_sparsity


class PstSchedule(TrainerCallback):
    """Raises the sparsity of the active PST adapter while a ``transformers.Trainer`` trains.

    ::

        Trainer(get_peft_model(model, PstConfig(sparsity=0.5)), ..., callbacks=[PstSchedule()]).train()

    A checkpoint does not hold the sparsity of its moment: loaded for inference it has the final one.
    """

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self._set(model, lambda final: scheduled_sparsity(state.global_step, state.max_steps, final))

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self._set(model, lambda final: final)

    @staticmethod
    def _set(model: nn.Module, sparsity: Any) -> None:
        for layer in model.modules():
            if isinstance(layer, PstLayer):
                for adapter in layer._held(layer.active_adapters):
                    layer.sparsity[adapter] = sparsity(layer.settings[adapter].sparsity)
