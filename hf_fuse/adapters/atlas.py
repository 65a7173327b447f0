"""aTLAS over LoRA task vectors: many trained LoRAs, and one learned coefficient per LoRA and weight matrix.

``W = W_0 + sum_v lambda_v s_v B_v A_v`` (arXiv 2407.02880): the factors stay frozen, ``vectors x modules`` coefficients
are trained. Coefficients of a module act in rank space, so all vectors together cost as much as one LoRA of the summed
rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import PeftType
from torch import Tensor, nn

from hf_fuse.adapters._peft import register
from hf_fuse.adapters.low_rank import LowRankLayer, LowRankModel, linear_size
from hf_fuse.adapters.targeted_config import TargetedConfig
from hf_fuse.checkpoint.adapter import WEIGHTS, BoundAdapter, is_adapter, open_adapter
from hf_fuse.checkpoint.adapter_binding import listed
from hf_fuse.checkpoint.reader import Checkpoint, TensorInfo, file_sha256, resolve
from hf_fuse.errors import CheckpointError


@dataclass
class AtlasConfig(TargetedConfig):
    """Settings of aTLAS (arXiv 2407.02880) as an adapter.

    Args:
        task_vectors: folders or Hub ids of LoRA adapters of this base, by whatever ranks and modules.
        init_coefficient: what every coefficient starts from. 0 is the base (the paper's choice), 1 the sum of all.
        target_modules: names of the modules to adapt; default: all that any of the LoRAs adapts.
        exclude_modules, modules_to_save, layers_to_transform, layers_pattern: as for LoRA.
        revisions: of those that are on the Hub, in the same order (None elsewhere); filled in with commits, so that a
            saved adapter finds its LoRAs as they were.
        sha256: filled in: hashes of the LoRAs' weights, in their order. Loading refuses other weights, to which the
            coefficients would not belong.

    The LoRAs are not copied. Where they lie elsewhere, load the config, set its ``task_vectors`` and pass it to
    ``PeftModel.from_pretrained``; or make one LoRA of all (:func:`hf_fuse.adapters.low_rank.to_lora`).

    The paper trains with AdamW, learning rate 0.1 and weight decay 0.1, which pulls towards the base.
    """

    task_vectors: list[str] = field(default_factory=list, metadata={"help": "Folders or Hub ids of LoRA adapters."})
    init_coefficient: float = field(default=0.0, metadata={"help": "Start of every coefficient."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of the modules to adapt; by default all that the LoRAs adapt."}
    )
    revisions: list[str | None] | None = field(default=None, metadata={"help": "Of the LoRAs on the Hub; filled in."})
    sha256: list[str] | None = field(default=None, metadata={"help": "Of the LoRAs' weights; filled in."})

    target_parameters = None
    bias = "none"

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType["ATLAS"]
        if not isinstance(self.task_vectors, (list, tuple)):
            raise ValueError(f"task_vectors is {self.task_vectors!r}, expected a list of folders or Hub ids.")
        if not isinstance(self.init_coefficient, (int, float)) or not math.isfinite(self.init_coefficient):
            raise ValueError(f"init_coefficient is {self.init_coefficient!r}, expected a finite number.")
        self.task_vectors = [str(vector) for vector in self.task_vectors]
        if len({*self.task_vectors}) < len(self.task_vectors):
            raise ValueError(f"task_vectors: one is listed twice in {self.task_vectors}.")


class AtlasLayer(LowRankLayer):
    """A linear layer with coefficients ``atlas_lambda`` ``[V]`` of V frozen low-rank changes.

    The factors of all changes lie one after the other in ``down`` ``[R, in]`` and ``up`` ``[out, R]``, scales included;
    ``owner`` ``[R]`` says whose each rank is. A vector that leaves this module alone owns none of them.
    """

    adapter_layer_names = ("atlas_lambda",)
    other_param_names = ("dropout", "down", "up", "owner")

    def __init__(self, base_layer: nn.Module, name: str):
        super().__init__(base_layer, name)
        self.atlas_lambda = nn.ParameterDict()
        self.down, self.up, self.owner = BufferDict(), BufferDict(), BufferDict()

    def update_layer(self, adapter_name: str, config: AtlasConfig, vectors: Sequence[BoundAdapter]) -> None:
        self.atlas_lambda[adapter_name] = nn.Parameter(torch.full((len(vectors),), float(config.init_coefficient)))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        # Only now: the factors keep their own precision, whatever the base's.
        weight = f"{self.name}.weight"
        changes = {v: vector.factors(weight) for v, vector in enumerate(vectors) if weight in vector.low_rank}
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        self.down[adapter_name] = torch.cat([right for _, right, _ in changes.values()]).to(device)
        self.up[adapter_name] = torch.cat([left * scale for left, _, scale in changes.values()], dim=1).to(device)
        ranks = torch.tensor([right.shape[0] for _, right, _ in changes.values()])
        self.owner[adapter_name] = torch.tensor([*changes]).repeat_interleave(ranks).to(device)

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        lambda_V = self.atlas_lambda[adapter_name]
        down_Ri, up_oR = (held[adapter_name].to(lambda_V.dtype) for held in (self.down, self.up))
        return down_Ri, up_oR * lambda_V[self.owner[adapter_name]]


class AtlasModel(LowRankModel):
    """Adds aTLAS to a model; made by ``get_peft_model(model, AtlasConfig(task_vectors=[...]))``."""

    prefix = "atlas_"
    tuner_layer_cls = AtlasLayer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        vectors = open_vectors(config, model)
        try:
            config.target_modules = _targets(config, vectors)
            self._layer_arguments = (vectors,)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            self._layer_arguments = ()
            for vector in vectors:
                vector.close()


def open_vectors(config: AtlasConfig, model: nn.Module) -> list[BoundAdapter]:
    """Opens the LoRAs and finds the module of ``model`` that each of their factor pairs changes.

    Raises:
        CheckpointError: no LoRAs; one that is not a plain LoRA of this model, that retrained whole modules other than
            those in ``modules_to_save`` (where a new copy is trained), or whose weights are not those of ``sha256``.
    """
    if not config.task_vectors:
        raise CheckpointError("task_vectors: is empty. Give the folders or Hub ids of LoRA adapters of this base.")
    described = _described(model)
    revisions = dict(zip(config.task_vectors, config.revisions or []))
    commits, hashes, vectors = [], [], []
    for ref in config.task_vectors:
        folder, _, commit = resolve(ref, None if Path(ref).is_dir() else revisions.get(ref))
        if not is_adapter(folder):
            raise CheckpointError(f"{ref}: is not an adapter (no adapter_config.json). task_vectors are LoRA adapters.")
        adapter = open_adapter(folder, ref)
        hashes.append(file_sha256(folder / WEIGHTS))
        commits.append(commit)
        own = config.modules_to_save or []
        whole = [n for n in adapter.full if not any(re.search(rf"(^|\.){end}\.", n) for end in own)]
        # PEFT stores the frozen weight of an adapted output layer as well: of no interest unless it was resized.
        frozen = {f"{module}.weight" for module in adapter.factors} & described.tensors.keys()
        whole = [n for n in whole if n not in frozen or adapter.full[n].shape != described.tensors[n].shape]
        whole += [f"{module}.bias" for module, part in adapter.factors.items() if "bias" in part]
        if whole:
            raise CheckpointError(
                f"{ref}: has trained {listed(whole)} as a whole, which coefficients of low-rank changes do not cover. "
                "Use LoRAs without these, or list the modules in modules_to_save to train a copy of your own."
            )
        # PEFT's orientation throughout, so no weight can look transposed.
        settings = adapter.config | {"fan_in_fan_out": False}
        vectors.append(replace(adapter, config=settings, full={}).bind(described, strict=False))
    if config.sha256 not in (None, hashes):
        changed = [ref for ref, was, now in zip(config.task_vectors, config.sha256, hashes) if was != now]
        raise CheckpointError(
            f"task_vectors: {listed(changed) or 'their number'} changed since these coefficients were trained. Restore "
            "the LoRAs, or train again with sha256=None."
        )
    config.sha256, config.revisions = hashes, commits
    return vectors


def coefficients(model: PeftModel, adapter_name: str = "default") -> dict[str, dict[str, float]]:
    """``{module: {task vector: coefficient}}``; a vector that does not change a module is left out."""
    names = model.peft_config[adapter_name].task_vectors
    return {
        layer.name: {names[v]: layer.atlas_lambda[adapter_name][v].item() for v in layer.owner[adapter_name].unique()}
        for layer in atlas_layers(model, adapter_name)
    }


def plot_coefficients(model: PeftModel, path: str | Path, *, adapter_name: str = "default") -> Path:
    """A heat map of modules and task vectors; returns ``path``. Needs matplotlib."""
    from hf_fuse.plots import heat_map

    learned = coefficients(model, adapter_name)
    vectors = model.peft_config[adapter_name].task_vectors
    return heat_map(
        [[by_vector.get(vector, math.nan) for vector in vectors] for by_vector in learned.values()],
        row_labels=list(learned),
        column_labels=[Path(vector).name for vector in vectors],
        path=path,
        title="aTLAS coefficients",
        diverging=True,
    )


def coefficient_penalty(model: nn.Module, *, power: float = 1.0, adapter_name: str = "default") -> Tensor:
    """``0.5 * mean over modules of ||lambda||_power``, the paper's optional regulariser; 1 favours few vectors."""
    rows = [layer.atlas_lambda[adapter_name] for layer in atlas_layers(model, adapter_name)]
    norms = [torch.linalg.vector_norm(lambda_V, power) for lambda_V in rows]
    return 0.5 * torch.stack(norms).mean()


def atlas_layers(model: nn.Module, adapter_name: str) -> list[AtlasLayer]:
    return [m for m in model.modules() if isinstance(m, AtlasLayer) and adapter_name in m.atlas_lambda]


def _targets(config: AtlasConfig, vectors: Sequence[BoundAdapter]) -> set[str]:
    """The adapted modules that the config admits."""
    modules = {name.removesuffix(".weight") for vector in vectors for name in vector.low_rank}
    wanted = config.target_modules
    if wanted is None or wanted == "all-linear":
        wanted = {module.rpartition(".")[2] for module in modules}  # whole names would bypass layers_to_transform
    admitted = {m for m in modules if check_target_module_exists(replace(config, target_modules=wanted), m)}
    if not admitted:
        raise ValueError(
            f"Target modules {wanted} not found among those that the LoRAs adapt: {listed(sorted(modules))}. "
            "Check target_modules, exclude_modules and layers_to_transform."
        )
    return admitted


def _described(model: nn.Module) -> Checkpoint:
    """The weights of a model in memory as if they were on disk: names and shapes ``[out, in]``, no bytes."""
    tensors: dict[str, TensorInfo] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (f"{name}.",)
            module = module.get_base_layer()
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            shape = tuple(weight.shape)
            with suppress(TypeError):
                shape = linear_size(module, name)[::-1]
            tensors[f"{name}.weight"] = TensorInfo(f"{name}.weight", "F32", shape, Path(), 0)
    base = Checkpoint(type(model).__name__, Path(), tensors)
    base.config = {}
    return base


register("atlas", AtlasConfig, AtlasModel)
