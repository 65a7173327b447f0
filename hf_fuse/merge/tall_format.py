"""What a store of TALL-masks looks like on disk: its description, and which base it belongs to."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from hf_fuse.checkpoint.reader import Checkpoint, FilePool
from hf_fuse.errors import CheckpointError
from hf_fuse.merge.store import STORE_FILE, read_description

KIND, FORMAT = "tall-masks", 1
VECTOR_STEM = "multitask"
_PROBE = 4096  # bytes of each tensor of the base that its fingerprint covers


def fingerprint(checkpoint: Checkpoint) -> str:
    """Hash of names, dtypes, shapes and the first bytes of every tensor: tells models apart at little cost."""
    digest, pool = hashlib.sha256(), FilePool()
    try:
        for name, info in sorted(checkpoint.tensors.items()):
            width = info.nbytes // max(info.numel, 1)
            probe = bytearray(min(info.nbytes, _PROBE // max(width, 1) * width))
            pool.read(info, 0, memoryview(probe))
            digest.update(f"{name}\0{info.dtype}\0{info.shape}\0".encode() + probe)
    finally:
        pool.close()
    return digest.hexdigest()


def read_store(store: Path) -> dict[str, Any]:
    """The description of a store, checked.

    Raises:
        CheckpointError: not a store, of another kind, or damaged.
    """
    facts = read_description(store)
    if facts.get("kind") != KIND or facts.get("format") != FORMAT:
        raise CheckpointError(
            f"{store}: {STORE_FILE} says kind {facts.get('kind')!r}, format {facts.get('format')!r}. Expected "
            f"{KIND!r}, {FORMAT}."
        )
    try:
        files = [facts["multitask"], *(task["mask"] for task in facts["tasks"].values())]
        sound = isinstance(facts["base"]["path"], str) and isinstance(facts["base_fingerprint"], str)
    except (KeyError, TypeError, AttributeError):
        sound, files = False, []
    if not sound or not all(isinstance(file, str) and re.fullmatch(r"\w[\w.-]*\.safetensors", file) for file in files):
        raise CheckpointError(f"{store / STORE_FILE}: is damaged. Make the store again.")
    return facts
