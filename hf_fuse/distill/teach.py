"""``hf-fuse teach``: a teacher runs once over a dataset; students learn from what it left, without it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_fuse.checkpoint.adapter import base_fingerprint
from hf_fuse.checkpoint.reader import Checkpoint, file_sha256, open_checkpoint, resolve
from hf_fuse.checkpoint.writer import check_output, leftovers
from hf_fuse.distill.teach_recipe import TeachRecipe, load_teach_recipe
from hf_fuse.errors import CheckpointError, FuseError, OutputError, RecipeError
from hf_fuse.evaluation_models import Candidate, candidates, check_device, loaded
from hf_fuse.merge.finish import versions
from hf_fuse.merge.workers import World
from hf_fuse.recipe import dump_recipe, output_folder
from hf_fuse.training_data import Rows, read_rows


@dataclass(frozen=True)
class Lesson:
    """A checked recipe and what it names; no weights have been read.

    Attributes:
        recipe: with Hub models pinned to their commits.
        checkpoint: the teacher's.
        candidate: its config and tokenizer.
        weights: fingerprint, of an adapter on it too.
        rows: read, not encoded.
        folder: to make.
    """

    recipe: TeachRecipe
    checkpoint: Checkpoint
    candidate: Candidate
    weights: str
    rows: Rows
    folder: Path

    @property
    def tokenizer(self) -> Any:
        return self.candidate.processor

    @property
    def teacher_name(self) -> str:
        """Its Hub id or the name of its folder, and that of the adapter on it."""
        name, adapter = self.checkpoint.repo_id or self.checkpoint.folder.name, self.recipe.teacher.adapter
        return name if adapter is None else f"{name}+{Path(adapter).name if Path(adapter).is_dir() else adapter}"

    @property
    def dtype(self) -> str:
        stored = self.candidate.config.dtype if self.recipe.dtype == "auto" else self.recipe.dtype
        return str(stored or "float32").removeprefix("torch.")

    def load_model(self) -> Any:
        """The teacher, in evaluation mode on its device."""
        return loaded(self.candidate, "causal", device=self.recipe.device, dtype=self.recipe.dtype).eval()

    def record(self, **facts: Any) -> str:
        """``fuse_recipe.yaml``: the recipe as it was run."""
        provenance = {"versions": versions(), "weights": self.weights, **facts}
        return dump_recipe(self.recipe.model_copy(update={"output": None, "provenance": provenance}))


@dataclass(frozen=True)
class TeachResult:
    """What there is now.

    Attributes:
        output: the folder.
        kind: ``predictions`` or ``sequences``.
        figures: name -> number: rows, predictions, bytes...
        notes: what was left out, in sentences.
        made: False if nothing had to be done, or only a dry run was.
    """

    output: Path
    kind: str
    figures: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    made: bool = True

    def to_dict(self) -> dict[str, Any]:
        return {"output": str(self.output), "kind": self.kind, **self.figures, "notes": list(self.notes)}


def teach(
    recipe: str | Path | dict | TeachRecipe,
    output: str | Path | None = None,
    *,
    overrides: dict[str, Any] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
) -> TeachResult:
    """Asks a teacher once about every row of a dataset, and keeps the answers in a new folder.

    ``kind: predictions`` keeps the likeliest tokens at every position that has a label (:mod:`hf_fuse.distill.cache`),
    for ``DistillTrainer(teacher=folder)``; ``kind: sequences`` keeps what it writes after every prompt, a dataset with
    the columns ``prompt`` and ``completion`` to train on (sequence-level distillation, arXiv 1606.07947).

    The folder appears when all is done. Where it exists and was made of the same teacher, text and settings, nothing is
    done. What a stopped run had finished waits in ``<output>.partial`` for ``resume``.

    Args:
        recipe: YAML file, dictionary or TeachRecipe.
        output: the folder to make; else the recipe's.
        overrides: dotted keys that win over the recipe, ``{"k": 16}``.
        overwrite: replace an existing output, in one step, when the new one is complete; drop an unfinished run.
        resume: go on with an unfinished run.
        dry_run: check everything, encode the data, tell the size, and run no teacher.

    Raises:
        FuseError: with one message that says what, where and what to do. An old output is intact then.
    """
    recipe = load_teach_recipe(recipe, overrides)
    folder = output_folder(output or recipe.output)
    if World().size > 1:
        raise RecipeError("teach: runs in one process. Start it without a launcher.")
    if not folder.is_dir():  # what is there may be what is wanted
        check_output(folder, overwrite)
    lesson = _prepared(recipe, folder)
    if recipe.kind == "predictions":
        from hf_fuse.distill.teach_predictions import write_predictions as write
    else:
        from hf_fuse.distill.teach_sequences import write_sequences as write
    return write(lesson, overwrite=overwrite, resume=resume, dry_run=dry_run)


def _prepared(recipe: TeachRecipe, folder: Path) -> Lesson:
    check_device(recipe.device)
    rows = read_rows(recipe.data)
    if rows.format == "classification":
        raise FuseError("data: holds classes, but a teacher is asked about texts. Give chats, completions or texts.")
    reference = recipe.teacher
    checkpoint = open_checkpoint(reference.path, reference.revision)
    candidate = candidates([str(checkpoint.folder)], "causal")[0]
    weights, pinned = base_fingerprint(checkpoint), {"revision": checkpoint.commit} if checkpoint.commit else {}
    if reference.adapter:
        adapter, _, commit = resolve(reference.adapter, reference.adapter_revision)
        file = adapter / "adapter_model.safetensors"
        if not file.exists():
            raise CheckpointError(f"{reference.adapter}: is no adapter (it has no adapter_model.safetensors).")
        candidate, weights = replace(candidate, adapter=adapter), f"{weights}+{file_sha256(file)}"
        pinned |= {"adapter_revision": commit} if commit else {}
    recipe = recipe.model_copy(update={"teacher": reference.model_copy(update=pinned)})
    return Lesson(recipe, checkpoint, candidate, weights, rows, folder)


def say(text: str) -> None:
    print(text, file=sys.stderr)


def check_unfinished(folder: Path, pattern: str, *, overwrite: bool, resume: bool) -> None:
    """Whether what a stopped run left may be gone on with, or dropped.

    Raises:
        OutputError: nobody said which; or there is nothing to go on with.
    """
    partial, _ = leftovers(folder)
    found = any(partial.glob(pattern))
    if found and not (overwrite or resume):
        raise OutputError(
            f"{partial}: an unfinished run left it. Go on with it with --resume, or start again with --overwrite."
        )
    if resume and not found:
        raise OutputError(f"{folder}: there is no unfinished run to resume. Leave --resume out.")
