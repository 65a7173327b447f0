from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hf_fuse.commands import Json, Pickle, app, console


@app.command()
def inspect(
    models: Annotated[list[str], typer.Argument(help="Fine-tuned models: folders or Hub ids.")],
    base: Annotated[str, typer.Option(help="The model they were fine-tuned from.")],
    as_json: Json = False,
    plot: Annotated[Path | None, typer.Option(help="Save a heat-map of the cosines here.", show_default=False)] = None,
    per_tensor: Annotated[bool, typer.Option("--per-tensor", help="One row per tensor.")] = False,
    allow_pickle: Pickle = False,
) -> None:
    """Compare task vectors: norms, cosines and sign conflicts, per tensor and over the whole model."""
    from hf_fuse.diagnostics.task_vectors import inspect_models, print_inspection

    found = inspect_models(models, base, allow_pickle=allow_pickle)
    if plot:
        found.plot(plot)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print_inspection(found, console(), per_tensor=per_tensor)
