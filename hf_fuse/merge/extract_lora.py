"""A LoRA adapter out of a fine-tuned model: the best change of a chosen rank, matrix by matrix.

The difference from the base is read as a task vector is, one matrix at a time, and cut down by a randomised SVD
(https://arxiv.org/abs/0909.4061). Nothing is trained; what the rank cannot hold is measured and reported.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from hf_fuse.card import read_license
from hf_fuse.checkpoint.adapter import base_fingerprint
from hf_fuse.checkpoint.adapter_binding import CONFIG
from hf_fuse.checkpoint.adapter_writer import Pair, adapter_config, adapter_layout, target_list, whole_name
from hf_fuse.checkpoint.reader import DTYPE_BYTES, DTYPE_CODES, Checkpoint, FilePool, TensorInfo, open_checkpoint
from hf_fuse.checkpoint.tokenizer import copy_files, tokenizer_files
from hf_fuse.checkpoint.writer import PartialFolder, Place, exclusive_output
from hf_fuse.errors import CheckpointError, FuseError, OutputError
from hf_fuse.merge.adapter_finish import base_row, write_card
from hf_fuse.merge.carry import write_json
from hf_fuse.merge.extraction import FACTORS, LEFT_OUT, WHOLE, Extraction, Part, kind_of
from hf_fuse.merge.lora_targets import EMBEDDING, Job, Modules, choose, find_modules, of_way, task_type
from hf_fuse.merge.plan import check_room
from hf_fuse.merge.progress import Progress
from hf_fuse.merge.rank_space import LowRankChange, low_rank, residual
from hf_fuse.merge.sources import BLOCK, Buffers, read_numbers
from hf_fuse.merge.workers import Workers
from hf_fuse.recipe import OUT_DTYPES

HELD_ELEMENTS = 1 << 27  # of a matrix kept in memory (512 MB); larger ones are read again for each product


def extract_lora(
    model: str | Path,
    base: str | Path,
    *,
    rank: int,
    output: str | Path,
    energy: float | None = None,
    targets: str | None = None,
    save_full: str | None = None,
    out_dtype: str = "float32",
    seed: int = 0,
    overwrite: bool = False,
    allow_pickle: bool = False,
    workers: int | None = None,
) -> Extraction:
    """Writes the adapter that comes closest to turning ``base`` into ``model``.

    Memory: one matrix per thread (at most 512 MB each) and the adapter itself.

    Args:
        model: the fine-tuned model, a folder or Hub id (``org/name@revision``).
        base: what it was fine-tuned from.
        rank: of each matrix, at most.
        output: the folder to make.
        energy: keep only as many directions of a matrix as hold this share of its squared change, ``(0, 1]``.
        targets: expression that is searched in module names; by default all linear layers but the output.
        save_full: expression that is searched in tensor names; what matches is stored whole (``modules_to_save``), such
            as norms, embeddings or a new head.
        out_dtype: of the factors.
        seed: of the randomised SVD.
        overwrite: replace an existing output when the new one is complete.
        allow_pickle: accept ``.bin`` inputs, loaded with torch's restricted unpickler.
        workers: threads; by default one per core, at most eight.

    Returns:
        What was kept and lost, by kind of tensor.

    Raises:
        FuseError: the models do not fit together or are equal, or nothing matches.
    """
    if rank < 1:
        raise FuseError(f"rank: {rank} is not a rank. Expected a whole number of at least 1.")
    if energy is not None and not 0 < energy <= 1:
        raise FuseError(f"energy: {energy} is not a share. Expected a number above 0, at most 1.")
    if out_dtype not in OUT_DTYPES:
        raise FuseError(f"out_dtype: {out_dtype!r} is not one of {', '.join(OUT_DTYPES)}.")
    folder = Path(output).expanduser().absolute()
    tuned, origin = (_open(str(ref), allow_pickle) for ref in (model, base))
    for checkpoint in (tuned, origin):
        if checkpoint.folder in (folder.resolve(), *folder.resolve().parents):
            raise OutputError(f"{output}: lies in the input {checkpoint.ref}. Choose an output of its own.")
        if folder.resolve() in checkpoint.folder.parents:
            raise OutputError(f"{output}: contains the input {checkpoint.ref}. Choose an output of its own.")
    modules = find_modules(tuned)
    jobs = choose(tuned, origin, modules, targets, save_full)
    most = sum(
        rank * sum(job.matrix) * torch.finfo(getattr(torch, out_dtype)).bits // 8 for job in of_way(jobs, FACTORS)
    )
    check_room(str(folder), most + sum(job.tuned.nbytes for job in of_way(jobs, WHOLE)), overwrite)
    pool = Workers(torch.device("cpu"), torch.float32, workers)
    nbytes = sum(info.nbytes for job in jobs for info in (job.tuned, job.base) if info)
    try:
        with exclusive_output(folder, overwrite=overwrite) as partial, Progress(nbytes, quiet=False) as progress:
            work = _Work(rank, energy, seed, getattr(torch, out_dtype), progress)
            pool.run(sorted(jobs, key=lambda job: -job.tuned.numel), work)
            parts = [work.parts[job.name] for job in jobs]
            if not any(part.total for part in parts) and all(job.base for job in jobs):
                raise CheckpointError(f"{model}: is equal to {base}, so there is no change to extract.")
            if not work.factors and not of_way(jobs, WHOLE):
                raise FuseError(f"targets: no chosen module of {model} differs from {base}. Choose others.")
            progress.phase("save")
            config, written = _write(partial, jobs, work.factors, out_dtype, tuned, origin, modules)
            found = Extraction(folder, tuned.ref, origin.ref, parts, written)
            write_json(partial.folder / CONFIG, config)
            copy_files(tokenizer_files(tuned.folder), tuned.folder, partial.folder)
            write_card(partial.folder, _card(found, tuned, origin, rank, energy, seed), config)
            partial.publish()
    finally:
        pool.close()
    return found


def _open(ref: str, allow_pickle: bool) -> Checkpoint:
    path, _, revision = (ref, "", "") if Path(ref).expanduser().is_dir() else ref.partition("@")
    checkpoint = open_checkpoint(path, revision or None, allow_pickle=allow_pickle)
    if checkpoint.config.get("quantization_config"):
        raise CheckpointError(
            f"{ref}: is quantised (quantization_config in its config.json); the change of quantised numbers can't be "
            "told. Use the unquantised model."
        )
    return checkpoint


class _Work:
    """Called for every job by any thread; gathers ``parts`` and ``factors`` by tensor name."""

    def __init__(self, rank: int, energy: float | None, seed: int, dtype: torch.dtype, progress: Progress):
        self.rank, self.energy, self.seed, self.dtype, self.progress = rank, energy, seed, dtype, progress
        self.parts: dict[str, Part] = {}
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, job: Job, buffers: Buffers, _: int) -> None:
        rows = _Rows(job, buffers, hold=job.way == FACTORS)
        rank, change = 0, None
        if job.way == FACTORS:
            change = low_rank(rows, job.matrix, self.rank, job.name, seed=self.seed, energy=self.energy)
        if change is not None:
            left, right = change.left_MR.to(self.dtype), change.right_RN.to(self.dtype)
            if not (left.isfinite().all() and right.isfinite().all()):
                raise OutputError(f"tensor {job.name}: its factors overflow {self.dtype}. Choose a wider out_dtype.")
            if self.dtype != torch.float32:  # what is stored counts, not what was computed
                change = LowRankChange(left, right, residual(rows, left.float(), right.float()), change.total)
            rank, self.factors[job.name] = left.shape[1], (left, right)
            error, total = change.error, change.total
        else:
            total = rows.squared_norm() if job.way != FACTORS and job.base else 0.0
            error = total if job.way == LEFT_OUT else 0.0
        self.parts[job.name] = Part(job.name, kind_of(job.name), job.way, rank, error, total)
        self.progress.add(job.tuned.nbytes + (job.base.nbytes if job.base else 0))


class _Rows:
    """The change of one tensor as ``[rows, columns]``: in one piece if it may be held, else read anew at each call."""

    def __init__(self, job: Job, buffers: Buffers, *, hold: bool):
        self.job, self.buffers = job, buffers
        m, n = job.matrix
        self.held = self._read(0, m) if hold and m * n <= HELD_ELEMENTS else None
        self.step = max(1, min(m, (BLOCK * 32 if hold else BLOCK) // max(n, 1)))

    def __call__(self) -> Iterator[tuple[int, Tensor]]:
        if self.held is not None:
            yield 0, self.held
            return
        for first in range(0, self.job.matrix[0], self.step):
            yield first, self._read(first, min(first + self.step, self.job.matrix[0]))

    def squared_norm(self) -> float:
        return math.fsum(float(block.double().square().sum()) for _, block in self())

    def _read(self, first: int, last: int) -> Tensor:
        n, job = self.job.matrix[1], self.job
        change = self.buffers.numbers("change", (last - first) * n)
        for start in range(0, change.numel(), BLOCK):
            piece = change[start : start + BLOCK]
            base = self.buffers.numbers("base", piece.numel())
            read_numbers(job.tuned, first * n + start, piece, self.buffers)
            read_numbers(job.base, first * n + start, base, self.buffers)
            piece.sub_(base)
            if not piece.sum().isfinite() and not piece.isfinite().all():
                raise CheckpointError(
                    f"tensor {job.name}: the change from {job.base.file} to {job.tuned.file} holds NaN or infinite "
                    "values. Mend the models first."
                )
        return change.view(last - first, n)


def _write(
    partial: PartialFolder,
    jobs: list[Job],
    factors: dict[str, tuple[Tensor, Tensor]],
    out_dtype: str,
    tuned: Checkpoint,
    origin: Checkpoint,
    modules: Modules,
) -> tuple[dict, int]:
    """Writes the weights; returns the adapter's config and the number of bytes."""
    pairs = {}
    for job in jobs:
        if job.name in factors:
            target, rank = job.target, factors[job.name][0].shape[1]
            shape = job.tuned.shape
            pairs[job.name] = Pair(target.module, shape, rank, target.transposed, target.kind == EMBEDDING)
    adapted, whole = {pair.module for pair in pairs.values()}, of_way(jobs, WHOLE)
    stored = {job.name: whole_name(job.running, adapted) for job in whole}
    layout = adapter_layout(
        [(name, DTYPE_CODES[out_dtype], shape) for pair in pairs.values() for name, shape in pair.sides.items()]
        + [(stored[job.name], job.tuned.dtype, job.tuned.shape) for job in whole]
    )
    partial.create(layout)
    for name, pair in pairs.items():
        for side, tensor in pair.stored(*factors.pop(name)).items():
            raw = tensor.contiguous().view(-1).view(torch.uint8)
            partial.write(layout.places[side], 0, memoryview(raw.numpy()))
    for job in whole:
        _copy(job.tuned, partial, layout.places[stored[job.name]])
    partial.sync()
    # Biases of adapted modules are a setting of their own; every other tensor belongs to a module that is saved.
    linear = {target.module for target in modules.targets.values() if target.kind != EMBEDDING}
    owners = {job.running: job.module for job in whole}
    biases = {
        owner for name, owner in owners.items()
        if name.endswith(".bias") and owner in linear and f"{owner}.weight" not in owners
    }  # fmt: skip
    task = task_type(tuned)
    inherited = {"task_type": task, "revision": origin.commit}
    if task is None and modules.model_class:
        inherited["auto_mapping"] = modules.model_class
    config = adapter_config(
        pairs.values(), base=origin.repo_id or origin.ref, fingerprint=base_fingerprint(origin), inherited=inherited,
        targets=target_list(adapted, modules.names - adapted), modules_to_save=set(owners.values()) - biases,
        bias="none" if not biases else "lora_only" if biases <= adapted else "all",
        fan_in_fan_out=any(pair.transposed and not pair.embedding for pair in pairs.values()),
    )  # fmt: skip
    return config, layout.nbytes


def _copy(info: TensorInfo, partial: PartialFolder, place: Place) -> None:
    pool, width = FilePool(), DTYPE_BYTES[info.dtype]
    try:
        for first in range(0, info.numel, BLOCK * 8):
            piece = memoryview(bytearray(min(BLOCK * 8, info.numel - first) * width))
            pool.read(info, first, piece)
            partial.write(place, first, piece)
    finally:
        pool.close()


def _card(found: Extraction, tuned: Checkpoint, origin: Checkpoint, rank: int, energy: float | None, seed: int) -> dict:
    source = {"ref": tuned.ref, "repo_id": tuned.repo_id, "commit": tuned.commit, "role": "fine-tune",
              "license": read_license(tuned.folder)}  # fmt: skip
    less = f", less where less holds {energy:.2%} of a squared change" if energy else ""
    return {
        "title": found.output.name,
        "method": "extract-lora",
        "summary": f"A LoRA adapter of rank {rank} extracted from a fine-tuned model.",
        "made": f"The change from base to fine-tune, matrix by matrix, cut down to rank {rank}{less} by a randomised "
        f"SVD with hf_fuse (`hf-fuse extract-lora`, seed {seed}).",
        "parents": [base_row(origin), source],
        "warnings": [],
        "figures": {
            "left out of the adapted changes": found.relative_error_of_factors,
            "left out of the whole change": found.relative_error,
        },
    }
