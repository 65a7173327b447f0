"""Tokenizers of three families, trained on the standard library's text in a fraction of a second."""

from __future__ import annotations

from functools import cache
from typing import Any

END = "<|endoftext|>"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
)
INST = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)


@cache
def texts(domain: str = "docs", characters: int = 120_000) -> list[str]:
    """Documents of one kind, together about that long."""
    from hf_fuse.data.stdlib_text import stdlib_domains

    found, total = [], 0
    for text in next(d for d in stdlib_domains(source_characters=400_000) if d.name == domain).train:
        found.append(text[:4000])
        total += len(found[-1])
        if total > characters:
            break
    return found


@cache
def byte_bpe(size: int = 400, domain: str = "docs") -> Any:
    """Byte-level BPE: a character may be split over tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [END, "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        texts(domain),
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return _fast(tokenizer, eos_token=END, pad_token=END, chat_template=CHATML)


@cache
def sentence_piece(size: int = 500, domain: str = "source") -> Any:
    """BPE whose words begin with a mark and whose unknown characters are bytes, with a token before each text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=100,
        show_progress=False,
    )
    tokenizer.train_from_iterator([word for text in texts(domain, 60_000) for word in _words(text)], trainer)
    # Only the three are special; bytes are ordinary entries.
    state = tokenizer.to_str()
    tokenizer = _only_special(state, special)
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", start)]
    )
    return _fast(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>", chat_template=INST)


@cache
def word_piece(size: int = 600, domain: str = "docs") -> Any:
    """Lower-cased WordPiece, without spaces in its tokens."""
    from tokenizers import BertWordPieceTokenizer

    made = BertWordPieceTokenizer(lowercase=True)
    made.train_from_iterator(texts(domain), vocab_size=size, show_progress=False, limit_alphabet=100)
    return _fast(
        made._tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", eos_token="[SEP]"
    )


def _words(text: str) -> list[str]:
    # Merges across spaces would make whole sentences into tokens.
    return [" " + word if place else word for place, word in enumerate(text.split(" "))]


def _only_special(state: str, special: list[str]) -> Any:
    import json

    from tokenizers import Tokenizer

    content = json.loads(state)
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    return Tokenizer.from_str(json.dumps(content))


def _fast(tokenizer: Any, **names: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)
