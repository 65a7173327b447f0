"""Gram matrices of what the linear layers of a model read: mean x x' over all tokens, for RegMean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_fuse.merge.learning import Learned, Subject

PAPER = "https://arxiv.org/abs/2212.09849"


def gram(subject: Subject) -> Learned:
    """``G = X'X / n`` for every linear layer, X ``[n, in]`` its inputs over all examples, padding left out.

    Layers that read the same tensor (q, k and v; gate and up) share one G. Layers whose weight is tied to an embedding
    have none, and neither have experts that are stored as a stack: they are averaged. Takes ``in^2`` fp32 numbers of
    memory per distinct input. The labels of the data are not used.

    Args:
        subject: model and data.
    """
    model = subject.model
    layers = _layers(model, subject)
    leaders = _leaders(model, layers, subject.batch([0]))
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    mask: list[Tensor | None] = [None]

    def add(name: str, inputs: Tensor) -> None:
        rows_ND = _tokens(inputs, mask[0]).float()
        if name not in totals:
            width = rows_ND.shape[1]
            totals[name], counts[name] = rows_ND.new_zeros(width, width), 0
        totals[name].addmm_(rows_ND.T, rows_ND)
        counts[name] += len(rows_ND)

    handles = [_watch(layers[name], lambda x, name=name: add(name, x)) for name in sorted(set(leaders.values()))]
    with torch.no_grad():
        # An encoder's and a decoder's padding can't be told apart by shapes; single examples have none.
        for batch in subject.batches(1 if subject.kind == "seq2seq" else subject.recipe.batch_size):
            batch.pop("labels")
            mask[0] = batch.get("attention_mask")
            model(**batch)
    for handle in handles:
        handle.remove()
    return Learned(
        {name: totals[name] / counts[name] for name in totals if counts[name]},
        {name: leader for name, leader in leaders.items() if name != leader and counts.get(leader)},
        [name for name in leaders if not isinstance(layers[name], nn.Linear)],
        {"examples": len(subject.data.train), "layers": len(leaders), "matrices": len(totals)},
    )


def _layers(model: Any, subject: Subject) -> dict[str, nn.Module]:
    """Linear layers by the stored name of their weight, those tied to another weight left out."""
    from transformers.pytorch_utils import Conv1D

    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and uses.get(id(module.weight)) == 1:
            stored = subject.stored({f"{name}.weight": module.weight.detach()})
            if len(stored) == 1 and next(iter(stored.values())).shape == module.weight.shape:
                found[next(iter(stored))] = module
    return found


def _watch(module: nn.Module, look: Callable[[Tensor], None]) -> Any:
    def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
        look(args[0] if args else kwargs["input"])

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _leaders(model: Any, layers: dict[str, nn.Module], batch: dict[str, Tensor]) -> dict[str, str]:
    """For every layer that runs, the first that reads the very same tensors."""
    read: dict[str, list[Tensor]] = {}  # kept until all have been compared: a freed tensor's id is given away again
    handles = [
        _watch(layer, lambda x, name=name: read.setdefault(name, []).append(x)) for name, layer in layers.items()
    ]
    batch.pop("labels")
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    first: dict[tuple[int, ...], str] = {}
    return {name: first.setdefault(tuple(map(id, tensors)), name) for name, tensors in read.items()}


def _tokens(inputs: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Inputs as rows ``[n, in]`` without those of padding, where they are laid out as the mask is."""
    if mask_BT is not None and inputs.shape[:-1] == mask_BT.shape:
        return inputs[mask_BT.bool()]
    rows_ND = inputs.flatten(0, -2)
    if mask_BT is not None and len(rows_ND) == mask_BT.numel():
        return rows_ND[mask_BT.flatten().bool()]
    return rows_ND
