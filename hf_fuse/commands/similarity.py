from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hf_fuse.commands import Device, Json, app, console


@app.command()
def similarity(
    first: Annotated[str, typer.Argument(help="A causal language model: folder or Hub id.")],
    second: Annotated[str, typer.Argument(help="Another with the same tokenizer.")],
    text: Annotated[list[Path], typer.Option(help="Text file that both read; repeatable.")],
    positions: Annotated[int, typer.Option(min=8, help="Tokens to compare, at most.")] = 1024,
    device: Device = "cpu",
    plot: Annotated[Path | None, typer.Option(help="Save a heat-map of CKA here.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Compare two models layer by layer (CKA) and unit by unit: whether aligning them before a merge is worth it."""
    from hf_fuse.diagnostics.layer_similarity import compare_layers
    from hf_fuse.evaluation_data import read_text_files

    if plot:
        from hf_fuse.plots import _checked

        _checked(plot)  # rather than after the work
    paragraphs = [
        part for file in read_text_files(text) for whole in file for part in whole.split("\n\n") if part.strip()
    ]
    found = compare_layers(first, second, paragraphs, positions=positions, device=device)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        found.print(console())
    if plot:
        found.plot(plot)
