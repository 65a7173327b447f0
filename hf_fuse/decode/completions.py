"""Prompts as text -> completions as text, by anything that has ``generate()``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationMixin, PreTrainedTokenizerBase

from hf_fuse.distill.teachers import tokenizer_of
from hf_fuse.errors import FuseError
from hf_fuse.perplexity import context_length

NEW_TOKENS = 128  # unless said otherwise; transformers' own limit is 20 tokens, prompt included


def tokenizer_beside(model: Any, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder that the model was loaded from.

    Raises:
        FuseError: there is none.
    """
    found = tokenizer_of(model)
    if found is None:
        raise FuseError(f"{name}: has no tokenizer beside it. Load it from a folder that holds its tokenizer.")
    return found


def encoded(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> list[int]:
    """Token ids of a prompt, in a chat as what the user says.

    Raises:
        FuseError: a prompt without a token, or no chat template.
    """
    if not chat:
        ids = tokenizer(prompt, verbose=False)["input_ids"]
    elif not tokenizer.chat_template:
        raise FuseError("chat: the tokenizer has no chat template. Leave chat out.")
    else:
        turn = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
    if not ids:
        raise FuseError(f"prompt {prompt!r}: has no tokens. Give some text.")
    return ids


def completions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    chat: bool = False,
    batch_size: int = 8,
    **generation: Any,
) -> list[list[str]]:
    """For each prompt the texts that the model goes on with; one, unless ``num_return_sequences`` says otherwise.

    Args:
        chat: put each prompt through the tokenizer's chat template.
        batch_size: prompts at a time, the longest first.
        generation: of ``generate()``.

    Raises:
        FuseError: an empty prompt, one that is too long, no chat template, or settings that ``generate()`` refuses.
    """
    ids = [encoded(tokenizer, prompt, chat) for prompt in prompts]
    if not {"max_new_tokens", "max_length"} & generation.keys():
        generation["max_new_tokens"] = NEW_TOKENS
    # Each of several models has to hold all of the text.
    contexts = [context_length(part.config) for part in model.modules() if isinstance(part, GenerationMixin)]
    context = min(filter(None, contexts), default=None)
    longest = max(map(len, ids), default=0)
    setting = "max_new_tokens" if "max_new_tokens" in generation else "max_length"
    more = generation[setting] if setting == "max_new_tokens" else max(generation[setting] - longest, 0)
    if context and longest + more > context:
        raise FuseError(
            f"a prompt has {longest} tokens, and {more} more are asked for, but not more than {context} can be read. "
            f"Shorten it, or lower {setting}."
        )
    if "stop_strings" in generation:
        generation["tokenizer"] = tokenizer
    padding = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    found: list[list[str]] = [[] for _ in prompts]
    order = sorted(range(len(ids)), key=lambda number: -len(ids[number]))
    with tqdm(total=len(prompts), desc="generate", unit="prompt", disable=None if len(prompts) > 1 else True) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            inputs = padded([ids[number] for number in rows], padding, model.device)
            try:
                made = model.generate(**inputs, pad_token_id=padding, **generation)
            except ValueError as error:
                raise FuseError(f"generation: {str(error).strip().splitlines()[0]}") from error
            new = made[:, inputs["input_ids"].shape[1] :]
            copies = len(new) // len(rows)
            for row, text in enumerate(tokenizer.batch_decode(new, skip_special_tokens=True)):
                found[rows[row // copies]].append(text)
            bar.update(len(rows))
    return found


def padded(ids: Sequence[list[int]], padding: int, device: torch.device) -> dict[str, torch.Tensor]:
    """A batch, padded on the left: what follows a prompt is to be next to it."""
    longest = max(map(len, ids))
    given = torch.tensor([[padding] * (longest - len(row)) + row for row in ids], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=device)
    return {"input_ids": given, "attention_mask": mask}
