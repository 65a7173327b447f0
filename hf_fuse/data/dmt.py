"""Dual-stage mixed fine-tuning (DMT, https://arxiv.org/abs/2310.05492): special abilities first, then general ones.

Stage 1 trains on all specialised sets together. Stage 2 goes on with the general set and a small, fixed part of each
specialised set, so that it forgets less of them. The limits are plain recipes: ``fraction=0`` is sequential training
with mixed special data; stage 2 alone with ``fraction=1`` is multi-task training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_fuse.errors import FuseError

if TYPE_CHECKING:
    from datasets import Dataset


def dmt_stages(
    specialised: Sequence[Dataset], general: Dataset, *, fraction: float = 1 / 256, seed: int = 0
) -> tuple[Dataset, Dataset]:
    """The training data of the two stages, each shuffled.

    Args:
        specialised: datasets with the columns of ``general``.
        general: the data of general ability.
        fraction: share of each specialised set in stage 2, at least one row of each unless 0. 1/256 gave the paper's
            best balance (recalled; it tried 1/256, 1/64, 1/16, 1/4 and 1).
        seed: of the choice and of both orders. Each set is drawn from on its own: adding one leaves the others' rows.

    Raises:
        FuseError: no specialised set, an empty one, other columns, or a fraction outside [0, 1].
    """
    from datasets import concatenate_datasets

    if not 0 <= fraction <= 1:
        raise FuseError(f"fraction is {fraction}; expected a share of each specialised set, 0 to 1.")
    if not specialised:
        raise FuseError("specialised: holds no dataset. Expected at least one.")
    for number, rows in enumerate(specialised):
        if not len(rows):
            raise FuseError(f"specialised: set {number} (counted from 0) is empty. Remove it.")
        if rows.features != general.features:
            raise FuseError(
                f"specialised: set {number} (counted from 0) has the columns {', '.join(rows.column_names)}, the "
                f"general set has {', '.join(general.column_names)}, or of other types. Rename or cast them alike."
            )
    counts = [max(1, round(fraction * len(rows))) if fraction else 0 for rows in specialised]
    parts = [rows.shuffle(seed=seed).select(range(count)) for rows, count in zip(specialised, counts)]
    first, second = concatenate_datasets(list(specialised)), concatenate_datasets([general, *parts])
    return first.shuffle(seed=seed), second.shuffle(seed=seed)
