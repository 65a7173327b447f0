from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hf_fuse.commands import EXTRA, Json, Output, Overwrite, app, overrides


@app.command(context_settings=EXTRA)
def fuse(
    context: typer.Context,
    recipe: Annotated[
        Path, typer.Argument(help="A recipe with a pivot, sources and data, in YAML.", show_default=False)
    ],
    output: Output = None,
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    as_json: Json = False,
) -> None:
    """Give a language model the knowledge of others, whatever their sizes and tokenizers (FuseChat, FuseLLM).

    Any recipe key can be set: --train.learning_rate 5e-6
    """
    from hf_fuse.distill.fusion import fuse as run
    from hf_fuse.distill.fusion_recipe import FusionRecipe

    given = overrides(context.args, FusionRecipe.model_fields)
    made = run(recipe, output, overrides=given, overwrite=overwrite, resume=resume)
    if as_json:
        print(json.dumps(made.to_dict(), indent=2))
        return
    for name, figures in made.figures.items():
        print(f"{name}: {', '.join(f'{key} {value:.4g}' for key, value in figures.items())}")
    print(f"fused: {made.output}")
