"""Models from a store of Twin-Merging: the shared model plus weighted low-rank differences."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fuse.checkpoint.reader import TensorInfo, read_header
from hf_fuse.errors import CheckpointError, RecipeError
from hf_fuse.merge.store import STORE_FILE, read_description, write_restored

if TYPE_CHECKING:
    from torch import Tensor

    from hf_fuse.checkpoint.adapter import BoundAdapter
    from hf_fuse.merge.sources import Buffers

KIND, FORMAT = "twin", 1
SHARED = "shared"
PAPER = "https://arxiv.org/abs/2406.15479"


def extract_twin(
    store: str | Path,
    output: str | Path,
    weights: Mapping[str, float],
    *,
    out_dtype: str | None = None,
    overwrite: bool = False,
    workers: int | None = None,
) -> Path:
    """Writes ``theta_s + sum_k w_k v_k``.

    Args:
        store: folder made by :func:`~hf_fuse.merge.twin_store.compress_twin`.
        output: the folder to make.
        weights: a number for each task wanted; ``{task: 1}`` restores that fine-tune, up to what its rank left out.
        out_dtype: of the result, else the shared model's.
        overwrite: replace an existing output.
        workers: threads.

    Returns:
        The output folder.

    Raises:
        FuseError: no such task, a damaged store, or an output that can't be made.
    """
    from hf_fuse.merge.plan import plan

    store = Path(store).expanduser().absolute()
    facts = read_store(store)
    for task, weight in weights.items():
        if task not in facts["tasks"]:
            raise RecipeError(f"{store}: holds no task {task!r}. Its tasks: {', '.join(sorted(facts['tasks']))}.")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not abs(weight) < float("inf"):
            raise RecipeError(f"weights: {weight!r} for {task}, expected a number.")
    recipe = {"method": "passthrough", "models": [str(store / SHARED)]} | (
        {"out_dtype": out_dtype} if out_dtype else {}
    )
    made = plan(recipe, output=output, overwrite=overwrite)
    source = TwinSource(made.reference.source, store, [(facts["tasks"][task], w) for task, w in weights.items() if w])
    mix = " + ".join(f"{weight:g} x {task}" for task, weight in weights.items())
    rows = [
        {"ref": model["path"], "repo_id": model["path"] if "revision" in model else None,
         "commit": model.get("revision"), "license": None, "role": "model", "weight": weights.get(task)}
        for task, model in ((task, entry["model"]) for task, entry in facts["tasks"].items())
    ]  # fmt: skip
    card = {
        "title": "-".join(weights),
        "method": KIND,
        "summary": f"A mix of fine-tuned models ({mix}), from a merged model and the low-rank difference of each.",
        "paper": PAPER,
        "made": f"Made with hf_fuse from a store of Twin-Merging: {len(rows)} fine-tunes merged by {facts['method']}, "
        f"plus {mix} ([paper]({PAPER})).",
        "parents": rows,
    }
    try:
        return write_restored(made, source, card, overwrite=overwrite, workers=workers)
    finally:
        source.close()


def read_store(store: Path) -> dict[str, Any]:
    """The description of a store of this kind, checked.

    Raises:
        CheckpointError: no store, one of another kind, or a damaged one.
    """
    facts = read_description(store)
    if facts.get("kind") != KIND or facts.get("format") != FORMAT:
        raise CheckpointError(
            f"{store}: {STORE_FILE} says kind {facts.get('kind')!r}, format {facts.get('format')!r}. Expected "
            f"{KIND!r}, {FORMAT}."
        )
    try:
        files = [entry["expert"] for entry in facts["tasks"].values()]
        sound = facts["shared"] == SHARED and isinstance(facts["method"], str)
        sound = sound and all(isinstance(entry["model"]["path"], str) for entry in facts["tasks"].values())
        sound = sound and all(f is None or re.fullmatch(r"expert-\w[\w.-]*\.safetensors", f) for f in files)
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise CheckpointError(f"{store / STORE_FILE}: is damaged. Make the store again.")
    return facts


class TwinSource:
    """The shared model plus weighted differences of its experts, in pieces; nothing is held whole."""

    def __init__(self, plain: Any, store: Path, experts: list[tuple[dict[str, Any], float]]):
        from hf_fuse.checkpoint.adapter import Adapter, BoundAdapter
        from hf_fuse.checkpoint.adapter_binding import LowRank

        self.plain, self.tensors = plain, plain.tensors
        self.experts: list[tuple[BoundAdapter, dict[str, TensorInfo], float]] = []
        for entry, weight in experts:
            infos = read_header(store / entry["expert"])[0] if entry["expert"] else {}
            factors, whole = {}, {}
            for name, info in infos.items():
                stem, _, side = name.rpartition(".")
                if name in self.tensors:
                    whole[name] = info
                elif side == "left" and f"{stem}.right" in infos and stem in self.tensors:
                    factors[stem] = LowRank(stem, self.tensors[stem].shape, 1.0, info, infos[f"{stem}.right"])
                elif side != "right" or f"{stem}.left" not in infos:
                    raise _unfit(info)
            for name, info in whole.items():
                if info.shape != self.tensors[name].shape or not info.is_float:
                    raise _unfit(info)
            for part in factors.values():
                shapes = (part.up.shape[:1] + part.down.shape[1:], part.up.shape[1:])
                if shapes != (part.shape, part.down.shape[:1]) or not (part.up.is_float and part.down.is_float):
                    raise _unfit(part.up)
            adapter = Adapter(str(store), store, {}, infos, {}, {})
            self.experts.append((BoundAdapter(adapter, plain.checkpoint, factors, {}), whole, weight))

    def read(self, name: str, start: int, out: Tensor, buffers: Buffers) -> None:
        from hf_fuse.merge.sources import read_numbers

        self.plain.read(name, start, out, buffers)
        change = buffers.numbers("twin", out.numel())
        for factors, whole, weight in self.experts:
            if name in factors.low_rank:
                factors.delta(name, start, start + out.numel(), change)
            elif name in whole:
                read_numbers(whole[name], start, change, buffers)
            else:
                continue
            out.add_(change, alpha=weight)

    def delta_from(self, base: object, name: str) -> bool:
        return False

    def raw(self, name: str, start: int, out: Tensor, buffers: Buffers) -> None:
        self.plain.raw(name, start, out, buffers)

    def close(self) -> None:
        for factors, _, _ in self.experts:
            factors.close()


def _unfit(info: TensorInfo) -> CheckpointError:
    return CheckpointError(f"{info.file}: tensor {info.name} does not fit the shared model. Make the store again.")
