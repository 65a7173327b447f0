"""LEVI: a frozen large model and a small one trained from scratch, joined layer by layer
(https://arxiv.org/abs/2402.04644).

Features of several layers of the large model, each beside the small model's output, give one prediction each, and these
are averaged. The small model can learn what the task needs without bending the large one's features; the layers keep
what its last layer has thrown away. Depth of the adapters, which layers, and losses per layer could not be verified.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_fuse.errors import CheckpointError, FuseError
from hf_fuse.model_features import pooled

WEIGHTS, SETTINGS = "levi.safetensors", "levi.json"


class Levi(nn.Module):
    """A classifier for ``Trainer`` and FuseTrainer: takes what both models take, and ``labels``.

    Args:
        pretrained: the large model (``AutoModel``); frozen, in evaluation mode, never saved with this.
        small: the small model (``AutoModel.from_config``); trained.
        num_labels: C.
        layers: indices into the large model's hidden states (0: embeddings, -1: last). Default: four, evenly spread.
        hidden: units of each layer's adapter.
    """

    main_input_name = "input_ids"

    def __init__(
        self,
        pretrained: PreTrainedModel,
        small: PreTrainedModel,
        num_labels: int,
        *,
        layers: Sequence[int] | None = None,
        hidden: int = 128,
    ):
        super().__init__()
        depth = pretrained.config.get_text_config().num_hidden_layers
        layers = sorted({round(depth * part / 4) for part in (1, 2, 3, 4)}) if layers is None else list(layers)
        if not layers or not all(-depth - 1 <= layer <= depth for layer in layers):
            raise FuseError(f"layers: {layers}; expected indices from {-depth - 1} to {depth} of hidden states.")
        # Kept out of parameters, state_dict and train(): it belongs to nobody here.
        self._pretrained = [pretrained.requires_grad_(False).eval()]
        self.small = small
        self.config = small.config
        self.settings = {"num_labels": num_labels, "layers": layers, "hidden": hidden}
        width = pretrained.config.get_text_config().hidden_size + small.config.get_text_config().hidden_size
        self.adapters = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, num_labels)) for _ in layers
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Mean logits ``(N, C)`` of the layers, and their cross-entropy."""
        mask_BT = attention_mask
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
        inputs = {name: values for name, values in inputs.items() if values is not None}
        with torch.no_grad():
            large = self._pretrained[0].to(self.device)(**inputs, output_hidden_states=True).hidden_states
        own_BD = pooled(self.small(**inputs).last_hidden_state, mask_BT)
        taken = [
            torch.cat([pooled(large[layer], mask_BT).to(own_BD), own_BD], dim=-1) for layer in self.settings["layers"]
        ]
        logits = torch.stack([adapter(joined) for adapter, joined in zip(self.adapters, taken)]).mean(0)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Writes the small model and the adapters; the large model is given again when loading. Older weights are
        replaced in one step."""
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / f"{WEIGHTS}.partial"
        save_file({name: values.contiguous() for name, values in self.state_dict().items()}, new)
        self.small.config.save_pretrained(folder)
        (folder / SETTINGS).write_text(json.dumps(self.settings), encoding="utf-8")
        new.replace(folder / WEIGHTS)

    @classmethod
    def from_pretrained(cls, folder: str | Path, pretrained: PreTrainedModel) -> Levi:
        """Reads what :meth:`save_pretrained` has written.

        Raises:
            CheckpointError: no such folder, or a large model of another width.
        """
        folder = Path(folder).expanduser()
        if not (folder / SETTINGS).is_file() or not (folder / WEIGHTS).is_file():
            raise CheckpointError(f"{folder}: holds no {SETTINGS} and {WEIGHTS}. Expected a folder saved by Levi.")
        try:
            settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            model = cls(pretrained, AutoModel.from_config(config, trust_remote_code=False), **settings)
            model.load_state_dict(load_file(folder / WEIGHTS))
        except (OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder}: is damaged, or does not fit this large model ({str(error).splitlines()[-1].strip()})."
            ) from None
        return model.eval()
