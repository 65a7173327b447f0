from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hf_fuse.commands import EXTRA, Json, Output, Overwrite, app, overrides


@app.command(context_settings=EXTRA)
def teach(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="A recipe with a teacher and data, in YAML.", show_default=False)],
    output: Output = None,
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, tell the size, ask nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Run a teacher once over a dataset, and keep its predictions or answers to train students from. Any recipe key can
    be set: --k 16
    """
    from hf_fuse.distill.teach import teach as run
    from hf_fuse.distill.teach_recipe import TeachRecipe

    given = overrides(context.args, TeachRecipe.model_fields)
    made = run(recipe, output, overrides=given, overwrite=overwrite, resume=resume, dry_run=dry_run)
    if as_json:
        print(json.dumps(made.to_dict(), indent=2))
        return
    for name, value in made.figures.items():
        print(f"{name}: {value:,}")
    for note in made.notes:
        print(f"note: {note}")
    if not dry_run:
        print(f"{made.kind}: {made.output}")
