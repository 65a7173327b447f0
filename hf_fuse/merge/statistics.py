"""Statistics beside the models: numbers estimated from data (``hf-fuse learn``), under the names of a model's tensors.

A method that wants them takes the argument ``statistics`` and its module names their kind, ``STATISTICS``: ``fisher``
is one number per weight of every tensor, ``gram`` a matrix ``[in, in]`` for those layers that have one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_fuse.checkpoint.reader import Checkpoint, TensorInfo, read_header
from hf_fuse.errors import CheckpointError, RecipeError
from hf_fuse.registry import Method


@dataclass(frozen=True)
class Statistics:
    """Those of one model.

    Attributes:
        ref: where they are, for messages.
        source: one of :mod:`hf_fuse.merge.sources`; a name may share its numbers with another.
        inputs_first: matrices that are stored ``[in, out]`` (GPT-2's), not ``[out, in]``.
    """

    ref: str
    source: Any
    inputs_first: frozenset[str] = frozenset()

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.source.tensors


def open_statistics(ref: str, kind: str | None) -> Statistics:
    """Reads the header of a statistics file, or of the one file of a folder.

    Raises:
        CheckpointError: no such file, damaged, or statistics of another kind.
    """
    from hf_fuse.merge.sources import FileSource

    path = Path(ref).expanduser()
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(files) != 1 or not files[0].is_file():
        raise CheckpointError(
            f"{ref}: no statistics found. Expected the folder that hf-fuse learn has made, or its .safetensors file."
        )
    tensors, metadata = read_header(files[0])
    found = metadata.get("statistics", kind)
    if kind is not None and found != kind:
        raise CheckpointError(f"{ref}: holds {found} statistics, expected {kind}. Make them with hf-fuse learn.")
    try:
        shared = {name: tensors[owner] for name, owner in json.loads(metadata.get("shared", "{}")).items()}
        inputs_first = frozenset(json.loads(metadata.get("inputs_first", "[]")))
    except (ValueError, AttributeError, KeyError, TypeError):
        raise CheckpointError(f"{files[0]}: its metadata is not what hf-fuse learn writes. Make it again.") from None
    return Statistics(ref, FileSource(Checkpoint(ref, files[0].parent, {**shared, **tensors})), inputs_first)


def check_statistics(method: Method, models: Iterable[tuple[str, str]], found: Mapping[str, Statistics]) -> None:
    """Whether every model has the statistics that the method wants, and none has others.

    Args:
        models: (where in the recipe, key).

    Raises:
        RecipeError: naming the model and what to do.
    """
    kind = getattr(method.module, "STATISTICS", None)
    for where, key in models:
        if kind is None and key in found:
            raise RecipeError(f"{where}: {method.name} uses no statistics. Remove them, or choose another method.")
        if kind is not None and key not in found:
            raise RecipeError(
                f"{where}: {method.name} needs statistics ({kind}) of every model. Make them with hf-fuse learn, and "
                "say statistics: FOLDER beside the model's path."
            )


def elementwise(found: Statistics, info: TensorInfo, name: str) -> str:
    """The name under which a tensor's numbers are found: its own, or that of the tensor that it is tied to.

    Raises:
        CheckpointError: there are none, or they have another shape.
    """
    name = name if name in found.tensors else info.name
    theirs = found.tensors.get(name)
    if theirs is None:
        raise CheckpointError(f"statistics {found.ref} lack tensor {name}")
    if theirs.shape != info.shape or not theirs.is_float:
        raise CheckpointError(
            f"statistics {found.ref}: tensor {name} is {theirs.dtype} {list(theirs.shape)}, expected floating-point "
            f"{list(info.shape)}"
        )
    return name


def input_axis(found: Iterable[tuple[Statistics, str]], shape: tuple[int, ...]) -> int | None:
    """Which axis of a matrix its inputs lie on: 1 for ``[out, in]``, 0 for ``[in, out]``; None if no model has a Gram
    matrix for it.

    Raises:
        CheckpointError: some have one and some don't, or one does not fit the matrix.
    """
    found = list(found)
    having = [(one, name) for one, name in found if name in one.tensors]
    if not having:
        return None
    for one, name in found:
        if name not in one.tensors:
            raise CheckpointError(f"statistics {one.ref} lack tensor {name}, which those of other models have")
    axis = 0 if having[0][1] in having[0][0].inputs_first else 1
    wanted = (shape[axis],) * 2 if len(shape) == 2 else None
    for one, name in having:
        theirs = one.tensors[name]
        if theirs.shape != wanted or not theirs.is_float:
            expected = f"floating-point {list(wanted)}" if wanted else "none, as it is no matrix"
            raise CheckpointError(
                f"statistics {one.ref}: tensor {name} is {theirs.dtype} {list(theirs.shape)}, expected {expected}"
            )
    return axis
