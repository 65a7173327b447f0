"""A LoRA folder seen as a change of its base model, computed in pieces and never held whole.

LoRA (https://arxiv.org/abs/2106.09685) stores two thin factors per adapted weight. :func:`open_adapter` reads the
folder's config and header, :meth:`Adapter.bind` finds each factor pair's tensor in the base, and
:meth:`BoundAdapter.delta` writes any span of ``scale * left @ right`` in the base tensor's own orientation. Whatever
the factors alone do not describe exactly (DoRA, routed variants, a base changed at initialisation) is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from hf_fuse.checkpoint.adapter_binding import CONFIG, MERGE_FIRST, Binding, LowRank, listed
from hf_fuse.checkpoint.reader import REDOWNLOAD, TORCH_NAMES, Checkpoint, FilePool, TensorInfo, read_header, read_json
from hf_fuse.errors import CheckpointError

if TYPE_CHECKING:
    import torch

WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
FINGERPRINT = "hf_fuse_base_fingerprint"
BLOCK = 131072  # elements of a delta multiplied at a time: half a MiB in fp32 stays in the processor's cache
CACHE_BYTES = 64 << 20
SAMPLES, SAMPLE_BYTES = 32, 4096

# These initialisations subtract the initial factors from the base: the factors fit weights that nobody published.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
HARMLESS_SETTINGS = {"use_rslora", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"}
REFUSED_SETTINGS = {
    "use_dora": "DoRA rescales the base's own weights, which no low-rank change can say",
    "alora_invocation_tokens": "activated LoRA depends on the prompt and has no merged form",
    "layer_replication": "the adapter belongs to a model with repeated layers",
    "trainable_token_indices": "single retrained embedding rows are not supported",
    "target_parameters": "LoRA on fused expert parameters is not supported",
}
SETTING_TYPES = {
    "r": int, "lora_alpha": (int, float), "rank_pattern": dict, "alpha_pattern": dict, "modules_to_save": list,
    "target_modules": (list, str), "exclude_modules": (list, str), "base_model_name_or_path": str,
    "layers_to_transform": (list, int), "layers_pattern": (list, str), "bias": str,
}  # fmt: skip

_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?:(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.(?P<leaf>weight|bias)"
    r"|(?P<embedding>embedding_[AB])(?:\.(?P<named>[^.]+))?)"
)


@dataclass
class Adapter:
    """A LoRA folder. ``factors`` (by module) and ``full`` (by tensor) have the names of the model it was trained on."""

    ref: str
    folder: Path
    config: dict
    infos: dict[str, TensorInfo]
    factors: dict[str, dict[str, TensorInfo]]
    full: dict[str, TensorInfo]
    repo_id: str | None = None
    commit: str | None = None

    @property
    def base_ref(self) -> str | None:
        """The base that the adapter's own config names."""
        return self.config.get("base_model_name_or_path") or None

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.infos.values())

    def bind(self, base: Checkpoint, *, strict: bool = True) -> BoundAdapter:
        """Finds the base tensor of every adapter tensor and checks that the two belong together.

        Args:
            base: the model to which the adapter is added.
            strict: False accepts a base with other weights, and layers of the base that the adapter leaves out.

        Raises:
            CheckpointError: modules that the base lacks or has twice, shapes that disagree, layers left out, a base
                with other weights than the one trained on, full tensors that nothing explains.
        """
        recorded = self.config.get(FINGERPRINT)
        if strict and recorded and recorded != base_fingerprint(base):
            raise CheckpointError(
                f"adapter {self.ref} (trained on {self.base_ref}) on base {base.ref}: {FINGERPRINT} in its {CONFIG} "
                "says that it was trained on other weights. Name the right base, or remove that field if this is meant."
            )
        return BoundAdapter(self, base, *Binding(self.ref, self.config, self.factors, self.full, base).run(strict))


class BoundAdapter:
    """An adapter on its base. ``low_rank`` and ``replaced`` are keyed by the base's tensor names.

    The adapted tensor is ``replaced[name]`` where that exists, else the base's, plus :meth:`delta` where ``low_rank``
    has the name. ``replaced`` holds tensors stored whole (``modules_to_save``, biases, resized embeddings); it may name
    tensors that the base lacks, such as a new classification head.
    """

    def __init__(
        self, adapter: Adapter, base: Checkpoint, low_rank: dict[str, LowRank], replaced: dict[str, TensorInfo]
    ):
        self.adapter, self.base, self.low_rank, self.replaced = adapter, base, low_rank, replaced
        self._pool = FilePool()
        self._held: OrderedDict[tuple, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()
        self._lock = Lock()

    def delta(self, name: str, start: int, stop: int, out: torch.Tensor) -> None:
        """Writes elements ``[start, stop)`` of the flattened delta into 1-D ``out`` (fp32 or fp64, on the CPU).

        The product is formed in row blocks that depend on the tensor's shape alone, so every element has the same bits
        however the tensor is cut. Safe to call from several threads.
        """
        import torch

        left, right, scale = self.factors(name, out.dtype)
        width = right.shape[1]
        rows = max(1, BLOCK // width)
        for first in range(start // (rows * width) * rows, left.shape[0], rows):
            begin = first * width
            if begin >= stop:
                break
            block = left[first : first + rows]
            # A fresh aligned block: BLAS may round differently when its output starts elsewhere in memory.
            product = torch.empty(block.shape[0], width, dtype=out.dtype)
            # The scale after the product: with more than one thread BLAS may apply its own alpha in another place.
            torch.mm(block, right, out=product).mul_(scale)
            lo, hi = max(start, begin), min(stop, begin + product.numel())
            out[lo - start : hi - start] = product.view(-1)[lo - begin : hi - begin]

    def factors(self, name: str, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor, float]:
        """``(left [m, r], right [r, n], scale)``: ``scale * left @ right``, reshaped, is the delta of tensor ``name``.

        ``m`` is the tensor's first axis, ``n`` all others together. ``dtype`` is fp32 unless given.
        """
        import torch

        change, dtype = self.low_rank[name], dtype or torch.float32
        with self._lock:
            pair = self._held.get((name, dtype))
            if pair:
                self._held.move_to_end((name, dtype))
        if pair is None:
            up = self._read(change.up, dtype).reshape(-1, change.rank)
            down = self._read(change.down, dtype).flatten(1) if change.down else torch.ones(1, 1, dtype=dtype)
            pair = (down.T.contiguous(), up.T.contiguous()) if change.transposed else (up, down)
            with self._lock:
                self._held[name, dtype] = pair
                while sum(t.nbytes for held in self._held.values() for t in held) > CACHE_BYTES and len(self._held) > 1:
                    self._held.popitem(last=False)
        return *pair, change.scale

    def close(self) -> None:
        self._pool.close()
        with self._lock:
            self._held.clear()

    def _read(self, info: TensorInfo, dtype: torch.dtype) -> torch.Tensor:
        import torch

        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        self._pool.read(info, 0, memoryview(raw.numpy()))
        return raw.view(getattr(torch, TORCH_NAMES[info.dtype])).reshape(info.shape).to(dtype)


def is_adapter(folder: Path) -> bool:
    """Whether ``folder`` was saved by PEFT: it has an ``adapter_config.json``."""
    return (folder / CONFIG).is_file()


def open_adapter(folder: Path, ref: str, *, allow_pickle: bool = False) -> Adapter:
    """Reads a LoRA folder's config and header; ``ref`` is what the user wrote. Imports no torch (pickles aside).

    Raises:
        CheckpointError: no weights, damaged files, tensors or settings that are not a plain low-rank change of weights.
    """
    if any((folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")):
        raise CheckpointError(
            f"{folder}: holds a full model beside {CONFIG}; which of the two is meant cannot be known. Move one to a "
            "folder of its own."
        )
    config = read_json(folder / CONFIG)
    _check_settings(folder / CONFIG, config)
    path = folder / WEIGHTS
    if path.exists():
        infos = read_header(path)[0]
    elif not (folder / PICKLED).exists():
        raise CheckpointError(f"{folder}: has {CONFIG} but no {WEIGHTS}. {REDOWNLOAD}")
    elif not allow_pickle:
        raise CheckpointError(
            f"{folder / PICKLED}: pickled weights can run code when loaded. Convert them to {WEIGHTS}, or pass "
            "--allow-pickle to load them with torch's restricted unpickler."
        )
    else:
        from hf_fuse.checkpoint.pickled import pickled_tensors

        path = folder / PICKLED
        infos = pickled_tensors(path)
    return Adapter(ref, folder, config, infos, *_sorted_tensors(path, infos))


def base_fingerprint(base: Checkpoint) -> str:
    """Hash of a checkpoint's tensor names, dtypes, shapes, and of 4 KiB out of each of up to 32 tensors.

    Tells models of one shape apart without reading them, whatever their sharding. It is kept in an adapter's config as
    ``hf_fuse_base_fingerprint``.
    """
    infos = [base.tensors[name] for name in sorted(base.tensors)]
    digest = hashlib.sha256(json.dumps([(i.name, i.dtype, i.shape) for i in infos]).encode())
    # Norms and biases often survive fine-tuning unchanged, so the sample is spread over the matrices.
    matrices = [i for i in infos if i.is_float and len(i.shape) > 1 and i.numel] or [i for i in infos if i.numel]
    count = min(SAMPLES, len(matrices))
    pool = FilePool()
    try:
        for place in range(count):
            info = matrices[place * len(matrices) // count]
            width = info.nbytes // info.numel
            elements = min(info.numel, SAMPLE_BYTES // width)
            sample = bytearray(elements * width)
            pool.read(info, (info.numel - elements) // 2, memoryview(sample))
            digest.update(sample)
    finally:
        pool.close()
    return digest.hexdigest()


def _check_settings(path: Path, config: dict) -> None:
    def refuse(name: str, why: str, fix: str = MERGE_FIRST) -> CheckpointError:
        return CheckpointError(f"{path}: {name} is {json.dumps(config.get(name))[:100]}: {why}. {fix}")

    if config.get("peft_type") != "LORA":
        raise refuse("peft_type", "only LORA adapters can be read as a low-rank change of weights")
    for name, kinds in SETTING_TYPES.items():
        if config.get(name) is not None and not isinstance(config[name], kinds):
            raise refuse(name, "not the kind of value that PEFT writes there", REDOWNLOAD)
    for name, value in config.items():
        if value is None or value is False or value in ([], {}):
            continue
        if name in REFUSED_SETTINGS:
            raise refuse(name, REFUSED_SETTINGS[name])
        if name == "init_lora_weights" and str(value).lower().startswith(BASE_CHANGING_INITS):
            raise refuse(
                name,
                "this initialisation changed the base, and the factors fit that changed base only",
                "Save the adapter with save_pretrained(..., path_initial_model_for_weight_conversion=...), which "
                "restates it for the original base.",
            )
        if (name.startswith("use_") or name.endswith("_config")) and name not in HARMLESS_SETTINGS:
            raise refuse(name, "a variant of LoRA that is not known to be a plain low-rank change")


def _sorted_tensors(path: Path, infos: dict[str, TensorInfo]) -> tuple[dict[str, dict], dict[str, TensorInfo]]:
    """``({module: {side: factor}}, {name: tensor stored whole})``, both without the prefix that PEFT puts before names.

    Sides are ``A``, ``B``, ``bias``, ``embedding_A`` and ``embedding_B``.
    """
    factors: dict[str, dict[str, TensorInfo]] = {}
    full: dict[str, TensorInfo] = {}
    unknown, adapters = [], set()
    for key, info in infos.items():
        name = key.removeprefix("base_model.model.")
        match = _FACTOR.fullmatch(name)
        if match:
            adapters.add(match["adapter"] or match["named"])
            group = factors.setdefault(match["module"], {})
            side = match["embedding"] or (match["side"] if match["leaf"] == "weight" else "bias")
            known = (match["side"], side) != ("A", "bias")
        else:
            # A wrapped module keeps its own tensors under base_layer: biases that were trained, resized embeddings.
            group, side = full, name.replace(".base_layer.", ".")
            known = not re.search(r"(^|\.)(lora_|token_adapter\.)", side)
        if known and side not in group:
            group[side] = info
        else:
            unknown.append(key)
    if len(adapters) > 1:
        names = listed(sorted(str(name) for name in adapters))
        raise CheckpointError(f"{path}: holds several adapters ({names}). Save each in a folder of its own.")
    if unknown:
        raise CheckpointError(
            f"{path}: {len(unknown)} unknown tensor(s), not part of a plain LoRA adapter: {listed(unknown)}. "
            f"{MERGE_FIRST}"
        )
    if not infos:
        raise CheckpointError(f"{path}: holds no tensors. {REDOWNLOAD}")
    for module, part in factors.items():
        kind = "embedding_" if any(side.startswith("embedding_") for side in part) else ""
        lost = [f"{kind}{side}" for side in "AB" if f"{kind}{side}" not in part]
        if lost:
            raise CheckpointError(
                f"{path}: module {module!r} has {listed(info.name for info in part.values())} but no lora_{lost[0]}: "
                f"the adapter is incomplete. {REDOWNLOAD}"
            )
        for info in part.values():
            if not (info.is_float and info.numel):
                raise CheckpointError(
                    f"{path}: tensor {info.name!r} is {info.dtype} {list(info.shape)}, expected filled floating-point "
                    "factors. If it was saved from a sharded run, gather the weights and save it again."
                )
    return factors, full
