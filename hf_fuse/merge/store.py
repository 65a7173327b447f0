"""What all stores of compressed fine-tunes share: names of tasks, the description, and models written from them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fuse.checkpoint.reader import read_json
from hf_fuse.checkpoint.writer import exclusive_output
from hf_fuse.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from hf_fuse.merge.plan import Plan
    from hf_fuse.merge.units import Unit
    from hf_fuse.recipe import ModelRef

STORE_FILE = "store.json"


def task_names(models: Sequence[ModelRef], tasks: Sequence[str] | None = None) -> dict[str, str]:
    """``{model key: task}``, by default named after the last part of each model's path."""
    if tasks is None:
        paths = [(model.adapter or model.path).rstrip("/") for model in models]
        tasks = [re.sub(r"[^\w.-]", "-", Path(path).name).lstrip(".-") or "model" for path in paths]
        tasks = [name if tasks.count(name) == 1 else f"{name}-{k}" for k, name in enumerate(tasks, 1)]
    if len(tasks) != len(models):
        raise RecipeError(f"tasks: {len(tasks)} names for {len(models)} models.")
    for name in tasks:
        if not re.fullmatch(r"\w[\w.-]{0,99}", name) or list(tasks).count(name) > 1:
            raise RecipeError(
                f"tasks: {name!r} is not a name of its own. Expected different names of letters, digits, '.', '_', '-'."
            )
    return {model.key: name for model, name in zip(models, tasks)}


def read_description(store: Path) -> dict[str, Any]:
    """The content of a store's ``store.json``; which keys there are depends on its ``kind``.

    Raises:
        CheckpointError: not a store.
    """
    if not (store / STORE_FILE).is_file():
        raise CheckpointError(f"{store}: has no {STORE_FILE}. Expected a folder made by `hf-fuse store`.")
    return read_json(store / STORE_FILE)


def write_restored(
    made: Plan, source: Any, card: dict[str, Any], *, overwrite: bool, workers: int | None = None
) -> Path:
    """Writes the one model of a passthrough plan with its numbers taken from ``source``.

    Args:
        made: plan of the folder that gives names, dtypes, config and tokenizer.
        source: one of :mod:`hf_fuse.merge.sources`, with that folder's tensors.
        card: facts for :func:`hf_fuse.card.merge_card`; what the folder tells is filled in.
    """
    import torch

    from hf_fuse.card import merge_card
    from hf_fuse.checkpoint.tokenizer import tokenizer_files
    from hf_fuse.merge.finish import RECIPE_FILE, versions, write_companions
    from hf_fuse.merge.progress import Progress
    from hf_fuse.merge.stream import Merger
    from hf_fuse.merge.workers import Workers, World

    folder = Path(made.recipe.output).expanduser().absolute()
    parent = made.reference
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(made.bytes_read, quiet=False))
        partial = stack.enter_context(exclusive_output(folder, overwrite=overwrite))
        partial.create(made.layout)
        merger = Merger(made.method, {parent.ref.key: source}, made.units, torch.float32, progress=progress)
        pool = Workers(torch.device("cpu"), torch.float32, workers)
        stack.callback(pool.close)

        def write(unit: Unit, start: int, out: Tensor) -> None:
            for name in (unit.name, *unit.aliases):
                partial.write(made.layout.places[name], start, memoryview(out.numpy()))

        merger.run(write, World(size=1, rank=0), pool)
        partial.sync()
        write_companions(made, partial.folder)
        (partial.folder / RECIPE_FILE).unlink()  # it would tell of a copy; the card tells the rest
        facts = {
            "architecture": parent.checkpoint.architecture,
            "recipe_yaml": None,
            "versions": versions(),
            "warnings": [],
            "figures": {},
            "has_tokenizer": bool(tokenizer_files(partial.folder)),
        }
        (partial.folder / "README.md").write_text(merge_card(facts | card), encoding="utf-8")
        partial.publish()
    return folder
