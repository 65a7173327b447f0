"""Digits and passages of the standard library as rows for a trainer, and the small classifiers that learn them."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from study.suites import fit, guises
from torch import Tensor

Rows = list[dict[str, Any]]

PACKAGES = ("asyncio", "email", "importlib", "logging", "unittest", "xml")
PASSAGE = 200  # characters
TOKENS = 40
WORDS, WIDTH, SPREAD = 2000, 32, 0.1  # of the text classifier's embeddings


@dataclass
class Source:
    """Rows of one seed for each purpose, and classifiers that start where their training does.

    Attributes:
        classes: number of labels.
        parts: ``train``, ``validation`` and ``test``.
        other: the same of another kind: images turned by 90 degrees, docstrings instead of code.
        encoder: weights of all but the last layer that trainings start from; none: at random.
        rate: learning rate.
    """

    name: str
    classes: int
    parts: dict[str, Rows]
    other: dict[str, Rows]
    encoder: dict[str, Tensor]
    rate: float
    seed: int

    def model(
        self, start: int = 0, *, classes: int | None = None, problem: str | None = None, untrained: bool = False
    ) -> Any:
        """A classifier with a new last layer. ``start``: which random numbers are in it."""
        made = _new(self.name, classes or self.classes, self.seed + 1000 * start)
        made.load_state_dict({} if untrained else self.encoder, strict=False)
        made.config.problem_type = problem
        return made


def digits(seed: int, steps: int) -> Source:
    """The encoder has learned 500 images in guises; the rows are other images, upright, or turned by 90 degrees."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(seed))
    images = (torch.tensor(data.images, dtype=torch.float32)[order, None] - 8) / 8
    labels = torch.tensor(data.target)[order]
    ends = {"train": (500, 1000), "validation": (1000, 1300), "test": (1300, 1797)}
    base = _new("digits", 10, seed)
    fit(base, images[:500], labels[:500], steps, 2e-3, seed, shows=list(guises(seed).values())[1:])
    parts, other = (
        {part: image_rows(show(images[a:b]), labels[a:b]) for part, (a, b) in ends.items()}
        for show in (lambda x: x, lambda x: x.rot90(1, (2, 3)))
    )
    encoder = {name: value for name, value in base.state_dict().items() if not name.startswith("classifier.")}
    return Source("digits", 10, parts, other, encoder, 3e-3, seed)


def image_rows(images: Tensor, labels: Tensor) -> Rows:
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels.tolist())]


def text(seed: int) -> Source:
    """Which package a passage of code is from; the others are docstrings. Word vectors are counted on all of them."""
    tokenizer, by_kind, vectors_VD = _passages()
    draw = random.Random(seed)
    found: list[dict[str, Rows]] = []
    for passages in by_kind:
        split: dict[str, Rows] = {"train": [], "validation": [], "test": []}
        for label, own in enumerate(passages):
            chosen = draw.sample(own, min(150, len(own)))
            first, second = 2 * len(chosen) // 5, 3 * len(chosen) // 5
            for part, some in zip(split, (chosen[:first], chosen[first:second], chosen[second:])):
                split[part] += [encoded(tokenizer, passage) | {"labels": label} for passage in some]
        for rows in split.values():
            draw.shuffle(rows)
        found.append(split)
    return Source("text", len(PACKAGES), *found, {"bert.embeddings.word_embeddings.weight": vectors_VD}, 1e-2, seed)


def encoded(tokenizer: Any, passage: str) -> dict[str, Tensor]:
    taken = tokenizer(passage, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    return {name: taken[name][0] for name in ("input_ids", "attention_mask")}


@lru_cache
def _passages() -> tuple[Any, list[list[list[str]]], Tensor]:
    """A tokenizer, passages of code and of docstrings by package, and vectors of words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from hf_fuse.data.stdlib_text import separate_docstrings

    root, kinds = Path(sysconfig.get_path("stdlib")), ([], [])
    for package in PACKAGES:
        files = sorted(path for path in (root / package).rglob("*.py") if "test" not in path.parts)
        pairs = [separate_docstrings(path.read_text(encoding="utf-8")) for path in files]
        for kind, texts in zip(kinds, zip(*pairs)):
            # The package's name would give it away.
            whole = " ".join(" ".join(texts).replace(package, "").split())
            kind.append([whole[a : a + PASSAGE] for a in range(0, len(whole) - PASSAGE, PASSAGE)])
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]"]
    every = [passage for kind in kinds for own in kind for passage in own]
    tokenizer.train_from_iterator(every, trainers.WordLevelTrainer(vocab_size=WORDS, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]")
    return fast, list(kinds), word_vectors(fast(every)["input_ids"])


def word_vectors(passages: Sequence[Sequence[int]]) -> Tensor:
    """Latent semantic analysis: ``(words, WIDTH)``, words near each other that occur in the same passages.

    From nothing, so small a model would learn them in thousands of steps.
    """
    from scipy.sparse import csr_matrix
    from sklearn.decomposition import TruncatedSVD

    rows = [number for number, ids in enumerate(passages) for _ in set(ids)]
    columns = [word for ids in passages for word in set(ids)]
    occurs = csr_matrix(([1.0] * len(rows), (rows, columns)), shape=(len(passages), WORDS))
    rarity = torch.tensor(len(passages) / (1 + occurs.sum(0).A1)).log().numpy()
    found = TruncatedSVD(WIDTH, random_state=0).fit(occurs.multiply(rarity).tocsr()).components_.T * rarity[:, None]
    return torch.tensor(found / found.std() * SPREAD, dtype=torch.float32)


def _new(name: str, classes: int, seed: int) -> Any:
    from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    if name == "text":
        config = BertConfig(
            vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=TOKENS, num_labels=classes, initializer_range=SPREAD,
        )  # fmt: skip
        return BertForSequenceClassification(config)
    config = ViTConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4,
        num_channels=1, num_labels=classes, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    return ViTForImageClassification(config)


def few(rows: Rows, each: int) -> Rows:
    """The first rows of each class."""
    return long_tailed(rows, [each] * (1 + max(row["labels"] for row in rows)))


def long_tailed(rows: Rows, counts: Sequence[int]) -> Rows:
    """The first ``counts[c]`` rows of class c."""
    left, kept = list(counts), []
    for row in rows:
        if left[row["labels"]]:
            left[row["labels"]] -= 1
            kept.append(row)
    return kept


def with_wrong_labels(rows: Rows, share: float, classes: int, seed: int) -> Rows:
    """A share of the rows gets another class, drawn at random."""
    draw = random.Random(seed)
    return [
        row | {"labels": (row["labels"] + draw.randrange(1, classes)) % classes} if draw.random() < share else row
        for row in rows
    ]


def one_against_rest(rows: Rows, positive: int = 3) -> Rows:
    return [row | {"labels": int(row["labels"] == positive)} for row in rows]


def in_pairs(rows: Rows, classes: int, count: int, seed: int) -> Rows:
    """Two rows in one, whose labels are those of both: images on top of each other, texts one after the other."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        one, other = draw.sample(rows, 2)
        labels = torch.zeros(classes)
        labels[[one["labels"], other["labels"]]] = 1
        if "pixel_values" in one:
            joined = {"pixel_values": torch.maximum(one["pixel_values"], other["pixel_values"])}
        else:
            half = TOKENS // 2
            joined = {
                name: torch.cat([one[name][:half], other[name][:half]]) for name in ("input_ids", "attention_mask")
            }
        found.append(joined | {"labels": labels})
    return found
