"""Reads the tokenizer of a checkpoint from its files, without importing transformers in the common case.

``tokenizer.json`` (or ``vocab.json`` + ``merges.txt``, or ``vocab.txt``) is read together with
``tokenizer_config.json`` and its older companions, and every token gets the id that ``AutoTokenizer.from_pretrained``
would give it. Only folders with nothing but a sentencepiece or tiktoken model go through transformers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path

from hf_fuse.checkpoint.reader import read_json
from hf_fuse.errors import CheckpointError

# What decides how text becomes ids and back, plus the preprocessing of the other modalities. Never code.
CARRIED_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "target_vocab.json", "normalizer.json", "bpe.codes",
    "tokenizer.model", "tokenizer.model.v3", "tokenizer.model.v7", "spiece.model", "sentencepiece.bpe.model",
    "sentencepiece.model", "spm.model", "source.spm", "target.spm", "tekken.json", "tiktoken.model",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
    "image_processor_config.json", "video_preprocessor_config.json", "feature_extractor_config.json",
)  # fmt: skip
EXTRA_TEMPLATES = "additional_chat_templates"
OPAQUE_VOCABULARIES = (".model", ".spm", ".v3", ".v7", "tekken.json")  # only transformers can read these
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
PUBLISHED_IDS = ("bos_token", "eos_token", "pad_token", "unk_token")
MODEL_DEFAULTS = {
    "BPE": {
        "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
    },
    "Unigram": {"byte_fallback": False},
}  # fmt: skip
MAX_TOKEN_ID = 1 << 24  # far above any real vocabulary; keeps a damaged file from asking for terabytes


@dataclass(frozen=True)
class AddedToken:
    """A token matched in the text before the model runs, and how. Field names as in ``tokenizer.json``."""

    content: str
    id: int
    special: bool = False
    normalized: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True)
class _Core:
    """What ``tokenizer.json`` alone says; shared by all models with the same file."""

    model_type: str
    vocab: dict[str, int]
    merges: list[tuple]
    options: dict | None
    post_processor: dict | None
    added: tuple[AddedToken, ...]

    @cached_property
    def digest(self) -> str:
        # Some versions repeat the added tokens in the model's vocabulary.
        added = {token.content for token in self.added}
        pieces = sorted(item for item in self.vocab.items() if item[0] not in added)
        content = json.dumps([self.model_type, pieces, self.merges, self.options], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass
class Tokenizer:
    """The tokenizer of one checkpoint.

    Args:
        folder: where it was read from.
        files: all files to carry over when this tokenizer is the output's.
        model_type: ``"BPE"``, ``"Unigram"``, ``"WordPiece"``, ``"WordLevel"`` or ``"unknown"``.
        vocab: token -> id, added tokens included.
        added: the added tokens by content.
        special_ids: ``{"bos_token_id": ..., "eos_token_id": ..., "pad_token_id": ..., "unk_token_id": ...}``, known
            ones only; ``config.json`` answers for a special token that the tokenizer's files do not name.
        chat_template: Jinja text of the default template.
        merges: BPE merges ``(left, right)`` in rank order, or a Unigram's ``(piece, score)``.
        options: model options, normalizer and pre-tokenizer as in ``tokenizer.json``; None if no file holds them.
        post_processor: what is put around an encoded text.
        problem: why the vocabulary could not be read; such a tokenizer can only be compared by its bytes.
    """

    folder: Path
    files: list[Path]
    model_type: str = "unknown"
    vocab: dict[str, int] = field(default_factory=dict, repr=False)
    added: dict[str, AddedToken] = field(default_factory=dict, repr=False)
    special_ids: dict[str, int] = field(default_factory=dict)
    chat_template: str | None = field(default=None, repr=False)
    merges: list[tuple] = field(default_factory=list, repr=False)
    options: dict | None = field(default=None, repr=False)
    post_processor: dict | None = field(default=None, repr=False)
    problem: str | None = None
    _core: _Core | None = field(default=None, repr=False, compare=False)

    @cached_property
    def tokens(self) -> dict[int, str]:
        """id -> token."""
        return {number: token for token, number in self.vocab.items()}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over what decides encoding: vocabulary, merges, model options, normalizer, pre-tokenizer, added.

        Equal for the same tokenizer saved in another key order or by another version of the libraries.
        """
        digest = hashlib.sha256((self._core.digest if self._core else "").encode())
        for path in self.files if self.problem else ():
            if path.name.endswith(OPAQUE_VOCABULARIES):
                digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
        added = sorted((asdict(token) for token in self.added.values()), key=lambda token: token["id"])
        digest.update(json.dumps(added, sort_keys=True).encode())
        return digest.hexdigest()


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer, chat template and preprocessor files of a checkpoint folder, in a fixed order; never ``.py``."""
    found = [folder / name for name in CARRIED_FILES if (folder / name).is_file()]
    return found + sorted(path for path in folder.glob(f"{EXTRA_TEMPLATES}/*.jinja") if path.is_file())


def copy_files(files: Iterable[Path], source: Path, target: Path) -> None:
    """Copies ``files`` of folder ``source`` to ``target``: contents only, so the copies get the umask's mode."""
    for path in files:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """Reads the tokenizer in ``folder``; None if the folder has none (a vision model, bare weights).

    A tokenizer that needs a missing package or remote code is returned with ``problem`` set instead of a vocabulary:
    merging models that share it byte for byte is still possible.

    Raises:
        CheckpointError: a file is damaged or is not what its name says.
    """
    folder = Path(folder)
    files = tokenizer_files(folder)
    names = {path.name for path in files}
    problem, class_names = None, {}
    if "tokenizer.json" in names:
        core = _core(_read_bytes(folder / "tokenizer.json"), folder / "tokenizer.json")
    elif "vocab.json" in names or "vocab.txt" in names:
        core = _core_of_plain_vocabulary(folder)
    elif "tokenizer_config.json" in names or any(name.endswith(OPAQUE_VOCABULARIES) for name in names):
        try:
            text, class_names = backend_json(folder)
            core = _core(text.encode(), folder)
        except CheckpointError as error:
            core, problem = _Core("unknown", {}, [], None, None, ()), str(error)
    else:
        return None

    config = read_json(folder / "tokenizer_config.json") if "tokenizer_config.json" in names else {}
    declared, named = _declared_tokens(folder, config)
    # The config's list can repeat a token of tokenizer.json; the loader keeps the flags of tokenizer.json then.
    vocab, added = assign_ids(core.vocab, [*core.added, *declared])
    vocab = {} if problem else vocab
    tokenizer = Tokenizer(
        folder, files, core.model_type, vocab, added, merges=core.merges, options=core.options, problem=problem,
        post_processor=core.post_processor, chat_template=_chat_template(folder, config), _core=core,
    )  # fmt: skip
    tokenizer.special_ids = _special_ids(folder, class_names | named, vocab)
    return tokenizer


def backend_json(folder: Path) -> tuple[str, dict[str, str]]:
    """What transformers makes of other files (sentencepiece, tiktoken, vocab and merges): ``tokenizer.json``'s text and
    the named special tokens ``{"bos_token": content, ...}`` of the tokenizer class.

    Raises:
        CheckpointError: transformers cannot read the tokenizer, or it has no fast implementation.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} has no fast implementation.")
        return tokenizer.backend_tokenizer.to_str(), dict(tokenizer.special_tokens_map)
    except Exception as error:  # transformers lets whatever its dozens of converters meet escape
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{folder}: its tokenizer has no tokenizer.json, and transformers could not make one: {reason[0]} "
            "If a package is missing (sentencepiece and protobuf, or tiktoken), install it; or save the tokenizer once "
            "with AutoTokenizer.from_pretrained(folder).save_pretrained(folder), which writes tokenizer.json."
        ) from None


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from None


@lru_cache(maxsize=4)  # the models of one recipe mostly have the same file: parse it once
def _parse(raw: bytes) -> _Core:
    state = json.loads(raw)
    model = state["model"]
    vocab, merges = model["vocab"], model.get("merges")
    kind = model.get("type") or ("Unigram" if isinstance(vocab, list) else "BPE" if merges else "WordPiece")
    if kind == "Unigram":
        merges = [(piece, float(score)) for piece, score in vocab]
        vocab = {piece: number for number, (piece, _) in enumerate(merges)}
    else:
        # Sharing the vocabulary's own strings keeps a 300k-merge table at a fifth of its size.
        shared = {token: token for token in vocab}
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in merges or ())
        merges = [(shared.get(left, left), shared.get(right, right)) for left, right in pairs]
    _check_ids(vocab)
    options = {key: value for key, value in model.items() if key not in ("vocab", "merges", "type")}
    # Older files leave these out; their defaults mean the same.
    options = {
        **MODEL_DEFAULTS.get(kind, {}),
        **{key: None if value == "" else value for key, value in options.items()},
    }
    options |= {"normalizer": state.get("normalizer"), "pre_tokenizer": state.get("pre_tokenizer")}
    added = tuple(_added_token(entry) for entry in state.get("added_tokens") or ())
    return _Core(kind, vocab, merges, options, state.get("post_processor"), added)


def _core(raw: bytes, path: Path) -> _Core:
    try:
        return _parse(raw)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not a tokenizer.json of the tokenizers library ({type(error).__name__}: {error}). "
            "Download it again, or save the tokenizer anew with save_pretrained."
        ) from None


def _check_ids(vocab: dict) -> None:
    for token, number in vocab.items():
        if type(token) is not str or type(number) is not int or not 0 <= number < MAX_TOKEN_ID:
            raise ValueError(f"token {token!r} has id {number!r}")


def _core_of_plain_vocabulary(folder: Path) -> _Core:
    """``vocab.json`` (+ ``merges.txt``) or ``vocab.txt``. How text is normalised and split is in no file: unknown."""
    path, merges = folder / "vocab.json", []
    try:
        if path.exists():
            vocab, kind = read_json(path), "WordLevel"
            if (folder / "merges.txt").exists():
                kind = "BPE"
                lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
                pairs = (line.split() for line in lines if not line.startswith("#version"))
                merges = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]
        else:
            path, kind = folder / "vocab.txt", "WordPiece"
            lines = path.read_text(encoding="utf-8").split("\n")
            vocab = {line.rstrip("\r"): number for number, line in enumerate(lines) if line or number < len(lines) - 1}
        _check_ids(vocab)
    except (UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a vocabulary ({error}). Expected tokens with their ids.") from None
    return _Core(kind, vocab, merges, None, None, ())


def _added_token(entry: Mapping | str, number: int = -1, special: bool | None = None) -> AddedToken:
    """``entry`` in the notation of any of the files. An id that no file states is -1: it is assigned later."""
    if isinstance(entry, str):
        entry = {"content": entry}
    special = bool(entry.get("special", special or False))
    flags = {key: bool(entry.get(key, False)) for key in ("lstrip", "rstrip", "single_word")}
    content, number = entry["content"], entry.get("id", number)
    if type(content) is not str or type(number) is not int or number >= MAX_TOKEN_ID:
        raise ValueError(f"added token {content!r} has id {number!r}")
    return AddedToken(content, number, special, bool(entry.get("normalized", not special)), **flags)


def assign_ids(model_vocab: dict[str, int], added: list[AddedToken]) -> tuple[dict[str, int], dict[str, AddedToken]]:
    """``(whole vocabulary, added tokens with their ids)`` by the loader's rule.

    An added token has the model's id if the model knows it, else the next one after the last. The loader ignores the
    ids in the files, and so they are ignored here: what counts is the id that the embedding matrix gets to see.
    """
    if not added:
        return model_vocab, {}
    vocab, known, last = dict(model_vocab), {}, -1
    for token in added:
        if not token.content or token.content in known:
            continue
        number = vocab.get(token.content)
        if number is None:
            number = max(len(model_vocab), last + 1)
        last = max(last, number)
        vocab[token.content], known[token.content] = number, replace(token, id=number)
    return vocab, known


def _declared_tokens(folder: Path, config: dict) -> tuple[list[AddedToken], dict[str, str]]:
    """Added tokens that ``tokenizer_config.json`` or its older companions name, in the loader's order, and the named
    ones ``{"bos_token": content, ...}``."""
    path = folder / "tokenizer_config.json"
    try:
        config, tokens = dict(config), []
        decoder = config.get("added_tokens_decoder")
        if decoder is None:
            path = folder / "special_tokens_map.json"
            config |= read_json(path) if path.exists() else {}
            path = folder / "added_tokens.json"
            legacy = read_json(path) if path.exists() else {}
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        named = {key: value for key, value in config.items() if key.endswith("_token") and value}
        named |= extra if isinstance(extra, dict) else {}
        named = {key: value for key, value in named.items() if isinstance(value, (str, dict))}
        in_order = sorted(named, key=lambda key: SPECIAL_NAMES.index(key) if key in SPECIAL_NAMES else 99)
        specials = [_added_token(named[key], special=True) for key in in_order]
        specials += [_added_token(entry, special=True) for entry in extra if not isinstance(extra, dict)]
        if decoder is None:
            contents = {token.content for token in specials}
            for content, number in sorted(legacy.items(), key=lambda item: item[1]):
                tokens.append(_added_token(content, number, content in contents))
        else:
            for number, entry in sorted(decoder.items(), key=lambda item: int(item[0])):
                tokens.append(_added_token(entry, int(number)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: its list of special or added tokens is malformed ({type(error).__name__}: {error}). "
            "Expected what save_pretrained writes."
        ) from None
    contents = {key: value if isinstance(value, str) else value["content"] for key, value in named.items()}
    return tokens + specials, contents


def _special_ids(folder: Path, named: dict[str, str], vocab: dict[str, int]) -> dict[str, int]:
    ids = {f"{name}_id": vocab[named[name]] for name in PUBLISHED_IDS if named.get(name) in vocab}
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    text = config.get("text_config")
    config = (text if isinstance(text, dict) else {}) | {key: v for key, v in config.items() if v is not None}
    known = set(vocab.values())
    for name in PUBLISHED_IDS:
        number = config.get(f"{name}_id")
        number = number[0] if isinstance(number, list) and number else number
        if type(number) is int and number in known:
            ids.setdefault(f"{name}_id", number)
    return {key: ids[key] for key in sorted(ids)}


def _chat_template(folder: Path, config: dict) -> str | None:
    """The default template. The file of its own wins over the entry in ``tokenizer_config.json``, as in the loader."""
    if (folder / "chat_template.jinja").exists():
        try:
            return (folder / "chat_template.jinja").read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{folder / 'chat_template.jinja'}: not UTF-8 text.") from None
    template = config.get("chat_template")
    if template is None and (folder / "chat_template.json").exists():
        template = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
