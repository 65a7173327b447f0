from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_fuse.commands import Overwrite, app


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything the demo makes.")] = Path(
        "hf-fuse-demo"
    ),
    seed: Annotated[int, typer.Option()] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Seconds instead of minutes; the figures mean nothing.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Train experts on text that every Python carries, merge them by several methods, and compare."""
    from hf_fuse.demo import run_demo

    run_demo(output, seed=seed, quick=quick, overwrite=overwrite)
