"""Writes the tokenizer of a merged model: a copy of one parent's files, or those files with the union's tokens in."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fuse.checkpoint.reader import read_json
from hf_fuse.checkpoint.tokenizer import AddedToken, assign_ids, backend_json, copy_files
from hf_fuse.errors import CheckpointError

if TYPE_CHECKING:
    from hf_fuse.checkpoint.vocabulary import Alignment

# Native formats of other loaders that read added tokens from nowhere else, so a union cannot be told to them.
NATIVE_FILES = ("tekken.json", "tiktoken.model")
PIECE_FILES = (".model", ".spm", ".v3", ".v7")  # sentencepiece: learns of added tokens elsewhere, of pieces not at all


def write_tokenizer(alignment: Alignment, folder: Path) -> None:
    """Writes the files from which ``AutoTokenizer.from_pretrained(folder)`` makes ``alignment.vocab``.

    A vocabulary taken from one model is that model's files, byte for byte. A union is the base's files with the new
    tokens entered; files of older formats that cannot hold them are left out.

    Raises:
        CheckpointError: the base's tokenizer files cannot express the union.
    """
    donor = alignment.tokenizers[alignment.donor]
    if not alignment.new_tokens and not alignment.new_pieces:
        copy_files(donor.files, donor.folder, folder)
        return
    stale = NATIVE_FILES + (PIECE_FILES if alignment.new_pieces else ())
    copy_files([path for path in donor.files if not path.name.endswith(stale)], donor.folder, folder)

    added = sorted([*donor.added.values(), *alignment.new_tokens], key=lambda token: token.id)
    source = donor.folder / "tokenizer.json"
    state = read_json(source) if source.exists() else json.loads(backend_json(donor.folder)[0])
    _enter(state, alignment, added, source)
    _write_json(folder / "tokenizer.json", state)

    config_path = folder / "tokenizer_config.json"
    if config_path.exists():
        config = read_json(config_path)
        if "added_tokens_decoder" in config:
            entries = {str(token.id): asdict(token) for token in added}
            config["added_tokens_decoder"] = {key: _without_id(entry) for key, entry in entries.items()}
        if "auto_map" in config:  # code of the base's repository knows nothing of the union
            del config["auto_map"]
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        _write_json(config_path, config)
    legacy = folder / "added_tokens.json"
    if legacy.exists():
        _write_json(legacy, read_json(legacy) | {token.content: token.id for token in alignment.new_tokens})
    if (folder / "vocab.json").exists() and alignment.new_pieces:
        _write_json(folder / "vocab.json", read_json(folder / "vocab.json") | alignment.new_pieces)


def _enter(state: dict[str, Any], alignment: Alignment, added: list[AddedToken], source: Path) -> None:
    """Enters the union's tokens into the ``tokenizer.json`` document ``state`` and checks that they get their ids."""
    from tokenizers import Tokenizer as Backend

    vocab = state["model"]["vocab"]
    state["added_tokens"] = [{"id": token.id, **_without_id(asdict(token))} for token in added]
    if isinstance(vocab, dict):
        vocab.update(alignment.new_pieces)
        if assign_ids(vocab, added)[0] != alignment.vocab:
            # The loader numbers added tokens on its own, after the vocabulary. Where pieces follow them, or ids have
            # holes, their numbers hold only if the model knows them. Without merges it never makes them itself.
            vocab.update({token.content: token.id for token in added})
    try:
        given = Backend.from_str(json.dumps(state)).get_vocab()
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{source}: the tokenizers library refuses the union: {error}.") from None
    if given != alignment.vocab:
        wrong = sorted(set(given.items()) ^ set(alignment.vocab.items()))
        raise CheckpointError(
            f"{source}: {len(wrong)} token(s) of the union would not get their ids, first {wrong[0][0]!r}. The ids of "
            "this vocabulary have holes that its format cannot express. Use `tokenizer: base`."
        )


def _without_id(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "id"}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
