"""The recipe's ``post``: which steps run on which merged tensor, with which numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_fuse import registry
from hf_fuse.errors import RecipeError
from hf_fuse.merge.parameters import check_names, method_options
from hf_fuse.recipe import Recipe


@dataclass
class PostStep:
    """One step for one tensor."""

    function: Callable[..., Tensor]
    options: dict[str, Any]

    def __call__(self, delta: Tensor) -> Tensor:
        return self.function(delta, **self.options)


def check_post(recipe: Recipe, method: registry.Method, has_base: bool) -> None:
    """Every step must exist, know its parameters, and have a difference to work on.

    Raises:
        RecipeError: naming the step and what would do.
    """
    for name, said in recipe.post.items():
        step = registry.get("post", name)
        if not has_base:
            raise RecipeError(
                f"post.{name}: works on the merged difference from a base, but {method.name} makes whole weights here. "
                "Choose a method on task vectors (task_arithmetic, ties), and say base_model."
            )
        check_names(step, [(f"post.{name}", said, False)])


def post_steps(recipe: Recipe, tensor: str, shape: tuple[int, ...], depth: float) -> list[PostStep]:
    """The steps that do something to this tensor, in the recipe's order."""
    found = []
    for name, said in recipe.post.items():
        step = registry.get("post", name)
        options = method_options(step, tensor, [(f"post.{name}", said, depth)], [], [], recipe.dialect)
        applies = getattr(step.module, "applies", None)
        if applies is not None:
            wanted = list(inspect.signature(applies).parameters)[1:]
            if not applies(shape, **{key: options[key] for key in wanted}):
                continue
        found.append(PostStep(step.function, options))
    return found
