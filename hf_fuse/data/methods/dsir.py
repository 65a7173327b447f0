"""DSIR: draws texts so that their n-grams are distributed as in a target text (importance resampling); needs no model.

A text's log weight is ``sum over its n-grams of log p_target - log p_raw``: words and pairs of words are hashed into
buckets, and both distributions are counted over buckets. Texts are then drawn without replacement (Gumbel top-k).

To prefer where no model of the domain exists, or there is too much text to run one over.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Annotated

import numpy as np
from tqdm import tqdm

from hf_fuse.registry import Between

PAPER = "https://arxiv.org/abs/2302.03169"
DRAWN = True
SMOOTHING = 1e-8  # of a bucket that nothing fell into
_WORDS = re.compile(r"\w+|[^\w\s]+")


def dsir(
    texts: Iterable[str],
    target: Iterable[str],
    *,
    buckets: Annotated[int, Between(2)] = 10_000,
    min_words: Annotated[int, Between(0)] = 100,
    per_word: bool = False,
) -> np.ndarray:
    """Log importance weight of each text, fp64 [N]; -inf for those that are too short.

    Args:
        texts: to choose from; read twice.
        target: texts that the chosen ones should resemble; read once.
        buckets: number of hash buckets.
        min_words: shorter texts are never chosen (punctuation counts as words).
        per_word: divides by the number of n-grams. The paper does not: there long texts have the extreme weights.
    """
    distributions = []
    for name, side in (("target", target), ("data", texts)):
        counts = np.zeros(buckets)
        for text in tqdm(side, desc=f"count {name}", unit="text", disable=None):
            np.add.at(counts, _buckets(text, buckets), 1)
        distributions.append(counts / max(counts.sum(), 1))
    log_ratio = np.log(distributions[0] + SMOOTHING) - np.log(distributions[1] + SMOOTHING)
    weights = []
    for text in tqdm(texts, desc="weigh data", unit="text", disable=None):
        found = _buckets(text, buckets)
        words = (len(found) + 1) // 2  # n words make n - 1 pairs
        weight = log_ratio[found].sum() / (max(len(found), 1) if per_word else 1)
        weights.append(weight if words >= min_words else -np.inf)
    _bucket.cache_clear()
    return np.array(weights)


def _buckets(text: str, count: int) -> list[int]:
    """Buckets of the words of ``text`` and of its pairs of neighbouring words."""
    words = _WORDS.findall(text.lower())
    return [_bucket(gram, count) for gram in (*words, *map(" ".join, zip(words, words[1:])))]


@lru_cache(1 << 20)
def _bucket(gram: str, count: int) -> int:
    return int.from_bytes(hashlib.sha256(gram.encode(errors="surrogatepass")).digest(), "big") % count
