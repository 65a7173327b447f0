"""Three kinds of text that every Python installation carries, for experiments without a network.

``source``: the standard library's code, its docstrings cut out. ``docs``: those docstrings. ``manual``: the chapters of
the language reference behind ``help("with")``. Each is split into training and held-out documents by file (by chapter),
and no paragraph of a held-out document of any domain is left in the training text of another.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hf_fuse.errors import FuseError

DOMAIN_NAMES = ("source", "docs", "manual")
# Foreign packages, data tables, and the tests that some distributions leave out.
SKIPPED = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data", "idlelib", "lib2to3", "__pycache__")
)
# Shorter paragraphs ("return None", "See also:") recur by chance and give nothing away.
SHARED_PARAGRAPH = 40


@dataclass(frozen=True)
class Domain:
    """One kind of text.

    Attributes:
        name: ``source``, ``docs`` or ``manual``.
        description: what it is, in a few words.
        train: documents to train on.
        held_out: documents to evaluate on.
    """

    name: str
    description: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]

    def excerpts(self, characters: int) -> list[str]:
        """The beginnings of all held-out documents, together at most ``characters`` long."""
        share = max(2, characters // len(self.held_out))
        return [text[:share] for text in self.held_out]


def stdlib_domains(*, source_characters: int = 3_500_000, folder: str | Path | None = None) -> list[Domain]:
    """Reads the three domains from the running Python.

    The same Python version gives the same text: files come in the order of a hash of their names, which also decides
    the split (about one in five is held out).

    Args:
        source_characters: stop reading files after about that many; bounds the time (about 1 s per million).
        folder: standard library to read; default: the running interpreter's.

    Raises:
        FuseError: this Python has no source files or no language reference.
    """
    root = Path(folder or sysconfig.get_path("stdlib"))
    code, docs = {}, {}
    for name, text in _files(root, source_characters):
        try:
            code[name], docs[name] = separate_docstrings(text)
        except (SyntaxError, ValueError):  # templates and files of another Python version
            continue
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}
    described = (
        ("library code", _of_size(code, 500)),
        ("its docstrings", _of_size(docs, 200)),
        ("language reference", _of_size(topics, 200)),
    )
    collected = dict(zip(DOMAIN_NAMES, described))
    held_out = {name: _held_out(documents) for name, (_, documents) in collected.items()}
    seen = {paragraph for kept in held_out.values() for text in kept.values() for paragraph in _paragraphs(text)}
    domains = []
    for name, (description, documents) in collected.items():
        train = [_without(text, seen) for key, text in documents.items() if key not in held_out[name]]
        if not any(train) or not held_out[name]:
            raise FuseError(
                f"{name}: no text found for the demo ({description}, expected in {root}). It reads what a full Python "
                "installation carries; some minimal or embedded ones leave it out. Run it with another Python."
            )
        domains.append(Domain(name, description, tuple(text for text in train if text), tuple(held_out[name].values())))
    return domains


def separate_docstrings(source: str) -> tuple[str, str]:
    """Python source -> (the code without its docstrings, the docstrings of at least 80 characters in their order).

    Raises:
        SyntaxError: not Python of this version.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # doubtful escapes in somebody else's code
        tree = ast.parse(source)
    lines = source.split("\n")
    found: list[tuple[int, str]] = []
    dropped: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if not text:
            continue
        place = node.body[0]
        found.append((place.lineno, text))
        before = lines[place.lineno - 1].encode()[: place.col_offset].strip()
        after = lines[place.end_lineno - 1].encode()[place.end_col_offset :].strip()
        if not before and not after:
            dropped.update(range(place.lineno, place.end_lineno + 1))
    code = "\n".join(line for number, line in enumerate(lines, 1) if number not in dropped)
    return code, "\n\n".join(text for _, text in sorted(found) if len(text) >= 80)


def _files(root: Path, characters: int) -> Iterator[tuple[str, str]]:
    """(path relative to the library, text) of its modules in hash order, until ``characters`` have been read."""
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    for path in sorted((path for path in paths if not SKIPPED & set(path.parts)), key=lambda p: _hash(p.as_posix())):
        if characters <= 0:
            return
        try:
            text = (root / path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        characters -= len(text)
        yield path.as_posix(), text


def _of_size(documents: Mapping[str, str], least: int) -> dict[str, str]:
    kept = {name: text.strip() for name, text in documents.items()}
    return {name: kept[name] for name in sorted(kept, key=_hash) if len(kept[name]) >= least}


def _held_out(documents: Mapping[str, str]) -> dict[str, str]:
    return {name: text for name, text in documents.items() if _hash(f"held-out:{name}")[0] < 51}


def _without(text: str, paragraphs: Iterable[str]) -> str:
    return "\n\n".join(part for part in text.split("\n\n") if " ".join(part.split()) not in paragraphs).strip()


def _paragraphs(text: str) -> Iterator[str]:
    for part in text.split("\n\n"):
        plain = " ".join(part.split())
        if len(plain) >= SHARED_PARAGRAPH:
            yield plain


def _hash(name: str) -> bytes:
    # Python's own hash() differs between processes.
    return hashlib.sha256(name.encode()).digest()
