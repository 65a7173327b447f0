"""The attention weights of one layer, while a model runs with eager attention.

B samples, H heads, T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from hf_fuse.errors import FuseError


def attention_layers(model: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """Name -> self-attention layer, in order, and at which place of its output its weights are.

    Raises:
        FuseError: the model doesn't say which of its layers these are.
    """
    found: dict[str, tuple[nn.Module, int]] = {}
    for owner_name, owner in model.named_modules():
        for kind, index, part in _recorded(owner):
            for name, module in owner.named_modules(prefix=owner_name):
                if isinstance(module, kind) and part in name:
                    found.setdefault(name, (module, index))
    if not found:
        raise FuseError(f"{type(model).__name__} doesn't tell which of its layers compute attention.")
    return found


def _recorded(owner: nn.Module) -> Iterator[tuple[type, int, str]]:
    """Class, place in the output, and part of the name of the layers whose attentions transformers records."""
    entries = (getattr(owner, "_can_record_outputs", None) or {}).get("attentions", [])
    for entry in entries if isinstance(entries, (list, tuple)) else [entries]:
        if isinstance(entry, type):
            yield entry, 1, ""
        elif getattr(entry, "target_class", None) is not None:
            yield entry.target_class, entry.index, entry.layer_name or ""


@contextlib.contextmanager
def captured_attention(layer: nn.Module, index: int) -> Iterator[list[Tensor]]:
    """Collects the weights ``(B, H, T, T)`` of ``layer`` in the forward passes inside; None without eager attention."""
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, args, output: seen.append(output[index]))
    try:
        yield seen
    finally:
        hook.remove()


@contextlib.contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """The model computes attention so that its weights exist, which takes memory for T x T numbers per head."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
