"""From the routers of a forward pass to a loss in the model's output, and to statistics for logs.

Two hooks on the base model do it, so it works whether the model is called itself, through ``PeftModel`` with or without
a task type, DDP or FSDP. Before the pass they put an empty list on every routed layer, which makes it record; after it
they take the lists away. What runs outside of that, such as the second pass of gradient checkpointing, evaluation and
generation, records nothing.

In training the model's output is a subclass of its usual one with five more fields:

``aux_loss``
    sum of the routers' losses, each times its coefficient; None if there are none.
``aux_loss_folded``
    whether ``loss`` contains it: true unless the model was called without ``labels``, as the Trainer does for label
    smoothing and ``compute_loss_func``. Then who makes the loss adds ``label_share(...) * aux_loss``.
``base_aux_loss``
    the ``aux_loss`` of a base model that is a mixture of experts itself, which treats it as ever.
``router_logits``, ``router_weights``
    per router ``(batch, sequence, experts)``, for losses of one's own.

They are declared fields and not just keys, because DDP and FSDP take outputs apart and put them together again. Of
models that return a tuple the loss gets the routers' losses if there are ``labels``; other outputs are left alone.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import is_dataclass, make_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.utils import ModelOutput

from hf_fuse.adapters.routed_layer import RoutedLayer, routed_layers
from hf_fuse.adapters.routing import Routes
from hf_fuse.errors import FuseError

_FIELDS = [
    ("aux_loss", Tensor | None, None),
    ("aux_loss_folded", bool | None, None),
    ("base_aux_loss", Tensor | None, None),
    ("router_logits", tuple | None, None),
    ("router_weights", tuple | None, None),
]
_SUFFIX = "WithRoutes"
_EXTENDED: dict[type[ModelOutput], type[ModelOutput]] = {}


def collect_routes(model: nn.Module) -> None:
    """Installs the hooks, once."""
    if _before_forward not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_before_forward, with_kwargs=True)
        model.register_forward_hook(_after_forward, with_kwargs=True, always_call=True)
    _extend_known_outputs()


def stop_collecting(model: nn.Module) -> None:
    """Takes the hooks away."""
    for hooks, own in ((model._forward_pre_hooks, _before_forward), (model._forward_hooks, _after_forward)):
        for key in [key for key, hook in hooks.items() if hook is own]:
            del hooks[key]
            for flags in (model._forward_pre_hooks_with_kwargs, model._forward_hooks_with_kwargs):
                flags.pop(key, None)
            model._forward_hooks_always_called.pop(key, None)


def router_statistics(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Layer name -> what its router did with the latest batch in training, padding left out. Nothing has a gradient.

    ``load`` (E,): share of the choices that went to each expert, sum 1. ``probability`` (E,): mean probability.
    ``entropy``: mean entropy of the probabilities over log E, in [0, 1]. ``dropped``: share of the tokens beyond an
    expert's capacity.
    """
    return {layer.key: layer.router_statistics for layer in routed_layers(model) if layer.router_statistics is not None}


def label_share(model: nn.Module, inputs: dict[str, Any]) -> Tensor | float:
    """Share of this forward pass in the labels that the loss is averaged over, so that auxiliary losses do not grow
    with gradient accumulation or processes; 1 without ``num_items_in_batch``.

    Args:
        model: the transformers model; tells whether its loss predicts the next token.
        inputs: of the model: ``num_items_in_batch`` and ``labels`` or ``shift_labels``.
    """
    items, labels = inputs.get("num_items_in_batch"), inputs.get("labels")
    if inputs.get("shift_labels") is not None:
        labels = inputs["shift_labels"]
    elif labels is not None and _predicts_next(model):
        labels = labels[..., 1:]
    if items is None or labels is None:
        return 1.0
    return (labels != -100).sum() / items


def _predicts_next(model: nn.Module) -> bool:
    # The same rule by which the Trainer counts num_items_in_batch.
    loss = LOSS_MAPPING.get(getattr(model, "loss_type", None))
    return loss is ForCausalLMLoss and not _encoder_decoder(model)


def _encoder_decoder(model: nn.Module) -> bool:
    return getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def _before_forward(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    if not model.training:
        return None
    for layer in routed_layers(model):
        layer.recorded = []
    if "task_types" not in kwargs:
        return None
    # LoRAMoE's balance needs them; the model does not know them.
    model._task_types = kwargs["task_types"]
    return args, {name: value for name, value in kwargs.items() if name != "task_types"}


def _after_forward(model: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    layers = routed_layers(model)
    recorded = [(layer, routes) for layer in layers for routes in layer.recorded or ()]
    for layer in layers:
        layer.recorded = None
    task_types = model.__dict__.pop("_task_types", None)
    if not recorded or output is None:  # None: the model's forward raised
        return output
    inputs = inspect.signature(model.forward).bind_partial(*args).arguments | kwargs if args else kwargs
    groups = _groups(recorded, inputs, _encoder_decoder(model))
    for group in groups:
        _keep_statistics(*group)
    aux_loss = _auxiliary_loss(groups, task_types)
    return _extended(model, inputs, output, aux_loss, [routes for _, routes in recorded])


Group = tuple[list[RoutedLayer], list[Routes], Tensor | None]


def _groups(recorded: list[tuple[RoutedLayer, Routes]], inputs: dict[str, Any], encoder_decoder: bool) -> list[Group]:
    """Routers of one adapter that saw the same tokens and have as many experts: layers, routes, attention mask."""
    groups: dict[Any, Group] = {}
    for layer, routes in recorded:
        names = ("attention_mask",)
        if encoder_decoder and ".decoder." in f".{layer.key}":
            names = ("decoder_attention_mask", "attention_mask")
        *tokens, experts = routes.logits_TE.shape
        count = routes.logits_TE[..., 0].numel()
        masks = [(name, inputs.get(name)) for name in names]
        fitting = [(n, m) for n, m in masks if isinstance(m, Tensor) and m.dim() == 2 and m.numel() == count]
        name, mask = fitting[0] if fitting else (None, None)
        key = (id(layer.active_experts.config), tuple(tokens), experts, name)
        group = groups.setdefault(key, ([], [], mask))
        group[0].append(layer)
        group[1].append(routes)
    return list(groups.values())


def _auxiliary_loss(groups: list[Group], task_types: Tensor | None) -> Tensor | None:
    """Mean over groups, each as heavy as it has routers; a sum if the reduction is one."""
    total = None
    for layers, routes, mask in groups:
        config = layers[0].active_experts.config
        if not config.router_loss:
            continue
        logits = tuple(r.logits_TE for r in routes)
        loss = config.auxiliary_loss(logits, tuple(r.weights_TE for r in routes), mask, task_types)
        if loss is None:
            continue
        learning = [layer.active_experts.router.requires_grad for layer in layers]
        if torch.is_grad_enabled() and any(it and not z.requires_grad for it, z in zip(learning, logits)):
            raise FuseError(
                "Gradient checkpointing with use_reentrant=True runs the layers without gradients first, so that the "
                "routers would learn nothing from their losses. Use gradient_checkpointing_kwargs="
                '{"use_reentrant": False}, or router_loss=False.'
            )
        share = 1 if config.aux_reduction == "sum" else len(layers) / sum(len(other) for other, _, _ in groups)
        total = share * loss if total is None else total + share * loss
    return total


def _keep_statistics(layers: list[RoutedLayer], routes: list[Routes], mask: Tensor | None) -> None:
    """For all layers of a group at once: with a router per Linear there are hundreds."""
    with torch.no_grad():
        experts = routes[0].logits_TE.shape[-1]
        probabilities_LTE = torch.stack([r.probabilities_TE.reshape(-1, experts) for r in routes])
        chosen_LTE = torch.stack([r.weights_TE.reshape(-1, experts) != 0 for r in routes]).float()
        kept_T1 = probabilities_LTE.new_ones(probabilities_LTE.shape[1], 1)
        if mask is not None:
            kept_T1 = (mask.reshape(-1, 1) != 0).to(kept_T1)
        tokens = kept_T1.sum().clamp(min=1)
        choices_LE = (chosen_LTE * kept_T1).sum(1)
        load_LE = choices_LE / choices_LE.sum(1, keepdim=True).clamp(min=1)
        probability_LE = (probabilities_LTE * kept_T1).sum(1) / tokens
        entropy_LT = torch.special.entr(probabilities_LTE).sum(-1) / math.log(max(experts, 2))
        entropy_L = (entropy_LT * kept_T1[:, 0]).sum(1) / tokens
        for index, (layer, own) in enumerate(zip(layers, routes)):
            dropped = entropy_L.new_zeros(())
            if own.passed_T is not None:
                dropped = ((own.passed_T != 0) * kept_T1[:, 0]).sum() / tokens
            layer.router_statistics = {
                "load": load_LE[index],
                "probability": probability_LE[index],
                "entropy": entropy_L[index],
                "dropped": dropped,
            }


def _extended(model: nn.Module, inputs: dict, output: Any, aux_loss: Tensor | None, routes: list[Routes]) -> Any:
    logits, weights = tuple(r.logits_TE for r in routes), tuple(r.weights_TE for r in routes)
    if isinstance(output, ModelOutput):
        loss = output.get("loss")
        folded = loss is not None and aux_loss is not None
        values = dict(output.items())
        if folded:
            values["loss"] = loss + label_share(model, inputs) * aux_loss.to(loss.device)
        values["base_aux_loss"] = values.pop("aux_loss", None)
        values |= {"aux_loss": aux_loss, "aux_loss_folded": folded, "router_logits": logits, "router_weights": weights}
        extended = _EXTENDED.get(type(output)) or _extend(type(output))
        return extended(**values)
    if isinstance(output, tuple) and inputs.get("labels") is not None and aux_loss is not None:  # return_dict=False
        return (output[0] + label_share(model, inputs) * aux_loss.to(output[0].device), *output[1:])
    return output


def _extend_known_outputs() -> None:
    # Beforehand, as torch.compile can use classes that exist, but not make them.
    known = [ModelOutput]
    for output_class in known:
        known += [c for c in output_class.__subclasses__() if not c.__name__.endswith(_SUFFIX)]
        if is_dataclass(output_class) and output_class not in _EXTENDED:
            _extend(output_class)


def _extend(output_class: type[ModelOutput]) -> type[ModelOutput]:
    name = f"{output_class.__name__}{_SUFFIX}"
    made = make_dataclass(name, _FIELDS, bases=(output_class,), namespace={"__module__": __name__})
    globals()[name] = _EXTENDED[output_class] = made  # pickle looks for it among the globals
    return made
