from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from hf_fuse.commands import app


@app.command()
def schema(
    command: Annotated[Literal["merge", "train"], typer.Argument(help="What the recipe is for.")] = "merge",
) -> None:
    """Print the JSON schema of a recipe."""
    from hf_fuse.recipe import Recipe
    from hf_fuse.training_recipe import TrainingRecipe

    print(json.dumps((TrainingRecipe if command == "train" else Recipe).model_json_schema(), indent=2))
