"""From a recipe for selection to a folder: read the texts, score them, keep some, write them as a dataset."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_fuse.checkpoint.writer import check_output, exclusive_output
from hf_fuse.data.select_recipe import SelectRecipe, load_select_recipe
from hf_fuse.errors import FuseError, RecipeError
from hf_fuse.recipe import ModelRef, dump_recipe, output_folder

if TYPE_CHECKING:
    from datasets import Dataset

ROWS, RESULTS, CHART = "data.parquet", "select_results.json", "scores.png"


@dataclass(frozen=True)
class Selection:
    """What a selection kept.

    Attributes:
        output: the folder; ``data.parquet`` in it holds the kept rows in their order, with a column ``score``.
        rows: number of rows to choose from.
        kept: number of rows kept.
        share_by_source: name of a source -> share of its rows that was kept.
    """

    output: Path
    rows: int
    kept: int
    share_by_source: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "kept": self.kept, "share_by_source": self.share_by_source}


def select(
    recipe: str | Path | dict | SelectRecipe,
    output: str | Path | None = None,
    *,
    overrides: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Selection:
    """Chooses training data as a recipe says, into a new folder.

    Args:
        recipe: YAML file, dictionary or SelectRecipe.
        output: the folder to make; else the recipe's.
        overrides: dotted keys that win over the recipe, ``{"keep": 0.05}``.
        overwrite: replace an existing output, in one step, when the new one is complete.

    Raises:
        FuseError: with one message that says what, where and what to do. No output is left then, an old one is intact.
    """
    recipe = load_select_recipe(recipe, overrides)
    folder = output_folder(output or recipe.output)
    check_output(folder, overwrite)
    names, rows = _rows(recipe.data)
    given = {key: _reader(key, recipe) for key in recipe.needs}
    with exclusive_output(folder, overwrite=overwrite) as partial:
        scores = recipe.found_method.function(Texts(rows), *given.values(), **recipe.options)
        draw = np.random.default_rng(recipe.seed) if recipe.found_method.module.DRAWN else None
        chosen = best(scores, recipe.keep, draw)
        sources = np.repeat(np.arange(len(names)), [count for _, count in names])
        kept_by_source = np.bincount(sources[chosen], minlength=len(names))
        shares = {name: round(kept / max(count, 1), 6) for (name, count), kept in zip(names, kept_by_source.tolist())}
        made = Selection(folder, len(rows), len(chosen), shares)
        partial.folder.mkdir()
        kept = rows.select(chosen)
        kept = kept.remove_columns(["score"] if "score" in kept.column_names else [])
        kept.add_column("score", scores[chosen]).to_parquet(partial.folder / ROWS)
        (partial.folder / RESULTS).write_text(json.dumps(made.to_dict(), indent=2) + "\n", encoding="utf-8")
        said = recipe.model_copy(update={"output": None})
        (partial.folder / "fuse_recipe.yaml").write_text(dump_recipe(said), encoding="utf-8")
        _chart(scores, chosen, recipe.method, partial.folder / CHART)
        partial.publish()
    return made


def best(scores: np.ndarray, keep: float | int, draw: np.random.Generator | None = None) -> np.ndarray:
    """Numbers of the rows to keep, ascending.

    Args:
        scores: [N]; rows of -inf are never kept. Equal scores: the earlier row.
        keep: a share of N (float; at least one row is kept) or a number of rows (int).
        draw: draws without replacement, each time with chances in proportion to ``exp(score)``; none: the highest.

    Raises:
        FuseError: fewer rows than asked for can be kept.
    """
    count = keep if isinstance(keep, int) else max(1, round(keep * len(scores)))
    possible = int(np.isfinite(scores).sum())
    if possible < count:
        raise FuseError(
            f"keep: {count} of {len(scores)} rows are to be kept, but only {possible} are long enough. Keep fewer, or "
            "allow shorter texts."
        )
    if draw is not None:
        scores = scores + draw.gumbel(size=len(scores))
    return np.sort(np.argsort(-scores, kind="stable")[:count])


class Texts(Sequence):
    """The column ``text`` of a dataset, read from disk as it is walked over."""

    def __init__(self, rows: Dataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number):
        return self.rows[number]["text"]

    def __iter__(self) -> Iterator[str]:
        for batch in self.rows.select_columns("text").iter(1000):
            yield from batch["text"]


def _rows(sources: Sequence) -> tuple[list[tuple[str, int]], Dataset]:
    """The names and sizes of all sources, and their rows as one dataset."""
    from datasets import concatenate_datasets

    from hf_fuse.training_data import read_rows
    from hf_fuse.training_recipe import DataEntry

    parts = read_rows(DataEntry(train=list(sources), format="text")).train
    first = parts[0].rows.features
    for part in parts[1:]:
        if part.rows.features != first:
            raise FuseError(
                f"{part.name}: has the columns {', '.join(part.rows.column_names)}, but {parts[0].name} has "
                f"{', '.join(first)}, or of other types. Select from one of them at a time, or make them alike."
            )
    rows = concatenate_datasets([part.rows for part in parts])
    for part in parts:
        for number, text in enumerate(Texts(part.rows)):
            if not text or text.isspace():
                raise FuseError(f"{part.name}: row {number} (counted from 0) holds no text. Remove it.")
    return [(part.name, len(part.rows)) for part in parts], rows


def _reader(key: str, recipe: SelectRecipe) -> Any:
    """What the method is given for one of its needs: texts, or a function that loads a model."""
    if key == "target":
        return Texts(_rows(recipe.target)[1])
    return _loader(getattr(recipe, key), recipe.device)


def _loader(reference: ModelRef, device: str) -> Callable[[], tuple[Any, Any]]:
    """Checks a model and says how to load it later."""
    from hf_fuse.checkpoint.reader import open_checkpoint
    from hf_fuse.evaluation_models import candidates, check_device, loaded

    check_device(device)
    if reference.adapter:
        raise RecipeError(f"{reference.key}: merge the adapter into its base first.")
    folder = open_checkpoint(reference.path, reference.revision).folder
    (candidate,) = candidates([str(folder)], "causal")
    return lambda: (loaded(candidate, "causal", device=device, dtype="auto"), candidate.processor)


def _chart(scores: np.ndarray, chosen: np.ndarray, method: str, path: Path) -> None:
    """The chart, if there is matplotlib (the extra ``plot``) to draw it."""
    if find_spec("matplotlib") is None:
        return
    from hf_fuse.data.score_chart import score_chart

    kept = np.isin(np.arange(len(scores)), chosen)
    score_chart(scores, kept, title=f"{method}: {len(chosen)} of {len(scores)} texts kept", path=path)
