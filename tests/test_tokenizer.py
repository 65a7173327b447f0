"""Tokenizers of merged models: reading, comparing, lining up rows, writing, chat templates.

The tokenizers are real ones, trained here on the standard library's sources; every written folder is read back by
``AutoTokenizer``.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from hf_fuse.checkpoint.chat_template import TEMPLATES, chat_template, missing_markers, write_chat_template
from hf_fuse.checkpoint.tokenizer import read_tokenizer, tokenizer_files
from hf_fuse.checkpoint.tokenizer_comparison import compare, compare_all
from hf_fuse.checkpoint.vocabulary import align
from hf_fuse.errors import CheckpointError, RecipeError
from hf_fuse.merge.sources import Buffers, MemorySource, RealignedSource

LINES = [line for module in (argparse, textwrap) for line in inspect.getsource(module).splitlines()]
ORDINARY = LINES[40:160] + ["Ünïcode – 日本語 🙂", "  two  spaces\n\ttab", "x = {'a': 1}\n\n"]


def byte_level(lines: list[str], size: int, specials: tuple[str, ...] = ("<s>", "</s>")) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(specials), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    backend.train_from_iterator(lines, trainer)
    return backend


def metaspace(lines: list[str], size: int) -> Backend:
    """A sentencepiece-style BPE: characters with byte fallback, as in Llama 2."""
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=specials, show_progress=False)
    backend.train_from_iterator([word for line in lines for word in line.split()], trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # the bytes are plain pieces
    return Backend.from_str(json.dumps(state))


def word_piece(lines: list[str], size: int) -> Backend:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(
        lines, trainers.WordPieceTrainer(vocab_size=size, special_tokens=specials, show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return backend


def unigram(lines: list[str], size: int) -> Backend:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(lines, trainer)
    return backend


def save(backend: Backend, folder: Path, model_type: str = "llama", **config) -> Path:
    """A folder as ``save_pretrained`` leaves it: tokenizer.json, tokenizer_config.json, config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def extended(folder: Path, target: Path, *tokens: AddedToken | str, **config) -> Path:
    """``folder`` with added tokens on top."""
    shutil.copytree(folder, target)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([AddedToken(t, special=True) if isinstance(t, str) else t for t in tokens])
    old = json.loads((folder / "tokenizer_config.json").read_text())
    return save(backend, target, **{**old, **config})


def auto(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def edit(path: Path, change) -> None:
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    out = {
        "byte": save(byte_level(LINES, 600), root / "byte", **special),
        "other_byte": save(byte_level(LINES[:400], 480), root / "other_byte", **special),
        "meta": save(metaspace(LINES, 700), root / "meta", unk_token="<unk>", **special),
        "word": save(
            word_piece(LINES, 500), root / "word", "bert", tokenizer_class="BertTokenizer",
            pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
        ),
        "unigram": save(unigram(LINES, 400), root / "unigram", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"),
    }  # fmt: skip
    gpt2 = root / "gpt2"
    gpt2.mkdir()
    byte_level(LINES, 500, ("<|endoftext|>",)).model.save(str(gpt2))
    (gpt2 / "config.json").write_text(json.dumps({"model_type": "gpt2", "bos_token_id": 0, "eos_token_id": 0}))
    return out | {"gpt2": gpt2}


@pytest.fixture
def family(trained, tmp_path) -> dict[str, Path]:
    """A base, two fine-tunes that each added tokens (at the same ids), and an unchanged one."""
    return {
        "base": trained["byte"],
        "chat": extended(trained["byte"], tmp_path / "chat", "<|im_start|>", "<|im_end|>", eos_token="<|im_end|>"),
        "code": extended(
            trained["byte"], tmp_path / "code", "<pad>", AddedToken("<fim>", special=False, normalized=False),
            "<|im_end|>", pad_token="<pad>",
        ),
        "plain": trained["byte"],
    }  # fmt: skip


def read_all(folders: dict[str, Path]) -> dict:
    return {key: read_tokenizer(folder) for key, folder in folders.items()}


# Reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["byte", "meta", "word", "unigram", "gpt2"])
def test_vocabulary_is_what_the_loader_gives(trained, name):
    tokenizer, loaded = read_tokenizer(trained[name]), auto(trained[name])
    assert tokenizer.vocab == loaded.get_vocab()
    assert len(tokenizer.vocab) >= 400
    assert tokenizer.added.keys() >= {t for t in loaded.get_added_vocab() if name != "gpt2"}
    expected = {"byte": "BPE", "meta": "BPE", "gpt2": "BPE", "word": "WordPiece", "unigram": "Unigram"}[name]
    assert tokenizer.model_type == expected
    for special in ("bos", "eos", "pad"):
        assert tokenizer.special_ids.get(f"{special}_token_id") == getattr(loaded, f"{special}_token_id")


def test_tokens_named_only_by_the_config_get_the_next_ids(trained, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(trained["byte"], folder)
    decoder = {"600": {"content": "<x>", "special": True, "normalized": False}, "601": {"content": "<y>"}}
    edit(
        folder / "tokenizer_config.json",
        lambda c: c.update(added_tokens_decoder=decoder, pad_token="[PAD]", additional_special_tokens=["<z>", "<x>"]),
    )
    tokenizer = read_tokenizer(folder)
    assert {t: tokenizer.vocab[t] for t in ("<x>", "<y>", "[PAD]", "<z>")} == {
        "<x>": 600, "<y>": 601, "[PAD]": 602, "<z>": 603,
    }  # fmt: skip
    assert tokenizer.vocab == auto(folder).get_vocab()
    assert tokenizer.special_ids["pad_token_id"] == 602
    assert tokenizer.added["[PAD]"].special and not tokenizer.added["<y>"].special


def test_companions_of_older_versions(trained, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(trained["gpt2"], folder)
    (folder / "added_tokens.json").write_text(json.dumps({"<b>": 501, "<a>": 500}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<b>", "eos_token": {"content": "<a>"}}))
    tokenizer = read_tokenizer(folder)
    assert tokenizer.vocab == auto(folder).get_vocab()
    assert tokenizer.special_ids == {"bos_token_id": 0, "eos_token_id": 500, "pad_token_id": 501}


def test_bert_vocabulary_file(trained, tmp_path):
    folder = tmp_path / "bert"
    folder.mkdir()
    vocab = read_tokenizer(trained["word"]).vocab
    lines = sorted(vocab, key=vocab.get)
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    tokenizer = read_tokenizer(folder)
    assert tokenizer.vocab == vocab == auto(folder).get_vocab()
    assert tokenizer.model_type == "WordPiece"


def test_fingerprint_follows_content_not_spelling(trained, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(trained["byte"], folder)
    first = read_tokenizer(folder).fingerprint

    def respell(state):
        model = state["model"]
        model["merges"] = [" ".join(pair) for pair in model["merges"]]
        model["vocab"] = dict(sorted(model["vocab"].items()))
        model.pop("byte_fallback"), model.pop("ignore_merges")
        state["padding"] = None

    edit(folder / "tokenizer.json", respell)
    assert read_tokenizer(folder).fingerprint == first
    edit(folder / "tokenizer.json", lambda s: s["model"]["merges"].reverse())
    assert read_tokenizer(folder).fingerprint != first


def test_folder_without_a_tokenizer(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert read_tokenizer(tmp_path) is None
    assert [path.name for path in tokenizer_files(tmp_path)] == ["preprocessor_config.json"]


def test_carried_files_never_hold_code(trained, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(trained["byte"], folder)
    (folder / "tokenization_own.py").write_text("raise SystemExit")
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "chat_template.jinja").write_text("x")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("y")
    (folder / "additional_chat_templates" / "tool.py").write_text("z")
    found = [path.relative_to(folder).as_posix() for path in tokenizer_files(folder)]
    assert found == [
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/tool.jinja",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a tokenizer.json"),
        ("[]", "not a tokenizer.json"),
        ('{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', "'a' has id -1"),
        ('{"model": {"type": "BPE", "vocab": {"a": 99999999999}, "merges": []}}', "has id 99999999999"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b c"]}}', "not a tokenizer.json"),
        ('{"model": {"type": "Unigram", "vocab": [["a", "b"]]}}', "not a tokenizer.json"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}}, "added_tokens": [3]}', "not a tokenizer.json"),
    ],
)
def test_damaged_tokenizer_file(tmp_path, text, message):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=message) as error:
        read_tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(error.value)


def test_damaged_companions(trained, tmp_path):
    shutil.copytree(trained["byte"], tmp_path, dirs_exist_ok=True)
    edit(tmp_path / "tokenizer_config.json", lambda c: c.update(added_tokens_decoder={"x": {"content": "a"}}))
    with pytest.raises(
        CheckpointError, match="tokenizer_config.json: its list of special or added tokens is malformed"
    ):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps({"en": {"a": 1}}))
    with pytest.raises(CheckpointError, match="vocab.json: not a vocabulary"):
        read_tokenizer(tmp_path)


def test_unreadable_sentencepiece_is_compared_by_bytes(tmp_path):
    for key, data in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / key).mkdir()
        (tmp_path / key / "tokenizer.model").write_bytes(data)
        (tmp_path / key / "config.json").write_text(json.dumps({"model_type": "llama"}))
    a, b, c = (read_tokenizer(tmp_path / key) for key in "abc")
    assert "no tokenizer.json" in a.problem
    assert compare(a, b).kind == "identical"
    assert compare(a, c).kind == "incompatible"
    with pytest.raises(CheckpointError, match="its tokens are needed to line up embeddings.*save_pretrained"):
        align("base", {"a": a, "c": c}, base_key="a", vocab_sizes={"a": 8, "c": 8})


def test_sentencepiece_model_goes_through_transformers(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    (tmp_path / "text").write_text("\n".join(LINES))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=500, model_type="bpe",
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.problem is None and tokenizer.model_type == "BPE"
    assert tokenizer.vocab == auto(tmp_path).get_vocab()
    assert tokenizer.special_ids == {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0}


def test_class_without_a_fast_implementation(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    tokenizer = read_tokenizer(tmp_path)
    assert "ByT5Tokenizer has no fast implementation" in tokenizer.problem
    assert compare(tokenizer, read_tokenizer(tmp_path)).kind == "identical"


def test_reading_does_not_import_transformers(trained):
    code = (
        "import sys; from pathlib import Path; from hf_fuse.checkpoint.tokenizer import read_tokenizer;"
        "from hf_fuse.checkpoint.tokenizer_comparison import compare_all;"
        "from hf_fuse.checkpoint.vocabulary import align;"
        "t = {k: read_tokenizer(Path(sys.argv[1])) for k in 'ab'}; compare_all(t);"
        "align('union', t, base_key='a', vocab_sizes={'a': 600, 'b': 600});"
        "print([m for m in ('torch', 'transformers', 'tokenizers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code, trained["byte"]], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# Comparing -------------------------------------------------------------------------------------------------------


def test_identical(trained):
    found = compare(read_tokenizer(trained["byte"]), read_tokenizer(trained["byte"]))
    assert (found.kind, found.reasons) == ("identical", [])


def test_special_ids_and_templates_are_reasons_only(trained, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(trained["byte"], folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    edit(folder / "tokenizer_config.json", lambda c: c.update(pad_token="</s>", eos_token="<s>"))
    found = compare(read_tokenizer(trained["byte"]), read_tokenizer(folder))
    assert found.kind == "identical"
    assert found.reasons == [
        "eos_token_id is 0 instead of 1", "pad_token_id is 1 instead of None", "has a chat template",
    ]  # fmt: skip


def test_extended_in_either_direction(family):
    base, chat = read_tokenizer(family["base"]), read_tokenizer(family["chat"])
    found = compare(base, chat)
    assert found.kind == "extended"
    assert found.reasons[0] == "has 2 token(s) more than the base: '<|im_start|>', '<|im_end|>'"
    back = compare(chat, base)
    assert back.kind == "extended"
    assert back.reasons[0] == "lacks 2 token(s) of the base: '<|im_start|>', '<|im_end|>'"


def test_extended_merges(trained, tmp_path):
    """Training the same text further keeps the first merges: the longer tokenizer extends the shorter."""
    longer = save(byte_level(LINES, 650), tmp_path / "longer", bos_token="<s>", eos_token="</s>")
    base, other = read_tokenizer(trained["byte"]), read_tokenizer(longer)
    for first, second, verb in ((base, other, "has 50 merge(s) more"), (other, base, "lacks 50 merge(s) of")):
        found = compare(first, second)
        assert found.kind == "extended"
        assert any(verb in reason for reason in found.reasons)


def test_two_extensions_at_the_same_ids_are_incompatible(family):
    found = compare_all(read_all(family), "base")
    assert found["chat"].kind == "extended"
    assert found["plain"] == compare(read_tokenizer(family["base"]), read_tokenizer(family["base"]))
    assert found["code"].kind == "incompatible"
    assert "1 token(s) have another id than in chat: '<|im_end|>' is 602 instead of 601" in found["code"].reasons
    assert any("600 is '<pad>' instead of '<|im_start|>'" in reason for reason in found["code"].reasons)


def swap_a_and_b(state: dict) -> None:
    vocab = state["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s["model"]["merges"].reverse(), "has other BPE merges than the base (first at rank 0)"),
        (lambda s: s["model"]["merges"].pop(), "has other BPE merges than the base (341 instead of 342)"),
        (
            lambda s: s.update(normalizer={"type": "Lowercase"}),
            "splits or normalises text differently from the base (normalizer)",
        ),
        (
            lambda s: s["pre_tokenizer"].update(add_prefix_space=True),
            "splits or normalises text differently from the base (pre_tokenizer)",
        ),
        (swap_a_and_b, "2 token(s) have another id than in the base: "),
    ],
)
def test_incompatible(trained, tmp_path, change, reason):
    folder = tmp_path / "model"
    shutil.copytree(trained["byte"], folder)
    edit(folder / "tokenizer.json", change)
    found = compare(read_tokenizer(trained["byte"]), read_tokenizer(folder))
    assert found.kind == "incompatible"
    assert found.reasons[0].startswith(reason)


def test_another_spelling_of_the_same_splitting_is_identical(trained, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(trained["byte"], folder)
    edit(
        folder / "tokenizer.json",
        lambda s: s.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [s["pre_tokenizer"]]}),
    )
    found = compare(read_tokenizer(trained["byte"]), read_tokenizer(folder))
    assert found.kind == "identical"
    assert found.reasons == ["writes pre_tokenizer differently from the base, but splits test sentences the same way"]


def test_other_algorithm_and_other_scores(trained, tmp_path):
    found = compare(read_tokenizer(trained["byte"]), read_tokenizer(trained["unigram"]))
    assert found.kind == "incompatible"
    assert found.reasons[0] == "is a Unigram tokenizer, the base has BPE"
    folder = tmp_path / "model"
    shutil.copytree(trained["unigram"], folder)
    edit(folder / "tokenizer.json", lambda s: s["model"]["vocab"][7].__setitem__(1, -99.0))
    found = compare(read_tokenizer(trained["unigram"]), read_tokenizer(folder))
    assert found.kind == "incompatible"
    assert found.reasons[0].startswith("scores 1 piece(s) differently from the base")


# Aligning --------------------------------------------------------------------------------------------------------


def matrices(tokenizers: dict, sizes: dict[str, int], width: int = 3) -> dict[str, np.ndarray]:
    """Every row differs from all others of all models."""
    return {
        key: (1000.0 * number + np.arange(sizes[key])[:, None] + np.arange(width) / 10)
        for number, key in enumerate(tokenizers, 1)
    }


def read_rows(found, key: str, weights: dict, first: int = 0, last: int | None = None) -> np.ndarray:
    """Output rows of one model's matrix as the engine reads them."""
    plain = {other: MemorySource({"w": torch.tensor(matrix)}) for other, matrix in weights.items()}
    source = RealignedSource(plain, key, {"w"}, found)
    shape = (found.size if last is None else last) - first, *weights[key].shape[1:]
    out = torch.empty(math.prod(shape), dtype=torch.float64)
    source.read("w", first * math.prod(shape[1:]), out, Buffers(torch.device("cpu"), torch.float64, None))
    return out.view(shape).numpy()


def row_by_rule(token: str, key: str, base: str, tokenizers: dict, weights: dict) -> np.ndarray:
    """The rule for a token's row, written down once more and slowly."""

    def row(owner):
        number = tokenizers[owner].vocab.get(token)
        return None if number is None or number >= len(weights[owner]) else weights[owner][number]

    for owner in (key, base):
        if row(owner) is not None:
            return row(owner)
    rows = [row(owner) for owner in tokenizers if row(owner) is not None]
    return np.mean(rows, axis=0) if rows else np.zeros(3)


@pytest.mark.parametrize("source", ["base", "union", "code"])
@pytest.mark.parametrize("base", ["base", "chat"])
def test_rows_follow_their_tokens(family, source, base):
    tokenizers = read_all(family)
    sizes = {"base": 600, "chat": 602, "code": 608, "plain": 640}  # two with padding
    found = align(source, tokenizers, base_key=base, vocab_sizes=sizes)
    donor = "code" if source == "code" else base
    assert found.size == max(sizes[donor], len(found.vocab))
    assert {t: found.vocab[t] for t in tokenizers[donor].vocab} == tokenizers[donor].vocab
    if source == "union":
        assert found.vocab.keys() == set().union(*(t.vocab for t in tokenizers.values()))
    weights = matrices(tokenizers, sizes)
    for key in tokenizers:
        aligned = read_rows(found, key, weights)
        assert aligned.shape == (found.size, 3)
        for token, number in found.vocab.items():
            assert np.allclose(aligned[number], row_by_rule(token, key, base, tokenizers, weights)), (key, token)
        pieces = [read_rows(found, key, weights, lo, min(lo + 37, found.size)) for lo in range(0, found.size, 37)]
        assert np.array_equal(np.concatenate(pieces), aligned)
        missing = found.rows[key] < 0
        assert set(np.flatnonzero(missing)) <= found.fill.keys()


def test_union_of_a_family(family):
    tokenizers = read_all(family)
    sizes = dict.fromkeys(tokenizers, 0) | {"base": 600, "chat": 602, "code": 603, "plain": 600}
    found = align("union", tokenizers, base_key="base", vocab_sizes=sizes)
    assert sorted(found.vocab, key=found.vocab.get)[600:] == ["<|im_start|>", "<|im_end|>", "<pad>", "<fim>"][:2] + [
        "<pad>", "<fim>",
    ]  # fmt: skip
    assert found.size == 604
    assert not any(found.identity(key) for key in tokenizers)
    assert found.fill[600] == [("chat", 600)]  # the only owner
    assert found.fill[601] == [("chat", 601), ("code", 602)]  # the mean of both
    assert found.rows["code"][600:].tolist() == [-1, 602, 600, 601]
    assert found.output_id("code", 602) == 601
    assert found.special_ids == {"bos_token_id": 0, "eos_token_id": 1}
    assert [(t.content, t.special) for t in found.new_tokens][2:] == [("<pad>", True), ("<fim>", False)]


def test_nothing_to_do(family):
    tokenizers = read_all({"base": family["base"], "plain": family["plain"], "nameless": family["base"]})
    tokenizers["nameless"] = None  # no tokenizer files: taken to be the base's
    sizes = dict.fromkeys(tokenizers, 640)
    for source in ("base", "union", "plain"):
        found = align(source, tokenizers, base_key=None, vocab_sizes=sizes)
        assert all(found.identity(key) for key in tokenizers)
        assert found.size == 640 and not found.fill and not found.notes


def test_padding_rows(family):
    tokenizers = read_all({"base": family["base"], "chat": family["chat"], "plain": family["plain"]})
    sizes = {"base": 608, "chat": 602, "plain": 610}
    found = align("base", tokenizers, base_key="base", vocab_sizes=sizes)
    weights = matrices(tokenizers, sizes)
    assert found.size == 608 and found.identity("base")
    assert np.array_equal(read_rows(found, "plain", weights), weights["plain"][:608])  # padding there too: its own
    assert np.array_equal(read_rows(found, "chat", weights)[600:], weights["base"][600:])  # tokens there, or no row
    wide = align("base", tokenizers, base_key="base", vocab_sizes=sizes, pad_to_multiple_of=64)
    assert wide.size == 640
    assert wide.notes == ["32 row(s) of padding are not in all models: each is the mean of the rows with a token."]
    for key in tokenizers:  # 608.. exist in one model only: the mean of the tokens in all
        rows = read_rows(wide, key, weights)
        assert np.allclose(rows[608:], rows[:600].mean(0)) and rows[608:].any()
    with pytest.raises(RecipeError, match="pad_to_multiple_of: 0"):
        align("base", tokenizers, base_key="base", vocab_sizes=sizes, pad_to_multiple_of=0)


def test_token_without_a_row_is_missing(family):
    tokenizers = read_all({"base": family["base"], "chat": family["chat"], "code": family["code"]})
    sizes = {"base": 600, "chat": 601, "code": 600}  # <|im_end|> is 601 in chat, beyond its matrix
    found = align("chat", tokenizers, base_key="base", vocab_sizes=sizes)
    assert found.size == 602
    assert found.fill[600] == [("chat", 600)] and found.fill[601] == []
    assert found.notes == ["1 token(s) have a row in no model and start as zeros: '<|im_end|>'."]
    assert not read_rows(found, "chat", matrices(tokenizers, sizes))[601].any()


def test_token_sources(family):
    tokenizers = read_all(family)
    sizes = {"base": 600, "chat": 602, "code": 603, "plain": 600}
    weights = matrices(tokenizers, sizes)
    found = align(
        "union", tokenizers, base_key="base", vocab_sizes=sizes,
        token_sources={
            "<|im_end|>": {"source": "code"},
            "<pad>": {"source": {"kind": "zero"}, "force": True},
            "<|im_start|>": {"source": {"kind": "model_token", "model": "base", "token": "<s>"}, "force": True},
            "<fim>": {"source": {"kind": "model_token", "model": "chat", "token_id": 7}},
            "</s>": {"source": "code", "force": False},
        },
    )  # fmt: skip
    where = found.vocab
    for key in tokenizers:
        aligned = read_rows(found, key, weights)
        own = "chat" if key == "chat" else "code"
        assert np.array_equal(aligned[where["<|im_end|>"]], weights[own][tokenizers[own].vocab["<|im_end|>"]])
        assert not aligned[where["<pad>"]].any()
        assert np.array_equal(aligned[where["<|im_start|>"]], weights["base"][0])
        expected = weights["code"][601] if key == "code" else weights["chat"][7]
        assert np.array_equal(aligned[where["<fim>"]], expected)
        assert np.array_equal(aligned[where["</s>"]], weights[key][1])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"<|im_strt|>": {"source": "chat"}}, "has no token '<|im_strt|>'. Did you mean '<|im_start|>'?"),
        ({"<s>": {"source": "chaz"}}, "'chaz' is none of the models. Expected one of: base, chat"),
        ({"<s>": {"source": {"kind": "model_token", "model": "base", "token": "<pad>"}}}, "base has no token '<pad>'"),
        ({"<s>": {"source": {"kind": "model_token", "model": "base", "token_id": 600}}}, "row 600 is not in base"),
        ({"<s>": {"source": {"kind": "mean"}}}, "Expected a model, or kind: zero"),
    ],
)
def test_token_sources_that_do_not_exist(family, entry, message):
    tokenizers = read_all(family)
    sizes = {"base": 600, "chat": 602, "code": 603, "plain": 600}
    with pytest.raises(RecipeError) as error:
        align("union", tokenizers, base_key="base", vocab_sizes=sizes, token_sources=entry)
    assert message in str(error.value)


def test_unknown_source_and_missing_tokenizers(family):
    tokenizers = read_all(family)
    sizes = {"base": 600, "chat": 602, "code": 603, "plain": 600}
    with pytest.raises(RecipeError, match="'untion' is none of the models. Expected base, union or one of: base, chat"):
        align("untion", tokenizers, base_key="base", vocab_sizes=sizes)
    with pytest.raises(CheckpointError, match="chat: has no tokenizer files, and its 602 embedding rows"):
        align("base", tokenizers | {"chat": None}, base_key="base", vocab_sizes=sizes)
    with pytest.raises(CheckpointError, match="base: has no tokenizer files"):
        align("base", tokenizers | {"base": None}, base_key="base", vocab_sizes=sizes)
    with pytest.raises(RecipeError, match="The base model 'elsewhere' is not among"):
        align("base", tokenizers, base_key="elsewhere", vocab_sizes=sizes)


def test_biases_are_lined_up_like_rows(family):
    tokenizers = read_all(family)
    sizes = {"base": 600, "chat": 602, "code": 603, "plain": 600}
    found = align("union", tokenizers, base_key="base", vocab_sizes=sizes, pad_to_multiple_of=8)
    weights = matrices(tokenizers, sizes)
    for key in tokenizers:
        biases = read_rows(found, key, {other: matrix[:, 1] for other, matrix in weights.items()}, 5, found.size)
        assert np.allclose(biases, read_rows(found, key, weights)[5:, 1])


# Writing ---------------------------------------------------------------------------------------------------------


def written(alignment, donor: Path, folder: Path) -> Path:
    folder.mkdir()
    shutil.copyfile(donor / "config.json", folder / "config.json")
    alignment.write(folder)
    return folder


def align_folders(source: str, folders: dict[str, Path], **options):
    tokenizers = read_all(folders)
    sizes = {key: len(tokenizer.vocab) for key, tokenizer in tokenizers.items()}
    return align(source, tokenizers, base_key=next(iter(folders)), vocab_sizes=sizes, **options)


def test_copy_of_one_model(family, tmp_path):
    os.umask(umask := os.umask(0))
    for source, donor in (("base", "base"), ("chat", "chat")):
        folder = written(align_folders(source, family), family[donor], tmp_path / f"out_{source}")
        for path in tokenizer_files(family[donor]):
            assert (folder / path.name).read_bytes() == path.read_bytes()
            assert (folder / path.name).stat().st_mode & 0o777 == 0o666 & ~umask
        assert auto(folder).get_vocab() == read_tokenizer(family[donor]).vocab


@pytest.mark.parametrize(
    ("name", "config"),
    [(name, config) for name in ("byte", "meta", "word", "unigram") for config in ("plain", "decoder")]
    + [("gpt2", "none")],
)
def test_union_of_added_tokens(trained, tmp_path, name, config):
    base = tmp_path / "base"
    shutil.copytree(trained[name], base)
    if config == "decoder":  # as transformers 4 wrote it: the added tokens are listed once more in the config
        tokens = read_tokenizer(base).added.values()
        decoder = {str(t.id): {k: v for k, v in vars(t).items() if k != "id"} for t in tokens}
        edit(base / "tokenizer_config.json", lambda c: c.update(added_tokens_decoder=decoder))
    before = auto(base)
    if name == "gpt2":
        chat = tmp_path / "chat"
        shutil.copytree(base, chat)
        count = len(read_tokenizer(base).vocab)
        (chat / "added_tokens.json").write_text(json.dumps({"<|im_start|>": count, "<|im_end|>": count + 1}))
    else:
        chat = extended(base, tmp_path / "chat", "<|im_start|>", AddedToken("<note>", normalized=False, lstrip=True))
    alignment = align_folders("union", {"base": base, "chat": chat})
    folder = written(alignment, base, tmp_path / "out")
    loaded = auto(folder)
    assert loaded.get_vocab() == alignment.vocab == read_tokenizer(folder).vocab
    assert len(alignment.vocab) == len(before.get_vocab()) + 2
    assert [loaded(text).input_ids for text in ORDINARY] == [before(text).input_ids for text in ORDINARY]
    assert loaded.convert_tokens_to_ids("<|im_start|>") in loaded("say <|im_start|>").input_ids
    if name not in ("gpt2", "word"):
        owner = read_tokenizer(chat)
        kept = read_tokenizer(folder).added["<note>"]
        assert (kept.special, kept.lstrip, kept.normalized) == (False, True, False)
        assert owner.added["<note>"].lstrip
        assert "<|im_start|>" not in loaded.decode(loaded("a <|im_start|> b").input_ids, skip_special_tokens=True)


@pytest.mark.parametrize("order", [("byte", "meta"), ("meta", "byte"), ("byte", "word"), ("gpt2", "other_byte")])
def test_union_with_the_pieces_of_another_tokenizer(trained, tmp_path, order):
    folders = {
        "base": extended(trained[order[0]], tmp_path / "base", "<|a|>", "<|b|>") if order[0] != "gpt2"
        else trained["gpt2"],
        "other": extended(trained[order[1]], tmp_path / "other", "<|c|>"),
    }  # fmt: skip
    alignment = align_folders("union", folders)
    assert alignment.new_pieces
    folder = written(alignment, folders["base"], tmp_path / "out")
    before, loaded = auto(folders["base"]), auto(folder)
    assert loaded.get_vocab() == alignment.vocab == read_tokenizer(folder).vocab
    assert sorted(alignment.vocab.values()) == list(range(len(alignment.vocab)))
    ascii_text = [text for text in ORDINARY if text.isascii()]
    assert [loaded(text).input_ids for text in ascii_text] == [before(text).input_ids for text in ascii_text]
    assert loaded("<|c|>").input_ids[-1:] == [alignment.vocab["<|c|>"]] or order[1] == "word"
    ids = loaded("a <|c|> b").input_ids
    assert alignment.vocab["<|c|>"] in ids
    assert any("without merges" in note for note in alignment.notes)
    assert loaded.decode(loaded(LINES[50]).input_ids, skip_special_tokens=True) == before.decode(
        before(LINES[50]).input_ids, skip_special_tokens=True
    )


@pytest.mark.parametrize("name", ["word", "unigram"])
def test_union_that_would_change_the_splitting_is_refused(trained, name):
    with pytest.raises(RecipeError, match=r"other has \d+ plain piece\(s\) that base lacks .* Use `tokenizer: base`"):
        align_folders("union", {"base": trained[name], "other": trained["byte"]})
    assert align_folders("base", {"base": trained[name], "other": trained["byte"]}).identity("base")


def test_union_into_a_bpe_that_looks_words_up_is_refused(trained, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(trained["byte"], folder)
    edit(folder / "tokenizer.json", lambda s: s["model"].update(ignore_merges=True))
    with pytest.raises(RecipeError, match="ignore_merges"):
        align_folders("union", {"base": folder, "other": trained["meta"]})
    chat = extended(folder, tmp_path / "chat", "<|c|>")
    alignment = align_folders("union", {"base": folder, "chat": chat})
    assert auto(written(alignment, folder, tmp_path / "out")).get_vocab() == alignment.vocab


def test_formats_that_cannot_hold_the_union_are_left_out(trained, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(trained["meta"], base)
    (base / "tokenizer.model").write_bytes(b"pieces")
    (base / "tekken.json").write_text("{}")
    chat = extended(trained["meta"], tmp_path / "chat", "<|c|>")
    out = written(align_folders("union", {"base": base, "chat": chat}), base, tmp_path / "added")
    assert (out / "tokenizer.model").exists() and not (out / "tekken.json").exists()
    out = written(align_folders("union", {"base": base, "other": trained["byte"]}), base, tmp_path / "pieces")
    assert not (out / "tokenizer.model").exists()


def test_remote_code_is_not_referred_to_by_a_union(trained, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(trained["byte"], base)
    edit(
        base / "tokenizer_config.json",
        lambda c: c.update(auto_map={"AutoTokenizer": ["tok.Own", None]}, tokenizer_class="Own"),
    )
    chat = extended(trained["byte"], tmp_path / "chat", "<|c|>")
    alignment = align_folders("union", {"base": base, "chat": chat})
    folder = written(alignment, base, tmp_path / "out")
    assert "auto_map" not in json.loads((folder / "tokenizer_config.json").read_text())
    assert auto(folder).get_vocab() == alignment.vocab


def test_same_bytes_whatever_the_hash_seed(family, trained, tmp_path):
    code = (
        "import sys, hashlib; from pathlib import Path; from hf_fuse.checkpoint.tokenizer import read_tokenizer;"
        "from hf_fuse.checkpoint.vocabulary import align;"
        "*parents, out = map(Path, sys.argv[1:]); t = {str(i): read_tokenizer(p) for i, p in enumerate(parents)};"
        "a = align('union', t, base_key='0', vocab_sizes={k: len(v.vocab) for k, v in t.items()}); a.write(out);"
        "print(hashlib.sha256(repr([list(a.vocab.items()), a.fill, [r.tolist() for r in a.rows.values()], a.notes,"
        "[v.fingerprint for v in t.values()]]).encode()).hexdigest())"
    )
    parents = [family["base"], family["code"], trained["meta"], family["chat"]]
    results = []
    for seed in ("0", "1", "4242"):
        out = tmp_path / f"seed{seed}"
        out.mkdir()
        run = subprocess.run(
            [sys.executable, "-c", code, *parents, out], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )  # fmt: skip
        results.append((run.stdout, {p.name: p.read_bytes() for p in sorted(out.iterdir())}))
    assert results[0] == results[1] == results[2]
    assert "tokenizer.json" in results[0][1]


# Chat templates --------------------------------------------------------------------------------------------------

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
SYSTEM = {"role": "system", "content": "Be kind."}
RENDERED = {
    "chatml": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
    "\n\nHello<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Hi [/INST] Hello</s>[INST] Bye [/INST]",
    "alpaca": "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nHi\n\n### Response:\nHello</s>\n\n### Instruction:\nBye\n\n### Response:\n",
    "exaone": "[|system|][|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n[|user|]Bye\n[|assistant|]",
}
OPENINGS = {
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user",
    "mistral": "<s>[INST] Be kind.\n\nHi [/INST] Hello</s>[INST] Bye",
    "alpaca": "Be kind.\n\n### Instruction:\nHi\n\n### Response:",
    "exaone": "[|system|]Be kind.[|endofturn|]\n[|user|]Hi\n",
}


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_named_templates(trained, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(trained["byte"], folder)
    edit(folder / "tokenizer_config.json", lambda c: c.update(chat_template="old"))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("old")
    write_chat_template(folder, chat_template(name))
    loaded = auto(folder)
    assert loaded.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == RENDERED[name]
    assert loaded.apply_chat_template([SYSTEM, *CHAT], tokenize=False).startswith(OPENINGS[name])
    assert read_tokenizer(folder).chat_template == loaded.chat_template


def test_automatic_template(trained, tmp_path):
    tokenizers = []
    for key, template in {"a": None, "b": "{{ 2 }}", "c": "{{ 1 }}", "d": "{{ 1 }}", "e": "{{ 2 }}"}.items():
        folder = tmp_path / key
        shutil.copytree(trained["byte"], folder)
        if template:
            edit(folder / "tokenizer_config.json", lambda c, t=template: c.update(chat_template=t))
        tokenizers.append(read_tokenizer(folder))
    assert chat_template("auto", [*tokenizers, None]) == "{{ 2 }}"  # a tie: the first
    assert chat_template("auto", tokenizers[:4]) == "{{ 1 }}"
    with pytest.raises(RecipeError, match="none has one"):
        chat_template("auto", tokenizers[:1])


def test_where_templates_are_read_from(trained, tmp_path):
    shutil.copytree(trained["byte"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "third"}))
    assert read_tokenizer(tmp_path).chat_template == "third"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "second"}]
    edit(tmp_path / "tokenizer_config.json", lambda c: c.update(chat_template=named))
    assert read_tokenizer(tmp_path).chat_template == "second"
    (tmp_path / "chat_template.jinja").write_text("first")
    assert read_tokenizer(tmp_path).chat_template == "first" == auto(tmp_path).chat_template


def test_template_texts_and_errors():
    assert chat_template("{{ messages[0] }}") == "{{ messages[0] }}"
    assert chat_template("{% generation %}{{ 1 }}{% endgeneration %}").startswith("{% generation")
    with pytest.raises(RecipeError, match="'chatm' is neither a known name nor Jinja text. Did you mean 'chatml'"):
        chat_template("chatm")
    with pytest.raises(RecipeError, match="not valid Jinja, line 2"):
        chat_template("{{ 1 }}\n{% if %}")
    assert missing_markers(chat_template("chatml"), ["<|im_start|>"]) == ["<|im_end|>"]
    assert missing_markers(chat_template("llama3"), []) == ["<|end_header_id|>", "<|eot_id|>", "<|start_header_id|>"]
    assert missing_markers(chat_template("alpaca"), []) == []
    assert missing_markers(chat_template("exaone"), ["[|endofturn|]"]) == ["[|assistant|]", "[|system|]", "[|user|]"]
