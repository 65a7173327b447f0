"""Several fine-tunes in the room of little more than one: base, multi-task vector, and one bit per weight and task.

``compress_tall`` makes the store, ``extract_tall`` restores the model of one task, ``theta_0 + mask_k * tau_M``
(TALL-masks, https://arxiv.org/abs/2405.07813). A store is a folder:

- ``store.json``: what it holds, and which base it needs;
- ``multitask.safetensors``: tau_M, in the base's dtype or the recipe's ``out_dtype``;
- ``mask-<task>.safetensors``: for each tensor the mask's bits as ``uint8 [ceil(N / 8)]``, first element in the lowest
  bit; tensors of one number are kept as they are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fuse.checkpoint.reader import (
    FLOAT_DTYPES,
    TORCH_NAMES,
    Checkpoint,
    FilePool,
    TensorInfo,
    read_header,
    read_json,
)
from hf_fuse.checkpoint.writer import Layout, PartialFolder, exclusive_output, lay_out
from hf_fuse.errors import CheckpointError, OutputError, RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from hf_fuse.merge.plan import Plan
    from hf_fuse.merge.sources import Buffers
    from hf_fuse.merge.stream import Merger
    from hf_fuse.merge.units import Unit
    from hf_fuse.recipe import Recipe

KIND, FORMAT = "tall-masks", 1
STORE_FILE, VECTOR_STEM = "store.json", "multitask"
_PROBE = 4096  # bytes of each tensor of the base that its fingerprint covers


def compress_tall(
    recipe: str | Path | dict | Recipe,
    output: str | Path | None = None,
    *,
    tasks: Sequence[str] | None = None,
    overrides: dict[str, Any] | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
    verify: bool = False,
    workers: int | None = None,
) -> Path:
    """Compresses fine-tunes of one base into a store. Streams: memory does not grow with the models.

    Args:
        recipe: as for a merge with the method ``consensus`` (which may be left out), of which ``weight``,
            ``mask_scale``, ``density``, ``election`` and ``scope`` count.
        output: the folder to make; else the recipe's.
        tasks: a name for each model; by default the last part of its path.
        overrides: dotted keys that win over the recipe.
        overwrite: replace an existing store.
        allow_pickle: accept ``.bin`` inputs.
        verify: compare Hub inputs with the Hub's hashes first.
        workers: threads.

    Returns:
        The store's folder.

    Raises:
        FuseError: with one message that says what, where and what to do.
    """
    from hf_fuse.merge.plan import plan

    recipe = _loaded(recipe, overrides)
    made = plan(recipe, output=output, overwrite=overwrite, allow_pickle=allow_pickle, verify=verify)
    if made.recipe.output is None:
        raise RecipeError("output: no folder is given. Pass --output DIR, or say output in the recipe.")
    folder = Path(made.recipe.output).expanduser().absolute()
    contents = _Contents.of(made, _task_names(made, tasks))
    with ExitStack() as stack:
        partial = stack.enter_context(exclusive_output(folder, overwrite=overwrite))
        partial.create(contents.layout)
        _fill(made, contents, partial, stack, workers)
        partial.sync()
        _describe(made, contents, partial.folder)
        partial.publish()
    return folder


def _loaded(recipe: str | Path | dict | Recipe, overrides: dict[str, Any] | None) -> Recipe:
    from hf_fuse.recipe import load_recipe

    if isinstance(recipe, dict):
        recipe = {"method": "consensus"} | recipe
    recipe = load_recipe(recipe, overrides)
    if recipe.method != "consensus":
        raise RecipeError(f"method: TALL-masks belong to consensus, the recipe says {recipe.method}. Leave it out.")
    for key in ("slices", "tokenizer", "tie_word_embeddings", "post"):
        if getattr(recipe, key):
            raise RecipeError(f"{key}: a store restores models as they were, so this can't be asked for. Leave it out.")
    said = {key for part in (recipe, *recipe.models) for key in part.parameters}
    if useless := said & {"agreement", "lambda"}:
        raise RecipeError(f"parameters: {min(useless)} has no meaning for a store of masks. Leave it out.")
    return recipe


def _task_names(made: Plan, tasks: Sequence[str] | None) -> dict[str, str]:
    """Model key -> task."""
    models = [model for model in made.recipe.models if model.key != made.recipe.base_model.key]
    if tasks is None:
        paths = [(model.adapter or model.path).rstrip("/") for model in models]
        tasks = [re.sub(r"[^\w.-]", "-", Path(path).name).lstrip(".") or "model" for path in paths]
        tasks = [name if tasks.count(name) == 1 else f"{name}-{k}" for k, name in enumerate(tasks, 1)]
    if len(tasks) != len(models):
        raise RecipeError(f"tasks: {len(tasks)} names for {len(models)} models.")
    for name in tasks:
        if not re.fullmatch(r"\w[\w.-]{0,99}", name) or list(tasks).count(name) > 1:
            raise RecipeError(
                f"tasks: {name!r} is not a name of its own. Expected different names of letters, digits, '.', '_', '-'."
            )
    return {model.key: name for model, name in zip(models, tasks)}


@dataclass
class _Contents:
    """The store's files: units to merge and to keep, and where their bytes go."""

    tasks: dict[str, str]  # model key -> task
    merged: list[Unit]
    kept: list[Unit]
    layout: Layout
    vector: Layout
    masks: dict[str, Layout]  # by model key

    @classmethod
    def of(cls, made: Plan, tasks: dict[str, str]) -> _Contents:
        from hf_fuse.merge.units import MEAN, MERGE

        merged = [unit for unit in made.units if unit.action == MERGE]
        kept = [unit for unit in made.units if unit.action == MEAN]
        whole = 1 << 62  # one file each
        vector = lay_out(((unit.name, unit.dtype, unit.shape) for unit in merged), whole, VECTOR_STEM)
        masks = {}
        for key, task in tasks.items():
            rows = [(u.name, "U8", (-(-u.numel // 8),)) for u in merged if _position(u, key) is not None]
            rows += [(u.name, "F32", u.shape) for u in kept if _position(u, key) is not None]
            masks[key] = lay_out(rows, whole, f"mask-{task}")
        parts = [vector, *masks.values()]
        headers = {file: header for part in parts for file, header in part.headers.items()}
        sizes = {file: size for part in parts for file, size in part.sizes.items()}
        return cls(tasks, merged, kept, Layout(headers, sizes), vector, masks)


def _position(unit: Unit, key: str) -> int | None:
    return next((k for k, part in enumerate(unit.inputs) if part.key == key), None)


def _fill(made: Plan, contents: _Contents, partial: PartialFolder, stack: ExitStack, workers: int | None) -> None:
    import torch

    from hf_fuse.merge.progress import Progress
    from hf_fuse.merge.stream import Merger
    from hf_fuse.merge.workers import Workers, World

    dtype = getattr(torch, made.recipe.dtype)
    progress = stack.enter_context(Progress(made.bytes_read * made.passes, quiet=False))
    sources = {key: parent.source for key, parent in made.parents.items()}
    merger = Merger(made.method, sources, contents.merged, dtype, progress=progress)
    pool = Workers(torch.device("cpu"), dtype, workers)
    stack.callback(pool.close)
    merger.measure_model([u for u in contents.merged if merger.scope(u) == "model"], World(size=1, rank=0), pool)
    progress.phase("compress")
    pool.run(merger.jobs(contents.merged), lambda job, buffers, _: _compress(merger, contents, partial, job, buffers))
    pool.run(contents.kept, lambda unit, buffers, _: _keep(merger, contents, partial, unit, buffers))


def _compress(
    merger: Merger, contents: _Contents, partial: PartialFolder, job: tuple[Unit, int, int], buffers: Buffers
) -> None:
    """Writes a piece of one tensor's multi-task vector and masks."""
    import numpy as np
    import torch

    from hf_fuse.merge.methods._masks import multitask_vector, task_mask
    from hf_fuse.merge.sources import BLOCK

    unit, first, last = job
    options = unit.options
    weight = options["weight"]
    thresholds = merger.measure_tensor(unit, buffers) if merger.scope(unit) == "tensor" else merger.states.get("")
    dtype = getattr(torch, TORCH_NAMES[unit.dtype])
    for start, stop in merger.blocks(first, last, BLOCK):
        deltas, _ = merger.block(unit, start, stop, buffers)
        multitask = multitask_vector(deltas, weight, thresholds, options["election"])
        out = multitask.to(dtype)
        if not out.float().sum().isfinite() and not out.isfinite().all():
            raise OutputError(f"tensor {unit.name}: the multi-task vector is not finite in {unit.dtype}.")
        partial.write(contents.vector.places[unit.name], start, memoryview(out.view(torch.uint8).numpy()))
        for k, part in enumerate(unit.inputs):
            mask = task_mask(deltas[k] * weight[k], multitask, options["mask_scale"][k])
            bits = np.packbits(mask.numpy() > 0, bitorder="little")
            partial.write(contents.masks[part.key].places[unit.name], start // 8, memoryview(bits))


def _keep(merger: Merger, contents: _Contents, partial: PartialFolder, unit: Unit, buffers: Buffers) -> None:
    """Single numbers are not worth a mask."""
    values, _ = merger.block(unit, 0, unit.numel, buffers)
    for k, part in enumerate(unit.inputs):
        partial.write(contents.masks[part.key].places[unit.name], 0, memoryview(values[k].float().numpy()).cast("B"))


def _describe(made: Plan, contents: _Contents, folder: Path) -> None:
    from hf_fuse.merge.carry import write_json
    from hf_fuse.merge.finish import resolved_recipe, versions

    recipe = resolved_recipe(made)
    references = {model.key: pinned for model, pinned in zip(made.recipe.models, recipe.models)}
    fields = {"path", "revision", "adapter", "adapter_revision"}
    write_json(
        folder / STORE_FILE,
        {
            "kind": KIND,
            "format": FORMAT,
            "base": recipe.base_model.model_dump(include=fields, exclude_none=True),
            "base_fingerprint": fingerprint(made.reference.checkpoint),
            "multitask": f"{VECTOR_STEM}.safetensors",
            "tasks": {
                task: {
                    "model": references[key].model_dump(include=fields, exclude_none=True),
                    "mask": f"mask-{task}.safetensors",
                }
                for key, task in contents.tasks.items()
            },
            "parameters": recipe.parameters,
            "versions": versions(),
        },
    )


def fingerprint(checkpoint: Checkpoint) -> str:
    """Hash of names, dtypes, shapes and the first bytes of every tensor: tells models apart at little cost."""
    digest, pool = hashlib.sha256(), FilePool()
    try:
        for name, info in sorted(checkpoint.tensors.items()):
            width = info.nbytes // max(info.numel, 1)
            probe = bytearray(min(info.nbytes, _PROBE // max(width, 1) * width))
            pool.read(info, 0, memoryview(probe))
            digest.update(f"{name}\0{info.dtype}\0{info.shape}\0".encode() + probe)
    finally:
        pool.close()
    return digest.hexdigest()


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
        store: folder made by :func:`compress_tall`.
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
    import torch

    from hf_fuse.merge.finish import write_companions
    from hf_fuse.merge.plan import plan
    from hf_fuse.merge.progress import Progress
    from hf_fuse.merge.stream import Merger
    from hf_fuse.merge.workers import Workers, World

    store = Path(store).expanduser().absolute()
    facts = _read_store(store)
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
    parent.source = TallSource(
        parent.source, _tensors(store, facts["multitask"]), _tensors(store, facts["tasks"][task]["mask"])
    )
    folder = Path(made.recipe.output).expanduser().absolute()
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(made.bytes_read * 2, quiet=False))
        partial = stack.enter_context(exclusive_output(folder, overwrite=overwrite))
        partial.create(made.layout)
        merger = Merger(made.method, {parent.ref.key: parent.source}, made.units, torch.float32, progress=progress)
        pool = Workers(torch.device("cpu"), torch.float32, workers)
        stack.callback(pool.close)

        def write(unit: Unit, start: int, out: Tensor) -> None:
            for name in (unit.name, *unit.aliases):
                partial.write(made.layout.places[name], start, memoryview(out.numpy()))

        merger.run(write, World(size=1, rank=0), pool)
        partial.sync()
        write_companions(made, partial.folder)
        (partial.folder / "fuse_recipe.yaml").unlink()  # it tells of the base alone; the card tells the rest
        (partial.folder / "README.md").write_text(_card(made, facts, task, partial.folder), encoding="utf-8")
        partial.publish()
    return folder


def _read_store(store: Path) -> dict[str, Any]:
    if not (store / STORE_FILE).is_file():
        raise CheckpointError(f"{store}: has no {STORE_FILE}. Expected a folder made from fine-tunes by compress_tall.")
    facts = read_json(store / STORE_FILE)
    if facts.get("kind") != KIND or facts.get("format") != FORMAT:
        raise CheckpointError(
            f"{store}: {STORE_FILE} says kind {facts.get('kind')!r}, format {facts.get('format')!r}. Expected "
            f"{KIND!r}, {FORMAT}."
        )
    try:
        files = [facts["multitask"], *(task["mask"] for task in facts["tasks"].values())]
        sound = isinstance(facts["base"]["path"], str) and isinstance(facts["base_fingerprint"], str)
    except (KeyError, TypeError, AttributeError):
        sound, files = False, []
    if not sound or not all(isinstance(file, str) and re.fullmatch(r"\w[\w.-]*\.safetensors", file) for file in files):
        raise CheckpointError(f"{store / STORE_FILE}: is damaged. Make the store again.")
    return facts


def _tensors(store: Path, file: str) -> dict[str, TensorInfo]:
    return read_header(store / file)[0]


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


def _card(made: Plan, facts: dict[str, Any], task: str, folder: Path) -> str:
    from hf_fuse.card import merge_card, read_license
    from hf_fuse.checkpoint.tokenizer import tokenizer_files
    from hf_fuse.merge.finish import versions

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
    return merge_card(
        {
            "title": task,
            "method": KIND,
            "summary": "A fine-tuned model, restored from a store of TALL-masks: close to the original, not equal.",
            "paper": "https://arxiv.org/abs/2405.07813",
            "architecture": checkpoint.architecture,
            "made": f"Restored with hf_fuse: the base, and of the summed changes of this and {others} other fine-tunes "
            "those that this task's mask keeps ([paper](https://arxiv.org/abs/2405.07813)).",
            "recipe_yaml": None,
            "parents": rows,
            "versions": versions(),
            "warnings": [],
            "figures": {},
            "has_tokenizer": bool(tokenizer_files(folder)),
        }
    )
