"""The PEFT layer that all adapters with a router share: a frozen module and the experts of each adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hf_fuse.adapters.experts import innermost
from hf_fuse.adapters.routing import Routes

NO_MERGE = (
    "Routed experts can't be merged: which of them work depends on the token, so there is no one weight matrix that "
    "does the same. Keep the adapter (save_pretrained), or call unload() to get the base model back without it."
)


class RoutedLayer(nn.Module, BaseTunerLayer):
    """A frozen module and, per adapter, its experts.

    ``recorded`` is a list while a forward pass of the model in training collects the decisions of its routers, and
    None otherwise, such as in the second forward pass of gradient checkpointing. ``ranks`` overrides the routing.
    """

    def __init__(self, base_layer: nn.Module, key: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.key = key
        self.recorded: list[Routes] | None = None
        self.ranks: list[int] | None = None
        self.router_statistics: dict[str, Tensor] | None = None
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())

    @property
    def experts(self) -> nn.ModuleDict:
        return getattr(self, self.adapter_layer_names[0])

    def update_layer(self, adapter_name: str, experts: nn.Module, active: bool) -> None:
        self.experts[adapter_name] = experts
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)
        if not active:
            experts.requires_grad_(False)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        own = [name for name in names if name in self.experts]
        if len(own) > 1:
            raise ValueError(
                f"{self.key}: the adapters {', '.join(own)} all have routers for this layer and can't be active "
                "together. Activate one of them."
            )
        super().set_adapter(adapter_names, inference_mode)

    @property
    def active_experts(self) -> nn.Module | None:
        if self.disable_adapters:
            return None
        return next((self.experts[name] for name in self.active_adapters if name in self.experts), None)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        experts = self.active_experts
        if experts is None:
            return self.base_layer(x, *args, **kwargs)
        out, routes = experts(self.base_layer, x, self.ranks)
        if self.recorded is not None and routes is not None:
            shape = (*x.shape[:-1], -1)
            self.recorded.append(
                routes._replace(
                    weights_TE=routes.weights_TE.view(shape),
                    probabilities_TE=routes.probabilities_TE.view(shape),
                    logits_TE=routes.logits_TE.view(shape),
                )
            )
        return out

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(NO_MERGE)

    def unmerge(self) -> None:
        raise NotImplementedError(NO_MERGE)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module):
        holders = [base_layer, *base_layer.children()]
        found = (super(RoutedLayer, self)._get_base_layer_device_and_dtype(innermost(holder)) for holder in holders)
        return next((pair for pair in found if pair[0] is not None), (None, None))


def routed_layers(model: nn.Module) -> list[RoutedLayer]:
    """All of them in a model, of whatever adapter."""
    return [module for module in model.modules() if isinstance(module, RoutedLayer)]


@contextmanager
def routing_override(model: nn.Module, ranks: Sequence[int]) -> Iterator[None]:
    """Within it all routers use only the experts at these places of each token's ranking, 0 the likeliest.

    SCMoE (arXiv 2405.14507) contrasts the usual routing with that by ``[2]``, the third-ranked expert alone.
    """
    layers = routed_layers(model)
    for layer in layers:
        layer.ranks = list(ranks)
    try:
        yield
    finally:
        for layer in layers:
            layer.ranks = None
