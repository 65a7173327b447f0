"""Whether the teachers of a training recipe say what its objectives ask for: found before any weights are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_fuse.checkpoint.reader import open_checkpoint
from hf_fuse.distill.cache import TeacherCache, is_cache
from hf_fuse.distill.cache_checks import check_objectives, check_revision, check_tokenizer
from hf_fuse.distill.cached_teacher import CachedTeacher
from hf_fuse.distill.sources import Source
from hf_fuse.distill.teachers import BASE, check_predictions
from hf_fuse.distill.top_k import TopK
from hf_fuse.errors import CheckpointError, FuseError, RecipeError

if TYPE_CHECKING:
    from hf_fuse.objectives import Objective
    from hf_fuse.training_recipe import SourceEntry
    from hf_fuse.training_setup import Setup


def check_teachers(setup: Setup) -> None:
    """Finds every teacher and source of the recipe, downloading Hub ids, and compares it with the student.

    Raises:
        RecipeError: an objective without a teacher, or with one that it has no use for.
        CheckpointError: no such model or cache, or damaged files.
        FuseError: one that predicts other tokens or classes than the student, or a cache that keeps too little.
    """
    recipe, objectives = setup.recipe, setup.arguments.read_objectives()[1]
    asking = [o.name for o in objectives if {"teacher", "teacher_logits", "sources"} & set(o.needs.values())]
    fusing = [o.name for o in objectives if "sources" in o.needs.values()]
    if asking and not (recipe.teacher or recipe.sources):
        raise RecipeError(
            f"train.objectives.{asking[0]}: needs a teacher, and none is given. Say teacher: a model, a cache or base; "
            "or sources, for models with other tokenizers."
        )
    if fusing and recipe.teacher:
        raise RecipeError(
            f"train.objectives.{fusing[0]}: fuses models that may have other tokenizers. Name them under sources "
            "instead of teacher."
        )
    weights, count = setup.arguments.teacher_weights, len(recipe.teacher or ()) + len(recipe.sources or ())
    if weights is not None and len(weights) != count:
        raise RecipeError(f"train.teacher_weights has {len(weights)} numbers for {count} teacher(s).")
    for name in recipe.teacher or ():
        if name == BASE:
            if not recipe.trains_adapter:
                raise RecipeError(
                    "teacher: base is the model without its adapter, but no adapter is trained. Add adapter, or name "
                    "another teacher."
                )
        elif is_cache(name):
            _check_cache(name, setup, objectives)
        else:
            _check_model(name, setup)
    if recipe.sources and setup.kind != "text":
        raise RecipeError("sources: are language models with other tokenizers, but the data holds classes.")
    kept = [_kept_by(source) for source in recipe.sources or ()]
    for objective in objectives if kept else ():
        if "sources" in objective.needs.values() and not isinstance(objective.loss, nn.Module):
            _try_without_rows(objective, kept, setup.config.get_text_config().vocab_size)


def _kept_by(source: SourceEntry) -> int:
    """How many tokens of each prediction."""
    if is_cache(source.path):
        return TeacherCache(source.path).facts.k
    open_checkpoint(source.path, source.revision)
    return source.k


def _try_without_rows(objective: Objective, kept: list[int], vocabulary: int) -> None:
    none_N = torch.zeros(0, dtype=torch.long)
    sources = [Source(TopK.of(torch.zeros(0, k), k), none_N, none_N, none_N.float()) for k in kept]
    given = {"student": torch.zeros(0, vocabulary), "sources": sources, "labels": none_N, "sequences": none_N}
    try:
        objective.loss(**objective.arguments(given | {"progress": 0.0}))
    except FuseError as error:
        raise FuseError(f"objectives.{objective.name}: {error}") from None


def _check_cache(folder: str, setup: Setup, objectives: list[Objective]) -> None:
    teacher = CachedTeacher(TeacherCache(folder))
    if setup.kind != "text":
        raise RecipeError(f"teacher: {folder} is a cache of predictions in texts, but the data holds classes.")
    check_revision(teacher, setup.arguments.teacher_model_init_kwargs or {})
    check_tokenizer(teacher, setup.processor, setup.config.get_text_config().vocab_size)
    check_objectives(teacher, objectives)


def _check_model(name: str, setup: Setup) -> None:
    from transformers import AutoConfig, AutoTokenizer

    options: dict[str, Any] = setup.arguments.teacher_model_init_kwargs or {}
    if "subfolder" in options:
        return  # where its files are, only loading it tells
    folder = open_checkpoint(name, options.get("revision")).folder
    local = {"trust_remote_code": False, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(folder, **local)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise CheckpointError(f"teacher {name}: its config.json cannot be used: {reason}.") from error
    tokenizers = None, None
    if setup.kind != "images":
        try:
            tokenizers = setup.processor, AutoTokenizer.from_pretrained(folder, **local)
        except (OSError, ValueError, KeyError):
            tokenizers = setup.processor, None
    check_predictions(f"teacher {name}", setup.config, config, *tokenizers, of_tokens=setup.kind == "text")
