"""A teacher's predictions on disk: what the teacher said once about a dataset, to train from without the teacher.

A cache is a folder: ``teacher_cache.json`` says what it was made of (:class:`CacheFacts`), and each
``predictions-00001.safetensors`` holds some of its rows. A row is one sequence of token ids; its key is the hash of
these. R rows, T tokens of all rows together, N predictions of all rows together, K kept tokens, V vocabulary::

    keys              U8   [R, 16]   row_key(input_ids)
    text_keys         U8   [R, 16]   text_key(row of the dataset); pieces of one long text share it, in their order
    token_starts      I64  [R + 1]   row r has the tokens token_starts[r] to token_starts[r + 1]
    input_ids         I32  [T]       prompts included
    prediction_starts I64  [R + 1]   likewise for what follows
    positions         I32  [N]       index in its row of the token that is predicted, from the tokens before it
    top_ids           U16  [N, K]    likeliest tokens, in descending order (I32 if V > 65536)
    top_log_probs     F16  [N, K]    natural logarithms; where fewer than K are known, ids are 0 and these are -inf
    tail_log_prob     F32  [N]       of all other tokens together
    label_log_prob    F32  [N]       of the token that follows in the text
    log_z             F32  [N]       logsumexp of the logits: top_log_probs + log_z are the logits themselves
    cross_entropy     F32  [R]       mean over the row's predictions at temperature 1

Logits are divided by ``temperature`` before everything but ``cross_entropy``. Only what has a label is kept: the prompt
of a completion has tokens and no predictions. That is ``4 K + 16`` bytes a prediction (``6 K + 16`` for vocabularies
beyond 65536) and 4 a token; whole distributions in fp16 would be ``2 V``. The tail is stored because what is left of
1 after rounding K probabilities is not it.

Reading maps the files into memory: a row costs its own bytes, whatever the size of the cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from hf_fuse.checkpoint.reader import read_header, read_json
from hf_fuse.checkpoint.tokenizer_comparison import PROBES
from hf_fuse.distill.top_k import TopK
from hf_fuse.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
CACHE_FILE = "teacher_cache.json"
STEM = "predictions"
SHARD_BYTES = 64 << 20  # what a killed run loses at most
KEY_BYTES = 16
CODES = {
    "keys": "U8", "text_keys": "U8", "token_starts": "I64", "input_ids": "I32", "prediction_starts": "I64",
    "positions": "I32", "top_log_probs": "F16", "tail_log_prob": "F32", "label_log_prob": "F32", "log_z": "F32",
    "cross_entropy": "F32",
}  # fmt: skip
NUMPY = {"U8": np.uint8, "U16": np.uint16, "I32": np.int32, "I64": np.int64, "F16": np.float16, "F32": np.float32}
TEXT_COLUMNS = ("messages", "tools", "prompt", "completion", "text")


@dataclass(frozen=True)
class CacheFacts:
    """What a cache was made of. Two caches with equal facts hold equal numbers.

    Attributes:
        teacher: its folder or Hub id; of several that were fused, their names.
        revision: the commit it was loaded at, for Hub models.
        weights: fingerprint of its weights.
        tokenizer: :func:`tokenizer_key`.
        vocabulary: V, the number of its logits.
        k: K.
        temperature: that its logits were divided by.
        dtype: that it ran in.
        data: hash of the rows and of which of their tokens are predicted.
        partial: some tokens with a label have no prediction on purpose; to a loss they count 0. Otherwise a label
            without a prediction is an error.
    """

    teacher: str
    tokenizer: str
    vocabulary: int
    k: int
    temperature: float = 1.0
    revision: str | None = None
    weights: str | None = None
    dtype: str | None = None
    data: str | None = None
    partial: bool = False

    def differences(self, other: CacheFacts) -> list[str]:
        """In words, what ``other`` has otherwise; folder names don't count where the weights are known."""
        names = [field.name for field in dataclasses.fields(self)]
        if self.weights and self.weights == other.weights:
            names.remove("teacher")
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return [f"{name} is {_short(ours)}, not {_short(theirs)}" for name, ours, theirs in pairs if ours != theirs]


@dataclass(frozen=True)
class CachedRow:
    """One sequence and what the teacher predicted in it. S tokens, N predictions.

    Attributes:
        input_ids_S: its tokens, ``int64``.
        positions_N: which of them are predicted, ascending, ``int64``; never 0.
        predictions: the N distributions, with ``label_log_prob_N`` and ``log_z_N``.
        cross_entropy: mean over the N at temperature 1, in nats.
        text_key: of the text that it is, or is a piece of.
    """

    input_ids_S: Tensor
    positions_N: Tensor
    predictions: TopK
    cross_entropy: float
    text_key: bytes


def row_key(input_ids: Sequence[int] | Tensor | np.ndarray) -> bytes:
    """Hash of a sequence of token ids."""
    ids = np.ascontiguousarray(torch.as_tensor(input_ids).cpu().numpy(), dtype="<i4")
    return hashlib.blake2b(ids.tobytes(), digest_size=KEY_BYTES).digest()


def text_key(row: Mapping[str, Any]) -> bytes:
    """Hash of a row of a dataset before it is encoded: the same for every tokenizer."""
    content = {name: row[name] for name in TEXT_COLUMNS if row.get(name) is not None}
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=KEY_BYTES).digest()


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the vocabulary and of how some difficult texts are split: equal for tokenizers that read alike."""
    read = [sorted(tokenizer.get_vocab().items()), [tokenizer(text, verbose=False)["input_ids"] for text in PROBES]]
    return hashlib.sha256(json.dumps(read).encode()).hexdigest()


def cache_bytes(tokens: int, predictions: int, k: int, vocabulary: int) -> int:
    """Size of a cache, less some 50 bytes a row."""
    return 4 * tokens + predictions * (k * (2 + _id_bytes(vocabulary)) + 16)


class CacheWriter:
    """Writes the rows of a cache into a folder, shard by shard; what is there already is gone on from.

    ``teacher_cache.json`` says how many rows there are when :meth:`finish` has been called, and nothing before.

    Args:
        folder: exists; make it a partial one and rename it when all is done.
        facts: of the cache.
        shard_bytes: about how much is held in memory and goes into one file.

    Raises:
        CheckpointError: the folder holds rows of another cache.
    """

    def __init__(self, folder: Path, facts: CacheFacts, *, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.facts, self.shard_bytes = folder, facts, shard_bytes
        if (folder / CACHE_FILE).exists():
            check_same(folder, facts)
        else:
            self._describe({})
        self._shards = sorted(folder.glob(f"{STEM}-*.safetensors"))
        self.rows = sum(read_header(path)[0]["keys"].shape[0] for path in self._shards)
        self._held: list[dict[str, np.ndarray]] = []
        self._held_bytes = 0

    def add(self, row: CachedRow) -> None:
        """Appends a row; it is on disk when its shard is full."""
        top = row.predictions
        width = self.facts.k - top.ids_NK.shape[-1]
        arrays = {
            "keys": np.frombuffer(row_key(row.input_ids_S), dtype=np.uint8),
            "text_keys": np.frombuffer(row.text_key, dtype=np.uint8),
            "input_ids": row.input_ids_S,
            "positions": row.positions_N,
            "top_ids": torch.nn.functional.pad(top.ids_NK, (0, width)),
            "top_log_probs": torch.nn.functional.pad(top.log_probs_NK.float(), (0, width), value=float("-inf")),
            "tail_log_prob": top.tail_log_prob_N.float(),
            "label_log_prob": top.label_log_prob_N.float(),
            "log_z": top.log_z_N.float(),
            "cross_entropy": np.array(row.cross_entropy),
        }
        codes = CODES | {"top_ids": _id_code(self.facts.vocabulary)}
        with np.errstate(over="ignore"):  # beyond fp16 a probability is 0
            held = {name: _array(values).astype(NUMPY[codes[name]]) for name, values in arrays.items()}
        self._held.append(held)
        self._held_bytes += sum(values.nbytes for values in held.values())
        self.rows += 1
        if self._held_bytes >= self.shard_bytes:
            self._write_shard()

    def finish(self) -> None:
        """Writes what is held, and that the cache is whole."""
        self._write_shard()
        self._describe({"rows": self.rows})

    def _write_shard(self) -> None:
        if not self._held:
            return
        each = {"keys", "text_keys", "cross_entropy"}  # one entry a row
        tensors = {
            name: (np.stack if name in each else np.concatenate)([row[name] for row in self._held])
            for name in self._held[0]
        }
        for name, counted in (("token_starts", "input_ids"), ("prediction_starts", "positions")):
            tensors[name] = np.cumsum([0, *(len(row[counted]) for row in self._held)], dtype=np.int64)
        path = self.folder / f"{STEM}-{len(self._shards) + 1:05d}.safetensors"
        unfinished = path.with_suffix(".unfinished")
        save_file(tensors, unfinished)
        unfinished.rename(path)
        self._shards.append(path)
        self._held, self._held_bytes = [], 0

    def _describe(self, more: dict[str, Any]) -> None:
        content = {"format": FORMAT, "kind": STEM, **dataclasses.asdict(self.facts), **more}
        unfinished = self.folder / f"{CACHE_FILE}.unfinished"
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(self.folder / CACHE_FILE)


class TeacherCache:
    """A cache to read from; see the module. ``len`` is its number of rows.

    Args:
        folder: of the cache.

    Raises:
        CheckpointError: there is none, it is unfinished, damaged, or of another version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.facts, rows = read_facts(self.folder)
        files = sorted(self.folder.glob(f"{STEM}-*.safetensors"))
        self._shards = [_mapped(path, self.facts) for path in files]
        self._first = [0, *np.cumsum([len(shard["keys"]) for shard in self._shards], dtype=int).tolist()]
        if rows is None or rows != len(self):
            raise CheckpointError(
                f"{self.folder}: holds {len(self)} rows of {'an unfinished cache' if rows is None else rows}. Make it "
                "again with hf-fuse teach."
            )

    def __len__(self) -> int:
        return self._first[-1]

    def __reduce__(self) -> tuple:
        return TeacherCache, (self.folder,)

    def row(self, number: int) -> CachedRow:
        """Row ``number`` of the cache."""
        shard, place = self._place(number)
        tokens = slice(*shard["token_starts"][place : place + 2])
        kept = slice(*shard["prediction_starts"][place : place + 2])
        read = {name: torch.from_numpy(np.array(shard[name][kept])) for name in _OF_PREDICTIONS}
        ids_NK = read["top_ids"].long()
        if ids_NK.numel() and not 0 <= int(ids_NK.min()) <= int(ids_NK.max()) < self.facts.vocabulary:
            raise CheckpointError(
                f"{self.folder}: row {number} has tokens beyond the vocabulary. Make the cache again."
            )
        top = TopK(
            ids_NK, read["top_log_probs"].float(), read["tail_log_prob"], read["label_log_prob"],
            self.facts.temperature, read["log_z"],
        )  # fmt: skip
        ids_S = torch.from_numpy(shard["input_ids"][tokens].astype(np.int64))
        key = shard["text_keys"][place].tobytes()
        return CachedRow(ids_S, read["positions"].long(), top, float(shard["cross_entropy"][place]), key)

    def positions(self, number: int) -> np.ndarray:
        """Which tokens of row ``number`` are predicted, without reading the predictions."""
        shard, place = self._place(number)
        return shard["positions"][slice(*shard["prediction_starts"][place : place + 2])]

    def find(self, key: bytes) -> list[int]:
        """Numbers of the rows with these token ids (:func:`row_key`)."""
        return self._by_key.get(key, [])

    def of_text(self, key: bytes) -> list[int]:
        """Numbers of the rows that make up a text (:func:`text_key`), in its order."""
        return self._by_text.get(key, [])

    def _place(self, number: int) -> tuple[dict[str, np.ndarray], int]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = bisect_right(self._first, number) - 1
        return self._shards[shard], number - self._first[shard]

    @cached_property
    def _by_key(self) -> dict[bytes, list[int]]:
        return self._numbers("keys")

    @cached_property
    def _by_text(self) -> dict[bytes, list[int]]:
        return self._numbers("text_keys")

    def _numbers(self, name: str) -> dict[bytes, list[int]]:
        found: dict[bytes, list[int]] = {}
        for first, shard in zip(self._first, self._shards):
            for place, key in enumerate(shard[name]):
                found.setdefault(key.tobytes(), []).append(first + place)
        return found


_OF_PREDICTIONS = ("positions", "top_ids", "top_log_probs", "tail_log_prob", "label_log_prob", "log_z")


def is_cache(folder: str | Path) -> bool:
    return (Path(folder).expanduser() / CACHE_FILE).is_file()


def read_facts(folder: Path) -> tuple[CacheFacts, int | None]:
    """What a cache was made of, and its number of rows; None while it is unfinished.

    Raises:
        CheckpointError: there is no such cache, or it is of another kind or version.
    """
    if not is_cache(folder):
        raise CheckpointError(f"{folder}: holds no {CACHE_FILE}. Make a cache with hf-fuse teach.")
    found = read_json(folder / CACHE_FILE)
    if (found.pop("format", None), found.pop("kind", None)) != (FORMAT, STEM):
        raise CheckpointError(
            f"{folder}: is no cache of predictions of version {FORMAT}. Make it again with hf-fuse teach."
        )
    rows = found.pop("rows", None)
    try:
        facts = CacheFacts(**found)
        if not (facts.temperature > 0 and all(isinstance(n, int) for n in (facts.vocabulary, facts.k, rows or 0))):
            raise TypeError("its temperature, vocabulary, k and rows are not all numbers")
    except TypeError as error:
        raise CheckpointError(f"{folder / CACHE_FILE}: {error}. Make the cache again.") from None
    return facts, rows


def check_same(folder: Path, facts: CacheFacts) -> None:
    """Whether the cache in ``folder``, whole or not, is the one that ``facts`` describe.

    Raises:
        CheckpointError: it was made with another teacher, revision, tokenizer, text or setting.
    """
    if different := read_facts(folder)[0].differences(facts):
        raise CheckpointError(
            f"{folder}: is another cache than the recipe's: its {'; '.join(different)}. Make it anew with --overwrite, "
            "or choose another output."
        )


def _mapped(path: Path, facts: CacheFacts) -> dict[str, np.ndarray]:
    """The tensors of a shard, mapped into memory, with their types and sizes checked."""
    infos, _ = read_header(path)
    codes = CODES | {"top_ids": _id_code(facts.vocabulary)}
    if {name: info.dtype for name, info in infos.items()} != codes:
        raise CheckpointError(f"{path}: is no shard of a cache as {CACHE_FILE} describes it. Make the cache again.")
    mapped = np.memmap(path, np.uint8, "r")  # once: systems limit the number of maps
    made = {
        name: mapped[info.start : info.start + info.nbytes].view(NUMPY[info.dtype]).reshape(info.shape)
        for name, info in infos.items()
    }
    rows, tokens, kept = len(made["keys"]), len(made["input_ids"]), len(made["positions"])
    shapes = dict.fromkeys(_OF_PREDICTIONS, (kept,))
    shapes |= dict.fromkeys(("top_ids", "top_log_probs"), (kept, facts.k))
    shapes |= dict.fromkeys(("keys", "text_keys"), (rows, KEY_BYTES))
    shapes |= dict.fromkeys(("token_starts", "prediction_starts"), (rows + 1,)) | {"cross_entropy": (rows,)}
    wrong = [name for name, shape in shapes.items() if made[name].shape != shape]
    for name, end in (("token_starts", tokens), ("prediction_starts", kept)):
        starts = made[name]
        if name not in wrong and (starts[0] != 0 or starts[-1] != end or (np.diff(starts) < 0).any()):
            wrong.append(name)
    if wrong:
        raise CheckpointError(f"{path}: {wrong[0]} doesn't fit the other tensors. Make the cache again.")
    return made


def _array(values: Tensor | np.ndarray) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values


def _id_bytes(vocabulary: int) -> int:
    return 2 if vocabulary <= 1 << 16 else 4


def _id_code(vocabulary: int) -> str:
    return "U16" if _id_bytes(vocabulary) == 2 else "I32"


def _short(value: Any) -> str:
    text = "unknown" if value is None else str(value)
    return text if len(text) < 60 else text[:12] + "..."
