"""What a LoRA folder has to hold so that PEFT, and :mod:`hf_fuse.checkpoint.adapter`, read back what was meant.

Every pair of factors is stored with scale 1 (``lora_alpha = r``). Where ranks differ, patterns say so under keys that
PEFT's own matching rule, applied here to every module, resolves to the right rank.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_fuse.checkpoint.adapter import FINGERPRINT, WEIGHTS
from hf_fuse.checkpoint.writer import Layout, lay_out

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Pair:
    """The two factors of one module's change.

    ``shape`` is that of the base's tensor; ``transposed`` says that it is stored ``[in, out]`` (Conv1D, embeddings).
    """

    module: str
    shape: tuple[int, ...]
    rank: int
    transposed: bool = False
    embedding: bool = False

    @property
    def sides(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of both factors as PEFT stores them, ``lora_B`` first."""
        ends = ("lora_embedding_B", "lora_embedding_A") if self.embedding else ("lora_B.weight", "lora_A.weight")
        outer, *inner = reversed(self.shape) if self.transposed else self.shape
        shapes = (outer, self.rank, *(1 for _ in inner[1:])), (self.rank, *inner)
        return {f"{PREFIX}{self.module}.{end}": shape for end, shape in zip(ends, shapes)}

    def stored(self, left_MR: Tensor, right_RN: Tensor) -> dict[str, Tensor]:
        """The factors of ``left @ right`` (in the base's orientation) under the names and in the shapes of PEFT."""
        up, down = (right_RN.T, left_MR.T) if self.transposed else (left_MR, right_RN)
        return {name: side.reshape(shape) for (name, shape), side in zip(self.sides.items(), (up, down))}


def adapter_layout(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> Layout:
    """One ``adapter_model.safetensors`` for ``(name, dtype code, shape)``, however large: PEFT reads no shards."""
    return lay_out(tensors, 1 << 62, WEIGHTS.removesuffix(".safetensors"))


def whole_name(name: str, modules: Collection[str]) -> str:
    """The stored name of a tensor kept whole. PEFT wraps adapted modules, so theirs lie one level deeper."""
    module, _, leaf = name.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{leaf}" if module in modules else PREFIX + name


def adapter_config(
    pairs: Collection[Pair],
    *,
    base: str | None,
    fingerprint: str | None = None,
    targets: list[str],
    inherited: Mapping[str, Any] | None = None,
    modules_to_save: Collection[str] = (),
    bias: str = "none",
    lora_bias: bool = False,
    fan_in_fan_out: bool = False,
) -> dict[str, Any]:
    """``adapter_config.json`` for these pairs.

    Args:
        base: id or folder of the base model.
        fingerprint: see :func:`~hf_fuse.checkpoint.adapter.base_fingerprint`.
        targets: ``target_modules`` that name exactly the modules of ``pairs``.
        inherited: settings taken over from elsewhere, such as ``task_type``.
    """
    rank, pattern = rank_settings({pair.module: pair.rank for pair in pairs})
    config = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base, "revision": None,
        "inference_mode": True, "r": rank, "lora_alpha": rank, "rank_pattern": pattern, "alpha_pattern": pattern,
        "target_modules": targets, "modules_to_save": sorted(modules_to_save) or None, "exclude_modules": None,
        "layers_to_transform": None, "layers_pattern": None, "lora_dropout": 0.0, "init_lora_weights": True,
        "bias": bias, "lora_bias": lora_bias, "fan_in_fan_out": fan_in_fan_out, "use_rslora": False, "use_dora": False,
    } | dict(inherited or {})  # fmt: skip
    if fingerprint:
        config[FINGERPRINT] = fingerprint
    return dict(sorted(config.items()))


def rank_settings(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """``(r, rank_pattern)`` that give every module its rank: the commonest rank, and what differs from it.

    A kind of module (the last part of its name) whose members agree has one entry.
    """
    usual = max(Counter(ranks.values()).items(), key=lambda entry: (entry[1], entry[0]))[0] if ranks else 1
    kinds: dict[str, set[int]] = defaultdict(set)
    for module, rank in ranks.items():
        kinds[module.rpartition(".")[2]].add(rank)
    agreed = {kind: min(found) for kind, found in sorted(kinds.items()) if len(found) == 1}
    pattern = {re.escape(kind): rank for kind, rank in agreed.items() if rank != usual}
    mixed = {m: rank for m, rank in ranks.items() if m.rpartition(".")[2] not in agreed}
    plain = {m: rank for m, rank in sorted(mixed.items()) if rank != usual}
    # Releases of PEFT before the "^" know plain names only, so these are preferred where they are unambiguous.
    anchored = {f"^{re.escape(m)}": rank for m, rank in sorted(mixed.items())}
    for names in (plain, anchored):
        if all(_looked_up(pattern | names, m, usual) == rank for m, rank in ranks.items()):
            break
    return usual, pattern | names


def _looked_up(pattern: Mapping[str, int], module: str, default: int) -> int:
    """PEFT's rule for patterns."""
    key = next((key for key in pattern if re.match(rf"(.*\.)?({key})$", module)), module)
    return pattern.get(key, default)


def target_list(modules: Collection[str], others: Iterable[str]) -> list[str]:
    """``target_modules``: kinds of modules where no other module of the model is of that kind, full names else."""
    taken = {module.rpartition(".")[2] for module in others}
    return sorted({module if (kind := module.rpartition(".")[2]) in taken else kind for module in modules})
