"""Everything in the output folder but the weights: config, generation config, tokenizer."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from hf_fuse.checkpoint.reader import TORCH_NAMES, Checkpoint, text_part

DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# Same shapes, other function: differences in these are worth a word.
_TELLING_KEYS = (
    "model_type", "hidden_act", "num_attention_heads", "num_key_value_heads", "rope_theta", "rope_scaling",
    "rope_parameters", "rms_norm_eps", "layer_norm_eps", "sliding_window", "num_labels", "id2label",
)  # fmt: skip


def config_differences(reference: Checkpoint, others: list[Checkpoint]) -> list[str]:
    """One line per setting in which the models differ although their tensors fit."""
    lines = []
    for key in _TELLING_KEYS:
        ours = reference.config.get(key)
        for other in others:
            theirs = other.config.get(key)
            if other.config and theirs != ours:
                lines.append(f"config {key}: {ours!r} in {reference.ref}, {theirs!r} in {other.ref}; the first is kept")
                break
    return lines


def output_config(
    config: dict[str, Any],
    *,
    out_dtype: str | None,
    layers: list[tuple[dict[str, Any], int]] | None,
    vocab_size: int | None,
    special_ids: dict[str, Any],
    tied: bool | None,
) -> dict[str, Any]:
    """The donor's config with what the merge changed.

    Args:
        out_dtype: safetensors code if all floating tensors have it.
        layers: for each output layer (config of its first source, its index there); None if depth is unchanged.
    """
    config = copy.deepcopy(config)
    text = text_part(config)
    if out_dtype:
        for part in (config, text):
            for key in ("dtype", "torch_dtype"):
                if key in part:
                    part[key] = TORCH_NAMES[out_dtype]
        if not {"dtype", "torch_dtype"} & set(config):
            config["dtype"] = TORCH_NAMES[out_dtype]
    if layers is not None:
        old = next((text[key] for key in DEPTH_KEYS if key in text), None)
        for key in DEPTH_KEYS:
            if key in text:
                text[key] = len(layers)
        for key, value in list(text.items()):
            # Lists with one entry per layer (layer_types and the like) follow the layers.
            if isinstance(value, list) and old is not None and len(value) == old and key != "architectures":
                text[key] = [text_part(source).get(key, value)[index] for source, index in layers]
    if vocab_size is not None:
        text["vocab_size"] = vocab_size
    for key, value in special_ids.items():
        if value is not None and key in text:
            text[key] = value
    if tied is not None:
        config["tie_word_embeddings"] = tied
        if "tie_word_embeddings" in text:
            text["tie_word_embeddings"] = tied
    config.pop("_name_or_path", None)
    # Code files are not carried over, so nothing may point to them.
    config.pop("auto_map", None)
    return config


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
