"""The ``sources`` of a training recipe: teachers that read the recipe's rows with tokenizers of their own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fuse.checkpoint.reader import resolve
from hf_fuse.distill.aligned_teacher import AlignedTeacher
from hf_fuse.distill.cache import TeacherCache, is_cache
from hf_fuse.distill.pairing import Encoding
from hf_fuse.distill.teachers import load_teacher
from hf_fuse.errors import FuseError, RecipeError
from hf_fuse.training_data import read_rows, row_length
from hf_fuse.training_encoding import usable_template

if TYPE_CHECKING:
    from hf_fuse.training_recipe import SourceEntry, TrainingRecipe
    from hf_fuse.training_setup import Setup


def open_sources(setup: Setup) -> list[AlignedTeacher]:
    """Loads every source of the recipe: a model, or a cache of one and the tokenizer that it was made with.

    Raises:
        RecipeError: packed rows.
        FuseError: no such model, tokenizer or cache.
    """
    recipe = setup.recipe
    if not recipe.sources:
        return []
    if recipe.data.packing:
        raise RecipeError("sources: a packed row is no single text, which other tokenizers could read. Drop packing.")
    rows = read_rows(recipe.data)
    data = [row for part in (*rows.train, *rows.eval) for row in part.rows]
    student = Encoding(setup.processor, setup.data.max_length, recipe.data.train_on)
    return [_opened(source, recipe, data, student) for source in recipe.sources]


def _opened(source: SourceEntry, recipe: TrainingRecipe, data: list[dict], student: Encoding) -> AlignedTeacher:
    options: dict[str, Any] = {
        "k": source.k, "vocabulary": source.vocabulary, "align": source.align, "collisions": source.collisions,
    }  # fmt: skip
    if is_cache(source.path):
        cache = TeacherCache(source.path)
        revision = source.revision if source.tokenizer else cache.facts.revision
        encoding = _encoding(source.tokenizer or cache.facts.teacher, revision, source, recipe, data)
        return AlignedTeacher(cache, data, student=student, encoding=encoding, **options)
    folder, _, _ = resolve(source.path, source.revision)
    encoding = _encoding(source.tokenizer or str(folder), None, source, recipe, data)
    return AlignedTeacher(load_teacher(str(folder), {}), data, student=student, encoding=encoding, **options)


def _encoding(
    name: str, revision: str | None, source: SourceEntry, recipe: TrainingRecipe, data: list[dict]
) -> Encoding:
    """How a teacher reads, by the rules that ``hf-fuse teach`` has for the same data."""
    from transformers import AutoConfig, AutoTokenizer

    folder, _, _ = resolve(name, None if Path(name).is_dir() else revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise FuseError(
            f"sources: {name}: its tokenizer can't be loaded. Say tokenizer: another folder or id."
        ) from error
    if "messages" in data[0] or not isinstance(data[0].get("prompt", ""), str):
        usable_template(tokenizer, source.chat_template)
    return Encoding(copy.copy(tokenizer), row_length(recipe.data, tokenizer, config), recipe.data.train_on)
