"""A recipe and prompts -> completions: what ``hf-fuse generate`` runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hf_fuse.checkpoint.reader import resolve
from hf_fuse.decode.completions import completions
from hf_fuse.decode.recipe import DecodeRecipe, load_decode_recipe
from hf_fuse.errors import FuseError
from hf_fuse.evaluation_models import Candidate, candidates, check_device, loaded
from hf_fuse.recipe import ModelRef


def generate(
    recipe: str | Path | dict | DecodeRecipe,
    prompts: str | Sequence[str],
    *,
    overrides: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Completes prompts with several models at once, as a recipe says.

    Args:
        recipe: YAML file, dictionary or DecodeRecipe.
        prompts: one or several.
        overrides: dotted keys that win over the recipe, ``{"parameters.alpha": 0.5}``.

    Returns:
        A row per completion with at least ``prompt`` and ``completion``: training data of the completion format.

    Raises:
        FuseError: with one message that says what, where and what to do.
    """
    recipe = load_decode_recipe(recipe, overrides)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts) or not prompts:
        raise FuseError("prompts: there is none, or an empty one. Give text to continue or to answer.")
    fused, tokenizer = open_models(recipe)
    torch.manual_seed(recipe.seed)
    asked = {"chat": recipe.chat, "batch_size": recipe.batch_size, **recipe.generation}
    if hasattr(fused, "answer"):
        return fused.answer(prompts, **asked)
    found = completions(fused, tokenizer, prompts, **asked)
    return [{"prompt": prompt, "completion": text} for prompt, texts in zip(prompts, found) for text in texts]


def open_models(recipe: DecodeRecipe) -> tuple[Any, Any]:
    """What the recipe's method makes of its models, and the first model's tokenizer.

    All models are found and their files checked before any weight is read; one that is named twice is loaded once.

    Raises:
        CheckpointError: a model is missing, damaged, or of another kind.
        FuseError: models that don't fit together, or an unknown device.
    """
    check_device(recipe.device)
    found = {
        (ref.key, role == "reward_model"): _candidate(ref, "text" if role == "reward_model" else "causal")
        for role in recipe.roles
        for ref in recipe.references(role)
    }
    dtype = recipe.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    live = {
        key: loaded(candidate, "text" if key[1] else "causal", device=recipe.device, dtype=dtype).eval()
        for key, candidate in found.items()
    }
    given: dict[str, Any] = {}
    for role in recipe.roles:
        models = [live[ref.key, role == "reward_model"] for ref in recipe.references(role)]
        if models:
            given[role] = models if isinstance(getattr(recipe, role), list) else models[0]
    fused = recipe.found_method.function(**given, **recipe.options)
    return fused, next(iter(found.values())).processor


def _candidate(ref: ModelRef, kind: str) -> Candidate:
    candidate = candidates([str(resolve(ref.path, ref.revision)[0])], kind)[0]
    if ref.adapter:
        candidate.adapter = resolve(ref.adapter, ref.adapter_revision)[0]
    return candidate
