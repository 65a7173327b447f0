"""Rows of text -> token ids and labels, and lists of those -> padded batches.

Labels are -100 wherever nothing is to be learnt: the prompt of a completion, a chat outside of the assistant's part,
padding, and the first token of every row, which nothing before it could predict.
"""

from __future__ import annotations

import re
from bisect import bisect_left, insort
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hf_fuse.checkpoint.chat_template import chat_template, missing_markers
from hf_fuse.errors import FuseError

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
MARKS_ASSISTANT = re.compile(r"\{%-?\s*generation\b")

Encoded = tuple[list[int], list[int]]  # token ids and labels


def encoder(
    kind: str, tokenizer: PreTrainedTokenizerBase, length: int, train_on: str, vocabulary: int
) -> Callable[..., dict]:
    """A function for ``Dataset.map(batched=True, with_indices=True)``: ``(name, batch, indices) -> columns``
    ``input_ids``, ``labels``, ``length``, ``cut`` (whether max_length cut something off) and ``source`` (its row).
    The model embeds ``vocabulary`` tokens."""
    if not tokenizer.is_fast:
        raise FuseError("the tokenizer does not tell where its tokens begin. Use a fast one (tokenizer.json).")

    def rows_of(row: dict) -> list[tuple[list[int], Any, bool]]:
        if kind == "classification":
            pair = (row["text"],) if "text" in row else (row["sentence1"], row.get("sentence2"))
            pair = tuple(text for text in pair if text is not None)
            whole = tokenizer(*pair, verbose=False)["input_ids"]
            ids = whole if len(whole) <= length else tokenizer(*pair, truncation=True, max_length=length)["input_ids"]
            return [(ids, row["labels"], len(whole) > length)]
        if kind == "text":
            return [(*piece, False) for piece in pieces(tokenizer, row["text"] or "", length)]
        if kind == "chat" or not isinstance(row["prompt"], str):
            messages = row["messages"] if kind == "chat" else _messages(row["prompt"]) + _messages(row["completion"])
            first = 0 if kind == "chat" else len(row["prompt"])
            ids, labels = encode_chat(tokenizer, _messages(messages), row.get("tools"), train_on, first)
        else:
            ids, labels = encode_completion(tokenizer, row["prompt"], row["completion"])
        cut, ids, labels = len(ids) > length, ids[:length], labels[:length]
        return [(ids, labels, cut)] if any(label != IGNORED for label in labels) else []

    def encode_batch(name: str, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        made: dict[str, list] = {"input_ids": [], "labels": [], "length": [], "cut": [], "source": []}
        for number, index in enumerate(indices):
            try:
                found = rows_of({column: values[number] for column, values in batch.items()})
                for ids, _, _ in found:
                    check_ids(ids, vocabulary)
            except FuseError as error:
                raise FuseError(f"{name}: row {index + 1}: {error}") from None
            for ids, labels, cut in found:
                for column, value in zip(made, (ids, labels, len(ids), cut, index)):
                    made[column].append(value)
        return made

    return encode_batch


def check_ids(ids: list[int], vocabulary: int) -> None:
    """Raises FuseError if the model does not embed one of the tokens."""
    if ids and (largest := max(ids)) >= vocabulary:
        raise FuseError(
            f"the tokenizer gives token id {largest}, but the model embeds ids below {vocabulary} only. Use the "
            "tokenizer that belongs to the model."
        )


def pieces(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> list[Encoded]:
    """A text and its end token, cut into pieces of at most ``length`` tokens. Nothing is left out but a last piece of
    one token, from which nothing can be learnt."""
    ids = tokenizer(text, verbose=False)["input_ids"] if text.strip() else []
    ids = ids + _end(tokenizer, ids)
    found = [ids[start : start + length] for start in range(0, len(ids), length)]
    return [(piece, [IGNORED, *piece[1:]]) for piece in found if len(piece) > 1]


def encode_completion(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> Encoded:
    """Prompt and completion in one row; the completion and the end token are trained on."""
    if prompt is None or completion is None:
        raise FuseError(f"has no {'prompt' if prompt is None else 'completion'}.")
    ids, labels = _with_spans(tokenizer, prompt + completion, [(len(prompt), len(prompt + completion))], special=True)
    end = _end(tokenizer, ids)
    ids, labels = ids + end, labels + end
    if not end and ids[-1] == tokenizer.eos_token_id:  # the tokenizer adds it itself
        labels[-1] = ids[-1]
    return ids, labels


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], tools: Any, train_on: str, first: int = 0
) -> Encoded:
    """A conversation through the tokenizer's chat template. Trained on: what the assistant says from message number
    ``first`` on, as the template marks it (``{% generation %}``) or, where it does not, as it grows turn by turn."""
    options = {"tools": tools} if tools else {}
    if train_on == "all":
        ids = tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"]
        return ids, [IGNORED, *ids[1:]]
    spoken = [n for n, message in enumerate(messages) if message["role"] == "assistant" and n >= first]
    if not spoken:
        raise FuseError("the assistant says nothing in it. Remove the row, or set data.train_on: all.")
    if MARKS_ASSISTANT.search(tokenizer.chat_template) and not first:
        made = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **options)
        return made["input_ids"], _masked(made["input_ids"], made["assistant_masks"])
    whole = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    spans = []
    for number in spoken:
        before = ""
        if number:
            before = tokenizer.apply_chat_template(
                messages[:number], tokenize=False, add_generation_prompt=True, **options
            )
        through = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False, **options)
        if not (whole.startswith(before) and whole.startswith(through)):
            raise FuseError(
                "the chat template shows a turn differently once others follow, so what the assistant says can't be "
                "told apart. Use a template with {% generation %} (data.chat_template), or set data.train_on: all."
            )
        spans.append((len(before), len(through)))
    return _with_spans(tokenizer, whole, spans, special=False)


def usable_template(tokenizer: PreTrainedTokenizerBase, wanted: str | None) -> list[str]:
    """Gives the tokenizer the recipe's chat template, if it names one; returns what the user should know about it.

    Raises:
        FuseError: neither recipe nor tokenizer has one.
    """
    if wanted:
        tokenizer.chat_template = chat_template(wanted)
    if not isinstance(tokenizer.chat_template, str):
        raise FuseError(
            "the tokenizer has no chat template to write messages with. Name one: data.chat_template: chatml."
        )
    if lacking := missing_markers(tokenizer.chat_template, tokenizer.get_vocab()):
        return [
            f"chat template: {', '.join(lacking[:3])} {'is' if len(lacking) == 1 else 'are'} no token of this "
            "tokenizer and will be split into pieces."
        ]
    return []


def packed(rows: Dataset, length: int) -> Packed:
    """Rows side by side in as few rows of ``length`` tokens as best fit decreasing finds. Positions begin anew with
    each of them; that is how transformers knows that they must not see each other."""
    lengths = rows["length"]
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, bin), sorted
    for index in sorted(range(len(rows)), key=lambda index: -lengths[index]):
        place = bisect_left(free, (lengths[index], -1))
        if place == len(free):
            room, number = length, len(bins)
            bins.append([])
        else:
            room, number = free.pop(place)
        bins[number].append(index)
        insort(free, (room - lengths[index], number))
    return Packed(rows, bins)


class Packed:
    """Several rows of a dataset as one, put together when asked for."""

    def __init__(self, rows: Dataset, bins: list[list[int]]):
        self.rows, self.bins = rows, bins

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
        for number in self.bins[index]:
            piece = self.rows[number]
            row["input_ids"] += piece["input_ids"]
            row["labels"] += [IGNORED, *piece["labels"][1:]]
            row["position_ids"] += range(len(piece["input_ids"]))
        return row


def collate_tokens(rows: list[dict], *, pad_id: int) -> dict[str, torch.Tensor]:
    """Rows padded on the right to the longest: ``input_ids``, ``labels`` and ``attention_mask`` ``[B, L]``. Packed rows
    have ``position_ids`` instead of the mask; each of their padding tokens is a text of its own."""
    batch = {"input_ids": _padded(rows, "input_ids", pad_id), "labels": _padded(rows, "labels", IGNORED)}
    if "position_ids" in rows[0]:
        return batch | {"position_ids": _padded(rows, "position_ids", 0)}
    return batch | {"attention_mask": _mask(rows)}


def collate_texts(rows: list[dict], *, pad_id: int) -> dict[str, torch.Tensor]:
    """Texts padded on the right to the longest ``[B, L]`` and their class ids ``[B]``."""
    import torch

    labels_B = torch.tensor([row["labels"] for row in rows])
    return {"input_ids": _padded(rows, "input_ids", pad_id), "attention_mask": _mask(rows), "labels": labels_B}


def _padded(rows: list[dict], key: str, value: int) -> torch.Tensor:
    import torch

    tensors = [torch.tensor(row[key], dtype=torch.long) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def _mask(rows: list[dict]) -> torch.Tensor:
    return _padded([{"mask": [1] * len(row["input_ids"])} for row in rows], "mask", 0)


def _with_spans(tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int]], special: bool) -> Encoded:
    """Token ids of ``text``; labels where a token begins within one of the spans of characters."""
    made = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    inside = [start < end and any(low <= start < high for low, high in spans) for start, end in made["offset_mapping"]]
    return made["input_ids"], _masked(made["input_ids"], inside)


def _masked(ids: list[int], trained: list) -> list[int]:
    labels = [token if kept else IGNORED for token, kept in zip(ids, trained)]
    return [IGNORED, *labels[1:]]


def _end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """The end token, unless there is none or the text has it already."""
    end = tokenizer.eos_token_id
    return [] if end is None or not ids or ids[-1] == end else [end]


def _messages(value: Any) -> list[dict]:
    if not isinstance(value, list) or not value:
        raise FuseError("holds no messages, expected a list of {role, content}.")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise FuseError(f"a message is {message!r}, expected {{role: user, content: ...}}.")
    return value
