"""The trainable parts of a routed adapter: one module per adapted layer and adapter, holding its parameters flat.

Flat, because PEFT and transformers both want the adapter's name last or last but one in a key; a module whose forward
runs, because that is what DeepSpeed's parameter partitioning and FSDP hang their hooks on.
Axes: T tokens, d input, E experts, r rank, i in, o out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import _get_in_out_features
from torch import Tensor, nn
from transformers.activations import ACT2FN

from hf_fuse.adapters.dora import rescaled, row_norms
from hf_fuse.adapters.ffn_families import Family, activation_of
from hf_fuse.adapters.routed_config import LoraSettings, RoutedLoraConfig
from hf_fuse.adapters.routed_ffn import routed_ffn
from hf_fuse.adapters.routed_linear import routed_linear
from hf_fuse.adapters.routing import Routes, jittered, route, router_logits


def innermost(module: nn.Module) -> nn.Module:
    """The module itself, or what other adapters wrap."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def sizes(linear: nn.Module) -> tuple[int, int]:
    """In and out features of a Linear of any kind.

    Raises:
        TypeError: it is none.
    """
    module, found = innermost(linear), (None, None)
    if not isinstance(module, (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)):
        found = _get_in_out_features(module)
    if None in found:
        raise TypeError(f"{type(module).__name__} cannot have LoRA experts: only Linear and Conv1D can.")
    return found


def _in_dtype_of(linear: nn.Module, x: Tensor) -> Tensor:
    dtype = innermost(linear).weight.dtype
    return linear(x.to(dtype) if dtype.is_floating_point else x)


class Experts(nn.Module):
    """Router and LoRA factors. Subclasses say what they are factors of."""

    def __init__(self, config: RoutedLoraConfig, lora: LoraSettings) -> None:
        super().__init__()
        self.config, self.lora = config, lora

    def _add_router(self, experts: int, width: int) -> None:
        self.router = nn.Parameter(torch.empty(experts, width))
        spread = self.config.router_init_range
        if self.config.router_init == "normal":
            nn.init.normal_(self.router, std=spread)
        else:  # kaiming_uniform_ with a = sqrt(spread)
            bound = (6 / ((1 + spread) * width)) ** 0.5
            nn.init.uniform_(self.router, -bound, bound)

    def _add_factors(self, name: str, linear: nn.Module, experts: tuple[int, ...], shared_A: bool = False) -> None:
        inputs, outputs = sizes(linear)
        A_Eri = torch.empty(*(() if shared_A else experts), self.lora.r, inputs)
        if self.lora.init == "gaussian":
            nn.init.normal_(A_Eri, std=1 / self.lora.r)
        else:
            nn.init.uniform_(A_Eri, -(inputs**-0.5), inputs**-0.5)
        self.register_parameter(f"A{name}", nn.Parameter(A_Eri))
        self.register_parameter(f"B{name}", nn.Parameter(torch.zeros(*experts, outputs, self.lora.r)))
        if self.lora.dora:
            A, B = getattr(self, f"A{name}"), getattr(self, f"B{name}")
            if A.is_meta:
                magnitude = torch.empty(*experts, outputs)
            else:
                norms_Eo = row_norms(innermost(linear), A.view(-1, *A.shape[-2:]), B.view(-1, *B.shape[-2:]), 0.0)
                magnitude = norms_Eo.view(*experts, outputs)
            self.register_parameter(f"magnitude{name}", nn.Parameter(magnitude))

    def extra_repr(self) -> str:
        experts = f"num_experts={len(self.router)}, " if hasattr(self, "router") else ""
        return f"{experts}r={self.lora.r}, scaling={self.lora.scaling:g}"

    def _jittered(self, x_Td: Tensor) -> Tensor:
        return jittered(x_Td, self.config.jitter_noise if self.training else 0.0)

    def _dropout(self) -> float:
        return self.lora.dropout if self.training else 0.0

    def _route(self, x_Td: Tensor, sequence_length: int, ranks: list[int] | None) -> Routes:
        options = self.config.routing_options(self.training)
        if "capacity" in options:
            options["sequence_length"] = sequence_length
        return route(
            router_logits(x_Td, self.router),
            self.config.routing_strategy,
            router_activation=self.config.router_activation,
            router_temperature=self.config.router_temperature,
            ranks=ranks,
            **options,
        )


class LinearExperts(Experts):
    """Experts of one Linear: ``W x + s sum_e w_e B_e A_e x``, A shared by all of them if ``shared_A`` (HydraLoRA)."""

    def __init__(self, config, lora: LoraSettings, linear: nn.Module, experts: int, shared_A: bool = False) -> None:
        super().__init__(config, lora)
        self._add_router(experts, sizes(linear)[0])
        self._add_factors("", linear, (experts,), shared_A)

    def forward(self, linear: nn.Module, x: Tensor, ranks: list[int] | None = None) -> tuple[Tensor, Routes]:
        x = self._jittered(x)
        x_Td = x.reshape(-1, x.shape[-1])
        routes = self._route(x_Td, x.shape[-2] if x.dim() > 2 else len(x_Td), ranks)
        base_out = linear(x)
        out_To = routed_linear(
            base_out.reshape(-1, base_out.shape[-1]), x_Td, routes.weights_TE, self.A, self.B, self.lora.scaling,
            dropout=self._dropout(),
        )  # fmt: skip
        return out_To.reshape(base_out.shape), routes


class PlainLora(Experts):
    """One LoRA on one Linear, without a router: what MixLoRA does to the attention."""

    def __init__(self, config: RoutedLoraConfig, lora: LoraSettings, linear: nn.Module) -> None:
        super().__init__(config, lora)
        self._add_factors("", linear, ())

    def forward(self, linear: nn.Module, x: Tensor, ranks: list[int] | None = None) -> tuple[Tensor, None]:
        base_out = linear(x)
        dropped = F.dropout(x, self._dropout(), self.training).to(self.A.dtype)
        delta = F.linear(F.linear(dropped, self.A), self.B) * self.lora.scaling
        if self.lora.dora:
            module = innermost(linear)
            norms_o = row_norms(module, self.A[None], self.B[None], self.lora.scaling)[0]
            return rescaled(base_out, delta, module, self.magnitude, norms_o), None
        return (base_out + delta).to(base_out.dtype), None


class FeedForwardExperts(Experts):
    """Experts of a whole feed-forward layer with one router, on those of its projections that are targeted."""

    def __init__(
        self, config, lora: LoraSettings, layer: nn.Module, family: Family, targets: list[str], experts: int
    ) -> None:
        super().__init__(config, lora)
        self.family = family
        self.targets = {role: name for role, name in family.projections.items() if name in targets}
        self._add_router(experts, sizes(getattr(layer, family.up))[0])
        for name in self.targets.values():
            self._add_factors(f"_{name}", getattr(layer, name), (experts,))

    def forward(self, layer: nn.Module, x: Tensor, ranks: list[int] | None = None) -> tuple[Tensor, Routes]:
        x = self._jittered(x)
        x_Td = x.reshape(-1, x.shape[-1])
        routes = self._route(x_Td, x.shape[-2] if x.dim() > 2 else len(x_Td), ranks)
        y_Td = self._with_dora(layer, x_Td, routes) if self.lora.dora else self._routed(layer, x_Td, routes)
        if self.family.dropout == "after_down":
            y_Td = layer.dropout(y_Td)
        return y_Td.reshape(*x.shape[:-1], -1), routes

    def _routed(self, layer: nn.Module, x_Td: Tensor, routes: Routes) -> Tensor:
        family = self.family
        before_down = family.dropout == "before_down"
        return routed_ffn(
            x_Td,
            routes,
            gate=getattr(layer, family.gate) if family.gate else None,
            up=getattr(layer, family.up),
            down=self._down(layer),
            activation=self._activation(layer),
            fused_gate_up=family.fused,
            factors={role: self._factors(name) for role, name in self.targets.items()},
            scaling=self.lora.scaling,
            dropout=self._dropout(),
            hidden_dropout=layer.dropout.p if before_down and self.training else 0.0,
        )

    def _with_dora(self, layer: nn.Module, x_Td: Tensor, routes: Routes) -> Tensor:
        """Each expert by itself on its tokens: magnitudes come after the projection down, which can't be shared."""
        family = self.family
        dropped_Td = F.dropout(x_Td, self._dropout(), self.training)
        base = {role: getattr(layer, name)(x_Td) for role, name in family.projections.items() if role != "down"}
        norms = {
            role: row_norms(innermost(getattr(layer, name)), *self._factors(name), self.lora.scaling)
            for role, name in self.targets.items()
        }

        def projected(role: str, expert: int, base_out: Tensor, inputs: Tensor) -> Tensor:
            if role not in self.targets:
                return base_out
            name = self.targets[role]
            A_Eri, B_Eor = self._factors(name)
            delta = F.linear(F.linear(inputs.to(A_Eri.dtype), A_Eri[expert]), B_Eor[expert]) * self.lora.scaling
            magnitude_o = getattr(self, f"magnitude_{name}")[expert]
            return rescaled(base_out, delta, innermost(getattr(layer, name)), magnitude_o, norms[role][expert])

        activation = self._activation(layer)
        down = self._down(layer)
        y_Td = None
        for expert in range(routes.weights_TE.shape[1]):
            rows = routes.weights_TE[:, expert].nonzero()[:, 0]
            raised = projected("up", expert, base["up"][rows], dropped_Td[rows])
            if family.fused:
                gate, raised = raised.chunk(2, dim=-1)
                hidden = activation(gate) * raised
            elif family.gate:
                hidden = activation(projected("gate", expert, base["gate"][rows], dropped_Td[rows])) * raised
            else:
                hidden = activation(raised)
            if family.dropout == "before_down":
                hidden = layer.dropout(hidden)
            lowered = projected("down", expert, down(hidden), F.dropout(hidden, self._dropout(), self.training))
            weighted = lowered * routes.weights_TE[rows, expert, None]
            if y_Td is None:
                y_Td = weighted.new_zeros(len(x_Td), weighted.shape[-1])
            y_Td = y_Td.index_add(0, rows, weighted)
        if routes.passed_T is not None:
            y_Td = y_Td + routes.passed_T.unsqueeze(-1) * x_Td
        return y_Td.to(base["up"].dtype)

    def _down(self, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        down = getattr(layer, self.family.down)
        # T5 keeps its projection down in fp32.
        return partial(_in_dtype_of, down) if self.family.dropout == "before_down" else down

    def _activation(self, layer: nn.Module) -> nn.Module:
        name = getattr(self.config, "act_fn", None)
        return ACT2FN[name] if name else activation_of(layer)

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        return getattr(self, f"A_{name}"), getattr(self, f"B_{name}")
