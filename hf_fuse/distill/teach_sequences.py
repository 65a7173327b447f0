"""Sequence-level distillation (arXiv 1606.07947): what a teacher writes after every prompt, as rows to train on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hf_fuse.checkpoint.writer import exclusive_output, remove_tree
from hf_fuse.distill.teach import Lesson, TeachResult, check_unfinished, say
from hf_fuse.errors import CheckpointError, FuseError
from hf_fuse.merge.finish import RECIPE_FILE
from hf_fuse.merge.plan import check_room
from hf_fuse.perplexity import context_length
from hf_fuse.recipe import read_yaml
from hf_fuse.training_data import Rows
from hf_fuse.training_encoding import usable_template

STEM = "sequences"
FILES = f"{STEM}-*.jsonl"
BATCHES_OF_FILE = 16  # of prompts: what a killed run loses at most
BYTES_OF_TOKEN = 6  # of text, at a guess


def write_sequences(lesson: Lesson, *, overwrite: bool, resume: bool, dry_run: bool) -> TeachResult:
    """The dataset that a recipe asks for; see :func:`hf_fuse.distill.teach.teach`."""
    notes = list(_template_notes(lesson))
    prompts = _prompts(lesson, notes)
    made_of = {"data": _digest(prompts), "dtype": lesson.dtype}
    samples, new_tokens = lesson.recipe.generation.samples, lesson.recipe.generation.max_new_tokens
    figures = {"prompts": len(prompts), "sequences": samples * len(prompts)}
    result = TeachResult(lesson.folder, STEM, figures, tuple(notes), made=False)
    if (lesson.folder / RECIPE_FILE).exists() and not overwrite:
        _check_same(lesson.folder, lesson, made_of)
        say(f"{lesson.folder}: was made by the same teacher of the same prompts and settings already.")
        return result
    most = len(prompts) * samples * new_tokens
    say(f"{figures['sequences']:,} answers to {len(prompts):,} prompts: at most {most:,} tokens to generate")
    check_room(str(lesson.folder), most * BYTES_OF_TOKEN, overwrite)
    check_unfinished(lesson.folder, FILES, overwrite=overwrite, resume=resume)
    if dry_run:
        return result
    with exclusive_output(lesson.folder, overwrite=overwrite, keep=_has_answers) as partial:
        if resume:
            _check_same(partial.folder, lesson, made_of)
        else:
            remove_tree(partial.folder)
        partial.folder.mkdir(exist_ok=True)
        (partial.folder / RECIPE_FILE).write_text(lesson.record(**made_of), encoding="utf-8")
        kept = _generate(lesson, prompts, partial.folder)
        if not kept:
            raise FuseError(
                f"{lesson.checkpoint.ref}: ended none of its answers within {new_tokens} tokens. Raise "
                "generation.max_new_tokens, or set generation.keep_unfinished."
            )
        for path in partial.folder.glob(FILES):
            if not path.stat().st_size:  # which readers of datasets refuse
                path.unlink()
        partial.publish()
    if lost := figures["sequences"] - kept:
        notes.append(f"{lost} of {figures['sequences']} answers were left out: they had no end within max_new_tokens.")
    return TeachResult(lesson.folder, STEM, {"prompts": len(prompts), "sequences": kept}, tuple(notes))


def _generate(lesson: Lesson, prompts: list[dict[str, Any]], folder: Path) -> int:
    """Writes file after file; those that are there already stay. Returns the number of answers in all of them."""
    recipe = lesson.recipe
    size = recipe.batch_size * BATCHES_OF_FILE
    # The longest first: memory runs out at once or never.
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]["ids"]))
    model, kept = None, 0
    with tqdm(total=len(prompts), unit="prompt", disable=None) as bar:
        for file, start in enumerate(range(0, len(order), size), 1):
            numbers, path = order[start : start + size], folder / f"{STEM}-{file:05d}.jsonl"
            if path.exists():
                kept += len(path.read_text(encoding="utf-8").splitlines())
                bar.update(len(numbers))
                continue
            model = model or lesson.load_model()
            lines = []
            for first in range(0, len(numbers), recipe.batch_size):
                batch = [prompts[number] for number in numbers[first : first + recipe.batch_size]]
                # Of its own for each batch, so that a resumed run goes on with the same numbers.
                seed = int.from_bytes(hashlib.sha256(f"{recipe.seed} {start + first}".encode()).digest()[:7], "big")
                with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
                    torch.manual_seed(seed)
                    lines += [json.dumps(row, ensure_ascii=False) for row in _answers(lesson, model, batch)]
                bar.update(len(batch))
            kept += len(lines)
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            unfinished.rename(path)
    return kept


def _answers(lesson: Lesson, model: Any, batch: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    from transformers import GenerationConfig

    settings, tokenizer = lesson.recipe.generation, lesson.tokenizer
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [tokenizer.eos_token_id if ends is None else ends]) - {None}
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0} if settings.sample else {}
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens, do_sample=settings.sample, num_return_sequences=settings.samples,
        num_beams=1, eos_token_id=sorted(ends) or None, pad_token_id=_padding(tokenizer, ends), **sampling,
    )  # fmt: skip
    width = max(len(prompt["ids"]) for prompt in batch)
    ids_BS = torch.full((len(batch), width), config.pad_token_id)
    mask_BS = torch.zeros_like(ids_BS)
    for row, prompt in enumerate(batch):
        ids_BS[row, width - len(prompt["ids"]) :] = torch.tensor(prompt["ids"])
        mask_BS[row, width - len(prompt["ids"]) :] = 1
    with torch.no_grad():
        made = model.generate(
            ids_BS.to(model.device), attention_mask=mask_BS.to(model.device), generation_config=config
        )
    for number, written in enumerate(made[:, width:].tolist()):
        end = next((place for place, token in enumerate(written) if token in ends), None)
        if end is None and not settings.keep_unfinished:
            continue
        row = batch[number // settings.samples]["row"]
        text = tokenizer.decode(written[:end], skip_special_tokens=True)
        chat = not isinstance(row["prompt"], str)
        yield row | {"completion": [{"role": "assistant", "content": text}] if chat else text}


def _prompts(lesson: Lesson, notes: list[str]) -> list[dict[str, Any]]:
    """Every prompt once: its token ids, and the row that its answer completes."""
    if lesson.rows.format == "text":
        raise FuseError(
            f"{lesson.rows.train[0].name}: holds texts without prompts. Give chats (messages), or prompts and "
            "completions."
        )
    context = min(context_length(lesson.candidate.config) or 1 << 30, lesson.tokenizer.model_max_length)
    room = context - lesson.recipe.generation.max_new_tokens
    found, seen, long = [], set(), 0
    for part in lesson.rows.train:
        for number, row in enumerate(part.rows):
            kept = _prompt_of(row, lesson.rows)
            if not kept["prompt"]:
                raise FuseError(f"{part.name}: row {number + 1}: has no prompt to answer.")
            key = json.dumps(kept, sort_keys=True)
            ids = _ids(lesson.tokenizer, kept)
            if key not in seen and len(ids) <= room:
                found.append({"ids": ids, "row": kept})
            long += len(ids) > room
            seen.add(key)
    if long:
        notes.append(f"{long} prompts are left out: they leave no room for max_new_tokens in the model's {context}.")
    if not found:
        raise FuseError("data: no prompt is left. Lower generation.max_new_tokens, or look at the rows.")
    return found


def _prompt_of(row: dict[str, Any], rows: Rows) -> dict[str, Any]:
    prompt = row["prompt"] if rows.format == "completion" else row["messages"]
    if rows.format == "chat":
        while prompt and prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]
    return {"prompt": prompt} | ({"tools": row["tools"]} if row.get("tools") else {})


def _ids(tokenizer: Any, row: dict[str, Any]) -> list[int]:
    if not isinstance(row["prompt"], str):
        tools = {"tools": row["tools"]} if "tools" in row else {}
        made = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True, **tools)
        return made["input_ids"]
    ids = tokenizer(row["prompt"], verbose=False)["input_ids"]
    # Some tokenizers end every text; after its end there is nothing to write.
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _template_notes(lesson: Lesson) -> list[str]:
    is_chat = lesson.rows.format == "chat" or not isinstance(lesson.rows.train[0].rows[0].get("prompt", ""), str)
    return usable_template(lesson.tokenizer, lesson.recipe.data.chat_template) if is_chat else []


def _padding(tokenizer: Any, ends: set[int]) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)


def _digest(prompts: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps([prompt["ids"] for prompt in prompts]).encode()).hexdigest()


def _has_answers(folder: Path) -> bool:
    return any(folder.glob(FILES))


def _check_same(folder: Path, lesson: Lesson, made_of: dict[str, Any]) -> None:
    """Whether the answers in ``folder`` are to the same prompts, by the same teacher with the same settings.

    Raises:
        CheckpointError: they are others.
    """
    before, now = (
        read_yaml(text, RECIPE_FILE)
        for text in ((folder / RECIPE_FILE).read_text(encoding="utf-8"), lesson.record(**made_of))
    )
    wrong = [key for key in ("kind", "generation", "batch_size", "seed") if before.get(key) != now.get(key)]
    said = before.get("provenance") or {}
    wrong += [key for key in ("weights", *made_of) if said.get(key) != now["provenance"][key]]
    if wrong:
        raise CheckpointError(
            f"{folder}: was made with another {wrong[0]} than the recipe's. Make it anew with --overwrite, or choose "
            "another output."
        )
