from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hf_fuse.commands import EXTRA, Json, Output, Overwrite, app, console, overrides


@app.command(context_settings=EXTRA)
def align(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="A recipe for an alignment in YAML.", show_default=False)],
    output: Output = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Put the units of a model into the order of another's, so that two models trained apart can be merged.

    Any recipe key can be set: --parameters.residual false
    """
    from hf_fuse.merge.align.engine import align as run
    from hf_fuse.merge.align.recipe import AlignRecipe

    made = run(recipe, output, overrides=overrides(context.args, AlignRecipe.model_fields), overwrite=overwrite)
    print(json.dumps(made.to_dict(), indent=2)) if as_json else made.print(console())
