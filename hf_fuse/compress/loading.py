"""Loads what ``hf-fuse compress`` made, without the parts that it does not need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from hf_fuse.compress.factored_experts import factor_experts, is_factored
from hf_fuse.compress.grouped_experts import GROUPS_KEY, share_experts
from hf_fuse.compress.sublayers import DROP_KEYS, skip_dropped


def renumbered(config: dict[str, Any], layers: list[int]) -> dict[str, Any]:
    """What an earlier compression noted in ``config.json``, for a model that keeps only ``layers``."""
    found: dict[str, Any] = {
        key: [layers.index(old) for old in config[key] if old in layers] for key in DROP_KEYS.values() if key in config
    }
    if GROUPS_KEY in config:
        found[GROUPS_KEY] = {}
        for key, became in config[GROUPS_KEY].items():
            stack, _, old = key.rpartition(".")
            if int(old) in layers:
                found[GROUPS_KEY][f"{stack}.{layers.index(int(old))}"] = became
    return found


def is_lightened(config: dict[str, Any], folder: Path) -> bool:
    """Whether :func:`lighten` takes anything out of a model with this ``config.json``, loaded from ``folder``."""
    return any(config.get(key) for key in (*DROP_KEYS.values(), GROUPS_KEY)) or is_factored(folder)


def lighten(model: nn.Module, folder: str | Path) -> nn.Module:
    """Takes out, in place, what is not needed by what config and ``folder`` say: less memory and work, the same output.

    The result is for running: save the folder that it came from, not this.
    """
    skip_dropped(model)
    share_experts(model)
    factor_experts(model, folder)
    return model


def load_compressed(folder: str | Path, **options: Any) -> nn.Module:
    """Loads the output of ``hf-fuse compress`` without the parts that it does not need.

    ``from_pretrained`` loads the same folder to the same logits, but runs dropped sub-layers, and has merged experts
    once for each of their old numbers, and factored ones as whole matrices.

    Args:
        folder: a folder or Hub id.
        options: for ``from_pretrained``.
    """
    import transformers

    safe = {"use_safetensors": True, "trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    kind = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
    return lighten(getattr(transformers, kind).from_pretrained(folder, **safe | options), folder)
