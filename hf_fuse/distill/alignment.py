"""Where two tokenizations of the same text have read the same part of it.

A language model's prediction at a position is about what follows the text read so far. So a prediction of a teacher can
teach the student's exactly where both have read the same bytes; that needs no dynamic time warping, only a walk along
both. S positions of the student, T of the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_fuse.distill.token_texts import BYTE, backend_of, family

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOWHERE = -1
# No text is longer; parts that one side lacks thus don't move those that follow.
PART = 1 << 40

Spans = Sequence[tuple[int, int] | None]


@dataclass(frozen=True)
class Reading:
    """A text as a tokenizer reads it.

    Attributes:
        ids: of the tokens.
        read: of the part that both sides share, how many bytes each token's prediction follows on; ``NOWHERE`` where
            it follows on something else (a template's own words, a piece of a character).
    """

    ids: list[int]
    read: list[int]


def reading(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    shared: Spans | None = None,
    *,
    special: bool = True,
) -> Reading:
    """Tokenizes ``text`` and tells how far each token has read.

    Args:
        tokenizer: a fast one.
        text: all of what the model reads.
        shared: where, in characters, the parts lie that the other side reads too, in their order; None for a part that
            isn't there. Default: all of the text. (Between templates, these are the contents of the messages.)
        special: whether the tokenizer adds its special tokens.

    Raises:
        FuseError: a tokenizer that doesn't tell where its tokens lie.
    """
    backend = backend_of(tokenizer)
    made = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    ids, offsets = made["input_ids"], made["offset_mapping"]
    starts_C = byte_offsets(text)
    bounds = [*map(tuple, starts_C[np.array(offsets, dtype=np.int64).reshape(-1, 2)].tolist())]
    kind = family(backend)
    ends = _ends(bounds, [_length(token, kind) for token in backend_tokens(tokenizer, ids, bounds)])
    parts = [(0, len(text))] if shared is None else shared
    return Reading(ids, _within(ends, bounds, [p and (int(starts_C[p[0]]), int(starts_C[p[1]])) for p in parts]))


def content_spans(rendered: str, contents: Sequence[str]) -> list[tuple[int, int] | None]:
    """Where the contents of messages lie in what a chat template made of them; None for one that it changed.

    Templates may cut off white space around a message, so it belongs to none.
    """
    spans: list[tuple[int, int] | None] = []
    place = 0
    for content in contents:
        text = content.strip()
        start = rendered.find(text, place) if text else -1
        spans.append((start, start + len(text)) if start >= 0 else None)
        place = start + len(text) if start >= 0 else place
    return spans


def byte_offsets(text: str) -> np.ndarray:
    """The byte at which each character begins, and the length in bytes, ``(C + 1,)``."""
    if text.isascii():
        return np.arange(len(text) + 1)
    codes_C = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    sizes_C = 1 + (codes_C >= 0x80).astype(np.int64) + (codes_C >= 0x800) + (codes_C >= 0x10000)
    return np.concatenate([[0], sizes_C.cumsum()])


def backend_tokens(tokenizer: Any, ids: list[int], bounds: list[tuple[int, int]]) -> list[str | None]:
    """The tokens that share a character with the next one, whose bytes have to be counted; None for the others."""
    overlap = [_overlap(bounds, place) for place in range(len(bounds) - 1)] + [False]
    wanted = [here or (place > 0 and overlap[place - 1]) for place, here in enumerate(overlap)]
    return [tokenizer.convert_ids_to_tokens(token) if want else None for token, want in zip(ids, wanted)]


def _length(token: str | None, kind: str) -> int | None:
    """Bytes of a token, where its spelling tells."""
    if token is None:
        return None
    if kind == "bytes":
        return len(token)
    return 1 if kind == "marked" and BYTE.fullmatch(token) else None


def _ends(bounds: list[tuple[int, int]], lengths: list[int | None]) -> list[int]:
    """The byte at which each token ends; ``NOWHERE`` within a character if the pieces' bytes can't be told."""
    ends: list[int] = []
    reached, place = 0, 0
    while place < len(bounds):
        last = place
        while last + 1 < len(bounds) and bounds[place][0] < bounds[place][1] and _overlap(bounds, last):
            last += 1
        if last > place:
            # Offsets count whole characters: the bytes of the pieces say where these end.
            group = lengths[place : last + 1]
            known = None not in group and sum(group) == bounds[last][1] - max(reached, bounds[place][0])
            at = max(reached, bounds[place][0])
            for length in group[:-1]:
                at = at + length if known else NOWHERE
                ends.append(at)
        reached = max(reached, bounds[last][1])
        ends.append(reached)
        place = last + 1
    return ends


def _overlap(bounds: list[tuple[int, int]], place: int) -> bool:
    """Whether the next token begins within a character that this one has a piece of."""
    (_, end), (start, next_end) = bounds[place], bounds[place + 1]
    return start < min(end, next_end)


def _within(ends: list[int], bounds: list[tuple[int, int]], parts: list[tuple[int, int] | None]) -> list[int]:
    """Ends in the text -> bytes of the shared parts, each of which begins one after the end of the one before."""
    read = [NOWHERE] * len(ends)
    base, first = 0, 0
    for part in parts:
        if part is None:
            # Its length is not known here: the other side may have it. Parts are numbered far apart.
            base += PART
            continue
        low, high = part
        at_start = None
        for place in range(first, len(ends)):
            end = ends[place]
            if end == NOWHERE or end < low:
                continue
            if end == low:
                at_start = place  # the last one that stands before the text
                continue
            if end > high:
                break
            if bounds[place][0] < bounds[place][1] and read[place] == NOWHERE:
                read[place] = base + end - low
                first = place + 1
        if at_start is not None and read[at_start] == NOWHERE:
            read[at_start] = base
        base += PART
    return read
