"""A teacher with a tokenizer of its own: it reads the same texts in its own tokens, live or from a cache.

B rows of a batch, S tokens, N predictions of the student, M of the teacher, K kept tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from hf_fuse.distill.alignment import NOWHERE
from hf_fuse.distill.cache import TeacherCache, is_cache, row_key, tokenizer_key
from hf_fuse.distill.pairing import Align, Encoding, Pair, Side, pair_row, token_pairs
from hf_fuse.distill.sources import Source
from hf_fuse.distill.teachers import Teacher, load_teacher, tokenizer_of
from hf_fuse.distill.top_k import TopK
from hf_fuse.distill.vocabulary_map import Collisions, Kind, VocabularyMap, vocabulary_map
from hf_fuse.errors import FuseError
from hf_fuse.perplexity import context_length
from hf_fuse.training_encoding import IGNORED

ROWS_OF_LOGITS = 256  # predictions whose logits exist at a time
# Of the rows that the statistical map counts its pairs in.
COUNTED_ROWS = 2000


class AlignedTeacher:
    """Gives :class:`hf_fuse.DistillTrainer` the predictions of a teacher that splits or frames texts in its own way.

    ::

        other = AlignedTeacher("org/other-model", data, student=Encoding(tokenizer, max_length=1024))
        DistillTrainer(student, args, teacher=[other], train_dataset=encoded, processing_class=tokenizer)

    Both read the same rows of ``data``; where both have read the same bytes of a text, the teacher's next token teaches
    the student's, through a map of the vocabularies. Losses that compare token by token see the teacher's ``k``
    likeliest tokens and one bucket for all others.

    Args:
        teacher: a model, its folder or Hub id, or a cache that ``hf-fuse teach`` made of the same ``data``.
        data: the rows before they are encoded (``messages``; ``prompt`` and ``completion``; or ``text``): all that the
            student is trained and evaluated on.
        student: how the student's rows were encoded from ``data``.
        encoding: how the teacher reads them. Default: the tokenizer and the chat template beside the teacher, up to the
            length of its context; needed with a cache whose teacher isn't at hand.
        k: of a live teacher's tokens.
        vocabulary: how tokens without a partner of equal text are mapped; see
            :func:`~hf_fuse.distill.vocabulary_map.vocabulary_map`.
        align: see :func:`~hf_fuse.distill.pairing.pair_row`.
        collisions: see :class:`~hf_fuse.distill.vocabulary_map.VocabularyMap`.

    Raises:
        FuseError: no such teacher, no tokenizer, or a cache of another tokenizer.
    """

    def __init__(
        self,
        teacher: nn.Module | str | Path | TeacherCache,
        data: Sequence[Mapping[str, Any]],
        *,
        student: Encoding,
        encoding: Encoding | None = None,
        k: int = 16,
        vocabulary: Kind = "min_ed",
        align: Align = "boundaries",
        collisions: Collisions = "sum",
    ) -> None:
        if isinstance(teacher, str | Path) and is_cache(teacher):
            teacher = TeacherCache(teacher)
        self.cache = teacher if isinstance(teacher, TeacherCache) else None
        self.model = (
            None if self.cache else load_teacher(str(teacher), {}) if isinstance(teacher, str | Path) else teacher
        )
        self.name = self.cache.facts.teacher if self.cache else getattr(self.model, "name_or_path", "") or "teacher"
        self.data, self.student, self.align, self.k, self.collisions = data, student, align, k, collisions
        self.encoding = encoding or self._own_encoding()
        if self.cache and tokenizer_key(self.encoding.tokenizer) != self.cache.facts.tokenizer:
            raise FuseError(
                f"{self.cache.folder}: was made with another tokenizer than the one given for {self.name}. Make the "
                "cache again, or give its own."
            )
        self._numbers = {
            row_key(side.ids): (number, piece)
            for number, row in enumerate(
                tqdm(data, desc=f"align with {Path(self.name).name}", unit="row", disable=None)
            )
            for piece, side in enumerate(student.sides(row, self.encoding))
        }
        self._pairs = lru_cache(maxsize=256)(self._paired)
        self.mapping = self._map(vocabulary)
        self._live: Teacher | None = None
        self._plain: bool | None = None

    def placed(self, device: torch.device) -> AlignedTeacher:
        """Frozen, in evaluation mode and on ``device``."""
        self._live = Teacher(self.model, device, self.name) if self.model is not None else None
        return self

    def check(self, student: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Refuses another student than the one that ``data`` was aligned for.

        Raises:
            FuseError: it has another tokenizer, or fewer rows of embeddings than tokens.
        """
        ours = self.student.tokenizer
        if tokenizer is not None and tokenizer_key(tokenizer) != tokenizer_key(ours):
            raise FuseError(f"teacher {self.name}: was aligned with another tokenizer than the student's.")
        size = student.config.get_text_config().vocab_size
        if len(ours) > size:
            raise FuseError(
                f"teacher {self.name}: the student's tokenizer has {len(ours)} tokens, its vocabulary {size} entries. "
                "Resize its embeddings."
            )

    def source(self, inputs: Mapping[str, Any], labels: Tensor, *, shifted: bool) -> Source:
        """What it predicts for a batch of the student's.

        Args:
            inputs: with ``input_ids`` and ``attention_mask``.
            labels: ``(B, S)``; the N predictions are those that have one.
            shifted: whether labels are still to be shifted by one against the logits.

        Raises:
            FuseError: a row that is none of ``data``, or that the cache doesn't have.
        """
        pairs, places = [], []
        for row, (ids, known) in enumerate(zip(inputs["input_ids"], _tokens(inputs))):
            pair = self._pair(ids[known])
            pairs.append(pair)
            # A label that is not shifted any more lies at the token before the one it names.
            place_S = known.long().cumsum(0) - 1 + (0 if shifted else 1)
            kept = known & (labels[row] != IGNORED)
            if shifted:
                kept[0] = False
            places.append(
                [pair.places[place] if place < len(pair.places) else None for place in place_S[kept].tolist()]
            )
        wanted = [[_within(side, pair) for side in pair.teachers] for pair in pairs]
        device = labels.device
        own = self._answers(pairs, wanted, device)
        starts, sequences, losses = [], [], []
        count = 0
        for number, each in enumerate(wanted):
            starts.append([])
            for tokens in each:
                starts[-1].append({token: count + place for place, token in enumerate(tokens)})
                count += len(tokens)
            sequences += [number] * (count - len(sequences))
        sequences_M = torch.tensor(sequences, device=device, dtype=torch.long)
        place_N = [
            -1 if found is None else starts[number][found[0]].get(found[1], -1)
            for number, each in enumerate(places)
            for found in each
        ]
        nats_M = -own.label_log_prob_N.float()
        for number, each in enumerate(places):
            of_row_M = nats_M[sequences_M == number]
            # Per token of the student, so that a teacher isn't better for having more and shorter tokens.
            value = of_row_M.sum() / max(len(each), 1) if len(of_row_M) else nats_M.new_tensor(float("inf"))
            losses.append(value.expand(len(each)))
        return Source(
            own, sequences_M, torch.tensor(place_N, device=device, dtype=torch.long),
            torch.cat(losses) if losses else nats_M, self.mapping, self.collisions,
        )  # fmt: skip

    def _own_encoding(self) -> Encoding:
        if self.cache:
            from transformers import AutoTokenizer

            try:
                tokenizer = AutoTokenizer.from_pretrained(
                    self.name, revision=self.cache.facts.revision, trust_remote_code=False
                )
            except (OSError, ValueError) as error:
                raise FuseError(
                    f"{self.cache.folder}: the tokenizer of {self.name} can't be loaded. Give it as the encoding."
                ) from error
            return Encoding(tokenizer, tokenizer.model_max_length, self.student.train_on)
        tokenizer = tokenizer_of(self.model)
        if tokenizer is None:
            raise FuseError(f"{self.name}: has no tokenizer beside it. Give it as the encoding.")
        length = min(context_length(self.model.config) or 1 << 30, tokenizer.model_max_length)
        return Encoding(tokenizer, length, self.student.train_on)

    def _map(self, kind: Kind) -> VocabularyMap | None:
        ours, theirs = self.student.tokenizer, self.encoding.tokenizer
        if tokenizer_key(ours) == tokenizer_key(theirs):
            return None
        pairs: Counter[tuple[int, int]] = Counter()
        if kind == "statistical":
            for row in range(min(len(self.data), COUNTED_ROWS)):
                pairs += token_pairs(pair_row(self.data[row], self.student, self.encoding, self.align))
        return vocabulary_map(theirs, ours, kind, pairs)

    def _pair(self, ids: Tensor) -> Pair:
        found = self._numbers.get(row_key(ids))
        if found is None:
            raise FuseError(
                f"{self.name}: a row of the batch is none of the data that the teacher was given. Give it all rows, "
                "encoded with the student's tokenizer, chat template and max_length, and don't pack them."
            )
        return self._pairs(found)

    def _paired(self, place: tuple[int, int]) -> Pair:
        return pair_row(self.data[place[0]], self.student, self.encoding, self.align)[place[1]]

    def _answers(self, pairs: list[Pair], wanted: list[list[list[int]]], device: torch.device) -> TopK:
        """The wanted predictions of all pairs, one after the other."""
        sides = [side for pair in pairs for side in pair.teachers]
        tokens = [tokens for each in wanted for tokens in each]
        if not any(tokens):
            return _nothing(self.cache.facts.k if self.cache else self.k, device)
        if self.cache is None:
            return self._asked(sides, tokens)
        found = TopK.joined([self._cached(side, some) for side, some in zip(sides, tokens)])
        return found.each(lambda values: values.to(device))

    def _cached(self, side: Side, tokens: list[int]) -> TopK:
        numbers = self.cache.find(row_key(side.ids))
        if not numbers:
            raise FuseError(
                f"{self.cache.folder}: a text of the training data is not in it, or was read with another chat "
                "template or length. Make the cache of the same data."
            )
        row = self.cache.row(numbers[0])
        place = {token: number for number, token in enumerate(row.positions_N.tolist())}
        return row.predictions.rows(torch.tensor([place[token] for token in tokens], dtype=torch.long))

    def _asked(self, sides: list[Side], tokens: list[list[int]]) -> TopK:
        teacher = self._live
        device = teacher.model.device
        length = max(len(side.ids) for side in sides)
        pad = self.encoding.tokenizer.pad_token_id or 0
        ids_BS = torch.tensor([side.ids + [pad] * (length - len(side.ids)) for side in sides], device=device)
        mask_BS = torch.tensor([[1] * len(side.ids) + [0] * (length - len(side.ids)) for side in sides], device=device)
        batch = {"input_ids": ids_BS, "attention_mask": mask_BS}
        row_M = torch.tensor([row for row, some in enumerate(tokens) for _ in some], device=device)
        token_M = torch.tensor([token for some in tokens for token in some], device=device)
        with torch.no_grad():
            states_BSX = teacher.hidden(batch) if self._plain_head(batch) else teacher.logits(batch)
            states_MX, labels_M = states_BSX[row_M, token_M - 1], ids_BS[row_M, token_M]
            parts = []
            for start in range(0, len(labels_M), ROWS_OF_LOGITS):
                some = slice(start, start + ROWS_OF_LOGITS)
                logits_MV = teacher.head(states_MX[some]) if self._plain else states_MX[some]
                parts.append(TopK.of(logits_MV, self.k, labels_M[some]))
        return TopK.joined(parts)

    def _plain_head(self, batch: dict[str, Tensor]) -> bool:
        """Whether the output layer's results are the logits, so that they can be computed for some positions alone."""
        if self._plain is None:
            try:
                self._live.hidden(batch)
                self._plain = True
            except FuseError:
                self._plain = False
        return self._plain


def _tokens(inputs: Mapping[str, Any]) -> Tensor:
    """Which places of ``input_ids`` are no padding, ``(B, S)``."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def _within(side: Side, pair: Pair) -> list[int]:
    """The teacher's tokens that are predicted within the text of the student's row, which may be a piece of it."""
    ours = [
        pair.student.read[place - 1] for place, label in enumerate(pair.student.labels) if place and label != IGNORED
    ]
    ours = [read for read in ours if read != NOWHERE]
    low, high = (min(ours), max(ours)) if ours else (0, -1)
    return [
        place
        for place, label in enumerate(side.labels)
        if place and label != IGNORED and (side.read[place - 1] == NOWHERE or low <= side.read[place - 1] <= high)
    ]


def _nothing(k: int, device: torch.device) -> TopK:
    none = torch.zeros(0, device=device)
    return TopK(torch.zeros(0, k, dtype=torch.long, device=device), torch.zeros(0, k, device=device), none, none)
