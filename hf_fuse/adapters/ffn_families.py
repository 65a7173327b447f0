"""Feed-forward layers of transformers models, told by the names of their parts.

A family says which projection is which, so that experts can be put between them. A layer whose parts have the right
names but which computes something else is found out by comparing the two on a random token; its projections, and those
of layers that are spread over several modules (BERT, OPT), can only be routed one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")


@dataclass(frozen=True)
class Family:
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` without a gate.

    ``fused`` means that ``up`` computes the gate in the first half of its output. ``dropout`` is the place of the
    layer's own dropout module, if it has one.
    """

    up: str
    down: str
    gate: str | None = None
    fused: bool = False
    dropout: Literal["before_down", "after_down"] | None = None

    @property
    def projections(self) -> dict[str, str]:
        """Role of a projection in :func:`~hf_fuse.adapters.routed_ffn.routed_ffn` -> its name in the layer."""
        return {role: name for role in ("gate", "up", "down") if (name := getattr(self, role))}


FAMILIES = (
    Family("up_proj", "down_proj", gate="gate_proj"),  # Llama, Mistral, Qwen, Gemma, DINOv2 with SwiGLU
    Family("gate_up_proj", "down_proj", fused=True),  # Phi-3, GLM
    Family("fc1", "fc2"),  # Phi, ViT, DINOv2, CLIP, SigLIP
    Family("c_fc", "c_proj", dropout="after_down"),  # GPT-2
    Family("fc_in", "fc_out", dropout="after_down"),  # GPT-J, CodeGen
    Family("lin1", "lin2", dropout="after_down"),  # DistilBERT
    Family("dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX, Falcon
    Family("wi_1", "wo", gate="wi_0", dropout="before_down"),  # T5 v1.1, Flan-T5
    Family("wi", "wo", dropout="before_down"),  # T5
)


def family_of(layer: nn.Module) -> Family | None:
    """The family whose projections are children of ``layer``, if the layer holds nothing else that has weights."""
    children = dict(layer.named_children())
    if activation_of(layer) is None:
        return None
    for family in FAMILIES:
        names = set(family.projections.values())
        others = [child for name, child in children.items() if name not in names]
        if names <= children.keys() and not any(True for child in others for _ in child.parameters()):
            return family
    return None


def activation_of(layer: nn.Module) -> nn.Module | None:
    """The layer's activation function."""
    return next((found for name in ACTIVATIONS if callable(found := getattr(layer, name, None))), None)


def is_feed_forward_projection(name: str, parent: nn.Module, grandparent: nn.Module | None) -> bool:
    """Whether the Linear ``parent.name`` belongs to a feed-forward part, be it a module of its own or not.

    BERT and its kin have ``intermediate.dense`` and ``output.dense``, with dropout, residual and normalisation in the
    second; OPT, BART and Whisper keep ``fc1`` and ``fc2`` beside the attention.
    """
    if name == "dense" and grandparent is not None and hasattr(grandparent, "intermediate"):
        return parent is grandparent.intermediate or parent is getattr(grandparent, "output", None)
    return any(
        name in family.projections.values() and all(hasattr(parent, other) for other in family.projections.values())
        for family in FAMILIES
    )


def computes(layer: nn.Module, family: Family) -> bool:
    """Whether the layer's output for a random token is what its family says.

    Weights that are quantised, sharded or not there yet are not compared: they count as equal.
    """
    weights = list(layer.parameters())
    if not weights or not all(
        type(w.data) is Tensor and w.numel() and w.is_floating_point() and w.element_size() > 1 and not w.is_meta
        for w in weights
    ):
        return True
    up, down = getattr(layer, family.up), getattr(layer, family.down)
    size = up.in_features if hasattr(up, "in_features") else up.weight.shape[0]  # a Conv1D's is (in, out)
    training = layer.training
    layer.eval()
    try:
        with torch.no_grad():
            x_11d = torch.randn(1, 1, size, generator=torch.Generator().manual_seed(0)).to(weights[0])
            raised = up(x_11d)
            if family.fused:
                gate, raised = raised.chunk(2, dim=-1)
                hidden = activation_of(layer)(gate) * raised
            elif family.gate:
                hidden = activation_of(layer)(getattr(layer, family.gate)(x_11d)) * raised
            else:
                hidden = activation_of(layer)(raised)
            found, expected = down(hidden.to(down.weight.dtype)), layer(x_11d)
    except (TypeError, RuntimeError):  # needs more arguments than one, or parts of other shapes
        return False
    finally:
        layer.train(training)
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-2, atol=1e-4)
