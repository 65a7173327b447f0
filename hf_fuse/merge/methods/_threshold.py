"""Exact order statistics of |delta| over a whole tensor or model, without holding or sorting it.

Magnitudes are compared as the integers that their bits are (for non-negative floats the order is the same). Each pass
counts them in a window that the pass before has narrowed, until a bin is a single number. On large models the first
passes look at a sample and the full pass only checks their guess; a wrong guess costs time, never exactness.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from hf_fuse.merge.methods._passes import Counted, Measurement, Pass, Seen

# (block_KN, seen, least) -> M rows to rank, made elementwise. Numbers below ``least[m]`` may be left out of row m
# (but not if what is not zero is to be counted).
Values = Callable[[Tensor, Seen, Sequence[float]], Sequence[Tensor]]

SAMPLED_BINS = 1 << 12
LEAST_BINS, MOST_BINS = 1 << 10, 1 << 17  # of a full pass
SAMPLE_ABOVE = 1 << 19  # elements; below, full passes are cheaper than being clever
SHARES = (64, 64)  # first for the magnitude's order, then for the place within it
_SIGMAS = 5.0


def kth_largest_magnitude(
    ranks: Sequence[int] | Sequence[float],
    numel: int,
    dtype: torch.dtype,
    *,
    of_nonzero: bool = False,
    rows: Sequence[int] | None = None,
    values: Values | None = None,
    ulps: int = 1,
    largest: list[float] | None = None,
) -> Measurement:
    """The ``ranks[i]``-th largest |delta| (1 = largest) of model ``rows[i]`` among ``numel`` elements, as floats.

    A rank beyond ``numel`` gives 0.

    Args:
        of_nonzero: the ranks are shares of how many are not zero, ``int(share * count)`` and at least one; infinity if
            all are zero.
        rows: which row of a block each rank is asked of; by default one rank per model.
        values: what to rank instead of the block itself, see :data:`Values`.
        ulps: how many neighbouring floats may be taken for one; the lowest of them is returned.
        largest: a list to be filled with the largest magnitude of each row.
    """
    rows = range(len(ranks)) if rows is None else rows
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    top = int(torch.tensor(float("inf"), dtype=dtype).view(integer)) + 1
    shares = SHARES if numel > SAMPLE_ABOVE else ()
    windows = [(0, top)] * len(ranks)
    bins = min(max(1 << max(numel.bit_length() - 3, 0), LEAST_BINS), MOST_BINS)
    expected = [float(r) if of_nonzero else r / max(numel, 1) for r in ranks]
    for share in shares:
        counts = yield _count(windows, share, SAMPLED_BINS, dtype, rows, values, of_nonzero, ulps, largest is not None)
        windows = [_guess(c, w, e) for c, w, e in zip(counts.counts, windows, expected)]
    ranks = list(ranks)
    while any(high - low > ulps for low, high in windows):
        # No more bins than numbers: bf16 models differ by few distinct ones, and every bin is written for every block.
        fitting = min(bins, 1 << max(1, *((high - low - 1).bit_length() for low, high in windows)))
        counts = yield _count(windows, 1, fitting, dtype, rows, values, of_nonzero, ulps, largest is not None)
        counts, most = counts.counts, counts.largest
        if largest is not None:
            largest[:] = most.tolist()
        if of_nonzero:
            ranks = [max(1, int(e * int(c[-1]))) if c[-1] else 0 for c, e in zip(counts, expected)]
        # A sample may have pointed beside the mark; then that rank starts again without one. What is larger than
        # everything is NaN (let in by the user) and counts as infinite.
        found = [_find(c, w, r) for c, w, r in zip(counts, windows, ranks)]
        beyond = [(top - 1, top) if r == 0 or w == (0, top) else (0, top) for w, r in zip(windows, ranks)]
        windows = [f or b for f, b in zip(found, beyond)]
    bits = torch.tensor([low for low, _ in windows], dtype=integer)
    return [float(value) if rank <= numel else 0.0 for value, rank in zip(bits.view(dtype), ranks)]


def guess_kth_largest_magnitude(ranks: Sequence[int], numel: int, dtype: torch.dtype) -> Measurement:
    """Guesses what :func:`kth_largest_magnitude` would find from samples alone, or None if they don't say.

    Differences of bf16 models take few distinct values, so the one at a rank shows already in a sample. Whether a guess
    is right, :func:`count_from` tells within any pass over the whole model.
    """
    if numel <= SAMPLE_ABOVE:
        return None
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    top = int(torch.tensor(float("inf"), dtype=dtype).view(integer)) + 1
    windows = [(0, 1) if rank > numel else (0, top) for rank in ranks]
    for share in (*SHARES, SHARES[-1]):
        counts = (yield _count(windows, share, SAMPLED_BINS, dtype, range(len(ranks)), None, False, 1, False)).counts
        windows = [_guess(c, w, rank / numel) for c, w, rank in zip(counts, windows, ranks)]
    if any(high - low > 1 for low, high in windows):
        return None
    return torch.tensor([low for low, _ in windows], dtype=integer).view(dtype).tolist()


def count_from(magnitude_N: Tensor, value: float) -> tuple[int, int]:
    """How many magnitudes are larger than ``value``, and how many equal it."""
    if not magnitude_N.is_cpu:
        return int((magnitude_N > value).sum()), int((magnitude_N == value).sum())
    numbers = magnitude_N.numpy()
    exact = numbers.dtype.type(value)
    return int(np.count_nonzero(numbers > exact)), int(np.count_nonzero(numbers == exact))


def _shift(window: tuple[int, int], bins: int) -> int:
    return max(0, (window[1] - window[0] - 1).bit_length() - (bins.bit_length() - 1))


def _count(
    windows: list[tuple[int, int]],
    share: int,
    bins: int,
    dtype: torch.dtype,
    rows: Sequence[int],
    values: Values | None,
    of_nonzero: bool,
    ulps: int,
    wants_largest: bool,
) -> Pass:
    """Counts per rank: bins of its window, then how many lie above it, then how many were seen (and not zero)."""
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    floor = torch.tensor([low for low, _ in windows], dtype=integer).view(dtype).tolist()
    least = [min(f for f, row in zip(floor, rows) if row == k) for k in range(max(rows, default=-1) + 1)]

    def add(block_KN: Tensor, total: Counted, seen: Seen) -> None:
        rows_here = block_KN if values is None else values(block_KN, seen, least)
        counts = total.counts
        bits_of: dict[int, Tensor] = {}
        for i, (low, high) in enumerate(windows):
            if high - low <= ulps:
                continue  # this number is already known
            k = rows[i]
            if k not in bits_of:
                magnitude_N = rows_here[k].abs()
                bits_of[k] = magnitude_N.view(integer)
                if wants_largest and magnitude_N.numel():
                    total.largest[k] = max(float(total.largest[k]), float(magnitude_N.max()))
            shift = _shift((low, high), bins)
            if bits_of[k].is_cpu:
                bits, row = bits_of[k].numpy(), counts[i].numpy()
                # numpy compares and compresses fast, torch counts fast.
                beyond = bits >= high
                inside = torch.from_numpy(np.compress((bits >= low) ^ beyond, bits))
                row[bins] += np.count_nonzero(beyond)
            else:
                bits = bits_of[k]
                inside = bits[(bits >= low) & (bits < high)]
                counts[i, bins] += int((bits >= high).sum())
            slots = inside.sub_(low).bitwise_right_shift_(shift)
            if slots.numel() * 8 > bins or not slots.is_cpu:
                counts[i, :bins] += torch.bincount(slots, minlength=bins).cpu()
            else:
                counts[i].index_add_(0, slots, torch.ones_like(slots, dtype=torch.int64))
            counts[i, bins + 1] += _nonzero(bits_of[k]) if of_nonzero else block_KN[0].numel()

    empty = torch.zeros(len(windows), bins + 2, dtype=torch.int64)
    return Pass(Counted(empty, torch.zeros(len(least), dtype=torch.float64)), add, share)


def _nonzero(bits: Tensor) -> int:
    return int(np.count_nonzero(bits.numpy()) if bits.is_cpu else bits.count_nonzero())


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


def _guess(counts: Tensor, window: tuple[int, int], share: float) -> tuple[int, int]:
    """A window that holds the element with this share of all above it, judging by a sample's counts, almost surely."""
    seen = int(counts[-1])
    if not seen or window[1] - window[0] <= 1:
        return window
    share = min(share, 1.0)
    margin = _SIGMAS * (seen * share * (1 - share)) ** 0.5 + 3
    upper = _find(counts, window, max(1, int(seen * share - margin)))
    lower = _find(counts, window, min(seen, int(seen * share + margin) + 1))
    if upper is None or lower is None:
        return window
    return lower[0], upper[1]
