"""What tokens stand for: the text that each entry of a vocabulary adds, whatever marks its tokenizer uses.

Byte-level BPE writes bytes as printable characters (``Ġthe``), SentencePiece marks spaces (``▁the``) and bytes
(``<0xE2>``), WordPiece marks the pieces that don't begin a word (``##ing``). Here all of them are plain text.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from hf_fuse.errors import FuseError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE_MARK = "\u2581"
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
WORD_END = "</w>"


def token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    """The text of each token by its id; None for special tokens and ids that no token has.

    Bytes that are no whole character are lone surrogates (``surrogateescape``): pieces of a character have texts that
    differ, and texts are equal exactly if their bytes are.

    Raises:
        FuseError: a tokenizer without ``tokenizer.json``, which doesn't tell where its tokens lie in a text.
    """
    backend = backend_of(tokenizer)
    readable = _reader(backend)
    added = tokenizer.added_tokens_decoder
    vocabulary = tokenizer.get_vocab()
    texts: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for token, number in vocabulary.items():
        if number not in added:
            texts[number] = readable(token)
        elif not added[number].special:
            texts[number] = added[number].content
    return texts


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The Rust tokenizer inside.

    Raises:
        FuseError: there is none.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise FuseError(
            f"{tokenizer.name_or_path or type(tokenizer).__name__}: does not tell where its tokens lie in a text. Use "
            "a fast tokenizer (one with tokenizer.json)."
        )
    return tokenizer.backend_tokenizer


def family(backend: Any) -> str:
    """``bytes`` (byte-level BPE), ``marked`` (SentencePiece) or ``words`` (WordPiece and word lists)."""
    parts = (backend.pre_tokenizer, backend.decoder, backend.normalizer)
    described = "".join(part.__getstate__().decode() for part in parts if part is not None)
    if '"ByteLevel"' in described:
        return "bytes"
    return "marked" if SPACE_MARK in described else "words"


def _reader(backend: Any) -> Any:
    kind = family(backend)
    if kind == "bytes":
        to_byte = byte_of_character()

        def readable(token: str) -> str:
            if all(character in to_byte for character in token):
                return text_of(bytes(to_byte[character] for character in token))
            return token

    elif kind == "marked":

        def readable(token: str) -> str:
            found = BYTE.fullmatch(token)
            return text_of(bytes([int(found[1], 16)])) if found else token.replace(SPACE_MARK, " ")

    else:
        inside = getattr(backend.model, "continuing_subword_prefix", None) or ""

        def readable(token: str) -> str:
            if inside and token.startswith(inside) and token != inside:
                return token.removeprefix(inside)
            if token.endswith(WORD_END) and token != WORD_END:
                return token.removesuffix(WORD_END)
            # The space before a word is in no token; punctuation may stand without one.
            return " " + token if token[:1].isalnum() else token

    return readable


def byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for.

    Printable characters of Latin-1 stand for their own byte, the other bytes follow from U+0100 on in their order.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(own)]
    return {chr(byte): byte for byte in own} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def text_of(data: bytes) -> str:
    return data.decode("utf-8", errors="surrogateescape")


def bytes_of(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogateescape")


def special_partners(source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase) -> dict[int, int]:
    """Special tokens of ``source`` and those that do the same in ``target``: by role (end of text, end of a turn in
    the chat template, start of text), else by name."""
    ours = target.get_vocab()
    found = {}
    for number, token in source.added_tokens_decoder.items():
        if token.special and token.content in ours:
            found[number] = ours[token.content]
    for role in (turn_end, lambda tokenizer: tokenizer.eos_token_id, lambda tokenizer: tokenizer.bos_token_id):
        theirs, own = role(source), role(target)
        if theirs is not None and own is not None:
            found.setdefault(theirs, own) if role is not turn_end else found.update({theirs: own})
    return found


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token by which the chat template closes what the assistant says; None if it has none."""
    if not isinstance(getattr(tokenizer, "chat_template", None), str):
        return None
    said = "qzx"  # nothing that a template would write
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": said}]
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template may refuse any conversation, each in its own way
        return None
    after = rendered.rpartition(said)[2]
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if said in rendered else []
    special = set(tokenizer.all_special_ids) | {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    return ids[0] if ids and ids[0] in special else None
