from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hf_fuse.commands import EXTRA, Json, Output, Overwrite, Private, Push, app, console, overrides


@app.command(context_settings=EXTRA)
def compress(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="A recipe for compression in YAML.", show_default=False)],
    output: Output = None,
    overwrite: Overwrite = False,
    push: Push = None,
    private: Private = None,
    as_json: Json = False,
) -> None:
    """Make one model smaller as a recipe says, with figures from before and after.

    Any recipe key can be set: --parameters.drop 4
    """
    from hf_fuse.compress.engine import compress as run
    from hf_fuse.compress.recipe import CompressRecipe

    given = overrides(context.args, CompressRecipe.model_fields)
    made = run(recipe, output, overrides=given, overwrite=overwrite, push=push, private=private)
    if as_json:
        print(json.dumps(made.to_dict(), indent=2))
    else:
        print(f"compressed: {made.output}\n{made.summary}")
        made.print(console())
        if made.address:
            print(f"pushed: {made.address}")
