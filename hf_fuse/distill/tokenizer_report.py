"""How much of a text two tokenizers let a student learn from a teacher: places, tokens, and examples of both."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_fuse.checkpoint.reader import resolve
from hf_fuse.distill.pairing import Align, Encoding, Pair, pair_row, token_pairs
from hf_fuse.distill.token_texts import token_texts
from hf_fuse.distill.vocabulary_map import NAMES, Kind, VocabularyMap, vocabulary_map
from hf_fuse.errors import CheckpointError, FuseError
from hf_fuse.recipe import _at
from hf_fuse.training_data import read_rows
from hf_fuse.training_encoding import usable_template
from hf_fuse.training_recipe import DataEntry

WHOLE = 1 << 30  # rows are not cut
SHOWN = 8  # examples of tokens
WINDOW = 12  # tokens of the example of a text


@dataclass(frozen=True)
class TokenizerReport:
    """What two tokenizers share.

    Attributes:
        rows: of the data that were read.
        student_predictions: tokens that the student is to predict in them.
        teacher_predictions: tokens that the teacher predicts in them.
        aligned: share of the student's predictions that the teacher has a place for.
        same_next: share of these where the next token, too, stands for the same text.
        vocabulary: by what the teacher's tokens were mapped: name -> how many.
        seen: the same, as shares of the tokens that the teacher predicts in the rows.
        partners: the commonest of the teacher's tokens without one of equal text, their partner or None, and how often
            they were seen.
        example: of a row, what stands between two shared places, as the student and as the teacher splits it.
    """

    rows: int
    student_predictions: int
    teacher_predictions: int
    aligned: float
    same_next: float
    vocabulary: dict[str, int]
    seen: dict[str, float]
    partners: list[tuple[str, str | None, int]]
    example: list[tuple[list[str], list[str]]]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def print(self, console: Any) -> None:
        from rich.table import Table
        from rich.text import Text

        console.print(
            f"aligned: {self.aligned:.1%} of {self.student_predictions:,} predictions in {self.rows:,} rows; the next "
            f"token is the same text in {self.same_next:.1%} of these. The teacher needs {self.teacher_predictions:,}."
        )
        table = Table("the teacher's tokens", "in its vocabulary", "in the text")
        for name, count in self.vocabulary.items():
            table.add_row(name, f"{count:,}", f"{self.seen[name]:.1%}")
        console.print(table)
        if self.partners:
            console.print("\nThe teacher's commonest tokens without one of equal text:")
            table = Table("teacher", "student", "seen")
            for token, partner, count in self.partners:
                table.add_row(Text(repr(token)), Text("none" if partner is None else repr(partner)), f"{count:,}")
            console.print(table)
        console.print("\nA text, in pieces between shared places:")
        table = Table("student", "teacher")
        for ours, theirs in self.example:
            table.add_row(Text(_joined(ours)), Text(_joined(theirs)))
        console.print(table)


def compare_tokenizers(
    student: str,
    teacher: str,
    data: DataEntry | str,
    *,
    vocabulary: Kind = "min_ed",
    align: Align = "boundaries",
    limit: int = 500,
    chat_templates: tuple[str | None, str | None] = (None, None),
) -> TokenizerReport:
    """Reads rows with the tokenizers of two models, without their weights.

    Args:
        student: folder or Hub id, as is ``teacher``.
        data: the section of a training recipe, or a file or dataset.
        vocabulary: see :func:`~hf_fuse.distill.vocabulary_map.vocabulary_map`.
        align: see :func:`~hf_fuse.distill.pairing.pair_row`.
        limit: rows to read, at most.
        chat_templates: the student's and the teacher's, where they aren't those beside the tokenizers.

    Raises:
        FuseError: no such tokenizer or data.
    """
    entry = data if isinstance(data, DataEntry) else DataEntry.model_validate({"train": data})
    parts = read_rows(entry).train
    rows = [row for part in parts for row in part.rows.select(range(min(limit, len(part.rows))))][:limit]
    ours, theirs = (
        Encoding(_tokenizer(name, rows, template), WHOLE, entry.train_on)
        for name, template in zip((student, teacher), chat_templates)
    )
    return report(rows, ours, theirs, vocabulary=vocabulary, align=align)


def report(
    rows: Iterable[Mapping[str, Any]],
    student: Encoding,
    teacher: Encoding,
    *,
    vocabulary: Kind = "min_ed",
    align: Align = "boundaries",
) -> TokenizerReport:
    """See :func:`compare_tokenizers`.

    Raises:
        FuseError: nothing to predict in the rows.
    """
    rows = list(rows)
    pairs = [pair for row in rows for pair in pair_row(row, student, teacher, align)]
    total = sum(pair.student.predictions for pair in pairs)
    if not total:
        raise FuseError("data: there is nothing to predict in it. Choose other rows.")
    together = token_pairs(pairs)
    mapping = vocabulary_map(teacher.tokenizer, student.tokenizer, vocabulary, together)
    ours, theirs = student.texts, teacher.texts
    aligned = sum(together.values())
    same = sum(
        count for (one, other), count in together.items() if _equal(theirs[one], ours[other], one, other, mapping)
    )
    # What the teacher predicts in each row, whether or not the student's row has a place for it.
    seen = Counter(token for row in rows for side in teacher.sides(row, student) for token in side.labels if token >= 0)
    by_how = Counter(dict.fromkeys(NAMES, 0))
    for token, count in seen.items():
        by_how[NAMES[int(mapping.how_V[token])]] += count
    everything = max(sum(seen.values()), 1)
    return TokenizerReport(
        rows=len(rows),
        student_predictions=total,
        teacher_predictions=sum(seen.values()),
        aligned=aligned / total,
        same_next=same / max(aligned, 1),
        vocabulary=mapping.counts(),
        seen={name: by_how[name] / everything for name in NAMES},
        partners=_partners(seen, mapping, theirs, ours),
        example=_example(max(pairs, key=lambda pair: sum(map(bool, pair.places))), ours, theirs),
    )


def _equal(theirs: str | None, ours: str | None, one: int, other: int, mapping: VocabularyMap) -> bool:
    return theirs == ours if theirs is not None else int(mapping.ids_V[one]) == other


def _partners(
    seen: Counter[int], mapping: VocabularyMap, theirs: list[str | None], ours: list[str | None]
) -> list[tuple[str, str | None, int]]:
    found = []
    for token, count in seen.most_common():
        partner = int(mapping.ids_V[token])
        if theirs[token] is None or (partner >= 0 and ours[partner] == theirs[token]):
            continue
        found.append((_shown(theirs[token]), None if partner < 0 else _shown(ours[partner]), count))
        if len(found) == SHOWN:
            break
    return found


def _example(pair: Pair, ours: list[str | None], theirs: list[str | None]) -> list[tuple[list[str], list[str]]]:
    """What each side has between two places that follow on each other, from the first shared one on."""
    places = [(place, found) for place, found in enumerate(pair.places) if found]
    made = []
    for (start, (row, low)), (end, (next_row, high)) in zip(places, places[1:]):
        if row == next_row:
            made.append(
                (
                    [_shown(ours[token]) for token in pair.student.ids[start:end]],
                    [_shown(theirs[token]) for token in pair.teachers[row].ids[low:high]],
                )
            )
        if len(made) == WINDOW:
            break
    return made


def _shown(text: str | None) -> str:
    """As it can be printed: pieces of characters as their bytes."""
    if text is None:
        return "(special)"
    return "".join(f"\\x{ord(c) - 0xDC00:02x}" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in text)


def _joined(tokens: list[str]) -> str:
    return " | ".join(repr(token)[1:-1].replace("\\\\x", "\\x") for token in tokens)


def _tokenizer(name: str, rows: list[dict], chat_template: str | None) -> Any:
    from transformers import AutoTokenizer

    folder, _, _ = resolve(*_at(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{name}: its tokenizer can't be loaded.") from error
    token_texts(tokenizer)  # says so if it doesn't tell where its tokens lie
    if rows and ("messages" in rows[0] or not isinstance(rows[0].get("prompt", ""), str)):
        usable_template(tokenizer, chat_template)
    return tokenizer
