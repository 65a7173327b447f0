from __future__ import annotations

import json
from enum import Enum
from typing import Annotated

import typer

from hf_fuse.commands import Json, app, console


class Map(str, Enum):
    exact = "exact"
    min_ed = "min_ed"
    statistical = "statistical"


@app.command()
def tokenizer_report(
    student: Annotated[str, typer.Argument(help="The model that learns: folder or Hub id.")],
    teacher: Annotated[str, typer.Argument(help="The model that it learns from.")],
    data: Annotated[str, typer.Option(help="Rows that both read: a file, folder or Hub id, as in a training recipe.")],
    vocabulary: Annotated[Map, typer.Option(help="How tokens without one of equal text are mapped.")] = Map.min_ed,
    limit: Annotated[int, typer.Option(min=1, help="Rows to read, at most.")] = 500,
    as_json: Json = False,
) -> None:
    """Show how much of a text a student can learn from a teacher with another tokenizer. Reads no weights."""
    from hf_fuse.distill.tokenizer_report import compare_tokenizers

    found = compare_tokenizers(student, teacher, data, vocabulary=vocabulary.value, limit=limit)
    print(json.dumps(found.to_dict(), indent=2)) if as_json else found.print(console())
