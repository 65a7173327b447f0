from __future__ import annotations

import json
from typing import Annotated

import typer

from hf_fuse.commands import Json, app, console


@app.command("list")
def list_methods(
    name: Annotated[str | None, typer.Argument(help="A method: its parameters and a recipe to paste.")] = None,
    as_json: Json = False,
) -> None:
    """List the merge methods and the steps after a merge, or describe one."""
    from hf_fuse.merge import report

    if as_json:
        wanted = [report.find(name)] if name else report.listed()
        facts = [report.method_facts(method) for method in wanted]
        print(json.dumps(facts[0] if name else facts, indent=2))
    elif name:
        report.print_method(name, console())
    else:
        report.print_methods(console())
