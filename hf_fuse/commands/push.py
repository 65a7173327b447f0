from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_fuse.commands import Private, app


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A model or adapter folder.")],
    repo: Annotated[str, typer.Argument(help="org/name")],
    private: Private = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.", show_default=False)] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.", show_default=False)] = None,
) -> None:
    """Push a folder to the Hub; files it no longer has are removed in the same commit."""
    from hf_fuse.hub import push as run

    print(f"pushed: {run(folder, repo, private=private, revision=revision, commit_message=message)}")
