"""Training data: rows of datasets, checked, told apart by their columns, and encoded for a model.

Four formats: ``chat`` (column ``messages``), ``completion`` (``prompt`` and ``completion``), ``classification``
(``label`` beside ``text``, ``sentence1`` and ``sentence2``, or an image) and ``text``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fuse.errors import FuseError
from hf_fuse.evaluation_data import LabelledSet, class_ids, labelled_set, load_rows, read_text_files
from hf_fuse.perplexity import context_length
from hf_fuse.registry import nearest
from hf_fuse.training_encoding import collate_texts, collate_tokens, encoder, packed, usable_template
from hf_fuse.training_recipe import DataEntry, DataSource

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

DEFAULT_LENGTH = 1024
COLUMNS = {
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
    "classification": ("label",),
    "text": ("text",),
}
FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
SPLIT_SEED = 0


@dataclass(frozen=True)
class Part:
    """The rows of one source, under our column names."""

    name: str
    rows: Dataset


@dataclass(frozen=True)
class Rows:
    """What a recipe's data section names, read and checked but not yet encoded."""

    format: str
    train: list[Part]
    eval: list[Part]
    replay: list[Part] = field(default_factory=list)

    @property
    def has_images(self) -> bool:
        return self.format == "classification" and _image_column(self.train[0].rows) is not None


@dataclass(frozen=True)
class TrainingData:
    """Encoded data, ready for a Trainer.

    Attributes:
        format: ``chat``, ``completion``, ``text`` or ``classification``.
        train: rows of token ids and labels, or of images and labels.
        eval: the same, or None.
        collator: rows -> a padded batch.
        max_length: in tokens; None for images.
        facts: what a summary shows: name -> number or text.
        notes: what was left out or cut off, in sentences.
        replay: as ``train``, or None.
    """

    format: str
    train: Any
    eval: Any
    collator: Callable[[list[dict]], dict[str, Any]]
    max_length: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    replay: Any = None


def read_rows(entry: DataEntry) -> Rows:
    """Loads all datasets of ``entry`` and finds out their format. Needs neither model nor tokenizer.

    Raises:
        FuseError: no such dataset, split or column; columns of no known format; sources of different formats.
    """
    train = [_read(source) for source in entry.train]
    found = {part.name: entry.format or _format(part) for part in train}
    kind = found[train[0].name]
    evaluation = [_read(source) for source in entry.eval or []]
    replay = [_read(source) for source in entry.replay or []]
    found |= {part.name: entry.format or _format(part) for part in [*evaluation, *replay]}
    if other := next((name for name, format in found.items() if format != kind), None):
        raise FuseError(
            f"{other}: its columns are those of {found[other]}, but {train[0].name} holds {kind}. Train on one format "
            "at a time, or name it with data.format."
        )
    for part in [*train, *evaluation, *replay]:
        _check_columns(part, kind)
    if entry.eval_fraction:
        train, evaluation = _split_off(train, entry.eval_fraction)
    return Rows(kind, train, evaluation, replay)


def encode(rows: Rows, entry: DataEntry, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> TrainingData:
    """Token ids and labels of text data; the classes of ``config`` count (see :func:`set_classes`).

    Raises:
        FuseError: rows that can't be read as their format (the first is named), a label that the model does not know,
            no chat template, or nothing left to train on.
    """
    length = row_length(entry, tokenizer, config)
    notes: list[str] = []
    if rows.format == "chat" or (rows.format == "completion" and _is_chat(rows.train[0].rows, "prompt")):
        notes += usable_template(tokenizer, entry.chat_template)
    if entry.packing and rows.format == "classification":
        raise FuseError("data: packing is for texts to predict, not for classes. Remove it.")
    encode_batch = encoder(rows.format, tokenizer, length, entry.train_on, config.get_text_config().vocab_size)
    train, facts = _encoded(rows.train, rows.format, encode_batch, config, notes)
    evaluation, replay = (
        _encoded(parts, rows.format, encode_batch, config, notes)[0] if parts else None
        for parts in (rows.eval, rows.replay)
    )
    if entry.packing:
        train = packed(train, length)
        evaluation, replay = (data and packed(data, length) for data in (evaluation, replay))
        facts |= {"packed rows": len(train)}
    if rows.format == "classification":
        collator = partial(collate_texts, pad_id=_pad_id(tokenizer))
    else:
        collator = partial(collate_tokens, pad_id=_pad_id(tokenizer))
    return TrainingData(rows.format, train, evaluation, collator, length, facts, notes, replay)


def row_length(entry: DataEntry, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
    """How many tokens a row of texts may have: ``max_length``, or 1024, or the model's context if that is shorter.

    Raises:
        FuseError: ``max_length`` is more than the model reads.
    """
    context = min(context_length(config) or DEFAULT_LENGTH, tokenizer.model_max_length)
    if entry.max_length and entry.max_length > context:
        raise FuseError(f"data: max_length is {entry.max_length}, but the model reads {context} tokens at most.")
    return entry.max_length or min(DEFAULT_LENGTH, context)


def encode_images(rows: Rows, processor: Any, config: PreTrainedConfig, dtype: Any) -> TrainingData:
    """Images and their class ids; pixels are made batch by batch."""
    from hf_fuse.classification import image_encoder

    to_pixels = image_encoder(processor, config, dtype)
    train, evaluation, replay = (
        _images(parts, config) if parts else None for parts in (rows.train, rows.eval, rows.replay)
    )

    def collate(batch: list[dict]) -> dict[str, Any]:
        import torch

        labels_B = torch.tensor([row["labels"] for row in batch])
        return to_pixels([row["image"] for row in batch]) | {"labels": labels_B}

    facts = {"images": len(train), "classes": config.num_labels}
    return TrainingData(rows.format, train, evaluation, collate, None, facts, replay=replay)


def set_classes(config: PreTrainedConfig, rows: Rows) -> bool:
    """Gives ``config`` the classes of the training rows, unless it is a classifier that knows them all.

    Returns:
        Whether the classification head has to be new.
    """
    sets = [_labelled(part) for part in rows.train]
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if architecture.endswith("Classification"):
        try:
            for labelled in sets:
                class_ids(labelled, config, "the model")
            return False
        except FuseError:
            pass  # other classes than the model was trained for: it gets a new head
    names = _class_names(sets)
    config.num_labels = len(names)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    return True


def _read(source: DataSource) -> Part:
    from datasets import Dataset

    path = Path(source.path).expanduser()
    if path.suffix == ".txt" and path.is_file():
        # A text file is one document: lines on their own would lose what they follow.
        (text,) = read_text_files([path])
        return Part(text.name, Dataset.from_dict({"text": list(text)}))
    if path.suffix in FILES and not path.is_file():  # else it would be looked for on the Hub
        raise FuseError(f"{path}: no such file.")
    name, rows = load_rows(source.path, subset=source.subset, split=source.split, limit=source.limit)
    for ours, theirs in source.columns.items():
        if theirs not in rows.column_names:
            raise FuseError(f"{name}: has no column {theirs!r}. {nearest(theirs, rows.column_names)}")
        if ours != theirs:
            rows = rows.remove_columns([ours] if ours in rows.column_names else []).rename_column(theirs, ours)
    return Part(name, rows)


def _format(part: Part) -> str:
    columns = set(part.rows.column_names)
    if "messages" in columns:
        return "chat"
    if {"prompt", "completion"} <= columns:
        return "completion"
    if "label" in columns and (columns & {"text", "sentence1"} or _image_column(part.rows)):
        return "classification"
    if "text" in columns:
        return "text"
    raise FuseError(
        f"{part.name}: the columns {', '.join(part.rows.column_names)} are of no known format. Expected messages; "
        "prompt and completion; text; or label beside text, sentence1 and sentence2, or an image. Columns of other "
        "names can be mapped: columns: {prompt: question, completion: answer}."
    )


def _check_columns(part: Part, kind: str) -> None:
    from datasets import Value

    for column in COLUMNS[kind]:
        if column not in part.rows.column_names:
            raise FuseError(f"{part.name}: has no column {column!r}. {nearest(column, part.rows.column_names)}")
        feature = part.rows.features[column]
        is_text = isinstance(feature, Value) and feature.dtype in ("string", "large_string")
        may_be_chat = column == "messages" or (kind == "completion" and not isinstance(feature, Value))
        if kind != "classification" and not (is_text and column != "messages" or may_be_chat):
            raise FuseError(f"{part.name}: column {column!r} holds {feature}, expected text.")


def _is_chat(rows: Dataset, column: str) -> bool:
    from datasets import Value

    return not isinstance(rows.features[column], Value)


def _split_off(parts: Sequence[Part], fraction: float) -> tuple[list[Part], list[Part]]:
    train, evaluation = [], []
    for part in parts:
        count = round(len(part.rows) * fraction)
        if not 0 < count < len(part.rows):
            raise FuseError(
                f"{part.name}: eval_fraction {fraction} of {len(part.rows)} rows leaves nothing to evaluate on, or "
                "nothing to train on. Choose another, or name a dataset as eval."
            )
        pieces = part.rows.train_test_split(count, seed=SPLIT_SEED)
        train.append(replace(part, rows=pieces["train"]))
        evaluation.append(replace(part, rows=pieces["test"]))
    return train, evaluation


def _encoded(
    parts: Sequence[Part], kind: str, encode_batch: Callable, config: PreTrainedConfig, notes: list[str]
) -> tuple[Dataset, dict[str, Any]]:
    """All parts as one dataset of token ids, with what a summary shows of it."""
    from datasets import concatenate_datasets

    pieces = []
    for part in parts:
        rows = part.rows
        if kind == "classification":
            labelled = _labelled(part)
            texts = [name for name in ("text", "sentence1", "sentence2") if name in rows.column_names]
            ids = class_ids(labelled, config, "the model")
            rows = rows.select_columns(texts).add_column("labels", ids)
        made = rows.map(
            partial(encode_batch, part.name), batched=True, with_indices=True, remove_columns=rows.column_names,
            desc=f"encode {part.name}",
        )  # fmt: skip
        if len(made) and (cut := sum(made["cut"])):
            notes.append(f"{part.name}: {cut} of {len(rows)} rows were cut off at max_length.")
        if kind in ("chat", "completion") and (lost := len(rows) - len(made)):
            notes.append(f"{part.name}: {lost} of {len(rows)} rows have nothing to train on within max_length.")
        if len(made):  # without rows there are no columns either
            pieces.append(made.remove_columns("cut"))
    if not pieces:
        names = ", ".join(part.name for part in parts)
        raise FuseError(f"{names}: nothing to train on is left. Raise max_length, or look at the rows.")
    whole = concatenate_datasets(pieces)
    facts = {"rows": sum(len(part.rows) for part in parts), "tokens": sum(whole["length"])}
    if kind == "classification":
        facts["classes"] = config.num_labels
    return whole, facts


def _images(parts: Sequence[Part], config: PreTrainedConfig) -> Dataset:
    from datasets import concatenate_datasets

    pieces = []
    for part in parts:
        column = _image_column(part.rows)
        if column is None:
            raise FuseError(f"{part.name}: has no column of images. {nearest('image', part.rows.column_names)}")
        ids = class_ids(_labelled(part), config, "the model")
        rows = part.rows.select_columns([column]).add_column("labels", ids)
        pieces.append(rows if column == "image" else rows.rename_column(column, "image"))
    return concatenate_datasets(pieces)


def _image_column(rows: Dataset) -> str | None:
    from datasets import Image

    found = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    return "image" if "image" in found else found[0] if found else None


def _labelled(part: Part) -> LabelledSet:
    column = _image_column(part.rows) or ("text" if "text" in part.rows.column_names else "sentence1")
    return labelled_set(part.name, part.rows, column, "label")


def _class_names(sets: Sequence[LabelledSet]) -> list[str]:
    """Names in the order of their ids; numbers without names get LABEL_0, LABEL_1, ... as in transformers."""
    if all(labelled.class_names for labelled in sets):
        return list(dict.fromkeys(name for labelled in sets for name in labelled.class_names))
    kinds = {type(labelled.labels[0]) for labelled in sets}
    if len(kinds) > 1 or any(labelled.class_names for labelled in sets):
        raise FuseError("data: some sources name their classes and others number them. Name them alike.")
    if kinds == {str}:
        return sorted({label for labelled in sets for label in labelled.labels})
    return [f"LABEL_{number}" for number in range(1 + max(max(labelled.labels) for labelled in sets))]


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise FuseError("the tokenizer has neither a padding nor an end token, so rows can't share a batch. Give it one.")
