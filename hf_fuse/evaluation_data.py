"""The data that models are evaluated on: text files, and one split of a local or Hub dataset, checked before use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_fuse.errors import FuseError

if TYPE_CHECKING:
    import datasets

# File name ending -> reader of the datasets library and its options.
_READERS = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".txt": ("text", {}),
}


@dataclass(frozen=True)
class TextSet:
    """Texts under one name. Iterating reads them; it can be done once per model."""

    name: str
    source: Sequence[str] | Iterable[str | None]

    def __iter__(self) -> Iterator[str]:
        # Blank rows are common in text datasets (paragraph breaks) and hold nothing to predict.
        return (text for text in self.source if text and not text.isspace())


@dataclass(frozen=True)
class LabelledSet:
    """Inputs with their true classes.

    Attributes:
        name: shown in the report.
        kind: "text" or "image".
        inputs: texts or PIL images, read lazily.
        labels: class ids or class names, one per input.
        class_names: name of each class id, where the dataset declares them.
        label_column: for messages.
    """

    name: str
    kind: str
    inputs: Sequence
    labels: list[int] | list[str]
    class_names: list[str] | None
    label_column: str


def unique_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many parents as it takes to tell all of them apart."""
    names = []
    for path in paths:
        others = [other for other in paths if other != path]
        for count in range(1, len(path.parts) + 1):
            tail = path.parts[-count:]
            if all(other.parts[-count:] != tail for other in others):
                break
        names.append(str(Path(*path.parts[-count:])))
    return names


def read_text_files(paths: Sequence[str | Path]) -> list[TextSet]:
    """Reads UTF-8 text files, each as one text.

    Raises:
        FuseError: a file is missing, is a folder, is not UTF-8, holds nothing, or is named twice.
    """
    files, contents = [Path(path).expanduser() for path in paths], []
    for file in files:
        if file.is_dir():
            raise FuseError(f"{file}: is a folder, not a text file. Pass it as the dataset instead.")
        try:
            contents.append(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FuseError(f"{file}: no such text file.") from None
        except UnicodeDecodeError as error:
            raise FuseError(
                f"{file}: is not UTF-8 text (byte {error.start}). Convert it, for example with iconv -t UTF-8."
            ) from None
        except OSError as error:
            raise FuseError(f"{file}: cannot be read: {error.strerror}.") from None
        if not contents[-1].strip():
            raise FuseError(f"{file}: holds no text. Remove it from the texts to evaluate.")
    resolved = [file.resolve() for file in files]
    twice = next((file for index, file in enumerate(resolved) if file in resolved[:index]), None)
    if twice:
        raise FuseError(f"{twice}: is given twice as a text file. Remove one.")
    return [TextSet(name, [text]) for name, text in zip(unique_names(resolved), contents)]


def load_rows(
    dataset: str | Path, *, subset: str | None = None, split: str = "test", limit: int | None = None
) -> tuple[str, datasets.Dataset]:
    """One split of a dataset -> (its name in reports, its rows).

    Args:
        dataset: a file (.csv, .tsv, .json, .jsonl, .parquet, .arrow, .txt), a folder of such files or of images, a
            folder written by ``save_to_disk``, or a Hub id. For a single file, which has no splits, ``split`` does not
            matter.
        subset: name of the configuration, for datasets that have several.
        split: name of the split; slices such as ``test[:100]`` work.
        limit: use the first rows only.

    Raises:
        FuseError: no such dataset, configuration or split (the existing ones are named), or no rows.
    """
    import datasets

    path, wanted = Path(dataset).expanduser(), re.match(r"[^\[]*", split).group()
    name = path.name if path.exists() else str(dataset)
    if path.is_file() and subset:
        raise FuseError(f"{path}: is a single file and has no subset {subset!r}. Remove the subset.")
    if path.is_file():
        reader, options = _reader(path)
        files = {wanted: str(path)}
        rows = _load(path, lambda: datasets.load_dataset(reader, data_files=files, split=split, **options))
    elif (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        rows = _load(path, lambda: datasets.load_from_disk(str(path)))
        if isinstance(rows, datasets.DatasetDict):
            _check_split(dataset, wanted, list(rows))
            rows = rows[wanted]
    else:
        if not path.is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(dataset)):
            raise FuseError(f"{dataset}: no such file or folder, and not a Hub id (expected org/name).")
        source = str(path) if path.is_dir() else str(dataset)
        subsets = _load(dataset, lambda: datasets.get_dataset_config_names(source))
        if subset is None and len(subsets) > 1 and "default" not in subsets:
            raise FuseError(f"{dataset}: has several subsets: {_listed(subsets)}. Choose one with subset.")
        if subset is not None and subset not in subsets:
            raise FuseError(f"{dataset}: has no subset {subset!r}. It has {_listed(subsets)}.")
        _check_split(dataset, wanted, _load(dataset, lambda: datasets.get_dataset_split_names(source, subset)))
        rows = _load(dataset, lambda: datasets.load_dataset(source, subset, split=split))
    if not len(rows):
        raise FuseError(f"{dataset}: split {split!r} holds no rows.")
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    return f"{name}:{subset}" if subset else name, rows


def text_set(name: str, rows: datasets.Dataset, column: str) -> TextSet:
    """The texts of a column; blank rows are left out."""
    _check_column(name, rows, column, "text")
    _check_is_text(name, rows, column)
    texts = TextSet(name, rows[column])
    if next(iter(texts), None) is None:
        raise FuseError(f"{name}: column {column!r} holds no text: all {len(rows)} rows are blank.")
    return texts


def labelled_set(name: str, rows: datasets.Dataset, column: str, label_column: str) -> LabelledSet:
    """Inputs and labels of a classification dataset.

    ``column`` holds texts or images. Where it does not exist and the dataset has exactly one column of images, that one
    is used. Labels are class ids or class names.
    """
    import datasets

    images = [key for key, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if column not in rows.column_names and len(images) == 1:
        column = images[0]
    _check_column(name, rows, column, "text or image")
    _check_column(name, rows, label_column, "label")
    if column not in images:
        _check_is_text(name, rows, column)
    feature = rows.features[label_column]
    labels = list(rows[label_column])
    kinds = {type(label) for label in labels}
    if kinds not in ({int}, {str}):
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise FuseError(
            f"{name}: label column {label_column!r} holds {found}; expected class ids (whole numbers) or class names."
        )
    if kinds == {int} and min(labels) < 0:
        raise FuseError(
            f"{name}: label column {label_column!r} holds {min(labels)}, which marks rows without a label. "
            "Choose a split that has labels."
        )
    class_names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    return LabelledSet(name, "image" if column in images else "text", rows[column], labels, class_names, label_column)


def class_ids(data: LabelledSet, config, model: str) -> list[int]:
    """The labels of ``data`` as class ids of a model with this config.

    Where dataset and model name their classes alike but number them differently, the names decide. Folders named after
    class ids (``0``, ``1``, ... ``10``), which datasets number in alphabetical order, count as those ids. Where the
    names have nothing in common, ids are taken as they are, provided that there are equally many classes.

    Raises:
        FuseError: a label the model does not know.
    """
    known = {str(name).casefold(): int(index) for name, index in (config.label2id or {}).items()}
    labels, names = data.labels, data.class_names
    if names and all(name.casefold() in known for name in names):
        return [known[names[label].casefold()] for label in labels]
    if names and all(name.isdecimal() and int(name) < config.num_labels for name in names):
        return [int(names[label]) for label in labels]
    if names and len(names) != config.num_labels:
        raise FuseError(
            f"{model}: has {config.num_labels} classes ({_listed(list(config.label2id or {}), 5)}), but label column "
            f"{data.label_column!r} of {data.name} has {len(names)} under other names ({_listed(names, 5)}), so it is "
            "not known which is which. Name them alike."
        )
    if isinstance(labels[0], str):
        unknown = sorted({label for label in labels if label.casefold() not in known})
        if unknown:
            raise FuseError(
                f"{model}: has no class {unknown[0]!r}, which label column {data.label_column!r} of {data.name} holds. "
                f"Its classes are {_listed(list(config.label2id or {}))}."
            )
        return [known[label.casefold()] for label in labels]
    if max(labels) >= config.num_labels:
        raise FuseError(
            f"{model}: has {config.num_labels} classes (ids 0 to {config.num_labels - 1}), but label column "
            f"{data.label_column!r} of {data.name} holds {max(labels)}. Choose another column or model."
        )
    return list(labels)


def _reader(path: Path) -> tuple[str, dict]:
    try:
        return _READERS[path.suffix.lower()]
    except KeyError:
        raise FuseError(f"{path}: unknown kind of dataset file. Expected one of {', '.join(_READERS)}.") from None


def _load(dataset: str | Path, load):
    """Runs a call of the datasets library, whose many exception types all become one message."""
    try:
        return load()
    except Exception as error:
        # The cause, not the wrapper, says what is wrong with a file.
        reason = str(error.__cause__ or error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise FuseError(f"{dataset}: cannot be loaded as a dataset: {reason}.") from error


def _check_split(dataset: str | Path, wanted: str, splits: list[str]) -> None:
    if wanted not in splits:
        raise FuseError(f"{dataset}: has no split {wanted!r}. It has {_listed(splits)}.")


def _check_column(name: str, rows: datasets.Dataset, column: str, role: str) -> None:
    if column not in rows.column_names:
        raise FuseError(f"{name}: has no {role} column {column!r}. Its columns are {_listed(rows.column_names)}.")


def _check_is_text(name: str, rows: datasets.Dataset, column: str) -> None:
    kind = getattr(rows.features[column], "dtype", type(rows.features[column]).__name__)
    if kind not in ("string", "large_string"):
        raise FuseError(
            f"{name}: column {column!r} holds {kind}, expected text. Its columns are {_listed(rows.column_names)}."
        )


def _listed(names: Sequence[str], most: int = 20) -> str:
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
