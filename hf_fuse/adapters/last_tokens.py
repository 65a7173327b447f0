"""Where each sequence of a batch ends, told to layers that see activations but no attention mask.

Two hooks on the base model put a :class:`Ends` into the layers for the time of a forward pass, so padding is known
however the model is called. Gradient checkpointing runs layers again later, when other batches may have passed; a layer
then recognises its input by the numbers in it.
"""

from __future__ import annotations

import inspect
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Forward passes between which gradient checkpointing can tell before the backward pass.
REMEMBERED = 8


@dataclass
class Ends:
    """Of one batch: its ``shape`` ``(B, S)``, the place of each last token in the mask, and the mask's length.

    None where unknown. With a cache the mask covers earlier tokens too.
    """

    shape: tuple[int, int] | None
    last_B: Tensor | None = None
    covered: int | None = None


class EndsReader(nn.Module):
    """Mixin of layers that need the last tokens. ``key`` is the layer's name in the model."""

    key: str
    ends: Ends | None = None  # only while the model runs
    remember = False
    remembered: deque[tuple[Tensor, Ends]] | None = None

    def last_tokens(self, x: Tensor) -> Tensor:
        """The last token of each sequence that is not padding: ``(B, S, d)`` or ``(B * S, d)`` to ``(B, d)``."""
        ends = self.ends if self.ends is not None else self._recognised(x)
        if self.ends is not None and self.remember:
            if self.remembered is None:
                self.remembered = deque(maxlen=REMEMBERED)
            self.remembered.append((x[..., 0].detach().clone(), ends))
        if x.dim() == 2:
            x_BSd = x.view(*(ends.shape if ends is not None and ends.shape else (1, -1)), x.shape[-1])
        else:
            x_BSd = x.flatten(1, -2)
        if ends is None or ends.last_B is None:
            return x_BSd[:, -1]
        last_B = ends.last_B.to(x.device) - (ends.covered - x_BSd.shape[1])
        return x_BSd[torch.arange(len(x_BSd), device=x.device), last_B.clamp(min=0)]

    def _recognised(self, x: Tensor) -> Ends | None:
        probe = x[..., 0]
        for seen, ends in self.remembered or ():
            if seen.shape == probe.shape and torch.equal(seen, probe):
                return ends
        return None


def tell_ends(model: nn.Module) -> None:
    """Installs the hooks, once."""
    if _before_forward not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_before_forward, with_kwargs=True)
        model.register_forward_hook(_after_forward, always_call=True)


def stop_telling_ends(model: nn.Module) -> None:
    """Takes the hooks away."""
    for hooks, own in ((model._forward_pre_hooks, _before_forward), (model._forward_hooks, _after_forward)):
        for key in [key for key, hook in hooks.items() if hook is own]:
            del hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
            model._forward_hooks_always_called.pop(key, None)


def _before_forward(model: nn.Module, args: tuple, kwargs: dict) -> None:
    inputs = inspect.signature(model.forward).bind_partial(*args).arguments | kwargs if args else kwargs
    both = {"encoder": _ends(inputs, "")}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        both["decoder"] = _ends(inputs, "decoder_")
    runs_again = model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    for layer in _readers(model):
        layer.ends = both["decoder" if "decoder" in both and ".decoder." in f".{layer.key}" else "encoder"]
        layer.remember = runs_again


def _after_forward(model: nn.Module, args: tuple, output: Any) -> None:
    for layer in _readers(model):
        layer.ends = None


def _ends(inputs: dict[str, Any], prefix: str) -> Ends:
    mask, labels = inputs.get(f"{prefix}attention_mask"), inputs.get("labels")
    tokens = inputs.get(f"{prefix}input_ids")
    if tokens is None:
        tokens = inputs.get(f"{prefix}inputs_embeds")
    if mask is None and tokens is None and prefix and labels is not None:
        mask = tokens = labels.ne(-100)  # the decoder's inputs will be made of these
    shape = None if tokens is None else tuple(tokens.shape[:2])
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return Ends(shape)
    places_S = torch.arange(mask.shape[1], device=mask.device)
    return Ends(shape, (mask.ne(0) * places_S).argmax(1), mask.shape[1])


def _readers(model: nn.Module) -> list[EndsReader]:
    return [module for module in model.modules() if isinstance(module, EndsReader)]
