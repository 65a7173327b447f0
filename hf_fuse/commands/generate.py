from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from hf_fuse.commands import EXTRA, Json, app, overrides
from hf_fuse.errors import RecipeError


@app.command(context_settings=EXTRA, options_metavar="[PROMPT] [OPTIONS]")
def generate(
    context: typer.Context,
    fuse: Annotated[Path, typer.Option(help="A recipe for fusion while decoding.", show_default=False)],
    prompts: Annotated[
        str | None,
        typer.Option(help="A text file, a prompt in each line, or a dataset's column 'prompt'.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File of JSON lines to make.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    as_json: Json = False,
    chat: Annotated[bool | None, typer.Option("--chat/--no-chat", help="Use the chat template.")] = None,
) -> None:
    """Let several models generate together. The prompt is an argument, of a file, or all of the standard input.

    Any recipe key can be set: hf-fuse generate "Once upon a time" --fuse recipe.yaml --generation.temperature 0.7
    """
    from hf_fuse.decode.answers import generate as run
    from hf_fuse.decode.prompts import check_rows_output, read_prompts, write_rows
    from hf_fuse.decode.recipe import DecodeRecipe

    prompt, rest = _prompt_apart(context.args)
    given = overrides(rest, DecodeRecipe.model_fields)
    if chat is not None:
        given["chat"] = chat
    if output is not None:
        check_rows_output(output, overwrite)
    rows = run(fuse, read_prompts(prompt, prompts, sys.stdin), overrides=given)
    if output is not None:
        write_rows(rows, output)
        print(f"rows: {len(rows)}\noutput: {output}")
    elif as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        print("\n---\n".join(row["completion"] for row in rows))


def _prompt_apart(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The prompt, and the overrides that may stand before or behind it. Declared as an argument of the command, it
    would be the first override's name where there is no prompt."""
    prompts, rest, left = [], [], list(arguments)
    while left:
        word = left.pop(0)
        if not word.startswith("--"):
            prompts.append(word)
            continue
        rest.append(word)
        if "=" not in word and left:
            rest.append(left.pop(0))
    if len(prompts) > 1:
        raise RecipeError(f"{prompts[1]!r} is one argument too many. Put the prompt in quotes.")
    return (prompts[0] if prompts else None), rest
