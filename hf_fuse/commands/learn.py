from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_fuse.commands import EXTRA, Output, Overwrite, app, overrides


@app.command(context_settings=EXTRA)
def learn(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="A recipe for learning in YAML.", show_default=False)],
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """Estimate from data what a merge needs to know: of one model statistics, of several the coefficients of a merge.

    Any recipe key can be set: --examples 1024
    """
    from hf_fuse.merge.coefficients import FILE, read_coefficients
    from hf_fuse.merge.learn_recipe import LearnRecipe
    from hf_fuse.merge.learning import learn as run

    given = overrides(context.args, LearnRecipe.model_fields)
    made = run(recipe, output, overrides=given, overwrite=overwrite)
    if not (made / FILE).exists():
        print(f"statistics: {made}")
        return
    print(f"coefficients: {made}")
    for name, value in read_coefficients(str(made)).facts.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    print(f"merge with them: hf-fuse merge {made / 'merge.yaml'} --output FOLDER")
