from __future__ import annotations

import json
from typing import Annotated

import typer

from hf_fuse.commands import Json, app, console


@app.command("list")
def list_methods(
    name: Annotated[str | None, typer.Argument(help="A method: its parameters and a recipe to paste.")] = None,
    kind: Annotated[
        str | None, typer.Option(help="Only of this kind: merge, compress, losses...", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """List the methods of all kinds, or describe one."""
    from hf_fuse import method_list

    methods = method_list.find(name, kind) if name else method_list.listed(kind)
    if as_json:
        facts = [method_list.method_facts(method) for method in methods]
        print(json.dumps(facts[0] if name and len(facts) == 1 else facts, indent=2))
    elif name:
        for method in methods:
            method_list.print_method(method, console())
    else:
        method_list.print_methods(methods, console())
