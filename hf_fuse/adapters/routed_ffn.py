"""A frozen feed-forward layer with low-rank experts (MixLoRA, arXiv 2404.15159).

    h_e = act(W1 x + s B1_e A1_e x) * (W3 x + s B3_e A3_e x),    y = sum_e weight_e (W2 h_e + s B2_e A2_e h_e)

W1 x and W3 x are the same for all experts, and as W2 is linear, ``sum_e weight_e W2 h_e = W2 sum_e weight_e h_e``: each
frozen product is made once per token, however many experts it uses.
Axes: T tokens, d hidden, f width of the layer, E experts, K choices per token, r rank, n = E r.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor

from hf_fuse.adapters.routing import Routes

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
) -> Tensor:
    """Output of the layer, in the dtype of ``down``'s output.

    Args:
        x_Td: input.
        routes: who computes what; weights may be 0, in any number per token.
        up: W3, or fc1 of a layer without gate, or with ``fused_gate_up`` the projection to 2 f, gate first. The
            projections are called and never looked into, so they may be quantised or adapters themselves.
        down: W2.
        activation: any elementwise function or module without trainable parameters.
        factors: ``{"gate" | "up" | "down": (A_Eri, B_Eor)}``; projections that are missing have no experts.
        scaling: s, or one for each projection that has experts.
        gate: W1; None for a layer without gate and for a fused one.
        fused_gate_up: ``up`` computes both.
        dropout: probability of dropping a factor's input, 0 outside training. One mask for all experts and for gate
            and up (MixLoRA draws one per expert and projection).
        hidden_dropout: of the base layer itself, between activation and ``down`` (T5); 0 outside training.
    """
    scalings = scaling if isinstance(scaling, Mapping) else dict.fromkeys(("gate", "up", "down"), scaling)
    experts = routes.weights_TE.shape[1]
    base_up_Tf = up(x_Td)
    base_gate_Tf = gate(x_Td) if gate is not None else None
    dropped_Td = F.dropout(x_Td, dropout) if dropout else x_Td

    def raised(base: Tensor, name: str, expert: int) -> Tensor:
        if name not in factors:
            return base
        A_rd, B_or = factors[name][0][expert], factors[name][1][expert]
        delta = F.linear(F.linear(dropped_Td.to(A_rd.dtype), A_rd), B_or) * scalings[name]
        return (base + delta).to(base.dtype)

    hidden_Tf, delta_Td = 0, 0
    for expert in range(experts):
        weight_T1 = routes.weights_TE[:, expert, None]
        raised_Tf = raised(base_up_Tf, "up", expert)
        if fused_gate_up:
            gate_Tf, raised_Tf = raised_Tf.chunk(2, dim=-1)
            h_Tf = activation(gate_Tf) * raised_Tf
        elif base_gate_Tf is not None:
            h_Tf = activation(raised(base_gate_Tf, "gate", expert)) * raised_Tf
        else:
            h_Tf = activation(raised_Tf)
        hidden_Tf = hidden_Tf + weight_T1 * h_Tf
        if "down" in factors:
            A_rf, B_dr = factors["down"][0][expert], factors["down"][1][expert]
            delta_Td = delta_Td + weight_T1 * F.linear(F.linear(h_Tf.to(A_rf.dtype), A_rf), B_dr) * scalings["down"]
    y_Td = down(hidden_Tf.to(base_up_Tf.dtype))
    bias_d = getattr(down, "bias", None)
    if bias_d is not None:
        y_Td = y_Td + bias_d * (routes.weights_TE.sum(1, keepdim=True) - 1)
    y_Td = (y_Td + delta_Td).to(y_Td.dtype)
    if routes.passed_T is not None:
        y_Td = y_Td + (routes.passed_T.unsqueeze(-1) * x_Td).to(y_Td.dtype)
    return y_Td
