"""From a store of TALL-masks back to the model of one task: ``theta_0 + mask_k * tau_M``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fuse.checkpoint.reader import FLOAT_DTYPES, TensorInfo, read_header
from hf_fuse.errors import CheckpointError, RecipeError
from hf_fuse.merge.store import write_restored
from hf_fuse.merge.tall_format import KIND, fingerprint, read_store

if TYPE_CHECKING:
    from torch import Tensor

    from hf_fuse.merge.plan import Plan
    from hf_fuse.merge.sources import Buffers


def extract_tall(
    store: str | Path,
    task: str,
    output: str | Path,
    overwrite: bool = False,
    *,
    base: str | None = None,
    workers: int | None = None,
) -> Path:
    """Restores the model of one task from a store, in the base's dtype and with its config and tokenizer.

    Args:
        store: folder made by :func:`~hf_fuse.merge.tall_store.compress_tall`.
        task: one of its tasks.
        output: the folder to make.
        overwrite: replace an existing output.
        base: where the base is now, if not where it was.
        workers: threads.

    Returns:
        The output folder.

    Raises:
        FuseError: no such task, another base, a damaged store, or an output that can't be made.
    """
    from hf_fuse.merge.plan import plan

    store = Path(store).expanduser().absolute()
    facts = read_store(store)
    if task not in facts["tasks"]:
        known = ", ".join(sorted(facts["tasks"]))
        raise RecipeError(f"{store}: holds no task {task!r}. Its tasks: {known}.")
    reference = facts["base"] | ({"path": base} if base else {})
    if base:
        reference.pop("revision", None)
    made = plan({"method": "passthrough", "models": [reference]}, output=output, overwrite=overwrite)
    parent = made.reference
    if fingerprint(parent.checkpoint) != facts["base_fingerprint"]:
        raise CheckpointError(
            f"{parent.ref.key}: is not the base that {store} was made with. Name the right one with `base`."
        )
    source = TallSource(
        parent.source, read_header(store / facts["multitask"])[0], read_header(store / facts["tasks"][task]["mask"])[0]
    )
    return write_restored(made, source, _card(made, facts, task), overwrite=overwrite, workers=workers)


class TallSource:
    """A base seen as the model of one task. Tensors that the task's file does not know are the base's."""

    def __init__(self, plain: Any, vector: Mapping[str, TensorInfo], masks: Mapping[str, TensorInfo]):
        self.plain, self.vector, self.masks = plain, vector, masks
        self.tensors: Mapping[str, TensorInfo] = plain.tensors
        for name, mask in masks.items():
            shape = self.tensors[name].shape if name in self.tensors else None
            if mask.dtype == "U8":
                fits = name in vector and vector[name].shape == shape and mask.shape == (-(-vector[name].numel // 8),)
            else:
                fits = mask.dtype in FLOAT_DTYPES and mask.shape == shape
            if not fits:
                raise CheckpointError(f"{mask.file}: tensor {name} does not fit the base. Make the store again.")

    def read(self, name: str, start: int, out: Tensor, buffers: Buffers) -> None:
        import numpy as np
        import torch

        from hf_fuse.merge.sources import read_numbers

        mask = self.masks.get(name)
        if mask is not None and mask.dtype != "U8":
            read_numbers(mask, start, out, buffers)
            return
        self.plain.read(name, start, out, buffers)
        if mask is None:
            return
        change, skip = buffers.numbers("tall", out.numel()), start % 8
        read_numbers(self.vector[name], start, change, buffers)
        packed = np.empty((skip + out.numel() + 7) // 8, dtype=np.uint8)
        buffers.pool.read(mask, start // 8, memoryview(packed))
        bits = np.unpackbits(packed, bitorder="little")[skip : skip + out.numel()]
        out.add_(change.mul_(torch.from_numpy(bits).to(change.dtype)))

    def delta_from(self, base: object, name: str) -> bool:
        return False

    def raw(self, name: str, start: int, out: Tensor, buffers: Buffers) -> None:
        self.plain.raw(name, start, out, buffers)


def _card(made: Plan, facts: dict[str, Any], task: str) -> dict[str, Any]:
    from hf_fuse.card import read_license

    checkpoint = made.reference.checkpoint
    model = facts["tasks"][task]["model"]
    repo_id = model["path"] if "revision" in model else None
    rows = [
        {"ref": checkpoint.ref, "repo_id": checkpoint.repo_id, "commit": checkpoint.commit,
         "license": read_license(checkpoint.folder), "role": "base", "weight": None},
        {"ref": model["path"], "repo_id": repo_id, "commit": model.get("revision"), "license": None, "role": "model",
         "weight": None},
    ]  # fmt: skip
    others = len(facts["tasks"]) - 1
    return {
        "title": task,
        "method": KIND,
        "summary": "A fine-tuned model, restored from a store of TALL-masks: close to the original, not equal.",
        "paper": "https://arxiv.org/abs/2405.07813",
        "made": f"Restored with hf_fuse: the base, and of the summed changes of this and {others} other fine-tunes "
        "those that this task's mask keeps ([paper](https://arxiv.org/abs/2405.07813)).",
        "parents": rows,
    }
