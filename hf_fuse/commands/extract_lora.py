from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hf_fuse.commands import Json, Overwrite, Pickle, Workers, app, console


@app.command("extract-lora")
def extract_lora(
    model: Annotated[str, typer.Argument(help="A fine-tuned model: folder or Hub id.", show_default=False)],
    base: Annotated[str, typer.Option(help="The model it was fine-tuned from.", show_default=False)],
    rank: Annotated[int, typer.Option(help="Rank of the adapter, at most.", min=1, show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make.", show_default=False)],
    energy: Annotated[
        float | None, typer.Option(help="Lower ranks where they hold this share, as 0.99.", show_default=False)
    ] = None,
    targets: Annotated[
        str | None, typer.Option(help="Modules: an expression; else all linear layers.", show_default=False)
    ] = None,
    save_full: Annotated[
        str | None, typer.Option(help="Tensors to keep whole: an expression, as norm.", show_default=False)
    ] = None,
    out_dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
    allow_pickle: Pickle = False,
    workers: Workers = None,
) -> None:
    """Turn a fine-tuned model into a LoRA adapter of its base, and say what that leaves out."""
    from hf_fuse.merge.extract_lora import extract_lora as run

    found = run(
        model, base, rank=rank, output=output, energy=energy, targets=targets, save_full=save_full,
        out_dtype=out_dtype, seed=seed, overwrite=overwrite, allow_pickle=allow_pickle, workers=workers,
    )  # fmt: skip
    print(json.dumps(found.to_dict(), indent=2)) if as_json else found.print(console())
