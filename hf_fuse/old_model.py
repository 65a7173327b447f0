"""The model that a new one is to stay compatible with: frozen, asked for features of the same batches.

B samples, C classes, D its features.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hf_fuse.batch_counts import IGNORED
from hf_fuse.errors import FuseError
from hf_fuse.loss_inputs import forward_options
from hf_fuse.model_features import classifier_inputs, feature_size, sample_features


class OldModel:
    """A frozen model, in evaluation mode.

    Args:
        model: a transformers model, its folder or name on the Hub.
        device: where it runs.

    Raises:
        FuseError: it can't be loaded.
    """

    def __init__(self, model: nn.Module | str, device: torch.device) -> None:
        model = _loaded(model) if isinstance(model, str) else model
        self.model = model.eval().requires_grad_(False).to(device)
        self._device = device

    @torch.no_grad()
    def features(self, inputs: dict[str, Any]) -> Tensor:
        """``(B, D)`` of a batch, of which it takes the columns that it knows."""
        known = inspect.signature(self.model.forward).parameters
        inputs = {name: value for name, value in inputs.items() if name in known and name != "labels"}
        with classifier_inputs(self.model) as seen:
            outputs = self.model(**inputs, **forward_options({"features"}, self.model))
        return sample_features(self.model, inputs, outputs, seen).float()

    def class_sums(self, batches: Iterable[dict[str, Any]], classes: int) -> tuple[Tensor, Tensor]:
        """Sums of the features of each class ``(C, D)``, and how many samples it has ``(C,)``."""
        # On the CPU: not every device adds up in double precision.
        sums_CD = torch.zeros(classes, feature_size(self.model), dtype=torch.float64)
        counts_C = torch.zeros(classes)
        for batch in batches:
            batch = {name: v.to(self._device) for name, v in batch.items() if isinstance(v, Tensor)}
            kept = batch["labels"] != IGNORED
            labels = batch["labels"][kept].cpu()
            sums_CD.index_add_(0, labels, self.features(batch)[kept].cpu().double())
            counts_C += torch.bincount(labels, minlength=classes)
        return sums_CD.float().to(self._device), counts_C.to(self._device)


def _loaded(name: str) -> nn.Module:
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        kind = (config.architectures or ["no architecture"])[0]
        if not hasattr(transformers, kind):
            raise FuseError(f"old_model {name}: its configuration names {kind}, which transformers doesn't have.")
        return getattr(transformers, kind).from_pretrained(
            name, dtype="auto", use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise FuseError(f"old_model {name}: can't be loaded: {str(error).strip().splitlines()[0]}") from error
