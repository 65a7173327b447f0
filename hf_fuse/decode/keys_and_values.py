"""Keys and values of a live model's attention layers, as their projections make them: read, replaced, put in a cache.

That is before any norm of the keys and before rotary position embeddings, while caches hold keys after both.

B sequences, S positions, H key-value heads, D head size.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hf_fuse.decode.vocabularies import named, plain_model
from hf_fuse.errors import FuseError

Projected = list[Tensor]  # one (B, S, H * D) per layer


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """All of them, in order.

    Raises:
        FuseError: no layers with projections of their own for keys and values, or none with rotary embeddings.
    """
    found = [m for m in model.modules() if all(hasattr(m, part) for part in ("k_proj", "v_proj", "layer_idx"))]
    count = model.config.get_text_config().num_hidden_layers
    if [layer.layer_idx for layer in found] != list(range(count)) or _rotary(model) is None:
        raise FuseError(
            f"{named(model)}: a {type(plain_model(model)).__name__} doesn't have k_proj, v_proj and rotary embeddings "
            "in each layer. Expected a model such as Llama, Mistral, Qwen2 or Qwen3."
        )
    return found


def _rotary(model: nn.Module) -> nn.Module | None:
    return next((module for name, module in model.named_modules() if name.endswith("rotary_emb")), None)


@contextlib.contextmanager
def recorded(layers: Sequence[nn.Module]) -> Iterator[tuple[Projected, Projected]]:
    """Collects the keys and values of a forward pass within it."""
    keys: Projected = []
    values: Projected = []

    def keep(kept: Projected, module: nn.Module, inputs: Any, output: Tensor) -> None:
        kept.append(output)

    handles = [layer.k_proj.register_forward_hook(partial(keep, keys)) for layer in layers]
    handles += [layer.v_proj.register_forward_hook(partial(keep, values)) for layer in layers]
    try:
        yield keys, values
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def replaced(layers: Sequence[nn.Module], keys: Projected, values: Projected, where_BS: Tensor) -> Iterator[None]:
    """Within it the layers' keys and values are these at some positions: later ones attend to them as to a cache."""

    def put(given: Tensor, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return torch.where(where_BS.unsqueeze(-1), given.to(output.dtype), output)

    handles = [layer.k_proj.register_forward_hook(partial(put, given)) for layer, given in zip(layers, keys)]
    handles += [layer.v_proj.register_forward_hook(partial(put, given)) for layer, given in zip(layers, values)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def made_cache(model: nn.Module, keys: Projected, values: Projected, positions_BS: Tensor) -> DynamicCache:
    """A cache as if the model had read the tokens at these positions itself."""
    cache = DynamicCache(config=model.config.get_text_config())
    turn = _rotary(model)
    for layer, keys_BSX, values_BSX in zip(attention_layers(model), keys, values):
        keys_BHSD = _heads(_normed(layer, keys_BSX), layer)
        cos, sin = turn(keys_BHSD, positions_BS)
        apply = sys.modules[type(layer).__module__].apply_rotary_pos_emb
        _, keys_BHSD = apply(keys_BHSD, keys_BHSD, cos, sin)
        cache.update(keys_BHSD, _heads(values_BSX, layer), layer.layer_idx)
    return cache


def _normed(layer: nn.Module, keys_BSX: Tensor) -> Tensor:
    norm = getattr(layer, "k_norm", None)
    if norm is None:
        return keys_BSX
    if norm.weight.numel() == keys_BSX.shape[-1]:
        return norm(keys_BSX)
    return norm(keys_BSX.unflatten(-1, (-1, layer.head_dim))).flatten(-2)


def _heads(x_BSX: Tensor, layer: nn.Module) -> Tensor:
    return x_BSX.unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)


@torch.no_grad()
def check_cache(model: nn.Module) -> None:
    """Compares a cache that the model has made with ours, on a few tokens.

    Raises:
        FuseError: its attention does something else with keys or values.
    """
    layers = attention_layers(model)
    ids_BS = torch.arange(4, device=model.device).unsqueeze(0)
    with recorded(layers) as (keys, values):
        theirs = model(input_ids=ids_BS, use_cache=True).past_key_values
    try:
        ours = made_cache(model, keys, values, ids_BS)
        pairs = [(getattr(a, part), getattr(b, part)) for a, b in zip(ours.layers, theirs.layers)
                 for part in ("keys", "values")]  # fmt: skip
        same = len(ours.layers) == len(theirs.layers) and all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)
    except (AttributeError, TypeError, RuntimeError):
        same = False
    if not same:
        raise FuseError(
            f"{named(model)}: the attention of a {type(plain_model(model)).__name__} makes its cache in a way that is "
            "not known here. Expected a model such as Llama, Mistral, Qwen2 or Qwen3."
        )
