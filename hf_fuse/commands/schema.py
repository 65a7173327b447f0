from __future__ import annotations

import json
from typing import Annotated

import typer

from hf_fuse.commands import app


@app.command()
def schema(
    command: Annotated[str, typer.Argument(help="What the recipe is for: merge, train, compress, learn...")] = "merge",
    method: Annotated[
        str | None, typer.Option(help="Only the parameters of this method, of any kind.", show_default=False)
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="Of the method, if several have its name.", show_default=False)
    ] = None,
) -> None:
    """Print the JSON schema of a recipe, or of a method's parameters."""
    from hf_fuse.schemas import method_schema, recipe_schema

    print(json.dumps(method_schema(method, kind) if method else recipe_schema(command), indent=2))
