"""Do the token ids of several models mean the same?"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from hf_fuse.checkpoint.tokenizer_comparison import PROBES
from hf_fuse.distill.teachers import tokenizer_of
from hf_fuse.errors import FuseError


def plain_model(model: nn.Module) -> nn.Module:
    """The model inside of a PEFT model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def named(model: nn.Module) -> str:
    """What to call the model: its Hub id, the name of its folder, or else its class."""
    source = getattr(model.config, "_name_or_path", "") or type(plain_model(model)).__name__
    cached = re.search(r"models--(.+?)--(.+?)/snapshots", source)
    return "/".join(cached.groups()) if cached else Path(source).name if Path(source).is_absolute() else source


def check_decoder(model: nn.Module) -> None:
    """Refuses what can't decode beside others.

    Raises:
        FuseError: no causal language model with a key-value cache, or one with learned tokens before the prompt.
    """
    plain = plain_model(model)
    if plain.config.is_encoder_decoder or not plain.can_generate():
        raise FuseError(f"{named(model)}: is a {type(plain).__name__}. Expected a decoder-only language model.")
    if "past_key_values" not in inspect.signature(plain.forward).parameters:
        raise FuseError(
            f"{named(model)}: a {type(plain).__name__} has no key-value cache. Expected a model with attention."
        )
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise FuseError(f"{named(model)}: its adapter adds tokens to the prompt, which other models wouldn't see.")


def shared_vocabulary(models: Sequence[nn.Module]) -> int:
    """How many ids all models know. Rows beyond the tokenizer are padding, so vocabularies may differ in size.

    Raises:
        FuseError: models of another kind, or different tokenizers; vocabularies that differ while a tokenizer is
            unknown, or that are smaller than it.
    """
    for model in models:
        check_decoder(model)
    first, *others = distinct = list({id(plain_model(model)): model for model in models}.values())
    sizes = [model.config.get_text_config().vocab_size for model in distinct]
    tokenizer = tokenizer_of(first) if others else None
    unknown = None if tokenizer else first
    for model in others:
        other = tokenizer_of(model)
        unknown = unknown or (None if other else model)
        if tokenizer is None or other is None:
            continue
        if difference := first_difference(tokenizer, other):
            raise FuseError(
                f"{named(model)}: has another tokenizer than {named(first)} ({difference}), so their token ids mean "
                "different text. Fuse models of one family, or an ensemble with align: min_ed."
            )
        if len(tokenizer) > min(sizes):
            small = distinct[sizes.index(min(sizes))]
            raise FuseError(
                f"{named(small)}: its vocabulary has {min(sizes)} entries, but the tokenizer has {len(tokenizer)} "
                "tokens. Resize the model's embeddings."
            )
    if unknown is not None and len(set(sizes)) > 1:
        raise FuseError(
            f"vocabularies have {' and '.join(map(str, sizes))} entries. That may be padding, if the tokenizers are "
            f"equal, but {named(unknown)} has none beside it. Load the models from folders that hold their tokenizers."
        )
    return min(sizes)


def first_difference(one, other) -> str | None:
    """What two tokenizers do differently, in words; None if nothing is known."""
    vocabularies = one.get_vocab(), other.get_vocab()
    for token in (*vocabularies[0], *vocabularies[1]):
        ids = [vocabulary.get(token, "missing") for vocabulary in vocabularies]
        if ids[0] != ids[1]:
            return f"{token!r} is {ids[1]} instead of {ids[0]}"
    text = next((text for text in PROBES if one(text)["input_ids"] != other(text)["input_ids"]), None)
    return None if text is None else f"{text[:20]!r} is split differently"
