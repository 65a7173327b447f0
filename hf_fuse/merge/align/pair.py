"""The two checkpoints of an alignment, and how alike the weights of their units are.

Tensors are read one pair at a time, as often as they are needed: nothing grows with the depth of the models.
Shapes: m, n units of the model that moves and of the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_fuse.checkpoint.reader import Checkpoint, FilePool, TensorInfo
from hf_fuse.errors import CheckpointError, FuseError
from hf_fuse.merge.align.maps import Maps, carried, read_fp32, rows
from hf_fuse.merge.align.spaces import RESIDUAL, Group, Spaces

if TYPE_CHECKING:
    from hf_fuse.merge.align.live import LivePair
    from hf_fuse.training_data import TrainingData


@dataclass
class Pair:
    """What a method works on.

    Attributes:
        moved: the model whose units are put into order.
        reference: the one whose order counts.
        spaces: of the first and of the second.
        live: both models, running, with data; None if the method needs none.
        data: of the recipe, encoded.
        seed: for methods that draw.
        verify: loads the model that moves, puts its units into a given order and compares its logits before and after.
    """

    moved: Checkpoint
    reference: Checkpoint
    spaces: tuple[Spaces, Spaces]
    seed: int
    live: LivePair | None = None
    data: TrainingData | None = None
    verify: Callable[[Maps], float] | None = None
    pool: FilePool = field(default_factory=FilePool)

    @property
    def groups(self) -> list[Group]:
        return self.spaces[1].groups

    def movable(self, residual: bool) -> list[Group]:
        """All groups, or those inside of layers."""
        return [group for group in self.groups if residual or group.name != RESIDUAL]

    def same_function(self, maps: Maps) -> float | None:
        """Largest difference of logits, relative to the largest, that the permutations make; None: not wanted.

        Raises:
            FuseError: the model does not compute the same in the new order.
        """
        return self.verify(maps) if self.verify else None

    def _both(self, name: str) -> tuple[TensorInfo, TensorInfo] | None:
        """A tensor that both models have with the same axes, where axes without units (tokens, classes) are equal."""
        one, other = self.moved.tensors.get(name), self.reference.tensors.get(name)
        if one is None or other is None or not one.is_float or not other.is_float:
            return None
        axes = self.spaces[1].axes[name]
        same = all(a == b for a, b, parts in zip(one.shape, other.shape, axes) if not parts)
        return (one, other) if same and len(one.shape) == len(other.shape) else None

    def similarities(
        self, group: Group, maps: Maps, settled: Collection[str] | None = None, cosine: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, int]]:
        """For every space of a group the inner products ``[m, n]`` of what belongs to its units in all tensors, the
        other axes of the model that moves carried over; and of how many tensors they are the sum.

        Args:
            group: the spaces.
            maps: what is known of the other spaces.
            settled: only tensors count whose other axes are in here, or have no units; None: all.
            cosine: of the rows as unit vectors in each tensor, not as they are.
        """
        found, terms = {}, {}
        for space in group.spaces:
            total_mn = torch.zeros(self.spaces[0].sizes[space], self.spaces[1].sizes[space])
            count = 0
            for mine, theirs in zip(self.spaces[0].slots(space), self.spaces[1].slots(space)):
                infos = self._both(mine.tensor)
                axes = self.spaces[0].axes[mine.tensor]
                others = {p.space for axis, parts in enumerate(axes) if axis != mine.axis for p in parts}
                if infos is None or (settled is not None and not others <= {*settled}):
                    continue
                values = carried(read_fp32(infos[0], self.pool), axes, maps, but=mine.axis)
                moved_mX = rows(values, mine.axis, mine.part)
                reference_nX = rows(read_fp32(infos[1], self.pool), theirs.axis, theirs.part)
                if cosine:
                    moved_mX, reference_nX = (torch.nn.functional.normalize(one) for one in (moved_mX, reference_nX))
                total_mn.addmm_(moved_mX, reference_nX.T)
                count += 1
            found[space], terms[space] = total_mn, max(count, 1)
        return found, terms

    def agreement(self, maps: Maps) -> Iterator[tuple[str, Tensor]]:
        """For every tensor that both have: inner product before and after ``maps``, and both squared lengths, fp64."""
        for name, axes in self.spaces[0].axes.items():
            infos = self._both(name)
            if infos is None or infos[0].shape != infos[1].shape:
                continue
            one, other = (read_fp32(info, self.pool) for info in infos)
            after = carried(one, axes, maps)
            pairs = (one, other), (after, other), (one, one), (other, other)
            yield name, torch.stack([(a * b).sum(dtype=torch.float64) for a, b in pairs])


def check_pair(moved: Checkpoint, reference: Checkpoint, spaces: tuple[Spaces, Spaces], *, same_widths: bool) -> None:
    """Whether the two models can be aligned.

    Raises:
        FuseError: they are of different families or heights.
        CheckpointError: their widths differ, and the method needs them equal.
    """
    a, b = spaces
    if a.family is not b.family:
        raise FuseError(
            f"{moved.ref} is {moved.architecture}, {reference.ref} is {reference.architecture}: units of models that "
            "are built differently can't be matched."
        )
    if lost := sorted(set(a.sizes) ^ set(b.sizes)):
        has, lacks = (moved, reference) if lost[0] in a.sizes else (reference, moved)
        raise FuseError(
            f"{has.ref} has units {lost[0]}, which {lacks.ref} lacks. Expected models of equal depth, with heads alike."
        )
    if not same_widths:
        return
    for space, size in a.sizes.items():
        if size != b.sizes[space]:
            raise CheckpointError(
                f"{moved.ref} has {size} units of {space}, {reference.ref} has {b.sizes[space]}. Models of different "
                "widths can be fused by the method optimal_transport."
            )
    if wrong := next((block for block, heads in a.heads.items() if heads != b.heads[block]), None):
        raise CheckpointError(f"{moved.ref} and {reference.ref} divide {wrong}attention into other heads.")


def same_ends(pair: Pair) -> None:
    """Whether the models have the same tensors, with equal axes where the order has a meaning, as an average needs.

    Raises:
        CheckpointError: naming the first tensor that differs.
    """
    one, other = pair.moved.tensors, pair.reference.tensors
    if lost := sorted(set(one) ^ set(other)):
        has, lacks = (pair.moved, pair.reference) if lost[0] in one else (pair.reference, pair.moved)
        raise CheckpointError(f"{has.ref} has a tensor {lost[0]}, which {lacks.ref} lacks, so they can't be fused.")
    for name, info in other.items():
        axes = pair.spaces[1].axes[name]
        if any(a != b for a, b, parts in zip(one[name].shape, info.shape, axes) if not parts):
            shapes = f"{list(one[name].shape)} in {pair.moved.ref} and {list(info.shape)} in {pair.reference.ref}"
            raise CheckpointError(
                f"{name} is {shapes}: vocabularies, positions and classes must be the same for a fusion."
            )
