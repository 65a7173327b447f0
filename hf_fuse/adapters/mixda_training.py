"""The two stages of training a mixture of domain adapters (arXiv 2306.05406).

Stage one, one adapter per domain: the task is to fill in masked knowledge (``labels`` are -100 elsewhere), and
:func:`~hf_fuse.losses.old_knowledge.old_knowledge` on generic text keeps the rest as it was::

    model = get_peft_model(model, MixDaConfig(layers_to_transform=[7, 11], task_type="FEATURE_EXTRACTION"))
    args = FuseConfig(..., objectives={"task": 0.5, "old_knowledge": 1.0})
    groups = parameter_groups(model, lr=1e-4, gate_lr=2e-4)
    MixDaTrainer(model, args, optimizers=(torch.optim.AdamW(groups, weight_decay=0.05), None), ...).train()

The batches hold generic text in the columns ``generic_input_ids`` and ``generic_attention_mask``. Stage two::

    model = get_peft_model(model, MixDaConfig(num_domains=2, stage="task", layers_to_transform=[7, 11]))
    load_domain_adapters(model, ["biomedicine", "reviews"])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from hf_fuse.adapters.mixda import MixDaLayer
from hf_fuse.errors import CheckpointError, FuseError
from hf_fuse.trainer import FuseTrainer

GENERIC = "generic_"


class MixDaTrainer(FuseTrainer):
    """A ``FuseTrainer`` whose objective ``old_knowledge`` reads the columns ``generic_*`` of the batch."""

    extra_tensors = frozenset({"adapted_outputs", "original_outputs"})

    def named_tensors(self, needed: set[str], model: nn.Module, inputs: dict[str, Any], outputs: Any) -> dict[str, Any]:
        found = super().named_tensors(needed, model, inputs, outputs)
        generic = {name.removeprefix(GENERIC): v for name, v in inputs.items() if name.startswith(GENERIC)}
        if needed & self.extra_tensors and generic:
            with recorded_outputs(self._base) as pairs:
                model(**generic)
            found["adapted_outputs"], found["original_outputs"] = zip(*pairs)
        return found

    @cached_property
    def _loss_columns(self) -> set[str]:
        return super()._loss_columns | {GENERIC + "input_ids", GENERIC + "attention_mask"}


@contextmanager
def recorded_outputs(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collects ``(with adapters, without)`` of every adapted layer while the model runs, for ``old_knowledge``.

    The list is filled when the context ends.

    Raises:
        FuseError: the outputs have no gradients though the adapters are being trained.
    """
    layers = [module for module in model.modules() if isinstance(module, MixDaLayer)]
    pairs: list[tuple[Tensor, Tensor]] = []
    for layer in layers:
        layer.recorded = []
    try:
        yield pairs
        pairs += [pair for layer in layers for pair in layer.recorded]
    finally:
        for layer in layers:
            layer.recorded = None
    trained = any(p.requires_grad for layer in layers for p in layer.mixda_domain.parameters())
    if not pairs:
        raise FuseError("No active domain adapter was called. Activate one and run the whole model.")
    if torch.is_grad_enabled() and trained and not pairs[0][0].requires_grad:
        raise FuseError(
            "Gradient checkpointing with use_reentrant=True runs the layers without gradients first, so that "
            'old_knowledge would teach nothing. Use gradient_checkpointing_kwargs={"use_reentrant": False}.'
        )


def parameter_groups(
    model: nn.Module, *, lr: float = 1e-4, gate_lr: float = 2e-4, adapter_name: str = "default"
) -> list[dict]:
    """What is trained, for an optimizer: the gates with a learning rate of their own."""
    groups = {lr: [], gate_lr: []} if lr != gate_lr else {lr: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[gate_lr if f".mixda_gate.{adapter_name}." in name else lr].append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items() if parameters]


@torch.no_grad()
def load_domain_adapters(model: PeftModel, adapters: Sequence[str | Path], *, adapter_name: str = "default") -> None:
    """Copies the domain adapters of saved MixDA folders into the slots of ``model``, in the order given.

    Gates and task adapters are left behind: they weigh other mixtures.

    Args:
        model: with a MixDA adapter of as many domains as the folders have together.
        adapters: folders or Hub ids, as ``save_pretrained`` wrote them.

    Raises:
        CheckpointError: a folder that holds no MixDA, other layers or sizes, or numbers that don't add up.
    """
    from safetensors.torch import load_file

    from hf_fuse.checkpoint.adapter import WEIGHTS, is_adapter
    from hf_fuse.checkpoint.reader import resolve

    layers = {m.key: m.mixda_domain[adapter_name] for m in model.modules() if isinstance(m, MixDaLayer)}
    slots = model.peft_config[adapter_name].num_domains
    filled = 0
    for ref in map(str, adapters):
        folder, _, _ = resolve(ref)
        stored = load_file(folder / WEIGHTS) if is_adapter(folder) and (folder / WEIGHTS).is_file() else {}
        parts = {}
        for name, value in stored.items():
            key, found, leaf = name.removeprefix("base_model.model.").rpartition(".mixda_domain.")
            if found:
                parts[key, leaf] = value
        expected = {(key, leaf) for key, domains in layers.items() for leaf, _ in domains.named_parameters()}
        if parts.keys() != expected:
            where = sorted({key for key, _ in parts.keys() ^ expected})
            raise CheckpointError(
                f"{ref}: has domain adapters in {len({key for key, _ in parts})} layers, the model in {len(layers)}; "
                f"they differ in {', '.join(where[:5])}. Give folders of MixDA adapters, and the same layers to both."
            )
        count = len(next(iter(parts.values())))
        for (key, leaf), value in parts.items():
            slot = getattr(layers[key], leaf)[filled : filled + count]
            if slot.shape != value.shape:
                raise CheckpointError(
                    f"{ref}: {leaf} of {key} has shape {list(value.shape)}, but the place left for it is "
                    f"{list(slot.shape)}. Check down_scale, and that num_domains ({slots}) counts all domains."
                )
            slot.copy_(value)
        filled += count
    if filled < slots:
        raise CheckpointError(
            f"{len(adapters)} folder(s) hold {filled} domain adapter(s), but num_domains is {slots}. Give all of them."
        )
