"""Whether a teacher's cache fits the student, its tokenizer, its objectives and its data: found before training."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from hf_fuse.distill.cache import tokenizer_key
from hf_fuse.distill.cached_teacher import CachedTeacher
from hf_fuse.distill.top_k import TopK
from hf_fuse.errors import FuseError
from hf_fuse.objectives import Objective

logger = logging.getLogger(__name__)


def check_tokenizer(teacher: CachedTeacher, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> None:
    """Whether the cache's token ids mean what the student's mean.

    Args:
        tokenizer: the student's, if it is known.
        vocabulary: number of the student's logits.

    Raises:
        FuseError: the tokenizer is another, or unknown while the vocabularies differ in size.
    """
    facts, named = teacher.facts, teacher.name
    if tokenizer is not None and tokenizer_key(tokenizer) != facts.tokenizer:
        raise FuseError(
            f"{named}: was made with another tokenizer than the student's, so its token ids are other text. Use a "
            f"student of the family of {facts.teacher}, or make a cache with a teacher of the student's."
        )
    if tokenizer is None and vocabulary != facts.vocabulary:
        raise FuseError(
            f"{named}: has a vocabulary of {facts.vocabulary} entries, the student {vocabulary}. That may be padding, "
            "if the tokenizers are equal, but the student's isn't known. Give processing_class."
        )
    if tokenizer is not None and len(tokenizer) > min(vocabulary, facts.vocabulary):
        raise FuseError(
            f"{named}: the tokenizer has {len(tokenizer)} tokens, but vocabularies have {facts.vocabulary} (cache) and "
            f"{vocabulary} (student) entries. Resize the smaller model's embeddings."
        )


def check_revision(teacher: CachedTeacher, options: dict[str, Any]) -> None:
    """Whether the cache is of the wanted revision.

    Args:
        options: arguments for loading a teacher, of which only ``revision`` makes sense: the beginning of a commit.

    Raises:
        FuseError: it is of another one, or there are other options.
    """
    if others := [name for name in options if name != "revision"]:
        raise FuseError(f"teacher_model_init_kwargs: {others[0]} is for models, and {teacher.name} is none.")
    wanted, found = options.get("revision"), teacher.facts.revision
    if wanted is not None and not (found or "").startswith(wanted):
        raise FuseError(
            f"{teacher.name}: was made with revision {found or 'unknown'} of {teacher.facts.teacher}, expected "
            f"{wanted}. Make it again with hf-fuse teach."
        )


def check_student(teacher: CachedTeacher, student: nn.Module, objectives: list[Objective], *, shifted: bool) -> None:
    """Whether a student can learn from a cache with these objectives.

    Args:
        shifted: whether it predicts the next tokens.

    Raises:
        FuseError: it doesn't, or see :func:`check_objectives`.
    """
    if not shifted or student.get_output_embeddings() is None:
        raise FuseError(f"{teacher.name}: is for causal language models; the student is a {type(student).__name__}.")
    check_objectives(teacher, objectives)


def check_objectives(teacher: CachedTeacher, objectives: list[Objective]) -> None:
    """Whether objectives can do with what a cache keeps.

    Raises:
        FuseError: one needs more, or another temperature.
    """
    none_NV, none_N = torch.zeros(0, teacher.facts.vocabulary), torch.zeros(0, dtype=torch.long)
    top = TopK.of(none_NV, teacher.facts.k, none_N, temperature=teacher.facts.temperature)
    for objective in objectives:
        needs = set(objective.needs.values())
        takes_top_k = getattr(objective.loss, "takes_top_k", False) or any(
            "TopK" in str(parameter.annotation) for parameter in inspect.signature(objective.loss).parameters.values()
        )
        if needs & {"teacher", "teacher_logits"} and not takes_top_k:
            raise FuseError(
                f"objectives.{objective.name}: needs whole distributions, and {teacher.name} keeps the "
                f"{teacher.facts.k} likeliest tokens. Give a model as the teacher, or use another objective."
            )
        if "teacher" in needs:
            given = {"student": none_NV, "teacher": top, "labels": none_N, "progress": 0.0}
            try:
                objective.loss(**objective.arguments(given))
            except FuseError as error:
                raise FuseError(f"objectives.{objective.name}: {error}") from None


class Coverage:
    """Which datasets the caches know as a whole. Of streams that shows batch by batch.

    Args:
        teachers: the caches.
        collate: rows of a dataset -> a batch.
    """

    def __init__(self, teachers: list[CachedTeacher], collate: Callable[[list], Any]) -> None:
        self.teachers, self.collate = teachers, collate
        self._known: dict[Any, bool] = {}

    def check(self, dataset: Any) -> None:
        """Refuses a training set that isn't known.

        Raises:
            FuseError: the first row that is missing, and why.
        """
        for teacher in self.teachers:
            rows, why = self._missing(teacher, dataset)
            if rows:
                raise FuseError(
                    f"{teacher.name}: lacks {len(rows)} of the {len(dataset)} training rows. The first is row "
                    f"{rows[0] + 1}: {why}. Make the cache of the same data, with the same max_length, train_on and "
                    "chat template."
                )

    def knows(self, dataset: Any) -> bool:
        """Whether every row is in every cache; looked up once."""
        key = getattr(dataset, "_fingerprint", id(dataset))
        if key not in self._known:
            self._known[key] = not any(self._missing(teacher, dataset)[0] for teacher in self.teachers)
            if not self._known[key]:
                logger.warning(
                    "The teacher's cache lacks rows of the evaluation set: no distillation term is evaluated."
                )
        return self._known[key]

    def _missing(self, teacher: CachedTeacher, dataset: Any) -> tuple[list[int], str]:
        """Numbers of the rows that the cache doesn't cover, and why the first doesn't."""
        found, why = [], ""
        count = len(dataset) if hasattr(dataset, "__len__") else 0
        for number in tqdm(range(count), desc=f"look up {teacher.cache.folder.name}", unit="row", disable=None):
            reason = next(teacher.missing(self.collate([dataset[number]])), None)
            if reason is not None:
                found.append(number)
                why = why or reason
        return found, why
