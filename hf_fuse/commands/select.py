from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hf_fuse.commands import EXTRA, Json, Output, Overwrite, app, overrides


@app.command(context_settings=EXTRA)
def select(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="A recipe for selection in YAML.", show_default=False)],
    output: Output = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Choose training texts that suit a target, by n-grams (dsir) or by two models (color_filter).

    Any recipe key can be set: --keep 0.05
    """
    from hf_fuse.data.select_recipe import SelectRecipe
    from hf_fuse.data.selection import select as run

    made = run(recipe, output, overrides=overrides(context.args, SelectRecipe.model_fields), overwrite=overwrite)
    if as_json:
        print(json.dumps(made.to_dict(), indent=2))
        return
    print(f"selected: {made.output}\nkept: {made.kept} of {made.rows} texts")
    for name, share in made.share_by_source.items():
        print(f"{name}: {share:.1%}")
