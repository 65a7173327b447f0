"""A teacher's predictions for every labelled token of a dataset, written as a cache (:mod:`hf_fuse.distill.cache`).

B rows of a batch, S tokens, N predictions, V vocabulary, K kept tokens, X hidden or V.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from hf_fuse.checkpoint.writer import PartialFolder, exclusive_output, remove_tree
from hf_fuse.distill.cache import (
    STEM,
    CachedRow,
    CacheFacts,
    CacheWriter,
    TeacherCache,
    cache_bytes,
    check_same,
    is_cache,
    read_facts,
    row_key,
    text_key,
    tokenizer_key,
)
from hf_fuse.distill.teach import Lesson, TeachResult, check_unfinished, say
from hf_fuse.distill.teachers import Teacher
from hf_fuse.distill.top_k import TopK
from hf_fuse.errors import CheckpointError, FuseError
from hf_fuse.loss_inputs import kept_predictions
from hf_fuse.merge.finish import RECIPE_FILE
from hf_fuse.merge.plan import check_room
from hf_fuse.training_data import Part, Rows, encode
from hf_fuse.training_encoding import IGNORED

SHARDS = f"{STEM}-*.safetensors"
ROWS_OF_LOGITS = 256  # predictions whose logits exist at a time


@dataclass(frozen=True)
class Sequences:
    """What the teacher is asked about: each text once, in pieces that fit.

    Attributes:
        parts: the sources, with their rows encoded.
        places: (part, encoded row) of each sequence.
        lengths: in tokens.
        predictions: of each sequence.
        digest: hash of the tokens and of which are predicted.
    """

    parts: list[tuple[Part, Any]]
    collator: Any
    places: list[tuple[int, int]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    predictions: list[int] = field(default_factory=list)
    digest: Any = field(default_factory=hashlib.sha256)

    def __getitem__(self, number: int) -> dict[str, Any]:
        part, row = self.places[number]
        return self.parts[part][1][row]

    def text_key(self, number: int) -> bytes:
        part, row = self.places[number]
        source, encoded = self.parts[part]
        return text_key(source.rows[encoded[row]["source"]])

    def described(self, number: int) -> str:
        part, row = self.places[number]
        return f"{self.parts[part][0].name}, row {self.parts[part][1][row]['source'] + 1}"


def write_predictions(lesson: Lesson, *, overwrite: bool, resume: bool, dry_run: bool) -> TeachResult:
    """The cache that a recipe asks for; see :func:`hf_fuse.distill.teach.teach`."""
    notes: list[str] = []
    sequences = _encoded(lesson, notes)
    facts = _facts(lesson, sequences)
    figures = {
        "rows": len(sequences.places),
        "tokens": sum(sequences.lengths),
        "predictions": sum(sequences.predictions),
    }
    figures["bytes"] = cache_bytes(figures["tokens"], figures["predictions"], facts.k, facts.vocabulary)
    result = TeachResult(lesson.folder, "predictions", figures, tuple(notes), made=False)
    if is_cache(lesson.folder) and not overwrite:
        check_same(lesson.folder, facts)
        try:
            TeacherCache(lesson.folder)
        except CheckpointError as error:
            raise CheckpointError(f"{error} Start hf-fuse teach with --overwrite.") from None
        say(f"{lesson.folder}: was made of the same teacher, text and settings already.")
        return result
    whole = 2 * facts.vocabulary * figures["predictions"]
    say(
        f"{figures['predictions']:,} predictions in {figures['rows']:,} rows: {_size(figures['bytes'])} with the "
        f"{facts.k} likeliest of {facts.vocabulary:,} tokens (all of them in fp16 would take {_size(whole)})"
    )
    check_room(str(lesson.folder), figures["bytes"], overwrite)
    check_unfinished(lesson.folder, SHARDS, overwrite=overwrite, resume=resume)
    if dry_run:
        return result
    with exclusive_output(lesson.folder, overwrite=overwrite, keep=_has_rows) as partial:
        if not resume:
            remove_tree(partial.folder)
        partial.folder.mkdir(exist_ok=True)
        _ask(lesson, sequences, facts, partial)
        record = lesson.record(predictions=figures["predictions"], rows=figures["rows"])
        (partial.folder / RECIPE_FILE).write_text(record, encoding="utf-8")
        partial.publish()
    return TeachResult(lesson.folder, "predictions", figures, tuple(notes))


def _has_rows(folder: Path) -> bool:
    return any(folder.glob(SHARDS)) and is_cache(folder) and read_facts(folder)[1] is None


def _ask(lesson: Lesson, sequences: Sequences, facts: CacheFacts, partial: PartialFolder) -> None:
    writer = CacheWriter(partial.folder, facts)
    # Rows of one length share a batch, the longest come first: memory runs out at once or never.
    order = sorted(range(len(sequences.places)), key=lambda number: -sequences.lengths[number])
    done, size = writer.rows, lesson.recipe.batch_size
    model = lesson.load_model()
    teacher = Teacher(model, model.device, facts.teacher)
    plain_head = bool(order) and _has_plain_head(teacher, sequences, order[-1])
    initial = sum(sequences.predictions[number] for number in order[:done])
    with tqdm(total=sum(sequences.predictions), initial=initial, unit="token", disable=None) as bar:
        # The batch that a run was stopped in is asked again as a whole: in another one sums are rounded otherwise.
        for start in range(done - done % size, len(order), size):
            numbers = order[start : start + size]
            answers = zip(numbers, _answers(teacher, sequences, numbers, facts, plain_head))
            for number, row in islice(answers, max(done - start, 0), None):
                if not row.predictions.log_z_N.isfinite().all():
                    raise FuseError(
                        f"{facts.teacher}: its logits are not finite ({sequences.described(number)}). Compute in "
                        "dtype: float32, or look at the model."
                    )
                writer.add(row)
                bar.update(sequences.predictions[number])
    writer.finish()


def _has_plain_head(teacher: Teacher, sequences: Sequences, number: int) -> bool:
    """Whether the output layer's results are the logits, so that they can be computed for some positions alone."""
    try:
        teacher.hidden(_batch(teacher, sequences, [number]))
    except FuseError:
        return False
    return True


def _batch(teacher: Teacher, sequences: Sequences, numbers: list[int]) -> dict[str, Tensor]:
    made = sequences.collator([sequences[number] for number in numbers])
    return {name: values.to(teacher.model.device) for name, values in made.items()}


def _answers(
    teacher: Teacher, sequences: Sequences, numbers: list[int], facts: CacheFacts, plain_head: bool
) -> Iterator[CachedRow]:
    batch = _batch(teacher, sequences, numbers)
    with torch.no_grad():
        states_BSX = teacher.hidden(batch) if plain_head else teacher.logits(batch)
        states_NX, labels_N = kept_predictions(states_BSX, batch["labels"], shifted=True)
        tops, losses = [], []
        for start in range(0, len(labels_N), ROWS_OF_LOGITS):
            some = slice(start, start + ROWS_OF_LOGITS)
            logits_NV = teacher.head(states_NX[some]) if plain_head else states_NX[some]
            top = TopK.of(logits_NV, facts.k, labels_N[some], temperature=facts.temperature)
            tops.append(top.each(Tensor.cpu))
            losses.append(F.cross_entropy(logits_NV.float(), labels_N[some], reduction="none").cpu())
    top, losses_N, first = TopK.joined(tops), torch.cat(losses), 0
    for number in numbers:
        row = sequences[number]
        positions = _positions(row["labels"])
        some = slice(first, first + len(positions))
        first = some.stop
        yield CachedRow(
            torch.tensor(row["input_ids"]), torch.from_numpy(positions), top.rows(some), losses_N[some].mean().item(),
            sequences.text_key(number),
        )  # fmt: skip


def _encoded(lesson: Lesson, notes: list[str]) -> Sequences:
    """Every text that has something to predict, once."""
    entry = lesson.recipe.data.model_copy(update={"packing": False})  # packed texts don't see each other anyway
    parts = []
    for part in (*lesson.rows.train, *lesson.rows.eval):
        data = encode(Rows(lesson.rows.format, [part], []), entry, lesson.tokenizer, lesson.candidate.config)
        notes += [note for note in data.notes if note not in notes]
        parts.append((part, data.train))
    found = Sequences(parts, data.collator)
    seen: set[bytes] = set()
    repeated = 0
    for number, (part, encoded) in enumerate(parts):
        source, is_new = None, True
        for row, content in enumerate(tqdm(encoded, desc=f"read {part.name}", unit="row", disable=None)):
            if content["source"] != source:
                source = content["source"]
                key = text_key(part.rows[source])
                is_new = key not in seen
                seen.add(key)
                repeated += not is_new
            if is_new:
                positions = _positions(content["labels"])
                found.places.append((number, row))
                found.lengths.append(len(content["input_ids"]))
                found.predictions.append(len(positions))
                found.digest.update(row_key(content["input_ids"]) + positions.tobytes())
    if repeated:
        notes.append(f"{repeated} rows are in the data more than once; the teacher is asked once.")
    return found


def _positions(labels: list[int]) -> np.ndarray:
    """Which tokens are predicted; nothing comes before the first."""
    return np.flatnonzero(np.asarray(labels[1:]) != IGNORED) + 1


def _facts(lesson: Lesson, sequences: Sequences) -> CacheFacts:
    vocabulary = lesson.candidate.config.get_text_config().vocab_size
    return CacheFacts(
        teacher=lesson.teacher_name,
        tokenizer=tokenizer_key(lesson.tokenizer),
        vocabulary=vocabulary,
        k=min(lesson.recipe.k, vocabulary),
        temperature=lesson.recipe.temperature,
        revision=lesson.recipe.teacher.revision,
        weights=lesson.weights,
        dtype=lesson.dtype,
        data=sequences.digest.hexdigest(),
    )


def _size(nbytes: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"
