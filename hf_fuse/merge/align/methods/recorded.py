"""Applies the order of units that an earlier alignment has found, or takes it back."""

from __future__ import annotations

from hf_fuse.errors import FuseError
from hf_fuse.merge.align.alignment import Alignment, Matched, read_maps
from hf_fuse.merge.align.maps import inverse, moved_units
from hf_fuse.merge.align.pair import Pair

NEEDS_REFERENCE = False


def needs_data(options: dict) -> bool:
    return False


def recorded(pair: Pair, *, alignment: str, inverted: bool = False) -> Alignment:
    """Puts the units of another model, such as a fine-tune of the one that was aligned, into the same order.

    Args:
        alignment: the folder of the aligned model, or the file in it.
        inverted: take the order back.

    Raises:
        FuseError: no alignment there, one of another model, or one that is no permutation.
    """
    maps = read_maps(alignment)
    for space, units in maps.items():
        size = pair.spaces[0].sizes.get(space)
        if units.dim() != 1:
            raise FuseError(f"{alignment}: units of {space} were mixed, not only moved, so this can't be repeated.")
        if size != len(units) or sorted(units.tolist()) != list(range(len(units))):
            raise FuseError(
                f"{alignment}: has {len(units)} units of {space}, {pair.moved.ref} has {size}. Expected an alignment "
                "of a model of the same architecture and size."
            )
    if inverted:
        maps = {space: inverse(units) for space, units in maps.items()}
    rows = [
        Matched(
            group.name,
            pair.spaces[0].sizes[group.spaces[0]],
            moved_units(maps, group.spaces),
            None,
            None,
        )
        for group in pair.groups
    ]
    return Alignment(maps, "", rows)
