"""The commands of ``hf-fuse``, one file each: parse, call one function, print. Each imports only what it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_fuse.errors import RecipeError

# Files of this folder, in the order in which the help lists them.
COMMANDS = (
    "merge",
    "plan",
    "sweep",
    "train",
    "teach",
    "fuse",
    "tokenizer_report",
    "compress",
    "generate",
    "learn",
    "align",
    "list_methods",
    "schema",
    "push",
    "extract_lora",
    "store",
    "extract",
    "inspect",
    "similarity",
    "evaluate",
    "select",
    "step_law",
    "demo",
)

app = typer.Typer(
    name="hf-fuse",
    help="Make one model out of many.\n\nExample: hf-fuse merge recipe.yaml --output merged",
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}  # of commands whose recipe can be overridden

RecipeFile = Annotated[Path, typer.Argument(help="A recipe in YAML, ours or mergekit's.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder to make.", show_default=False)]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing output when the new one is complete.")
]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Accept .bin inputs (torch's restricted unpickler).")]
Verify = Annotated[bool, typer.Option("--verify", help="Compare Hub inputs with the Hub's hashes first.")]
Push = Annotated[str | None, typer.Option(help="Push the result to this Hub id.", show_default=False)]
Private = Annotated[bool | None, typer.Option("--private/--public", help="Of a new repository.")]
Device = Annotated[str, typer.Option(help="cpu or cuda[:N].")]
Workers = Annotated[int | None, typer.Option(help="Threads; one per core, at most 8.", min=1)]


def overrides(arguments: list[str], known: Any = None) -> dict[str, Any]:
    """``--parameters.density 0.3 --seed=1`` -> ``{"parameters.density": 0.3, "seed": 1}``.

    ``known``: the recipe's keys, by default those of one for merging.
    """
    from hf_fuse.recipe import Recipe, read_yaml
    from hf_fuse.registry import nearest

    known = known or {*Recipe.model_fields, "merge_method"}
    found, rest = {}, list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise RecipeError(f"{flag!r} is one argument too many. Expected a recipe and --options.")
        key, given, value = flag[2:].partition("=")
        if key.split(".")[0] not in known:
            hint = f" A method's parameter is --parameters.{key}." if "parameters" in known and "." not in key else ""
            raise RecipeError(f"--{key}: no such option or recipe key. {nearest(key, known)}{hint}")
        if not given:
            if not rest:
                raise RecipeError(f"--{key} needs a value.")
            value = rest.pop(0)
        found[key] = read_yaml(value, f"--{key}")
    return found


def console(stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=stderr, soft_wrap=False)
