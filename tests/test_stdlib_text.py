"""The three domains read from the running Python: what they hold, and that held-out text is really held out."""

from __future__ import annotations

import pytest

from hf_fuse.data.stdlib_text import DOMAIN_NAMES, SHARED_PARAGRAPH, separate_docstrings, stdlib_domains
from hf_fuse.errors import FuseError


@pytest.fixture(scope="module")
def domains():
    return {domain.name: domain for domain in stdlib_domains(source_characters=600_000)}


def paragraphs(text):
    return {" ".join(part.split()) for part in text.split("\n\n") if len(" ".join(part.split())) >= SHARED_PARAGRAPH}


def test_there_is_enough_of_each_kind(domains):
    assert tuple(domains) == DOMAIN_NAMES
    for domain in domains.values():
        assert sum(map(len, domain.train)) > 30_000, domain.name
        assert len(domain.held_out) >= 2 and sum(map(len, domain.held_out)) > 2_000, domain.name
    share = {name: text_share(domain.train, "self.") for name, domain in domains.items()}
    assert share["source"] > 5 * max(share["docs"], share["manual"]), "code looks like code, prose does not"


def text_share(texts, word):
    joined = "\n".join(texts)
    return joined.count(word) / len(joined)


def test_no_paragraph_is_both_held_out_and_trained_on(domains):
    held_out = {part for domain in domains.values() for text in domain.held_out for part in paragraphs(text)}
    trained = {part for domain in domains.values() for text in domain.train for part in paragraphs(text)}
    assert len(held_out) > 50 and not held_out & trained


def test_the_same_python_gives_the_same_text(domains):
    assert {domain.name: domain for domain in stdlib_domains(source_characters=600_000)} == domains


def test_excerpts_come_from_every_held_out_document(domains):
    for domain in domains.values():
        excerpts = domain.excerpts(1_000)
        assert len(excerpts) == len(domain.held_out) and sum(map(len, excerpts)) <= 1_000
        assert all(text.startswith(excerpt) and excerpt for text, excerpt in zip(domain.held_out, excerpts))


def test_docstrings_are_cut_out_of_the_code():
    long = "A docstring that is long enough to be kept, because it has more than eighty characters in all."
    code, docs = separate_docstrings(
        f'"""{long}\n\nMore of it."""\nimport os\n\ndef f(): "one line"\n\nclass A:\n    """short"""\n    x = "text"\n'
        f'\n    async def g(self):\n        """{long} Again."""\n        return "no docstring"\n'
    )
    assert docs == f"{long}\n\nMore of it.\n\n{long} Again."
    # A docstring that shares its line with code stays: cutting the line would lose the code.
    assert code.split("\n") == [
        "import os", "", 'def f(): "one line"', "", "class A:", '    x = "text"', "", "    async def g(self):",
        '        return "no docstring"', "",
    ]  # fmt: skip


def test_a_python_without_sources_is_refused_with_the_place(tmp_path):
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FuseError, match="source: no text found for the demo") as caught:
        stdlib_domains(folder=tmp_path)
    assert str(tmp_path) in str(caught.value) and "another Python" in str(caught.value)
