"""Exact order statistics of |delta| over a whole tensor or model, without holding or sorting it.

Magnitudes are compared as the integers that their bits are (for non-negative floats the order is the same). Each pass
counts them in a window that the pass before has narrowed, until a bin is a single number. On large models the first
passes look at a sample and the full pass only checks their guess; a wrong guess costs time, never exactness.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hf_fuse.merge.methods._passes import Measurement, Pass

SAMPLED_BINS, FULL_BINS = 1 << 12, 1 << 17
SAMPLE_ABOVE = 1 << 23  # elements; below, full passes are cheaper than being clever
SHARES = (64, 8)  # first look at 1/64 of the elements, then at 1/8
_SIGMAS = 6.0


def kth_largest_magnitude(ranks: Sequence[int], numel: int, dtype: torch.dtype) -> Measurement:
    """For each model the ``ranks[k]``-th largest |delta| (1 = largest) among ``numel`` elements; returns K floats.

    A rank beyond ``numel`` gives 0.
    """
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    top = int(torch.tensor(float("inf"), dtype=dtype).view(integer)) + 1
    shares = SHARES if numel > SAMPLE_ABOVE else ()
    windows = [(0, top)] * len(ranks)
    for share in shares:
        counts = yield _count(windows, share, SAMPLED_BINS, integer)
        windows = [_guess(c, w, r, numel) for c, w, r in zip(counts, windows, ranks)]
    while any(high - low > 1 for low, high in windows):
        counts = yield _count(windows, 1, FULL_BINS, integer)
        # A sample may have pointed beside the mark; then that model starts again without one.
        windows = [_find(c, w, r) or (0, top) for c, w, r in zip(counts, windows, ranks)]
    bits = torch.tensor([low for low, _ in windows], dtype=integer)
    return [float(value) if rank <= numel else 0.0 for value, rank in zip(bits.view(dtype), ranks)]


def _shift(window: tuple[int, int], bins: int) -> int:
    return max(0, (window[1] - window[0] - 1).bit_length() - (bins.bit_length() - 1))


def _count(windows: list[tuple[int, int]], share: int, bins: int, integer: torch.dtype) -> Pass:
    """Counts per model: bins of the window, then how many lie above it, then how many were seen."""

    def add(block_KN: Tensor, total: Tensor, seen: object) -> None:
        bits_KN = block_KN.abs().view(integer)
        for k, window in enumerate(windows):
            if window[1] - window[0] <= 1:
                continue  # this model's number is already known
            low, high = window
            shift = _shift(window, bins)
            if bits_KN.is_cpu:
                bits = bits_KN[k].numpy()
                inside = bits[(bits >= low) & (bits < high)]
                above = np.count_nonzero(bits >= high)
                slots = (inside - inside.dtype.type(low)) >> shift
                row = total[k].numpy()
                if slots.size * 8 > bins:
                    row[:bins] += np.bincount(slots, minlength=bins)
                else:
                    np.add.at(row, slots, 1)
                row[bins] += above
            else:
                bits = bits_KN[k]
                inside = bits[(bits >= low) & (bits < high)]
                total[k, :bins] += torch.bincount((inside - low) >> shift, minlength=bins).to(total.device)
                total[k, bins] += int((bits >= high).sum())
            total[k, bins + 1] += block_KN.shape[1]

    return Pass(torch.zeros(len(windows), bins + 2, dtype=torch.int64), add, share)


def _find(counts: Tensor, window: tuple[int, int], rank: int) -> tuple[int, int] | None:
    """The bin that holds the rank-th largest, or None if it lies outside the window."""
    low, high = window
    if high - low <= 1:
        return window
    bins = counts.numel() - 2
    above, seen = int(counts[bins]), int(counts[bins + 1])
    rank = min(rank, seen)
    if rank <= above:
        return None
    from_top = above + counts[:bins].flip(0).cumsum(0)
    if int(from_top[-1]) < rank:
        return None
    slot = bins - 1 - int(torch.searchsorted(from_top, rank))
    shift = _shift(window, bins)
    return low + (slot << shift), min(high, low + ((slot + 1) << shift))


def _guess(counts: Tensor, window: tuple[int, int], rank: int, numel: int) -> tuple[int, int]:
    """A window that holds the rank-th largest of all elements, judging by a sample's counts, almost surely."""
    seen = int(counts[-1])
    if not seen or window[1] - window[0] <= 1:
        return window
    share = min(rank / numel, 1.0)
    margin = _SIGMAS * (seen * share * (1 - share)) ** 0.5 + 3
    upper = _find(counts, window, max(1, int(seen * share - margin)))
    lower = _find(counts, window, min(seen, int(seen * share + margin) + 1))
    if upper is None or lower is None:
        return window
    return lower[0], upper[1]
