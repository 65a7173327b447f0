"""Compares the tokenizers of several models: can their embedding rows be merged one by one?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hf_fuse.checkpoint.tokenizer import AddedToken, Tokenizer

Kind = Literal["identical", "extended", "incompatible"]
SEVERITY = ("identical", "extended", "incompatible")

# Two spellings of the same normalizer (older and newer library versions write different ones) encode these equally.
PROBES = (
    "The quick brown fox, jumped over 3.14159 lazy dogs' tails — didn't it?",
    "  two  spaces\tand a tab\n\n\nnew lines \r\n end ",
    "def f(x):\n    return {'a': [1, 22, 333, 4444], \"b\": x ** 2}  # comment",
    "Ünïcödé, ÅNGSTRÖM, ﬁ ligature, Ａ fullwidth, e\u0301 combining, ½",
    "日本語と中文，한국어 русский العربية हिन्दी ไทย 🙂👩‍🚀",
    "https://example.org/a?b=c&d=%20 UPPER lower CamelCase snake_case 12345678 1,000.00",
    "", " ", "a", " leading", "trailing ",
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """How a tokenizer relates to the base's. ``reasons`` also names differences that do not change ``kind``."""

    kind: Kind
    reasons: list[str] = field(default_factory=list)


def compare(base: Tokenizer, other: Tokenizer, base_name: str = "the base") -> Comparison:
    """Compares two tokenizers.

    * identical: the same tokens with the same ids, and the same splitting of text;
    * extended: shared tokens have the same ids, one side (said in ``reasons``) has tokens or merges on top;
    * incompatible: a token has two ids, an id two tokens, or text is split or normalised differently, so merging
      row by row would mix unrelated tokens.

    Special ids, the chat template, flags of added tokens and the post-processor are compared too; differences there are
    reasons, but incompatible they are not.
    """
    reasons, clashes = [], []
    if base.problem or other.problem:
        same = base.fingerprint == other.fingerprint
        reasons.append(f"could not be read, so files were compared: {other.problem or base.problem}")
        return Comparison("identical" if same else "incompatible", reasons + _soft_differences(base, other, base_name))
    more = less = 0
    if base.fingerprint != other.fingerprint:
        if base.model_type != other.model_type:
            clashes.append(f"is a {other.model_type} tokenizer, {base_name} has {base.model_type}")
        clashes += _id_clashes(base, other, base_name)
        only_here = [token for token in other.vocab if token not in base.vocab]
        only_there = [token for token in base.vocab if token not in other.vocab]
        more, less = len(only_here), len(only_there)
        if more:
            reasons.append(f"has {more} token(s) more than {base_name}: {some_of(only_here)}")
        if less:
            reasons.append(f"lacks {less} token(s) of {base_name}: {some_of(only_there)}")
        if base.model_type == other.model_type:
            clash, note = _merge_differences(base, other, base_name)
            clashes += clash
            reasons += note
            more += len(note)
            clash, note = _option_differences(base, other, base_name)
            clashes += clash
            reasons += note
    reasons = clashes + reasons + _soft_differences(base, other, base_name)
    return Comparison("incompatible" if clashes else "extended" if more or less else "identical", reasons)


def compare_all(tokenizers: Mapping[str, Tokenizer | None], base_key: str | None = None) -> dict[str, Comparison]:
    """Compares every tokenizer with the base's (default: the first), and with each earlier one: two models can extend
    the base with different tokens at the same id. The worst kind counts; models without a tokenizer are left out."""
    known = {key: tokenizer for key, tokenizer in tokenizers.items() if tokenizer is not None}
    base_key = base_key if base_key in known else next(iter(known), None)
    order = [base_key, *(key for key in known if key != base_key)] if known else []
    out: dict[str, Comparison] = {}
    for number, key in enumerate(order[1:], 1):
        kind, reasons = "identical", []
        for earlier in order[:number]:
            if earlier != base_key and known[earlier].fingerprint == known[base_key].fingerprint:
                continue
            found = compare(known[earlier], known[key], "the base" if earlier == base_key else earlier)
            if earlier == base_key or found.kind == "incompatible":
                reasons += [reason for reason in found.reasons if reason not in reasons]
                kind = max(kind, found.kind, key=SEVERITY.index)
        out[key] = Comparison(kind, reasons)
    return out


def _id_clashes(base: Tokenizer, other: Tokenizer, base_name: str) -> list[str]:
    moved = [token for token, number in other.vocab.items() if base.vocab.get(token, number) != number]
    out = []
    if moved:
        token = moved[0]
        out.append(
            f"{len(moved)} token(s) have another id than in {base_name}: "
            f"{token!r} is {other.vocab[token]} instead of {base.vocab[token]}"
        )
    taken = [
        number
        for number, token in other.tokens.items()
        if token not in base.vocab and number in base.tokens and base.tokens[number] not in other.vocab
    ]
    if taken:
        number = taken[0]
        out.append(
            f"{len(taken)} id(s) stand for another token than in {base_name}: "
            f"{number} is {other.tokens[number]!r} instead of {base.tokens[number]!r}"
        )
    return out


def _merge_differences(base: Tokenizer, other: Tokenizer, base_name: str) -> tuple[list[str], list[str]]:
    """``(clashes, notes)``. Extra merges are an extension if each makes a token that the shorter vocabulary lacks."""
    if base.merges == other.merges:
        return [], []
    if base.model_type == "Unigram":
        scores = dict(base.merges)
        moved = [piece for piece, score in other.merges if scores.get(piece, score) != score]
        return ([f"scores {len(moved)} piece(s) differently from {base_name}: {some_of(moved)}"] if moved else []), []
    prefix = (base.options or {}).get("continuing_subword_prefix") or ""
    for short, long, verb in ((base, other, "has"), (other, base, "lacks")):
        kept = [pair for pair in long.merges if pair[0] + pair[1].removeprefix(prefix) in short.vocab]
        if kept == short.merges:
            count = len(long.merges) - len(kept)
            relation = "more than" if verb == "has" else "of"
            return [], [f"{verb} {count} merge(s) {relation} {base_name}, so it splits text differently"]
    rank = next((i for i, (a, b) in enumerate(zip(base.merges, other.merges)) if a != b), None)
    where = f"first at rank {rank}" if rank is not None else f"{len(other.merges)} instead of {len(base.merges)}"
    return [f"has other BPE merges than {base_name} ({where})"], []


def _option_differences(base: Tokenizer, other: Tokenizer, base_name: str) -> tuple[list[str], list[str]]:
    if base.options == other.options:
        return [], []
    if base.options is None or other.options is None:
        return [], ["one of the two has no tokenizer.json, so normalizer and pre-tokenizer could not be compared"]
    parts = sorted(key for key in base.options | other.options if base.options.get(key) != other.options.get(key))
    names = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    if _probe(base, base.options) == _probe(base, other.options):
        return [], [f"writes {names} differently from {base_name}, but splits test sentences the same way"]
    return [f"splits or normalises text differently from {base_name} ({names})"], []


def _probe(model: Tokenizer, options: dict) -> list[list[int]] | str:
    """Ids of the test sentences under ``options``, always with the same vocabulary and merges."""
    from tokenizers import Tokenizer as Backend

    rest = {key: value for key, value in options.items() if key not in ("normalizer", "pre_tokenizer", "dropout")}
    state: dict[str, Any] = {"type": model.model_type, **rest, "vocab": model.vocab, "merges": model.merges}
    if model.model_type == "Unigram":
        state["vocab"] = state.pop("merges")
    elif model.model_type != "BPE":
        state.pop("merges")
    pipeline = {key: options.get(key) for key in ("normalizer", "pre_tokenizer")}
    try:
        backend = Backend.from_str(json.dumps({"version": "1.0", "added_tokens": [], **pipeline, "model": state}))
        return [backend.encode(text).ids for text in PROBES]
    except Exception as error:  # the library raises plain Exception for whatever it cannot build
        return str(error)


def _soft_differences(base: Tokenizer, other: Tokenizer, base_name: str) -> list[str]:
    out = []
    for name in sorted(base.special_ids | other.special_ids):
        here, there = other.special_ids.get(name), base.special_ids.get(name)
        if here != there:
            out.append(f"{name} is {here} instead of {there}")
    flagged = [
        token.content
        for token in other.added.values()
        if token.content in base.vocab and _flags(base.added.get(token.content)) != _flags(token)
    ]
    flagged += [content for content in base.added if content in other.vocab and content not in other.added]
    if flagged:
        out.append(
            f"{len(flagged)} token(s) are added or special in another way than in {base_name}: {some_of(flagged)}"
        )
    if None not in (base.options, other.options) and base.post_processor != other.post_processor:
        out.append(f"puts other tokens around a text than {base_name} (post-processor)")
    if base.chat_template != other.chat_template:
        which = "another" if base.chat_template and other.chat_template else "a" if other.chat_template else "no"
        out.append(f"has {which} chat template")
    return out


def _flags(token: AddedToken | None) -> tuple | None:
    return token and (token.special, token.normalized, token.lstrip, token.rstrip, token.single_word)


def some_of(tokens: list[str], count: int = 3) -> str:
    """The first few of ``tokens``, quoted, for a message."""
    return ", ".join(repr(token) for token in tokens[:count]) + (", ..." if len(tokens) > count else "")
