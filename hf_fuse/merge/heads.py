"""Heads of classifiers: what lies outside the network that the tasks share, and is not merged when tasks differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_fuse.checkpoint.reader import Checkpoint
from hf_fuse.errors import CheckpointError

# What config.json says of a head.
HEAD_KEYS = ("architectures", "num_labels", "id2label", "label2id", "problem_type")


def head_tensors(checkpoint: Checkpoint) -> set[str]:
    """Names of the tensors outside the part that transformers calls the base model.

    Raises:
        CheckpointError: transformers does not know the architecture, or the files don't tell the two apart.
    """
    import transformers

    known = getattr(transformers, checkpoint.architecture or "", None)
    prefix = getattr(known, "base_model_prefix", "")
    found = {name for name in checkpoint.tensors if not name.startswith(f"{prefix}.")}
    if not prefix or len(found) == len(checkpoint.tensors):
        raise CheckpointError(
            f"{checkpoint.ref}: it can't be told which tensors of a {checkpoint.architecture} are its head. Expected a "
            "classifier saved by transformers."
        )
    return found


def leave_out_heads(parents: Mapping[str, Any], owner: str) -> set[str]:
    """Hides the heads of all parents of a merge but that of ``owner``, whose names it returns."""
    for key, parent in parents.items():
        if key != owner:
            heads = head_tensors(parent.checkpoint)
            parent.source.tensors = {n: info for n, info in parent.source.tensors.items() if n not in heads}
    return head_tensors(parents[owner].checkpoint)


def with_head(config: dict[str, Any], owner: dict[str, Any]) -> dict[str, Any]:
    """A config with everything that ``owner``'s says of its head."""
    kept = {key: value for key, value in config.items() if key not in HEAD_KEYS}
    return kept | {key: owner[key] for key in HEAD_KEYS if key in owner}
