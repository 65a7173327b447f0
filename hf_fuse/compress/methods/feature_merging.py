"""Iterative Feature Merging: hidden units of feed-forward layers that resemble each other become one. Needs no data.

The closest pair of units is merged again and again. Under ReLU, which is positively homogeneous, two units become one
with the sum of their incoming and the mean of their outgoing weights, as in the paper. Under any other activation, and
in gated layers, the incoming weights are averaged and the outgoing ones summed: that is exact for units that repeat
each other, where the paper's rule is far off.

Shapes: n units, X numbers per unit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from torch import Tensor
from tqdm import tqdm

from hf_fuse.checkpoint.reader import FilePool
from hf_fuse.compress.edit import Edit, Read, read_tensor, the_stack
from hf_fuse.compress.subject import Subject
from hf_fuse.errors import FuseError
from hf_fuse.registry import Between

NEEDS_TEXT = False


@dataclass(frozen=True)
class Layout:
    """Stored names after the layer's number -> the axis of the units; what makes a unit's input, and what uses it."""

    incoming: dict[str, int]
    outgoing: dict[str, int]
    width: str  # its key in config.json


LAYOUTS = (
    Layout(
        {"mlp.gate_proj.weight": 0, "mlp.up_proj.weight": 0, "mlp.gate_proj.bias": 0, "mlp.up_proj.bias": 0},
        {"mlp.down_proj.weight": 1},
        "intermediate_size",
    ),
    Layout({"mlp.c_fc.weight": 1, "mlp.c_fc.bias": 0}, {"mlp.c_proj.weight": 0}, "n_inner"),
    Layout({"fc1.weight": 0, "fc1.bias": 0}, {"fc2.weight": 1}, "ffn_dim"),
)


def feature_merging(
    subject: Subject,
    *,
    threshold: Annotated[float, Between(0, 1)] = 0.1,
    most: Annotated[float, Between(0, 1)] = 0.5,
) -> Edit:
    """Narrows all feed-forward layers to one common width, so that the output is a stock checkpoint.

    That width is the one of the layer that can spare least. Merging n units costs about n^2 steps each.

    Args:
        threshold: a layer goes on while its closest pair is at most this share of its farthest pair apart (squared
            distances).
        most: largest share of a layer's units to merge away.

    Raises:
        FuseError: the feed-forward layers are not of a known make.
    """
    stack, height = the_stack(subject.checkpoint)
    tensors = subject.checkpoint.tensors
    layout = next((one for one in LAYOUTS if all(f"{stack}.0.{name}" in tensors for name in one.outgoing)), None)
    if layout is None or f"{stack}.0.{next(iter(layout.incoming))}" not in tensors:
        raise FuseError(f"{subject.candidate.name}: how its feed-forward layers are built is not known here.")
    config = subject.candidate.config
    activation = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    homogeneous = activation == "relu" and "mlp.gate_proj.weight" not in layout.incoming
    merges = []
    for index in tqdm(range(height), desc="merge", unit="layer", disable=None):
        incoming_nX, outgoing_nX = (
            _units(subject, f"{stack}.{index}.", part) for part in (layout.incoming, layout.outgoing)
        )
        count = math.floor(most * len(incoming_nX))
        merges.append(closest_pairs(incoming_nX, outgoing_nX, threshold, count, homogeneous))
    spared = min(map(len, merges))
    edit = Edit(facts={"possible": [len(pairs) for pairs in merges]})
    width = len(incoming_nX) - spared
    edit.summary = f"Merged {spared} of {width + spared} units in each feed-forward layer."
    if not spared:
        return edit
    edit.config[layout.width] = width
    for index, pairs in enumerate(merges):
        clusters = clusters_of(width + spared, pairs[:spared])
        for part, summed in ((layout.incoming, homogeneous), (layout.outgoing, not homogeneous)):
            for name, axis in part.items():
                full = f"{stack}.{index}.{name}"
                if full in tensors:
                    shape = list(tensors[full].shape)
                    shape[axis] = width
                    edit.shapes[full] = tuple(shape)
                    edit.tensors[full] = partial(_narrowed, full, axis, clusters, summed)
    return edit


def _units(subject: Subject, prefix: str, part: dict[str, int]) -> Tensor:
    """All stored numbers that belong to each unit, ``[n, X]``."""
    pool, found = FilePool(), []
    try:
        for name, axis in part.items():
            if info := subject.checkpoint.tensors.get(prefix + name):
                values = read_tensor(info, pool).movedim(axis, 0)
                found.append(values.reshape(len(values), -1))
    finally:
        pool.close()
    return torch.cat(found, dim=1)


def closest_pairs(
    incoming_nX: Tensor, outgoing_nX: Tensor, threshold: float, count: int, homogeneous: bool
) -> list[tuple[int, int]]:
    """Which units to merge, one pair after the other; the unit that a merge makes gets the next free number.

    Under the sum rule a unit is all of its numbers, as in the paper; under the mean rule its incoming ones, which alone
    decide whether two units can be told apart.
    """
    made_nX = torch.cat([incoming_nX, outgoing_nX], dim=1) if homogeneous else incoming_nX.clone()
    head = incoming_nX.shape[1]
    size, numbers, pairs = torch.ones(len(made_nX)), list(range(len(made_nX))), []
    distance_nn = torch.cdist(made_nX, made_nX, compute_mode="donot_use_mm_for_euclid_dist").square()
    distance_nn.fill_diagonal_(math.inf)
    alive_n = torch.ones(len(made_nX), dtype=torch.bool)
    while len(pairs) < count:
        flat = int(distance_nn.argmin())
        one, other = sorted(divmod(flat, len(made_nX)))
        largest = distance_nn[distance_nn.isfinite()].max()
        if not distance_nn[one, other] <= threshold * largest:
            break
        share = size[other] / (size[one] + size[other])
        mean_X = made_nX[one].lerp(made_nX[other], share)
        sum_X = made_nX[one] + made_nX[other]
        made_nX[one] = torch.cat([sum_X[:head], mean_X[head:]]) if homogeneous else mean_X
        size[one] += size[other]
        alive_n[other] = False
        pairs.append((numbers[one], numbers[other]))
        numbers[one] = len(numbers) + len(pairs) - 1
        new_n = (made_nX - made_nX[one]).square().sum(1).masked_fill(~alive_n, math.inf)
        new_n[one] = math.inf
        distance_nn[one], distance_nn[:, one] = new_n, new_n
        distance_nn[other], distance_nn[:, other] = math.inf, math.inf
    return pairs


def clusters_of(count: int, pairs: list[tuple[int, int]]) -> list[list[int]]:
    """The units left, each as the original ones it is made of: those untouched first, then merged ones by age."""
    found = {number: [number] for number in range(count)}
    for place, (one, other) in enumerate(pairs):
        found[count + place] = sorted(found.pop(one) + found.pop(other))
    return list(found.values())


def _narrowed(name: str, axis: int, clusters: list[list[int]], summed: bool, read: Read) -> Tensor:
    values = read(name)
    parts = [values.index_select(axis, torch.tensor(members)) for members in clusters]
    return torch.stack([part.sum(axis) if summed else part.mean(axis) for part in parts], dim=axis)
