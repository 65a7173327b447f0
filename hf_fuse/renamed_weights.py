"""Reading back a checkpoint whose weights have other names than the model's: transformers renames when it saves."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


def restore_renamed(model: nn.Module, folder: str | Path) -> None:
    """Loads what ``Trainer`` has left out of ``folder``, as it looks for the names of the model itself.

    ``ViTForImageClassification`` is one of those that keep the names of older versions in files: its encoder would
    silently stay as it was initialised.
    """
    if isinstance(model, PreTrainedModel) and not _saved_names(Path(folder)) <= model.state_dict().keys():
        model.load_state_dict(type(model).from_pretrained(folder, dtype=model.dtype).state_dict())


def _saved_names(folder: Path) -> set[str]:
    if (index := folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return {*json.loads(index.read_text(encoding="utf-8"))["weight_map"]}
    if not (folder / SAFE_WEIGHTS_NAME).is_file():
        return set()
    with safe_open(folder / SAFE_WEIGHTS_NAME, framework="pt") as file:
        return {*file.keys()}
