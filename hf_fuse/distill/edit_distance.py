"""Levenshtein distances of many words at once, and the nearest words of a big list without comparing all pairs.

W words, P pairs, L characters of the longest word.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

MOST_EDITS = 2
# Words within two edits share what is left of their beginnings after dropping at most two characters of each (the
# symmetric deletes of Garbe's SymSpell). A longer beginning makes more entries and fewer false candidates.
BEGINNING = 9
PAIRS_AT_A_TIME = 1 << 20


def code_points(words: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Words as rows of code points filled up with 0, ``(W, L)``, and their lengths, ``(W,)``."""
    lengths_W = np.fromiter((len(word) for word in words), dtype=np.int64, count=len(words))
    codes_WL = np.zeros((len(words), max(int(lengths_W.max(initial=0)), 1)), dtype=np.uint32)
    filled = np.arange(codes_WL.shape[1]) < lengths_W[:, None]
    codes_WL[filled] = np.frombuffer("".join(words).encode("utf-32-le", "surrogatepass"), dtype="<u4")
    return codes_WL, lengths_W


def edit_distances(one: Sequence[str], other: Sequence[str]) -> np.ndarray:
    """Insertions, deletions and substitutions between the words of each pair, ``(P,)``."""
    return _distances(*code_points(one), *code_points(other))


def _distances(one_PL: np.ndarray, lengths_P: np.ndarray, other_PM: np.ndarray, widths_P: np.ndarray) -> np.ndarray:
    pairs, columns = other_PM.shape
    rows = int(lengths_P.max(initial=0))
    # Pairs lie side by side in memory, and small: reading it is what takes the time.
    one_LP, other_MP = np.ascontiguousarray(one_PL.T), np.ascontiguousarray(other_PM.T)
    small = np.int8 if max(rows, columns) < 100 else np.int32
    place_M1 = np.arange(columns + 1, dtype=small)[:, None]
    row_MP = np.repeat(place_M1, pairs, axis=1)
    found_P = np.where(lengths_P == 0, widths_P, 0).astype(np.int32)
    for index in range(rows):
        next_MP = np.empty_like(row_MP)
        next_MP[0] = index + 1
        np.minimum(row_MP[1:] + 1, row_MP[:-1] + (other_MP != one_LP[index]), out=next_MP[1:])
        # An insertion looks back in the same row: a running minimum once the slope is taken out.
        row_MP = np.minimum.accumulate(next_MP - place_M1, axis=0) + place_M1
        done_P = np.flatnonzero(lengths_P == index + 1)
        found_P[done_P] = row_MP[widths_P[done_P], done_P]
    return found_P


def nearest_words(words: Sequence[str], known: Sequence[str]) -> list[tuple[int, int]]:
    """For each word the nearest of ``known`` and its distance; ``(-1, 0)`` where none is near.

    Near are at most two edits, and at most half of the word's characters. Of equally near ones it is that which
    differs only by case and spaces, then the first. The answer is exact; the work grows with the number of words, not
    of pairs.
    """
    if not words or not known:
        return [(-1, 0)] * len(words)
    codes_WL, lengths_W = code_points(words)
    known_codes, known_lengths = code_points(known)
    number: dict[str, int] = {}
    plain_W, known_plain = (
        np.array([number.setdefault(word.strip().casefold(), len(number)) for word in some]) for some in (words, known)
    )
    hashes_E, owners_E = _shortened(known_codes, known_lengths)
    order_E = hashes_E.argsort(kind="stable")
    hashes_E, owners_E = hashes_E[order_E], owners_E[order_E]
    limits_W = np.minimum(MOST_EDITS, lengths_W // 2)
    asked_Q, askers_Q = _shortened(codes_WL, lengths_W)
    low_Q, high_Q = (np.searchsorted(hashes_E, asked_Q, side) for side in ("left", "right"))
    by_word = askers_Q.argsort(kind="stable")
    low_Q, high_Q, askers_Q = low_Q[by_word], high_Q[by_word], askers_Q[by_word]
    # Edits first, then whether more than case and spaces differ, then the place, in one number.
    none = 2 * (MOST_EDITS + 1) * len(known)
    best_W = np.full(len(words), none)
    for part in _parts(high_Q - low_Q, askers_Q):
        counts = (high_Q - low_Q)[part]
        word_P = np.repeat(askers_Q[part], counts)
        within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        known_P = owners_E[np.repeat(low_Q[part], counts) + within]
        fits_P = np.abs(lengths_W[word_P] - known_lengths[known_P]) <= limits_W[word_P]
        pairs_P = np.sort(word_P[fits_P] * len(known) + known_P[fits_P])
        pairs_P = pairs_P[np.diff(pairs_P, prepend=-1) > 0]
        word_P, known_P = pairs_P // len(known), pairs_P % len(known)
        for rows in _of_like_length(np.maximum(lengths_W[word_P], known_lengths[known_P])):
            w, k = word_P[rows], known_P[rows]
            wide, narrow = int(lengths_W[w].max()), int(known_lengths[k].max(initial=0))
            found = _distances(codes_WL[w, :wide], lengths_W[w], known_codes[k, :narrow], known_lengths[k])
            rank = (2 * found.astype(np.int64) + (plain_W[w] != known_plain[k])) * len(known) + k
            near = found <= limits_W[w]
            np.minimum.at(best_W, w[near], rank[near])
    return [(rank % len(known), rank // len(known) // 2) if rank < none else (-1, 0) for rank in best_W.tolist()]


def _shortened(codes_WL: np.ndarray, lengths_W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of every word's beginning with up to two characters dropped, and whose they are."""
    begins_W = np.minimum(lengths_W, BEGINNING)
    codes_WL = codes_WL[:, :BEGINNING].astype(np.uint64)
    hashes, owners = [], []
    for count in range(MOST_EDITS + 1):
        for dropped in combinations(range(codes_WL.shape[1]), count):
            # Words of fewer than four characters may differ by one edit only.
            rows = np.flatnonzero((begins_W > (dropped[-1] if dropped else -1)) & (lengths_W // 2 >= count))
            value = np.full(len(rows), 0xCBF29CE484222325, dtype=np.uint64)
            for place in range(codes_WL.shape[1]):
                if place not in dropped:
                    code = codes_WL[rows, place]
                    mixed = (value ^ (code + np.uint64(1))) * np.uint64(0x9E3779B97F4A7C15)
                    value = np.where(place < begins_W[rows], mixed ^ (mixed >> np.uint64(29)), value)
            hashes.append(value)
            owners.append(rows)
    return np.concatenate(hashes), np.concatenate(owners)


def _parts(counts_Q: np.ndarray, askers_Q: np.ndarray) -> list[slice]:
    """Slices with about ``PAIRS_AT_A_TIME`` pairs; those of a word stay together."""
    ends = np.flatnonzero(np.diff(askers_Q, append=-1))
    reached = counts_Q.cumsum()[ends]
    parts, start, before = [], 0, 0
    for end, total in zip(ends.tolist(), reached.tolist()):
        if total - before >= PAIRS_AT_A_TIME or end == ends[-1]:
            parts.append(slice(start, end + 1))
            start, before = end + 1, total
    return parts


def _of_like_length(lengths_P: np.ndarray) -> list[np.ndarray]:
    """Rows by length, so that few long words don't make the tables of all the others wide."""
    bands = np.digitize(lengths_P, (8, 12, 16, 24, 48))
    return [rows for band in range(6) if len(rows := np.flatnonzero(bands == band))]
