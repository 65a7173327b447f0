"""Rows of a dataset as student and teacher read them, each with its own tokenizer and chat template.

The student's rows are those that :mod:`hf_fuse.training_encoding` makes; a pair says for each of their predictions
which prediction of the teacher follows on the same text. S tokens of a student's row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from hf_fuse.distill.alignment import NOWHERE, Reading, content_spans, reading
from hf_fuse.distill.cache import row_key
from hf_fuse.distill.time_warping import time_warped
from hf_fuse.distill.token_texts import token_texts
from hf_fuse.errors import FuseError
from hf_fuse.training_encoding import IGNORED, encode_chat, encode_completion, pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Align = Literal["boundaries", "dtw", "dtw_suffix"]


@dataclass(frozen=True)
class Side:
    """One row of token ids.

    Attributes:
        ids: its tokens.
        labels: the same, or -100 where nothing is predicted.
        read: how far each token has read the text (:class:`~hf_fuse.distill.alignment.Reading`).
    """

    ids: list[int]
    labels: list[int]
    read: list[int]

    @property
    def predictions(self) -> int:
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class Pair:
    """A student's row and the teacher's rows of the same text.

    Attributes:
        student: the row.
        teachers: several only where a long text was cut into pieces.
        places: for each student token with a label, which teacher row and which token of it is predicted from the same
            text; None where there is none.
    """

    student: Side
    teachers: tuple[Side, ...]
    places: list[tuple[int, int] | None]


@dataclass(frozen=True)
class Encoding:
    """How one side encodes a dataset.

    Attributes:
        tokenizer: a fast one, with the chat template to use.
        max_length: of a row, in tokens.
        train_on: ``assistant`` or ``all`` of a chat.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    train_on: str = "assistant"

    @cached_property
    def texts(self) -> list[str | None]:
        """What each token stands for."""
        return token_texts(self.tokenizer)

    def sides(self, row: Mapping[str, Any], others: Encoding | None = None) -> list[Side]:
        """The rows that a row of the dataset becomes, as :func:`hf_fuse.training_encoding.encoder` makes them.

        Args:
            row: with ``messages``, ``prompt`` and ``completion``, or ``text``.
            others: whose chat template may differ, so that only what messages contain is shared.
        """
        tokenizer = self.tokenizer
        if "messages" in row or not isinstance(row.get("prompt", ""), str):
            messages = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
            first = 0 if "messages" in row else len(row["prompt"])
            ids, labels = encode_chat(tokenizer, messages, row.get("tools"), self.train_on, first)
            read = self._chat(messages, row.get("tools"), others)
        elif "prompt" in row:
            ids, labels = encode_completion(tokenizer, row["prompt"], row["completion"])
            read = reading(tokenizer, row["prompt"] + row["completion"])
        else:
            return self._text(row["text"] or "")
        ids, labels, read = (values[: self.max_length] for values in (ids, labels, _fitted(read, ids)))
        return [Side(ids, labels, read)] if any(label != IGNORED for label in labels) else []

    def _chat(self, messages: list[dict], tools: Any, others: Encoding | None) -> Reading:
        options = {"tools": tools} if tools else {}
        rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        same = others is None or rendered == others.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        contents = [message["content"] for message in messages if isinstance(message.get("content"), str)]
        return reading(self.tokenizer, rendered, None if same else content_spans(rendered, contents), special=False)

    def _text(self, text: str) -> list[Side]:
        found = pieces(self.tokenizer, text, self.max_length)
        whole = reading(self.tokenizer, text) if found else Reading([], [])
        sides, start = [], 0
        for ids, labels in found:
            sides.append(Side(ids, labels, _fitted(Reading(whole.ids[start:], whole.read[start:]), ids)))
            start += len(ids)
        return sides


def _fitted(read: Reading, ids: list[int]) -> list[int]:
    """How far the tokens ``ids`` have read; what was put behind the text follows on nothing that is shared."""
    count = min(len(ids), len(read.ids))
    if ids[:count] != read.ids[:count]:
        raise FuseError("the tokenizer splits the same text in two ways, so its tokens can't be placed in the text.")
    return read.read[:count] + [NOWHERE] * (len(ids) - count)


def pair_row(row: Mapping[str, Any], student: Encoding, teacher: Encoding, align: Align = "boundaries") -> list[Pair]:
    """The student's rows of a row of the dataset, with what the teacher's predict in the same places.

    With one tokenizer on both sides every prediction has its own place.

    Args:
        row: of the dataset.
        student: how the student reads.
        teacher: how the teacher reads.
        align: ``boundaries`` takes the places where both have read the same bytes. The others are FuseLLM's alignment
            by time warping, with tokens that are equal (``dtw``) or, as in FuseChat, where the student's token ends on
            the teacher's (``dtw_suffix``).

    Raises:
        FuseError: a row that can't be encoded.
    """
    ours, theirs = student.sides(row, teacher), tuple(teacher.sides(row, student))
    if [side.ids for side in ours] == [side.ids for side in theirs]:
        return [
            Pair(side, (side,), [(0, place) if label != IGNORED else None for place, label in enumerate(side.labels)])
            for side in ours
        ]
    pairs = []
    for side, after in zip(ours, _readings(ours, theirs, student, teacher, align)):
        places = [
            found if place and label != IGNORED and (found := after[place - 1]) and _predicted(theirs, found) else None
            for place, label in enumerate(side.labels)
        ]
        used = sorted({found[0] for found in places if found})
        places = [found and (used.index(found[0]), found[1]) for found in places]
        pairs.append(Pair(side, tuple(theirs[number] for number in used), places))
    return pairs


def _predicted(sides: tuple[Side, ...], place: tuple[int, int]) -> bool:
    side, token = sides[place[0]], place[1]
    return token < len(side.ids) and side.labels[token] != IGNORED


def _readings(
    ours: list[Side], theirs: tuple[Side, ...], student: Encoding, teacher: Encoding, align: Align
) -> list[list[tuple[int, int] | None]]:
    """For each student row and token, the teacher row and the token that follows on the same text."""
    if align == "boundaries":
        follows = {
            read: (number, place + 1)
            for number, side in enumerate(theirs)
            for place, read in enumerate(side.read)
            if read != NOWHERE
        }
        return [[follows.get(read) for read in side.read] for side in ours]
    found = []
    if len(ours) > 1 or len(theirs) > 1:
        raise FuseError("time warping compares whole rows, but this text was cut into pieces. Use align: boundaries.")
    for side in ours:
        texts = (
            [_spelt(encoding, one.ids) for encoding, one in ((student, side), (teacher, theirs[0]))] if theirs else []
        )
        places = time_warped(*texts, accept="suffix" if align == "dtw_suffix" else "equal") if theirs else []
        found.append([(0, place + 1) if place != NOWHERE else None for place in places] or [None] * len(side.ids))
    return found


def _spelt(encoding: Encoding, ids: list[int]) -> list[str]:
    """The tokens without the marks of their tokenizer; special ones by name."""
    texts = encoding.texts
    names = encoding.tokenizer.convert_ids_to_tokens(ids)
    return [name if texts[token] is None else texts[token].strip(" ") for token, name in zip(ids, names)]


def pairs_of(
    rows: Iterable[Mapping[str, Any]], student: Encoding, teacher: Encoding, align: Align = "boundaries"
) -> dict[bytes, Pair]:
    """All pairs of a dataset by the key of the student's row (:func:`~hf_fuse.distill.cache.row_key`).

    Raises:
        FuseError: see :func:`pair_row`; the row is numbered.
    """
    found = {}
    for number, row in enumerate(rows, 1):
        try:
            found |= {row_key(pair.student.ids): pair for pair in pair_row(row, student, teacher, align)}
        except FuseError as error:
            raise FuseError(f"row {number}: {error}") from None
    return found


def token_pairs(pairs: Iterable[Pair]) -> Counter[tuple[int, int]]:
    """(teacher's token, student's token) -> how often both were to be predicted from the same text."""
    return Counter(
        (pair.teachers[found[0]].ids[found[1]], token)
        for pair in pairs
        for token, found in zip(pair.student.ids, pair.places)
        if found
    )
