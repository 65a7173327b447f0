"""Layers of a decoder and the attention and MLP inside them: where they are, and how to do without them.

Two forms of a dropped sub-layer compute the same. In a checkpoint its output projection is zero, which every loader
understands but which saves nothing; in a live model the sub-layer and its norm are gone (:func:`skip_dropped`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_fuse.errors import FuseError

# Keys of config.json, as the LLM-Drop authors name them: indices of layers without attention or MLP.
DROP_KEYS = {"attention": "drop_attn_list", "mlp": "drop_mlp_list"}


@dataclass(frozen=True)
class Family:
    """Names inside a layer ``x + attention(norm(x))``, then ``x + mlp(norm(x))``.

    ``*_output``: pattern of the stored names, after the layer's number, of what makes the sub-layer's output.
    """

    attention: str
    attention_norm: str
    mlp: str
    mlp_norm: str
    attention_output: str
    mlp_output: str

    def module(self, kind: str) -> str:
        return getattr(self, kind)

    def norm(self, kind: str) -> str:
        return getattr(self, f"{kind}_norm")

    def output(self, kind: str) -> re.Pattern:
        return re.compile(getattr(self, f"{kind}_output"))


_LLAMA = {
    "attention_output": r"self_attn\.o_proj\.(weight|bias)",
    "mlp_output": r"(mlp|block_sparse_moe)\.(.*\.)?(down_proj|w2)\.(weight|bias)",
}
FAMILIES = (
    Family("self_attn", "input_layernorm", "mlp", "pre_feedforward_layernorm", **_LLAMA),
    Family("self_attn", "input_layernorm", "mlp", "post_attention_layernorm", **_LLAMA),
    Family("attn", "ln_1", "mlp", "ln_2", r"attn\.c_proj\.(weight|bias)", r"mlp\.c_proj\.(weight|bias)"),
)


class Skipped(nn.Module):
    """Stands where a sub-layer was. Its zero has no shape, so that adding it costs next to nothing."""

    def __init__(self, returns_pair: bool):
        super().__init__()
        self.returns_pair = returns_pair

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        zero = hidden_states.new_zeros(())
        return (zero, None) if self.returns_pair else zero


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's stack of layers.

    Raises:
        FuseError: no list of modules is as long as the config says.
    """
    height = model.config.get_text_config().num_hidden_layers
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == height]
    if not found:
        raise FuseError(f"{type(model).__name__}: no stack of {height} layers found, so none can be dropped.")
    return found[0]


def family_of(layers: nn.ModuleList) -> Family | None:
    """How the layers are built; None if attention and MLP do not follow each other in a known way."""
    for family in FAMILIES:
        names = (family.attention, family.attention_norm, family.mlp, family.mlp_norm)
        if all(isinstance(getattr(layers[0], name, None), nn.Module) for name in names):
            return family
    return None


def skip(layer: nn.Module, kind: str, family: Family | None) -> None:
    """Takes ``attention``, ``mlp`` or the whole ``block`` out of a live layer."""
    if kind == "block":
        layer.forward = lambda hidden_states, *_, **__: hidden_states
        return
    setattr(layer, family.module(kind), Skipped(returns_pair=kind == "attention"))
    setattr(layer, family.norm(kind), nn.Identity())


def skip_dropped(model: nn.Module) -> None:
    """Takes out the sub-layers that ``config.json`` lists as dropped, in place: less memory, less work, same output.

    The remaining attentions share the cache's first places, because a cache counts its tokens by the first of them.
    """
    config = model.config.get_text_config()
    dropped = {kind: set(getattr(config, key, None) or ()) for kind, key in DROP_KEYS.items()}
    if not any(dropped.values()):
        return
    layers = decoder_layers(model)
    family = family_of(layers)
    if family is None or not all(0 <= index < len(layers) for found in dropped.values() for index in found):
        raise FuseError(f"{type(model).__name__}: its config lists dropped sub-layers that it can't have.")
    for kind, indices in dropped.items():
        for index in indices:
            skip(layers[index], kind, family)
    if dropped["attention"] and one_layer_type(config):
        kept = [layer for index, layer in enumerate(layers) if index not in dropped["attention"]]
        for place, layer in enumerate(kept):
            getattr(layer, family.attention).layer_idx = place


def one_layer_type(config: Any) -> bool:
    """Whether all layers have the same kind of attention, and so of cache."""
    return len(set(getattr(config, "layer_types", None) or ())) < 2
