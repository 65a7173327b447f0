"""Input embeddings and output head that share one tensor: who ties them, and who only says so."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from hf_fuse.checkpoint.reader import Checkpoint, FilePool, TensorInfo, text_part
from hf_fuse.errors import CheckpointError

_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output|predictions\.decoder)\.weight$")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared)\.weight$")
_PER_TOKEN = re.compile(r"(^|\.)(lm_head|predictions|final_logits_bias|predictions\.decoder)(\.weight|\.bias)?$")


def embedding_name(checkpoint: Checkpoint) -> str | None:
    """The matrix of token embeddings, ``[vocabulary, width]``."""
    found = [name for name, info in checkpoint.tensors.items() if _EMBEDDING.search(name) and len(info.shape) == 2]
    return min(found, key=lambda name: (len(name), name), default=None)


def head_name(checkpoint: Checkpoint) -> str | None:
    found = [name for name, info in checkpoint.tensors.items() if _HEAD.search(name) and len(info.shape) == 2]
    return min(found, key=len, default=None)


def stored_twice(checkpoint: Checkpoint) -> str | None:
    """The head's name, if the files hold it though it is the embedding.

    A config alone does not say: transformers leaves a head alone that differs from the embedding it should be tied to.
    """
    head = head_name(checkpoint)
    return head if head and _verdict(checkpoint, head) == "tied" else None


def vocabulary_tensors(checkpoint: Checkpoint) -> set[str]:
    """Tensors whose first axis is the vocabulary."""
    embedding = embedding_name(checkpoint)
    if embedding is None:
        return set()
    rows = checkpoint.tensors[embedding].shape[0]
    return {
        name
        for name, info in checkpoint.tensors.items()
        if info.shape[:1] == (rows,) and (_EMBEDDING.search(name) or _HEAD.search(name) or _PER_TOKEN.search(name))
    }


@dataclass(frozen=True)
class Tying:
    """How the parents' heads are merged: which head to leave to the embedding, where an embedding stands in."""

    head: str | None = None
    embedding: str | None = None
    tied: bool | None = None  # None: no head in question
    store_twice: bool = False
    changed: bool = False  # config.json needs another tie_word_embeddings


def resolve_tying(checkpoints: list[Checkpoint], choice: bool | None) -> Tying:
    """Decides for all parents (the reference first) whether the output's head is the embedding.

    Raises:
        CheckpointError: some parents tie and others don't, or a file contradicts its config, and the recipe makes no
            choice; or a separate head is wanted and nobody has one.
    """
    heads = {c.ref: head_name(c) for c in checkpoints}
    head = next((h for h in heads.values() if h), None)
    embedding = embedding_name(checkpoints[0])
    if choice is False and head is None:
        raise CheckpointError(
            "tie_word_embeddings: false: no model stores a head of its own, so the output can't either. Leave it out."
        )
    if head is None or embedding is None:
        return Tying()
    verdicts = {c.ref: _verdict(c, heads[c.ref]) for c in checkpoints}
    kinds = set(verdicts.values())
    if choice is None and (len(kinds) > 1 or "contradictory" in kinds):
        said = "; ".join(f"{ref}: {verdict}" for ref, verdict in verdicts.items())
        raise CheckpointError(
            f"{head}: the models disagree whether it is tied to {embedding} ({said}). Say tie_word_embeddings: true "
            "in the recipe to drop the separate heads, or false to keep one (tied models lend their embedding)."
        )
    tied = choice if choice is not None else kinds == {"tied"}
    store_twice = tied and choice is None and bool(heads[checkpoints[0].ref])
    return Tying(head, embedding, tied, store_twice, changed=choice is not None)


def tied_view(tensors: Mapping[str, TensorInfo], tying: Tying) -> Mapping[str, TensorInfo]:
    """A model's tensors as the merge sees them: without the head if it is tied; else the embedding lent as head."""
    if tying.head is None:
        return tensors
    if tying.tied:
        return {name: info for name, info in tensors.items() if name != tying.head}
    if tying.head not in tensors and tying.embedding in tensors:
        return {**tensors, tying.head: tensors[tying.embedding]}
    return tensors


def _verdict(checkpoint: Checkpoint, head: str | None) -> str:
    if head is None:
        return "tied"
    config = checkpoint.config
    declared = config.get("tie_word_embeddings", text_part(config).get("tie_word_embeddings"))
    if declared is False:
        return "untied"
    if _equal(checkpoint, head, embedding_name(checkpoint)):
        return "tied"
    # Older configs leave the setting out where it has the architecture's default, so then the file decides.
    return "contradictory" if declared else "untied"


def _equal(checkpoint: Checkpoint, one: str, other: str | None) -> bool:
    a, b = checkpoint.tensors[one], checkpoint.tensors.get(other or "")
    if b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    pool, piece = FilePool(), 1 << 20
    width = a.nbytes // max(a.numel, 1)
    try:
        for first in range(0, a.numel, piece):
            count = min(piece, a.numel - first) * width
            left, right = bytearray(count), bytearray(count)
            pool.read(a, first, memoryview(left))
            pool.read(b, first, memoryview(right))
            if left != right:
                return False
        return True
    finally:
        pool.close()
