"""The half on text: two teachers whose tokenizers differ from the student's and from each other's."""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from study.distilling import Effort, Half, Method, Row, trainer_settings
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback

from hf_fuse import AlignedTeacher, DistillConfig, DistillTrainer, FuseConfig, FuseTrainer
from hf_fuse.data.stdlib_text import stdlib_domains
from hf_fuse.demo_training import ModelSize, Schedule, new_model, token_stream, train
from hf_fuse.distill.pairing import Encoding, pair_row
from hf_fuse.distill.teach import teach
from hf_fuse.merge.engine import merge_state_dicts
from hf_fuse.perplexity import perplexity
from hf_fuse.training_encoding import collate_tokens

CLM, CLM_MERGED, PIVOT = "CLM alone", "CLM, two merged", "the pivot, before"
MINCE, AVGCE, FUSECHAT = "FuseLLM, MinCE", "FuseLLM, AvgCE", "FuseChat"
START, END = "<s>", "</s>"
CHARACTERS = 160  # of a row; all models read the same rows
CONTEXT = 128
TEACHER = ModelSize(hidden=96, feed_forward=192, layers=2, heads=4, context=CONTEXT)
STUDENT = ModelSize(hidden=64, feed_forward=128, layers=2, heads=4, context=CONTEXT)
TEACHERS, PIVOTS = ("source", "manual"), "docs"  # the domains that they have read
RATE = 8e-3


@dataclass(frozen=True)
class Shared:
    """What all seeds share.

    Attributes:
        descriptions, tokenizers, read: of the domains, by name: in words, of the model that has read it, and its rows.
        texts: what students learn from.
        held_out: description -> ``validation`` and ``test`` -> rows.
        rows: of the teachers.
        teachers: what they say about ``texts``.
    """

    descriptions: dict[str, str]
    tokenizers: dict[str, PreTrainedTokenizerFast]
    read: dict[str, list[str]]
    texts: list[str]
    held_out: dict[str, dict[str, list[str]]]
    rows: dict[str, Row]
    teachers: dict[str, AlignedTeacher]


def methods() -> dict[str, Method]:
    """Name -> what is tried: the weight of the paper, where there is one, and more of it."""
    teachers = partial(Method, "the teachers")
    rates = {f"rate {rate:g}": {"learning_rate": rate} for rate in (RATE, RATE / 2)}
    return {
        CLM: Method("the text", rates),
        CLM_MERGED: Method("the text", rates),
        MINCE: teachers(_weighted("fuse_llm", (0.1, 0.5))),
        AVGCE: teachers(_weighted("fuse_llm", (0.1, 0.5), fusion="avg_ce")),
        FUSECHAT: teachers(_weighted("fuse_llm", (0.1, 0.5))),
        "GLD": teachers(_weighted("gld", (0.01, 0.1))),
        "ULD": teachers(_weighted("uld", (0.1, 0.5))),
    }


def _weighted(name: str, weights: Sequence[float], **options: Any) -> dict[str, dict[str, Any]]:
    return {
        f"weight {weight:g}": {"objectives": {"task": 1 - weight, name: {"weight": weight, **options}}}
        for weight in weights
    }


def prepare(seed: int, effort: Effort) -> tuple[dict[str, Row], Callable[[str, str], Row]]:
    """Trains a pivot, and asks it about the students' texts, too: FuseLLM and FuseChat learn from it as well."""
    all_seeds = shared(effort)
    tokenizer = all_seeds.tokenizers[PIVOTS]
    pivot = learnt(STUDENT, tokenizer, all_seeds.read[PIVOTS], effort.text_steps[1], seed)
    teachers = {PIVOTS: asked(pivot, tokenizer, tokenizer, all_seeds.texts), **all_seeds.teachers}
    rows = {PIVOT: Row(*scores(pivot, tokenizer, all_seeds.held_out)), **all_seeds.rows}
    return rows, partial(student, pivot, teachers, all_seeds, seed, effort.text_steps[2])


@cache
def shared(effort: Effort) -> Shared:
    """Reads the text, trains tokenizers and teachers, and asks these about what students will learn from."""
    domains = {domain.name: domain for domain in stdlib_domains(source_characters=effort.characters)}
    rows = {name: cut(domain.train) for name, domain in domains.items()}
    read = {name: pieces[: -effort.rows][: effort.read // CHARACTERS] for name, pieces in rows.items()}
    tokenizers = {
        "source": byte_level(read["source"], 800), "manual": marked(read["manual"], 700),
        "docs": byte_level(read["docs"], 500),
    }  # fmt: skip
    texts = [text for name in TEACHERS for text in rows[name][-effort.rows :]]  # which no teacher has read
    held_out = {}
    for name in TEACHERS:
        pieces = cut(domains[name].held_out)
        pieces = pieces[:: max(1, len(pieces) // (2 * effort.held_out))][: 2 * effort.held_out]
        held_out[domains[name].description] = {"validation": pieces[0::2], "test": pieces[1::2]}
    reached, teachers = {}, {}
    for name in TEACHERS:
        model = learnt(TEACHER, tokenizers[name], read[name], effort.text_steps[0], len(reached))
        teachers[name] = asked(model, tokenizers[name], tokenizers[PIVOTS], texts)
        said = f"knows {places(texts[::10], tokenizers[PIVOTS], tokenizers[name]):.0%} of the places"
        reached[f"teacher of {domains[name].description}"] = Row(*scores(model, tokenizers[name], held_out), said)
    descriptions = {name: domain.description for name, domain in domains.items()}
    return Shared(descriptions, tokenizers, read, texts, held_out, reached, teachers)


def student(
    pivot: LlamaForCausalLM, teachers: dict[str, AlignedTeacher], all_seeds: Shared, seed: int, steps: int,
    method: str, setting: str,
) -> Row:  # fmt: skip
    """The row of one setting. Of copies that are merged, each takes as many steps as another method's student."""
    tokenizer, settings = all_seeds.tokenizers[PIVOTS], methods()[method].settings[setting]
    learn = partial(trained, pivot, tokenizer, all_seeds.texts, settings, steps)
    started = time.process_time()
    if method == FUSECHAT:
        copies = [learn(seed, [teachers[PIVOTS], teachers[name]]) for name in TEACHERS]
    elif method == CLM_MERGED:
        copies = [learn(seed + number, []) for number in range(len(TEACHERS))]
    elif method == CLM:
        copies = [learn(seed, [])]
    else:
        copies = [learn(seed, [teachers[n] for n in ((PIVOTS, *TEACHERS) if "FuseLLM" in method else TEACHERS)])]
    seconds = (time.process_time() - started) / steps
    model = copies[0]
    if len(copies) > 1:
        # What `hf-fuse fuse` does on files; all of the change is kept, as of FuseO1.
        states = [copy.state_dict() for copy in copies]
        merged = merge_state_dicts(states, "sce", base=pivot.state_dict(), parameters={"density": 1.0})
        model.load_state_dict(merged)
    return Row(*scores(model, tokenizer, all_seeds.held_out), setting, seconds)


def trained(
    pivot: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str], settings: dict[str, Any],
    steps: int, seed: int, teachers: list[AlignedTeacher],
) -> LlamaForCausalLM:  # fmt: skip
    """A copy of the pivot after its training."""
    model = copy.deepcopy(pivot)  # its configuration too, which trainers change
    sides = [side for text in texts for side in Encoding(tokenizer, CONTEXT).sides({"text": text})]
    given = {
        "train_dataset": [{"input_ids": side.ids, "labels": side.labels} for side in sides],
        "data_collator": partial(collate_tokens, pad_id=tokenizer.pad_token_id), "processing_class": tokenizer,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        settings = trainer_settings(folder, steps, seed) | {"learning_rate": RATE} | settings
        if teachers:
            trainer = DistillTrainer(model, DistillConfig(**settings), teacher=teachers, **given)
        else:
            trainer = FuseTrainer(model, FuseConfig(**settings), **given)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model


def learnt(
    size: ModelSize, tokenizer: PreTrainedTokenizerFast, read: list[str], steps: int, seed: int
) -> LlamaForCausalLM:
    """A teacher or a pivot."""
    model = new_model(size, tokenizer, seed)
    train(model, [token_stream(tokenizer, read, CHARACTERS * len(read))], Schedule(steps, 4e-3), seed=seed)
    return model


def asked(
    model: LlamaForCausalLM, theirs: PreTrainedTokenizerFast, ours: PreTrainedTokenizerFast, texts: list[str]
) -> AlignedTeacher:
    """What a model says about the texts, with places in the student's tokens."""
    rows = [{"text": text} for text in texts]
    folder = Path(tempfile.mkdtemp(dir=scratch().name))
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model.save_pretrained(folder / "model")
    theirs.save_pretrained(folder / "model")
    recipe = {"teacher": str(folder / "model"), "k": 16, "data": {"train": str(data), "max_length": CONTEXT}}
    answers = teach(recipe, folder / "cache").output
    return AlignedTeacher(answers, rows, student=Encoding(ours, CONTEXT), encoding=Encoding(theirs, CONTEXT))


@cache
def scratch() -> tempfile.TemporaryDirectory:
    """Gone when the process ends."""
    return tempfile.TemporaryDirectory(prefix="distill-study-")


def places(texts: list[str], ours: PreTrainedTokenizerFast, theirs: PreTrainedTokenizerFast) -> float:
    """The share of the student's predictions for which the teacher has read exactly as far."""
    found = [
        place is not None
        for text in texts
        for pair in pair_row({"text": text}, Encoding(ours, CONTEXT), Encoding(theirs, CONTEXT))
        for place in pair.places[1:]
    ]
    return sum(found) / len(found)


def scores(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, held_out: dict[str, dict[str, list[str]]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Bits per byte of each domain: validation and test."""

    def bits(texts: list[str]) -> float:
        return perplexity(model, tokenizer, texts, batch_size=16).bits_per_byte

    validation, test = (
        {name: bits(rows[part]) for name, rows in held_out.items()} for part in ("validation", "test")
    )  # fmt: skip
    return validation, test


def cut(texts: Iterable[str]) -> list[str]:
    """Rows of a length; not those of hardly more than white space."""
    rows = [text[start : start + CHARACTERS] for text in texts for start in range(0, len(text), CHARACTERS)]
    return [row for row in rows if len(row.split()) > 3]


def byte_level(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's: words carry the space before them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[START, END], initial_alphabet=alphabet, show_progress=False
    )
    return _fast(tokenizer, texts, trainer)


def marked(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """BPE as SentencePiece's: spaces are marks, and a character that it doesn't know is bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Metaspace(prepend_scheme="first"), decoders.ByteFallback(), decoders.Fuse()]
    )
    single = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[START, END, *single], limit_alphabet=120, show_progress=False
    )
    return _fast(tokenizer, texts, trainer)


def _fast(tokenizer: Any, texts: list[str], trainer: Any) -> PreTrainedTokenizerFast:
    """Trained, with a mark before each text: so every byte of it is predicted, and scored."""
    from tokenizers import Tokenizer, processors

    tokenizer.train_from_iterator(texts[:1000], trainer)
    state = json.loads(tokenizer.to_str())
    # Bytes had to be named to the trainer as special tokens; they are ordinary ones.
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in (START, END)]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    start = tokenizer.token_to_id(START)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", pair=f"{START} $A {START} $B", special_tokens=[(START, start)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


PAIRS = ((FUSECHAT, CLM_MERGED), (FUSECHAT, MINCE), (MINCE, AVGCE))
HALF = Half(CLM, "bits per byte", True, methods(), PIVOT, PAIRS, prepare)
