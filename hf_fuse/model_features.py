"""One vector per sample from a model: what its classifier takes, or the mean of its last hidden state.

B samples, T tokens, D hidden, N samples that have a label.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_fuse.batch_counts import IGNORED
from hf_fuse.errors import FuseError

# Models with one answer per sample; those for token classification have one per token.
_PER_SAMPLE = re.compile(r"For(?!Token).*Classification")


def classifier_of(model: nn.Module) -> nn.Linear | None:
    """The linear layer that makes the logits of a classifier of whole samples; None if ``model`` is none."""
    if not _PER_SAMPLE.search(type(model).__name__):
        return None
    classes = model.config.num_labels
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == classes and "lora_" not in name
    ]
    # The last one: in front of it may be others as wide, and PEFT's trained copy comes after the original.
    return found[-1] if found else None


@contextlib.contextmanager
def classifier_inputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what the classifier takes in the forward passes inside; nothing from models without one."""
    seen: list[Tensor] = []
    classifier = classifier_of(model)
    if classifier is None:
        yield seen
        return
    hook = classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        hook.remove()


def sample_features(model: nn.Module, inputs: dict[str, Any], outputs: Any, seen: list[Tensor]) -> Tensor:
    """``(B, D)``: what the classifier took last, else the mean of the last hidden state over the attention mask.

    Args:
        model: the transformers model.
        inputs: of the forward pass.
        outputs: of the forward pass, with ``hidden_states`` or ``last_hidden_state`` if there is no classifier.
        seen: from :func:`classifier_inputs`.

    Raises:
        FuseError: the output has no hidden states.
    """
    if seen:
        taken = seen[-1]
        return taken if taken.dim() == 2 else taken[torch.arange(len(taken)), _classified_tokens(model, inputs, taken)]
    states = getattr(outputs, "hidden_states", None)
    last_BTD = states[-1] if states else getattr(outputs, "last_hidden_state", None)
    if last_BTD is None:
        raise FuseError(f"features: {type(model).__name__} returns no hidden states.")
    return pooled(last_BTD, inputs.get("attention_mask"))


def pooled(states_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Mean ``(B, D)`` over the tokens that the mask shows; over all if it is of other tokens, or there is none."""
    if mask_BT is None or mask_BT.shape != states_BTD.shape[:2]:
        return states_BTD.flatten(1, -2).mean(1)
    weights_BT1 = mask_BT.to(states_BTD).unsqueeze(-1)
    return (states_BTD * weights_BT1).sum(1) / weights_BT1.sum(1).clamp(min=1)


def of_labelled(rows_B: Tensor, labels: Any) -> Tensor:
    """The rows whose sample has a label, if labels are one class per sample; else all."""
    if isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point():
        return rows_B[labels != IGNORED]
    return rows_B


def _classified_tokens(model: nn.Module, inputs: dict[str, Any], taken_BTD: Tensor) -> Tensor:
    """Which token ``(B,)`` a decoder classifies at: the last that isn't padding, as transformers finds it."""
    batch, length = taken_BTD.shape[:2]
    padding, ids_BT = model.config.get_text_config().pad_token_id, inputs.get("input_ids")
    if padding is None or ids_BT is None:
        return torch.full((batch,), length - 1, device=taken_BTD.device)
    place_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    # Prompt tuning puts tokens in front that have no ids.
    return (place_T * (ids_BT != padding)).argmax(-1).to(taken_BTD.device) + length - ids_BT.shape[1]


def feature_size(model: nn.Module) -> int:
    """D of :func:`sample_features`."""
    classifier = classifier_of(model)
    return classifier.in_features if classifier is not None else model.config.get_text_config().hidden_size
