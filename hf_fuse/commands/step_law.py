from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from hf_fuse.commands import Json, app


@app.command("step-law")
def step_law(
    model: Annotated[str, typer.Argument(help="Parameters outside the embeddings, as 1e9; or a model.")],
    tokens: Annotated[float, typer.Option(help="Tokens of the whole training, as 1e11.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Learning rate and batch size to pre-train a dense decoder, by the Step Law."""
    from hf_fuse.data.step_law import parameters_outside_embeddings
    from hf_fuse.data.step_law import step_law as run

    try:
        parameters = float(model)
    except ValueError:
        from hf_fuse.evaluation_models import candidates

        parameters = parameters_outside_embeddings(candidates([model], "causal")[0].config)
    found = run(parameters, tokens)
    if as_json:
        print(json.dumps({"parameters": parameters, "tokens": tokens, **asdict(found)}, indent=2))
        return
    print(f"parameters outside embeddings: {parameters:,.0f}")
    print(f"learning rate: {found.learning_rate:.3g}\nbatch: {found.batch_tokens:,.0f} tokens")
    if found.warning:
        print(f"note: {found.warning}", file=sys.stderr)
