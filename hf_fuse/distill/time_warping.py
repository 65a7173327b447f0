"""FuseLLM's alignment of two token sequences: dynamic time warping over the edit distances of their tokens.

For comparison with its results. Both sides read the same text, so
:func:`~hf_fuse.distill.pairing.pair_row` finds the exact places without it, in linear time. S tokens of the student's,
T of the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from hf_fuse.distill.alignment import NOWHERE
from hf_fuse.distill.edit_distance import edit_distances

DIAGONAL, TEACHER, STUDENT = range(3)


def time_warped(
    student: Sequence[str], teacher: Sequence[str], *, accept: Literal["equal", "suffix"] = "equal"
) -> list[int]:
    """For each of the student's tokens the teacher's token that it is aligned with, or -1.

    Needs ``4 S T`` bytes and ``S + T`` vector operations.

    Args:
        student: tokens, without the marks of their tokenizer.
        teacher: likewise.
        accept: ``equal`` takes a token that is aligned with exactly one, which is equal (FuseLLM ``hard``). ``suffix``
            also takes the last of several that the student's token ends on (FuseChat's default): after ``able`` the
            teacher predicts what follows ``unbelievable``.
    """
    if not student or not teacher:
        return [NOWHERE] * len(student)
    matched: list[list[int]] = [[] for _ in student]
    others: list[int] = [0] * len(teacher)
    for ours, theirs in _path(_costs(student, teacher)):
        matched[ours].append(theirs)
        others[theirs] += 1
    places = []
    for token, aligned in zip(student, matched):
        last = max(aligned)
        single = len(aligned) == 1 and others[last] == 1 and teacher[last] == token
        ends = accept == "suffix" and bool(teacher[last]) and token.endswith(teacher[last]) and others[last] == 1
        places.append(last if single or ends else NOWHERE)
    return places


def _costs(student: Sequence[str], teacher: Sequence[str]) -> np.ndarray:
    ours, place_S = np.unique(np.array(student, dtype=object), return_inverse=True)
    theirs, place_T = np.unique(np.array(teacher, dtype=object), return_inverse=True)
    one, other = np.meshgrid(np.arange(len(ours)), np.arange(len(theirs)), indexing="ij")
    table = edit_distances(ours[one.ravel()].tolist(), theirs[other.ravel()].tolist())
    return table.reshape(len(ours), len(theirs))[place_S][:, place_T]


def _path(costs_ST: np.ndarray) -> list[tuple[int, int]]:
    """The cheapest way from the first pair to the last; among equal steps the diagonal one."""
    rows, columns = costs_ST.shape
    moves_ST = np.zeros((rows, columns), dtype=np.int8)
    # Cells of an anti-diagonal depend on the two before it only. Entry s of these is row s - 1.
    before = np.full(rows + 1, np.inf)
    last = np.full(rows + 1, np.inf)
    before[0] = 0
    for diagonal in range(rows + columns - 1):
        row = np.arange(max(0, diagonal - columns + 1), min(rows, diagonal + 1))
        ways = np.stack([before[row], last[row + 1], last[row]])
        chosen = ways.argmin(0)
        moves_ST[row, diagonal - row] = chosen
        here = np.full(rows + 1, np.inf)
        here[row + 1] = ways[chosen, np.arange(len(row))] + costs_ST[row, diagonal - row]
        before, last = last, here
    path, place = [], (rows - 1, columns - 1)
    while place[0] >= 0 and place[1] >= 0:
        path.append(place)
        move = moves_ST[place]
        place = place[0] - (move != TEACHER), place[1] - (move != STUDENT)
    return path[::-1]
