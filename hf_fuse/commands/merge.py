from __future__ import annotations

import sys
from typing import Annotated

import typer

from hf_fuse.commands import (
    EXTRA,
    Device,
    Output,
    Overwrite,
    Pickle,
    Private,
    Push,
    RecipeFile,
    Verify,
    Workers,
    app,
    console,
    overrides,
)


@app.command(context_settings=EXTRA)
def merge(
    context: typer.Context,
    recipe: RecipeFile,
    output: Output = None,
    overwrite: Overwrite = False,
    device: Device = "cpu",
    push: Push = None,
    private: Private = None,
    allow_nonfinite: Annotated[bool, typer.Option("--allow-nonfinite", help="Merge NaN and infinity too.")] = False,
    allow_pickle: Pickle = False,
    verify: Verify = False,
    workers: Workers = None,
    continue_from: Annotated[
        str | None, typer.Option(help="Output of an earlier merge to add the models to (opcm).", show_default=False)
    ] = None,
) -> None:
    """Merge checkpoints as a recipe says. Any recipe key can be set: --parameters.density 0.3

    Several processes: accelerate launch -m hf_fuse merge recipe.yaml --output merged
    """
    from hf_fuse.merge.engine import merge as run
    from hf_fuse.merge.plan import plan as make_plan
    from hf_fuse.merge.workers import World

    options = {"overwrite": overwrite, "allow_pickle": allow_pickle, "verify": verify}
    options["continue_from"] = continue_from
    made = make_plan(recipe, overrides=overrides(context.args), output=output, **options)
    leads = World().leads
    if leads and sys.stderr.isatty():
        from hf_fuse.merge.report import print_plan

        print_plan(made, console(stderr=True))
    elif leads:
        for warning in made.warnings:
            print(f"note: {warning}", file=sys.stderr)
    folder = run(
        made,
        overwrite=overwrite,
        device=device,
        allow_nonfinite=allow_nonfinite,
        push=push,
        private=private,
        workers=workers,
    )
    if leads:
        print(f"merged: {folder}\nmethod: {made.method.name}\ntensors: {len(made.units)}\nbytes: {made.layout.nbytes}")
        if lost := getattr(made, "truncation", None):
            print(f"left out by the rank: {lost:.3%} of the change")
