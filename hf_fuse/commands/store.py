from __future__ import annotations

from typing import Annotated, Any

import typer

from hf_fuse.commands import EXTRA, Output, Overwrite, Pickle, RecipeFile, Verify, Workers, app, overrides
from hf_fuse.errors import RecipeError


@app.command(context_settings=EXTRA)
def store(
    context: typer.Context,
    kind: Annotated[str, typer.Argument(help="twin or tall-masks.", show_default=False)],
    recipe: RecipeFile,
    output: Output = None,
    task: Annotated[list[str] | None, typer.Option(help="Name of a model, in their order; repeatable.")] = None,
    density: Annotated[
        str | None, typer.Option(help="twin: share of each difference's directions to keep.", show_default=False)
    ] = None,
    overwrite: Overwrite = False,
    allow_pickle: Pickle = False,
    verify: Verify = False,
    workers: Workers = None,
) -> None:
    """Keep several fine-tunes in the room of few: twin (merged model + low-rank rest) or tall-masks (a bit per weight).

    Any recipe key can be set: --parameters.lambda 0.3
    """
    from hf_fuse.merge.extract import store as run
    from hf_fuse.recipe import read_yaml

    options: dict[str, Any] = {"tasks": task, "overrides": overrides(context.args), "overwrite": overwrite}
    if density is not None:
        if kind != "twin":
            raise RecipeError(f"--density belongs to the store twin, not to {kind}. Leave it out.")
        options["density"] = read_yaml(density, "--density")
    folder = run(kind, recipe, output, allow_pickle=allow_pickle, verify=verify, workers=workers, **options)
    print(f"store: {folder}\nbytes: {sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())}")
