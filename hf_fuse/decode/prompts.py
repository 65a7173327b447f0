"""Where prompts come from and where completions go."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from hf_fuse.errors import FuseError, OutputError
from hf_fuse.evaluation_data import load_rows

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow")


def read_prompts(prompt: str | None, source: str | None, standard_input: TextIO) -> list[str]:
    """The prompt of the command line; or those of a file or dataset; or all of the standard input as one.

    Raises:
        FuseError: both are given, or nothing; a source that can't be read or has no column of texts ``prompt``.
    """
    if prompt is not None and source is not None:
        raise FuseError("prompts: there is a prompt too. Give one of the two.")
    if prompt is not None:
        return [prompt]
    if source is None:
        if standard_input.isatty():
            raise FuseError(
                'no prompt. Give one in quotes, or --prompts FILE, or pipe text in: echo "..." | hf-fuse ...'
            )
        return [standard_input.read().rstrip("\n")]
    path = Path(source).expanduser()
    if path.is_file() and path.suffix.lower() not in TABLES:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise FuseError(f"{source}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'}).") from None
        found = [line for line in lines if line.strip()]
    else:
        name, rows = load_rows(source, subset=None, split="train")
        if "prompt" not in rows.column_names:
            raise FuseError(f"{name}: has no column 'prompt', but {', '.join(rows.column_names)}.")
        found = rows["prompt"][:]
        if not all(isinstance(text, str) for text in found):
            raise FuseError(f"{name}: its column 'prompt' holds something else than texts.")
    if not found:
        raise FuseError(f"{source}: holds no prompt.")
    return found


def check_rows_output(path: Path, overwrite: bool) -> None:
    """Refuses, before any work, an output that exists or can't be."""
    if path.suffix.lower() != ".jsonl":
        raise OutputError(f"{path}: is to hold rows of JSON. Call it {path.stem}.jsonl.")
    if path.exists() and not overwrite:
        raise OutputError(f"{path}: exists. Choose another output, or replace it with --overwrite.")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path.parent}: no such folder. Make it first.")


def write_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One JSON object per line, in one step."""
    partial = path.with_name(f"{path.name}.partial")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
