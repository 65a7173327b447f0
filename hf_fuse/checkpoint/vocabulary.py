"""Lines up the embedding rows of models with different vocabularies, token by token.

Models whose tokenizers agree are merged row by row. Where they differ, `align` decides on the output vocabulary and
says, for every model, which of its rows becomes which output row and where the rows come from that it does not have.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_fuse.checkpoint.tokenizer import AddedToken, Tokenizer
from hf_fuse.checkpoint.tokenizer_comparison import some_of
from hf_fuse.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass
class Alignment:
    """The output vocabulary, and where every model's embedding rows go in it. Made by `align`.

    Args:
        source: ``"base"``, ``"union"`` or a model's key: whose vocabulary this is.
        donor: key of the model whose tokenizer files the output starts from.
        vocab: token -> id of the output.
        size: rows of the output's embedding matrix; may exceed the vocabulary (padding rows).
        rows: per model, int64 of length ``size``: its own row that goes to output row ``i``, or -1.
        fill: output id -> ``[(model key, row), ...]``, for ids that some model has -1 at: it gets the mean of those
            rows. If the list is empty, a token starts as zeros, and padding is the mean of the model's rows with a
            token. Every -1 has an entry.
        new_tokens, new_pieces: tokens of a union that the donor lacks: added tokens with their flags; plain pieces.
        special_ids: ``bos_token_id``, ``eos_token_id``, ``pad_token_id`` for the output's configs, known ones only.
        notes: what a user should know about the result, one sentence each.
    """

    source: str
    donor: str
    vocab: dict[str, int] = field(repr=False)
    size: int
    rows: dict[str, NDArray[np.int64]] = field(repr=False)
    fill: dict[int, list[tuple[str, int]]] = field(repr=False)
    tokenizers: dict[str, Tokenizer] = field(repr=False)
    vocab_sizes: dict[str, int] = field(default_factory=dict)
    new_tokens: list[AddedToken] = field(default_factory=list, repr=False)
    new_pieces: dict[str, int] = field(default_factory=dict, repr=False)
    special_ids: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def identity(self, key: str) -> bool:
        """Whether model ``key`` can be read as it is: same number of rows, every row in its place."""
        return self.vocab_sizes[key] == self.size and bool(np.array_equal(self.rows[key], np.arange(self.size)))

    def output_id(self, key: str, token_id: int) -> int | None:
        """The output id of model ``key``'s token ``token_id`` (say, of its generation config), None if it has none."""
        token = self.tokenizers[key].tokens.get(token_id)
        return self.vocab.get(token) if token is not None else None

    @cached_property
    def has_token(self) -> NDArray[np.bool_]:
        """Which output rows have a token; the others are padding."""
        mask = np.zeros(self.size, bool)
        mask[np.fromiter(self.vocab.values(), np.int64, len(self.vocab))] = True
        return mask

    def write(self, folder: Path) -> None:
        """Writes the output's tokenizer files: `hf_fuse.checkpoint.tokenizer_writer.write_tokenizer`."""
        from hf_fuse.checkpoint.tokenizer_writer import write_tokenizer

        write_tokenizer(self, folder)


def align(
    source: str,
    tokenizers: Mapping[str, Tokenizer | None],
    *,
    base_key: str | None,
    vocab_sizes: Mapping[str, int],
    token_sources: Mapping[str, Mapping[str, Any]] | None = None,
    pad_to_multiple_of: int | None = None,
) -> Alignment:
    """Chooses the output vocabulary and finds a row for every token of every model.

    A token's row in a model is its own if the model has the token; else the base's row; else the only owner's; else the
    mean of the owners' rows. A token whose id lies beyond a model's matrix counts as missing there. A union keeps the
    base's ids and appends the tokens of the others in recipe order, each by ascending id. Added tokens stay added
    tokens; plain pieces of another BPE join the vocabulary without merges, so that the base's splitting of ordinary
    text stays as it is.

    The output has as many rows as the source's matrix, or more if its tokens need them, rounded up to
    ``pad_to_multiple_of``. A row without a token (padding) keeps each model's own values where the row is padding in
    that model too; a model that has no such row, or a token at it, gets the base's padding row if there is one. Where
    the base has none and some model lacks it, the row is the mean of each model's rows with a token: zeros would be a
    logit of 0, above that of most tokens.

    Args:
        source: ``"base"``, ``"union"`` or the key of the model whose vocabulary to use.
        tokenizers: per model key, in recipe order. A model without tokenizer files (None) is taken to use the base's.
        base_key: the base model; None: the first model plays its part.
        vocab_sizes: per model key, rows of its embedding matrix (at least those tokens that are used have one).
        token_sources: overrides by token: ``{"source": model key | {"kind": "model_token", "model": key, "token": ...
            or "token_id": ...} | {"kind": "zero"}, "force": bool}``. Used for the models that lack the token, with
            ``force`` for all.
        pad_to_multiple_of: round the number of rows up to a multiple of this.

    Raises:
        RecipeError: unknown source, model or token; a vocabulary that cannot take the others' pieces.
        CheckpointError: a tokenizer that is missing or could not be read.
    """
    if not tokenizers:
        raise RecipeError("No models to align the vocabulary of.")
    base = base_key if base_key is not None else next(iter(tokenizers))
    known = _complete(tokenizers, base, vocab_sizes)
    if source not in ("base", "union") and source not in known:
        raise RecipeError(
            f"tokenizer: {source!r} is none of the models. Expected base, union or one of: {', '.join(known)}."
        )
    donor = base if source in ("base", "union") else source  # the words win over a model of that name
    vocab, new_tokens, new_pieces, notes = _output_vocabulary(source, known, donor)
    size = max([vocab_sizes[donor], *(number + 1 for number in vocab.values())])
    if pad_to_multiple_of is not None:
        if type(pad_to_multiple_of) is not int or pad_to_multiple_of < 1:
            raise RecipeError(f"pad_to_multiple_of: {pad_to_multiple_of!r}. Expected a whole number of at least 1.")
        size = -(-size // pad_to_multiple_of) * pad_to_multiple_of

    rows = {key: np.full(size, -1, np.int64) for key in known}
    for key, tokenizer in known.items():
        limit, own = vocab_sizes[key], rows[key]
        if tokenizer.vocab == vocab:
            numbers = np.fromiter(vocab.values(), np.int64, len(vocab))
            numbers = numbers[numbers < limit]
            own[numbers] = numbers
            continue
        for token, number in vocab.items():
            row = tokenizer.vocab.get(token, limit)
            if row < limit:
                own[number] = row
    _pad(rows, vocab, known, vocab_sizes, base)
    tokens = set(vocab.values())
    fill = _fill(rows, base, tokens)
    orphans = [token for token, number in vocab.items() if all(own[number] < 0 for own in rows.values())]
    _override(token_sources or {}, vocab, known, vocab_sizes, rows, fill)
    orphans = [token for token in orphans if not fill[vocab[token]]]
    if orphans:
        notes.append(f"{len(orphans)} token(s) have a row in no model and start as zeros: {some_of(orphans)}.")
    new = sum(not sources for number, sources in fill.items() if number not in tokens)
    if new:
        notes.append(f"{new} row(s) of padding are not in all models: each is the mean of the rows with a token.")
    special = {name: number for name, number in known[donor].special_ids.items() if name != "unk_token_id"}
    return Alignment(
        source, donor, vocab, size, rows, fill, known, dict(vocab_sizes), new_tokens, new_pieces, special, notes
    )


def _complete(tokenizers: Mapping[str, Tokenizer | None], base: str, sizes: Mapping[str, int]) -> dict[str, Tokenizer]:
    if base not in tokenizers:
        raise RecipeError(f"The base model {base!r} is not among the models whose tokenizers were given.")
    first = tokenizers[base]
    if first is None:
        raise CheckpointError(
            f"{base}: has no tokenizer files, so tokens cannot be matched. Copy the tokenizer of the model it was "
            "trained from into its folder, or remove `tokenizer` from the recipe to merge row by row."
        )
    out = {}
    for key, tokenizer in tokenizers.items():
        if tokenizer is None and sizes[key] != sizes[base]:
            raise CheckpointError(
                f"{key}: has no tokenizer files, and its {sizes[key]} embedding rows are not the base's {sizes[base]}, "
                "so it cannot be the base's tokenizer either. Put the tokenizer it was trained with into its folder."
            )
        out[key] = tokenizer or first
        if out[key].problem:
            raise CheckpointError(f"{key}: its tokens are needed to line up embeddings. {out[key].problem}")
    return out


def _output_vocabulary(
    source: str, known: dict[str, Tokenizer], donor: str
) -> tuple[dict[str, int], list[AddedToken], dict[str, int], list[str]]:
    """``(vocab, new added tokens, new plain pieces, notes)``."""
    first = known[donor]
    if source != "union":
        return first.vocab, [], {}, []
    vocab, pieces, owners = dict(first.vocab), {}, {}
    added = {}
    for tokenizer in known.values():
        for content, token in tokenizer.added.items():
            added.setdefault(content, token)
    new_tokens = []
    following = max(vocab.values(), default=-1) + 1
    for key, tokenizer in known.items():
        for token, _ in sorted(tokenizer.vocab.items(), key=lambda item: (item[1], item[0])):
            if token in vocab:
                continue
            vocab[token] = following
            if token in added:
                flags = {name: value for name, value in vars(added[token]).items() if name != "id"}
                new_tokens.append(AddedToken(id=following, **flags))
            else:
                pieces[token] = following
                owners.setdefault(key, []).append(token)
            following += 1
    notes = []
    if pieces:
        refused = None
        if first.model_type != "BPE":
            refused = f"adding pieces to a {first.model_type} vocabulary changes how ordinary text is split"
        elif (first.options or {}).get("ignore_merges"):
            refused = "this BPE looks whole words up first (ignore_merges), so added pieces change how text is split"
        if refused:
            key, tokens = next(iter(owners.items()))
            raise RecipeError(
                f"tokenizer: union is not possible here: {key} has {len(tokens)} plain piece(s) that {donor} lacks "
                f"({some_of(tokens)}), and {refused}. Use `tokenizer: base` to keep the base model's vocabulary."
            )
        single = [token for token in pieces if len(token) == 1]
        if single:
            notes.append(
                f"{len(single)} new single character(s) ({some_of(single)}) are now tokens of their own; {donor} spelt "
                "them in bytes or as unknown."
            )
        notes.append(
            f"{len(pieces)} plain piece(s) joined the vocabulary without merges: text is split as {donor} splits it, "
            f"so these rows are rarely used (first: {some_of(list(pieces))})."
        )
    return vocab, new_tokens, pieces, notes


def _pad(
    rows: dict[str, NDArray], vocab: dict[str, int], known: dict[str, Tokenizer], sizes: Mapping[str, int], base: str
) -> None:
    """Fills in the rows without a token that a model keeps, as described in `align`."""
    size = len(rows[base])
    empty = np.ones(size, bool)
    empty[np.fromiter(vocab.values(), np.int64, len(vocab))] = False
    spare = {}
    for key, tokenizer in known.items():
        own = empty.copy()
        own[sizes[key] :] = False
        taken = np.fromiter(tokenizer.vocab.values(), np.int64, len(tokenizer.vocab))
        own[taken[taken < size]] = False
        spare[key] = own
    kept = spare[base] | np.logical_and.reduce(list(spare.values()))
    for key, own in spare.items():
        numbers = np.flatnonzero(own & kept)
        rows[key][numbers] = numbers


def _fill(rows: dict[str, NDArray], base: str, tokens: set[int]) -> dict[int, list[tuple[str, int]]]:
    missing = np.flatnonzero(np.logical_or.reduce([own < 0 for own in rows.values()]))
    fill = {}
    for number in missing.tolist():
        owners = [(key, int(own[number])) for key, own in rows.items() if own[number] >= 0]
        mine = [owner for owner in owners if owner[0] == base]
        fill[number] = mine or (owners if number in tokens else [])
    return fill


def _override(
    token_sources: Mapping[str, Mapping[str, Any]],
    vocab: dict[str, int],
    known: dict[str, Tokenizer],
    sizes: Mapping[str, int],
    rows: dict[str, NDArray],
    fill: dict[int, list[tuple[str, int]]],
) -> None:
    """Applies the recipe's token overrides to ``rows`` and ``fill``."""
    for token, entry in token_sources.items():
        number = vocab.get(token)
        if number is None:
            near = difflib.get_close_matches(token, vocab, 1, 0.7)
            raise RecipeError(
                f"tokenizer.tokens: the output vocabulary has no token {token!r}."
                + (f" Did you mean {near[0]!r}?" if near else " Use `union`, or the model that has it, as the source.")
            )
        sources = _row_of(token, entry.get("source"), known, sizes)
        if entry.get("force") and sources is not None:
            for own in rows.values():
                own[number] = -1
        if sources is not None and any(own[number] < 0 for own in rows.values()):
            fill[number] = sources


def _row_of(
    token: str, source: Any, known: dict[str, Tokenizer], sizes: Mapping[str, int]
) -> list[tuple[str, int]] | None:
    """The row that a token override names; [] for zeros, None if it names no source."""
    where = f"tokenizer.tokens[{token!r}].source"
    if source is None:
        return None
    if isinstance(source, str):
        source = {"kind": "model_token", "model": source, "token": token}
    kind = source.get("kind", "model_token") if isinstance(source, Mapping) else None
    if kind == "zero":
        return []
    if kind != "model_token":
        raise RecipeError(f"{where}: {source!r}. Expected a model, or kind: zero, or kind: model_token.")
    key, row = source.get("model"), source.get("token_id")
    if key not in known:
        raise RecipeError(f"{where}: {key!r} is none of the models. Expected one of: {', '.join(known)}.")
    if row is None:
        wanted = source.get("token", token)
        row = known[key].vocab.get(wanted)
        if row is None:
            near = difflib.get_close_matches(str(wanted), known[key].vocab, 1, 0.7)
            raise RecipeError(
                f"{where}: {key} has no token {wanted!r}." + (f" Did you mean {near[0]!r}?" if near else "")
            )
    if type(row) is not int or not 0 <= row < sizes[key]:
        raise RecipeError(f"{where}: row {row} is not in {key}, whose embeddings have {sizes[key]} rows.")
    return [(key, row)]
