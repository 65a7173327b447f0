from __future__ import annotations

import json

import typer

from hf_fuse.commands import EXTRA, Json, Output, Overwrite, Pickle, RecipeFile, Verify, app, console, overrides


@app.command(context_settings=EXTRA)
def plan(
    context: typer.Context,
    recipe: RecipeFile,
    output: Output = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    allow_pickle: Pickle = False,
    verify: Verify = False,
) -> None:
    """Show what a merge would read, compute and write. Reads headers only."""
    from hf_fuse.merge.plan import plan as make_plan

    given = overrides(context.args)
    made = make_plan(
        recipe, overrides=given, output=output, overwrite=overwrite, allow_pickle=allow_pickle, verify=verify
    )
    if as_json:
        print(json.dumps(made.to_dict(), indent=2))
    else:
        from hf_fuse.merge.report import print_plan

        print_plan(made, console())
