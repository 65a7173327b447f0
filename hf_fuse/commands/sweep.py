from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hf_fuse.commands import EXTRA, Device, Json, Output, Overwrite, Pickle, Workers, app, console, overrides


@app.command(context_settings=EXTRA)
def sweep(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="A recipe with a section sweep.", show_default=False)],
    output: Output = None,
    overwrite: Overwrite = False,
    trials: Annotated[int | None, typer.Option(help="Instead of the file's.", min=1, show_default=False)] = None,
    device: Device = "cpu",
    as_json: Json = False,
    plot: Annotated[Path | None, typer.Option(help="Draw here, not beside the output.", show_default=False)] = None,
    allow_pickle: Pickle = False,
    workers: Workers = None,
) -> None:
    """Merge with many sets of parameters, score each merge, keep the best. Any recipe key can be set as in merge."""
    from hf_fuse.merge.sweep import sweep as run

    found = run(
        recipe, output, overrides=overrides(context.args), trials=trials, overwrite=overwrite, device=device,
        allow_pickle=allow_pickle, workers=workers, plot=plot,
    )  # fmt: skip
    print(json.dumps(found.to_dict(), indent=2, default=str)) if as_json else found.print(console())
