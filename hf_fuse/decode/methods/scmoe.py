"""Contrasts a mixture-of-experts model with itself under a weaker routing, by an expert it would not have chosen."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from hf_fuse.adapters.routed_layer import routed_layers, routing_override
from hf_fuse.decode.fused_models import FusedModels
from hf_fuse.decode.vocabularies import named
from hf_fuse.errors import FuseError
from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2405.14507"


def scmoe(
    model: nn.Module,
    *,
    beta: Annotated[float, Between(0)] = 0.5,
    alpha: Annotated[float, Between(0, 1, open_low=True)] = 0.1,
    weak_rank: Annotated[int, Between(0)] = 2,
) -> FusedModels:
    """``(1 + beta) usual - beta weak``, in logits, among the tokens that the usual routing finds likely.

    Args:
        model: with routers as Mixtral's (softmax over experts, then the best k), or with an adapter of ours that has
            routers, such as MixLoRA.
        beta: strength of the contrast; 0 is the usual routing. The paper tries 0.1 to 0.9.
        alpha: tokens less likely than alpha times the likeliest are left out; 1 is greedy decoding.
        weak_rank: the one expert of the weak routing, by its place in the token's ranking; 0 is the likeliest.

    Raises:
        FuseError: no routers of a known kind, or fewer experts.
    """
    usual, weak = contextlib.nullcontext, partial(routing_of_rank, model, weak_rank)
    with weak():  # refuses what can't be overridden
        pass
    return FusedModels([model, model], partial(contrasted, beta=beta, alpha=alpha), [usual, weak])


def contrasted(logits: Sequence[Tensor], beta: float, alpha: float) -> Tensor:
    """Logits ``(..., V)`` by the usual and by the weak routing -> the contrast, -inf for what is left out."""
    usual_XV, weak_XV = logits
    kept_XV = usual_XV >= usual_XV.amax(-1, keepdim=True) + math.log(alpha)
    return ((1 + beta) * usual_XV - beta * weak_XV).masked_fill(~kept_XV, -torch.inf)


@contextlib.contextmanager
def routing_of_rank(model: nn.Module, rank: int) -> Iterator[None]:
    """Within it every token uses only the expert at this place of its ranking, with weight 1.

    Raises:
        FuseError: the model has no routers of a known kind, or a router has fewer experts.
    """
    layers = [layer for layer in routed_layers(model) if hasattr(layer.active_experts, "router")]
    counts = {layer.key: len(layer.active_experts.router) for layer in layers}
    routers = {} if layers else _routers(model)
    counts |= {key: len(router.weight) for key, router in routers.items()}
    if not counts:
        raise FuseError(
            f"{named(model)}: has no routers as Mixtral's, and no adapter of ours with routers. SCMoE needs a mixture "
            "of experts that chooses them token by token."
        )
    for key, experts in counts.items():
        if rank >= experts:
            raise FuseError(f"weak_rank is {rank}, but {key} has {experts} experts. Use 0 to {experts - 1}.")
    handles = [router.register_forward_hook(partial(_routed, rank)) for router in routers.values()]
    try:
        with routing_override(model, [rank]):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _routers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if type(module).__name__.endswith("TopKRouter")}


def _routed(rank: int, router: nn.Module, inputs: Any, outputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What a router returns (logits, weights, experts), but for one expert per token."""
    if not (isinstance(outputs, tuple) and len(outputs) == 3 and outputs[1].shape == outputs[2].shape):
        raise FuseError(
            f"{type(router).__name__}: doesn't return logits, weights and experts as Mixtral's router does, so its "
            "routing can't be overridden."
        )
    logits_TE, weights_TK, _ = outputs
    chosen_T1 = logits_TE.argsort(-1, descending=True)[:, rank : rank + 1]
    return logits_TE, torch.ones_like(weights_TK[:, :1]), chosen_T1
