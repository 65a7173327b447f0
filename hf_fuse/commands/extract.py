from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_fuse.commands import Overwrite, Workers, app


@app.command()
def extract(
    store: Annotated[Path, typer.Argument(help="A folder made by hf-fuse store.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make.", show_default=False)],
    task: Annotated[str | None, typer.Option(help="The task whose model is wanted.", show_default=False)] = None,
    weight: Annotated[
        list[str] | None, typer.Option(help="Instead, a mix: TASK=NUMBER, repeatable (twin).", show_default=False)
    ] = None,
    base: Annotated[str | None, typer.Option(help="tall-masks: where the base is now.", show_default=False)] = None,
    out_dtype: Annotated[str | None, typer.Option(help="twin: dtype of the result.", show_default=False)] = None,
    overwrite: Overwrite = False,
    workers: Workers = None,
) -> None:
    """Restore one task's model, or a mix of several, from a store."""
    from hf_fuse.merge.extract import extract as run
    from hf_fuse.merge.extract import parse_weights

    options = {"base": base, "out_dtype": out_dtype}
    options = {name: value for name, value in options.items() if value is not None}
    weights = parse_weights(weight) if weight else None
    folder = run(store, output, task=task, weights=weights, overwrite=overwrite, workers=workers, **options)
    print(f"restored: {folder}")
