"""A frozen feed-forward layer with low-rank experts (MixLoRA, arXiv 2404.15159).

    h_e = act(W1 x + s B1_e A1_e x) * (W3 x + s B3_e A3_e x),    y = sum_e weight_e (W2 h_e + s B2_e A2_e h_e)

W1 x and W3 x are the same for all experts, and as W2 is linear, ``sum_e weight_e W2 h_e = W2 sum_e weight_e h_e``: each
frozen product is made once per token, however many experts it uses.
Axes: T tokens, d hidden, f width of the layer, E experts, K choices per token, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fuse.adapters.expert_loop import Projection, expert_loop
from hf_fuse.adapters.expert_slots import can_group, expert_groups, expert_slots
from hf_fuse.adapters.precise_linear import factor_dtype, no_autocast, precise_linear
from hf_fuse.adapters.routing import Routes
from hf_fuse.errors import FuseError

# Columns of all experts' factors side by side from which on grouped products are expected to be faster on a GPU:
# below it a masked product is limited by memory, not by arithmetic (reckoned for an H200, not measured).
GROUPED_FROM = 512

Factors = tuple[Tensor, Tensor]  # A_Eri, B_Eor


def routed_ffn(
    x_Td: Tensor,
    routes: Routes,
    *,
    up: Callable[[Tensor], Tensor],
    down: Callable[[Tensor], Tensor],
    activation: Callable[[Tensor], Tensor],
    factors: Mapping[str, Factors],
    scaling: float | Mapping[str, float],
    gate: Callable[[Tensor], Tensor] | None = None,
    fused_gate_up: bool = False,
    dropout: float = 0.0,
    hidden_dropout: float = 0.0,
    kernel: Literal["loop", "slots", "groups"] | None = None,
) -> Tensor:
    """Output of the layer for T tokens, in the dtype of ``down``'s output.

    Factors are applied in their own dtype, the base's if that is more precise, and autocast's under autocast.

    Args:
        x_Td: input.
        routes: who computes what. Experts of weight 0 do not compute, and their weights have no gradient.
        up: W3, or fc1 of a layer without gate, or with ``fused_gate_up`` the projection to 2 f, gate first. The
            projections are called and never looked into (but for ``bias``), so they may be quantised or adapters.
        down: W2.
        activation: any elementwise function or module.
        factors: ``{"gate" | "up" | "down": (A_Eri, B_Eor)}``; projections that are missing have no experts.
        scaling: s, or one for each projection that has experts.
        gate: W1; None for a layer without gate and for a fused one.
        dropout: probability of dropping a factor's input, 0 outside training. One mask for all experts, and for gate
            and up (MixLoRA draws one per expert and projection).
        hidden_dropout: of the base layer itself, between activation and ``down`` (T5); 0 outside training.
        kernel: how the experts are evaluated; None chooses by device: ``loop`` on the CPU, elsewhere and under
            torch.compile ``slots``, or ``groups`` for bf16 factors with E r > 512.

    Raises:
        FuseError: factors of a projection that the layer does not have.
    """
    for name in factors:
        if name not in ("up", "down") and not (name == "gate" and gate is not None):
            names = "gate, up, down" if gate is not None else "up, down"
            raise FuseError(f"factors: the layer has no projection {name!r}, only {names}.")
    scalings = scaling if isinstance(scaling, Mapping) else dict.fromkeys(factors, scaling)
    activated, linear, dtype = _projections(x_Td, up, gate, fused_gate_up, factors, scalings, dropout)
    kept_Tf, kept_by_factors_Tf = _kept(activated.base_Tf, hidden_dropout, dropout if "down" in factors else 0.0)
    # The masks are 0 and 1: what they scale by is constant, so the factors and the weights can carry it.
    A_Erf = _over(factors["down"][0].to(dtype), 1 - dropout) if "down" in factors else None
    weights_TE = _over(routes.weights_TE, 1 - hidden_dropout)
    evaluate = _kernel(kernel or _best_kernel(x_Td, activation, factors, dtype, routes.chosen_TK), routes.chosen_TK)
    with no_autocast(x_Td):
        hidden_Tf, ranks_TEr = evaluate(activated, linear, weights_TE, A_Erf, activation, kept_Tf, kept_by_factors_Tf)
    y_Td = down(hidden_Tf)
    change_Td = 0
    bias_d = getattr(down, "bias", None)
    if bias_d is not None:  # down added it once, the experts' outputs hold it weight by weight
        change_Td = (routes.weights_TE.sum(1, keepdim=True) - 1) * bias_d
    if ranks_TEr is not None:
        B_dn = factors["down"][1].transpose(0, 1).flatten(1).to(dtype) * scalings["down"]
        change_Td = F.linear(ranks_TEr.flatten(1), B_dn) + change_Td
    if routes.passed_T is not None:
        change_Td = routes.passed_T.unsqueeze(-1) * x_Td + change_Td
    return (y_Td + change_Td).to(y_Td.dtype)


def _projections(
    x_Td: Tensor,
    up: Callable[[Tensor], Tensor],
    gate: Callable[[Tensor], Tensor] | None,
    fused_gate_up: bool,
    factors: Mapping[str, Factors],
    scalings: Mapping[str, float],
    dropout: float,
) -> tuple[Projection, Projection | None, torch.dtype]:
    """What goes through the activation, what multiplies it, and the factors' dtype."""
    up_Tf = up(x_Td)
    dtype = factor_dtype(up_Tf, *chain(*factors.values()))
    raised = {name: factors[name] for name in ("gate", "up") if name in factors}
    parts = {}
    if raised:
        dropped_Td = F.dropout(x_Td, dropout) if dropout else x_Td
        # One product for both: it reads x once.
        A_nd = torch.cat([A_Erd.flatten(0, 1) * scalings[name] for name, (A_Erd, _) in raised.items()])
        ranks_Tn = precise_linear(dropped_Td, A_nd, dtype)
        sizes = [A_Erd.shape[:2] for A_Erd, _ in raised.values()]
        ranks = ranks_Tn.split([experts * rank for experts, rank in sizes], 1)
        for (name, (_, B_Efr)), size, part_Tn in zip(raised.items(), sizes, ranks):
            parts[name] = part_Tn.unflatten(1, size), B_Efr.to(dtype)
    activated, linear = Projection(up_Tf, *parts.get("up", ())), None
    if gate is not None:
        return Projection(gate(x_Td), *parts.get("gate", ())), activated, dtype
    if fused_gate_up:
        halves = [None, None] if activated.B_Efr is None else activated.B_Efr.chunk(2, 1)
        activated, linear = (
            Projection(base_Tf, activated.ranks_TEr, B_Efr) for base_Tf, B_Efr in zip(up_Tf.chunk(2, 1), halves)
        )
    return activated, linear, dtype


def _kept(base_Tf: Tensor, hidden_dropout: float, dropout: float) -> tuple[Tensor | None, Tensor | None]:
    """Dropout's masks on the hidden activations, and on them as the input of the factors of ``down``."""
    kept_Tf = torch.empty_like(base_Tf, dtype=torch.bool).bernoulli_(1 - hidden_dropout) if hidden_dropout else None
    if not dropout:
        return kept_Tf, kept_Tf
    kept_by_factors_Tf = torch.empty_like(base_Tf, dtype=torch.bool).bernoulli_(1 - dropout)
    return kept_Tf, kept_by_factors_Tf if kept_Tf is None else kept_by_factors_Tf & kept_Tf


def _over(values: Tensor, divisor: float) -> Tensor:
    return values if divisor == 1 else values / divisor


def _best_kernel(
    x_Td: Tensor,
    activation: Callable[[Tensor], Tensor],
    factors: Mapping[str, Factors],
    dtype: torch.dtype,
    chosen_TK: Tensor | None,
) -> str:
    trained = isinstance(activation, nn.Module) and any(p.requires_grad for p in activation.parameters())
    if x_Td.device.type == "cpu" and not torch.compiler.is_compiling() and not trained:
        return "loop"
    sizes = [A_Eri.shape[:2] for A_Eri, _ in factors.values()]
    columns = max([0, *(experts * rank for experts, rank in sizes)])
    groupable = chosen_TK is not None and can_group(dtype, {rank for _, rank in sizes})
    return "groups" if columns > GROUPED_FROM and groupable else "slots"


def _kernel(name: str, chosen_TK: Tensor | None) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if name == "loop":
        return expert_loop
    return partial(expert_groups if name == "groups" else expert_slots, chosen_TK=chosen_TK)
