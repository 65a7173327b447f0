"""Which token of the student's vocabulary stands for which of a teacher's: equal text, nearest text, or seen together.

V entries of the teacher's vocabulary, N predictions, K kept tokens.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from hf_fuse.distill.edit_distance import edit_distances, nearest_words
from hf_fuse.distill.token_texts import special_partners, token_texts
from hf_fuse.distill.top_k import TopK

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAPS = ("exact", "min_ed", "statistical")
Kind = Literal["exact", "min_ed", "statistical"]
Collisions = Literal["sum", "first"]
NO_TOKEN = -1
NONE, SPECIAL, EXACT, NEAREST, SEEN = range(5)
NAMES = ("none", "special token", "same text", "nearest text", "seen together")


@dataclass(frozen=True)
class VocabularyMap:
    """From a teacher's token ids to the student's.

    Attributes:
        ids_V: the student's token for each of the teacher's, or -1.
        how_V: by what it was found, an index of ``NAMES``.
    """

    ids_V: Tensor
    how_V: Tensor

    def counts(self) -> dict[str, int]:
        """How many of the teacher's tokens were mapped by what."""
        return {name: int((self.how_V == number).sum()) for number, name in enumerate(NAMES)}

    def __call__(self, top: TopK, *, collisions: Collisions = "sum") -> TopK:
        """A teacher's top-K over the student's tokens, where they have a partner; the rest goes to the tail.

        Args:
            top: over the teacher's vocabulary.
            collisions: of several tokens with the same partner. ``sum`` adds their probabilities; ``first`` keeps the
                likeliest and leaves the others to the tail, as FuseLLM does.
        """
        ids_V = self.ids_V.to(top.ids_NK.device)
        # Entries beyond the tokenizer are padding of the vocabulary: no token, so no partner.
        inside_NK = top.ids_NK < len(ids_V)
        ids_NK = ids_V[top.ids_NK.where(inside_NK, 0).long()].where(inside_NK & top.known_NK, NO_TOKEN)
        return merged(ids_NK, top.log_probs_NK.float(), top, collisions)


def merged(ids_NK: Tensor, log_probs_NK: Tensor, top: TopK, collisions: Collisions = "sum") -> TopK:
    """Equal ids of a row become one, ids of -1 and what else is dropped go to the tail of ``top``."""
    ids_NK = ids_NK.where(log_probs_NK > float("-inf"), NO_TOKEN)
    log_probs_NK, order_NK = log_probs_NK.sort(dim=-1, descending=True, stable=True)
    ids_NK = ids_NK.gather(-1, order_NK)
    equal_NKK = ids_NK[:, :, None] == ids_NK[:, None, :]
    first_NK = ~equal_NKK.tril(-1).any(-1) & (ids_NK != NO_TOKEN)
    kept_NK = log_probs_NK
    lost_NK = log_probs_NK.masked_fill(first_NK, float("-inf"))
    if collisions == "sum":
        kept_NK = log_probs_NK[:, None, :].masked_fill(~equal_NKK, float("-inf")).logsumexp(-1)
        lost_NK = log_probs_NK.masked_fill(ids_NK != NO_TOKEN, float("-inf"))
    kept_NK, order_NK = kept_NK.masked_fill(~first_NK, float("-inf")).sort(dim=-1, descending=True, stable=True)
    ids_NK = ids_NK.gather(-1, order_NK).where(kept_NK > float("-inf"), 0)
    tail_N = torch.cat([lost_NK, top.tail_log_prob_N.float().unsqueeze(-1)], dim=-1).logsumexp(-1)
    return TopK(ids_NK, kept_NK, tail_N, None, top.temperature)


def vocabulary_map(
    teacher: PreTrainedTokenizerBase,
    student: PreTrainedTokenizerBase,
    kind: Kind = "min_ed",
    pairs: Counter[tuple[int, int]] | None = None,
) -> VocabularyMap:
    """Finds a token of the student's for the tokens of a teacher's.

    Special tokens go by what they do (end of text, end of a turn, begin of text), else by name; all others by the text
    that they stand for, so that ``Ġthe``, ``▁the`` and ``the`` are one. Where no token has the same text:

    - ``exact``: none.
    - ``min_ed``: the nearest by edit distance (FuseLLM's MinED), if that is at most 2 edits and half of the token. (The
      paper maps every token to something, however far away.)
    - ``statistical``: the token that ``pairs`` show most often with it, each time counting ``1 / (1 + edit distance)``
      (FuseChat: counts and edit distance; how it weighs one against the other is our reading), else as ``min_ed``.

    Args:
        teacher: tokenizer; a fast one.
        student: likewise.
        kind: see above.
        pairs: (teacher's token, student's token) -> how often they were seen in the same place.

    Raises:
        FuseError: a tokenizer without ``tokenizer.json``.
    """
    theirs, ours = token_texts(teacher), token_texts(student)
    known: dict[str, int] = {}
    for number, text in enumerate(ours):
        if text is not None:
            known.setdefault(text, number)
    ids, how = [NO_TOKEN] * len(theirs), [NONE] * len(theirs)
    for number, text in enumerate(theirs):
        if text is not None and text in known:
            ids[number], how[number] = known[text], EXACT
    for number, partner in special_partners(teacher, student).items():
        ids[number], how[number] = partner, SPECIAL
    if kind == "statistical":
        for number, partner in _seen_together(theirs, ours, pairs or Counter()).items():
            if ids[number] == NO_TOKEN:
                ids[number], how[number] = partner, SEEN
    if kind != "exact":
        open_V = [number for number, text in enumerate(theirs) if ids[number] == NO_TOKEN and text]
        names = list(known)
        for number, (place, _) in zip(open_V, nearest_words([theirs[number] for number in open_V], names)):
            if place >= 0:
                ids[number], how[number] = known[names[place]], NEAREST
    return VocabularyMap(torch.tensor(ids), torch.tensor(how, dtype=torch.uint8))


def _seen_together(theirs: list, ours: list, pairs: Counter[tuple[int, int]]) -> dict[int, int]:
    usable = [
        (pair, count) for pair, count in pairs.items() if theirs[pair[0]] is not None and ours[pair[1]] is not None
    ]
    if not usable:
        return {}
    edits = edit_distances([theirs[one] for (one, _), _ in usable], [ours[other] for (_, other), _ in usable])
    best: dict[int, tuple[float, int]] = {}
    for ((one, other), count), distance in zip(usable, edits.tolist()):
        best[one] = max(best.get(one, (0.0, 0)), (count / (1 + distance), -other))
    return {one: -other for one, (_, other) in best.items()}
