"""Exact order statistics of |delta| over a whole tensor or model, without holding or sorting it.

Magnitudes are compared as the integers that their bits are (for non-negative floats the order is the same). On large
models a sample says first between which two numbers the wanted one lies, almost surely. One full pass then counts what
is larger and looks closer only at what is between: it keeps those few, or counts them in bins if they are many. A wrong
guess costs another pass, never exactness.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hf_fuse.merge.methods._passes import Measurement, Pass, Seen

# (block_KN, seen, least) -> M rows to rank, made elementwise. Numbers below ``least[m]`` may be left out of row m
# (but not if what is not zero is to be counted).
Values = Callable[[Tensor, Seen, Sequence[float]], Sequence[Tensor]]

SAMPLE_ABOVE = 1 << 19  # elements; below, a full pass is cheaper than being clever
SHARE, MOST_SAMPLED = 64, 1 << 24  # one element of 64, or of more if that would be more than this many
COARSE_BINS = 1 << 12  # of the first look at a sample
BINS = 1 << 17  # of a full pass
HELD = 1 << 22  # numbers that a pass is to keep for a rank; it stops at eight times as many
_SIGMAS = 15.0  # a sample of pieces says less than one of elements: neighbours are alike, tensors are not


@dataclass(frozen=True)
class Window:
    """Bits ``[low, high)`` that hold the wanted magnitude, and how many elements are expected in them."""

    low: int
    high: int
    inside: int
    certain: bool = False  # a full pass has found it there

    @property
    def known(self) -> bool:
        return self.certain and self.high - self.low == 1

    def bins(self, most: int) -> int:
        """1 to count those equal to the only number, 0 to keep those inside, else how many bins to sort them into."""
        if self.high - self.low == 1:
            return 1
        return 0 if self.inside <= HELD else min(most, 1 << (self.high - self.low - 1).bit_length())


class Census:
    """Of each rank's window: how many magnitudes lie above it, how many were seen in all, and those inside, in bins or
    kept. Of each row: the largest magnitude. Adds up exactly in any order."""

    def __init__(self, windows: Sequence[Window], most_bins: int, rows: int):
        self.windows, self.most_bins = windows, most_bins
        self.above, self.seen, self.within = np.zeros((3, len(windows)), np.int64)
        self.binned = [np.zeros(window.bins(most_bins), np.int64) for window in windows]
        self.kept: list[list[np.ndarray]] = [[] for _ in windows]
        self.largest = np.zeros(rows)

    def clone(self) -> Census:
        """Another one to count in, at zero as this one is when it is asked for."""
        return Census(self.windows, self.most_bins, len(self.largest))

    def is_floating_point(self) -> bool:
        return False

    def __iadd__(self, other: Census) -> Census:
        self.above += other.above
        self.seen += other.seen
        self.within += other.within
        for mine, theirs in zip(self.binned, other.binned):
            mine += theirs
        for mine, theirs in zip(self.kept, other.kept):
            mine += theirs
        self.largest = np.maximum(self.largest, other.largest)
        return self

    def add(self, i: int, bits: Tensor) -> None:
        window, bins = self.windows[i], self.binned[i]
        if not bits.is_cpu:
            self.above[i] += int((bits >= window.high).sum())
            bits = bits[(bits >= window.low) & (bits < window.high)].cpu()
        numbers = bits.numpy()
        if len(bins) == 1:
            larger = np.count_nonzero(numbers > window.low)
            self.above[i] += larger
            bins[0] += np.count_nonzero(numbers >= window.low) - larger
            return
        larger_N = numbers >= window.high
        self.above[i] += np.count_nonzero(larger_N)
        inside = np.compress((numbers >= window.low) ^ larger_N, numbers)
        if not len(bins):
            self.within[i] += len(inside)
            if not self.overflows(i):
                self.kept[i].append(inside)
            return
        inside -= inside.dtype.type(window.low)
        inside >>= self._shift(i)
        bins += torch.bincount(torch.from_numpy(inside), minlength=len(bins)).numpy()

    def find(self, i: int, rank: int) -> Window | None:
        """The interval that holds the rank-th largest, or None if it lies outside the window."""
        window, place = self.windows[i], rank - int(self.above[i])
        if place <= 0:
            return None
        if len(self.binned[i]):
            from_top = self.binned[i][::-1].cumsum()
            if place > from_top[-1]:
                return None
            slot = len(from_top) - 1 - int(np.searchsorted(from_top, place))
            low, width = window.low + (slot << self._shift(i)), 1 << self._shift(i)
            return Window(low, min(low + width, window.high), int(self.binned[i][slot]))
        kept = self._kept(i)
        if place > len(kept):
            return None
        low = int(np.partition(kept, len(kept) - place)[len(kept) - place])
        return Window(low, low + 1, 1)

    def count(self, i: int, low: int, high: int) -> int:
        """How many inside the window lie in ``[low, high)``, the ends of intervals that were found."""
        if len(self.binned[i]):
            first = self.windows[i].low
            return int(self.binned[i][(low - first) >> self._shift(i) : -(-(high - first) >> self._shift(i))].sum())
        kept = self._kept(i)
        return int(np.count_nonzero((kept >= low) & (kept < high)))

    def overflows(self, i: int) -> bool:
        """Whether there were more numbers inside than are kept: the sample was no picture of the whole."""
        return self.within[i] > 8 * HELD

    def _kept(self, i: int) -> np.ndarray:
        if self.overflows(i):
            return np.empty(0, np.int64)
        self.kept[i] = [np.concatenate(self.kept[i] or [np.empty(0, np.int64)])]
        return self.kept[i][0]

    def _shift(self, i: int) -> int:
        window = self.windows[i]
        return max(0, (window.high - window.low - 1).bit_length() - (len(self.binned[i]).bit_length() - 1))


def kth_largest_magnitude(
    ranks: Sequence[int] | Sequence[float],
    numel: int,
    dtype: torch.dtype,
    *,
    of_nonzero: bool = False,
    rows: Sequence[int] | None = None,
    values: Values | None = None,
    largest: list[float] | None = None,
) -> Measurement:
    """The ``ranks[i]``-th largest |delta| (1 = largest) of model ``rows[i]`` among ``numel`` elements, as floats.

    A rank beyond ``numel`` gives 0.

    Args:
        of_nonzero: the ranks are shares of how many are not zero, ``int(share * count)`` and at least one; infinity if
            all are zero.
        rows: which row of a block each rank is asked of; by default one rank per model.
        values: what to rank instead of the block itself, see :data:`Values`.
        largest: a list to be filled with the largest magnitude of each row.
    """
    rows = range(len(ranks)) if rows is None else rows
    windows = yield from _sampled_windows(ranks, numel, dtype, rows, of_nonzero, values)
    windows = [Window(0, 1, 0, certain=True) if rank > numel else window for rank, window in zip(ranks, windows)]
    top, ranks, asked = _top(dtype), list(ranks), list(ranks)
    while not all(window.known for window in windows):
        census = yield _census(windows, 1, BINS, dtype, rows, of_nonzero, values, largest is not None)
        for i, window in enumerate(windows):
            if window.known:
                continue
            if of_nonzero:
                ranks[i] = max(1, int(asked[i] * census.seen[i])) if census.seen[i] else 0
            rank = min(ranks[i], int(census.seen[i]))
            found = census.find(i, rank)
            windows[i] = replace(found, certain=True) if found else _elsewhere(census, i, rank, top)
        if largest is not None:
            largest[:] = census.largest.tolist()
    return [value if rank <= numel else 0.0 for value, rank in zip(_floats(windows, dtype), ranks)]


def guess_kth_largest_magnitude(ranks: Sequence[int], numel: int, dtype: torch.dtype) -> Measurement:
    """Guesses what :func:`kth_largest_magnitude` would find from samples alone, or None if they don't say.

    Differences of bf16 models take few distinct values, so the one at a rank shows already in a sample. Whether a guess
    is right, :func:`count_from` tells within any pass over the whole model.
    """
    windows = yield from _sampled_windows(ranks, numel, dtype, range(len(ranks)), False, None)
    if any(window.high - window.low > 1 and rank <= numel for window, rank in zip(windows, ranks)):
        return None
    return [value if rank <= numel else 0.0 for value, rank in zip(_floats(windows, dtype), ranks)]


def count_from(magnitude_N: Tensor, value: float) -> tuple[int, int]:
    """How many magnitudes are larger than ``value``, and how many equal it."""
    if not magnitude_N.is_cpu:
        return int((magnitude_N > value).sum()), int((magnitude_N == value).sum())
    numbers = magnitude_N.numpy()
    exact = numbers.dtype.type(value)
    return int(np.count_nonzero(numbers > exact)), int(np.count_nonzero(numbers == exact))


def places_from(magnitude_N: Tensor, value: float) -> Tensor:
    """Indices of the magnitudes that are at least ``value``."""
    if not magnitude_N.is_cpu:
        return (magnitude_N >= value).nonzero()[:, 0]
    numbers = magnitude_N.numpy()
    return torch.from_numpy(np.flatnonzero(numbers >= numbers.dtype.type(value)))


def _sampled_windows(
    ranks: Sequence[float],
    numel: int,
    dtype: torch.dtype,
    rows: Sequence[int],
    of_nonzero: bool,
    values: Values | None,
) -> Measurement:
    """One window for each rank, by two looks at a sample: bins for the magnitude's order, then the numbers there."""
    windows = [Window(0, _top(dtype), numel)] * len(ranks)
    if numel <= SAMPLE_ABOVE:
        return windows
    share = max(SHARE, 1 << (numel // MOST_SAMPLED).bit_length())
    for bins in (COARSE_BINS, BINS):
        sampled = [replace(window, inside=-(-window.inside // share)) for window in windows]
        census = yield _census(sampled, share, bins, dtype, rows, of_nonzero, values, False)
        for i, rank in enumerate(ranks):
            expected = rank if of_nonzero else rank / numel
            windows[i] = _guess(census, i, min(expected, 1.0), share) or windows[i]
    return windows


def _top(dtype: torch.dtype) -> int:
    return int(torch.tensor(float("inf"), dtype=dtype).view(_integer(dtype))) + 1


def _integer(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if dtype == torch.float64 else torch.int32


def _floats(windows: Sequence[Window], dtype: torch.dtype) -> list[float]:
    return torch.tensor([window.low for window in windows], dtype=_integer(dtype)).view(dtype).tolist()


def _census(
    windows: Sequence[Window],
    share: int,
    most_bins: int,
    dtype: torch.dtype,
    rows: Sequence[int],
    of_nonzero: bool,
    values: Values | None,
    wants_largest: bool,
) -> Pass:
    integer, floor = _integer(dtype), _floats(windows, dtype)
    least = [min(f for f, row in zip(floor, rows) if row == k) for k in range(max(rows, default=-1) + 1)]

    def add(block_KN: Tensor, total: Census, seen: Seen) -> None:
        rows_here = block_KN if values is None else values(block_KN, seen, least)
        for k in {row for window, row in zip(windows, rows) if not window.known}:
            magnitude_N = rows_here[k].abs()
            if wants_largest and magnitude_N.numel():
                total.largest[k] = max(total.largest[k], float(magnitude_N.max()))
            bits = magnitude_N.view(integer)
            count = int(bits.count_nonzero()) if of_nonzero else block_KN[0].numel()
            for i, window in enumerate(windows):
                if rows[i] == k and not window.known:
                    total.add(i, bits)
                    total.seen[i] += count

    return Pass(Census(windows, most_bins, len(least)), add, share)


def _elsewhere(census: Census, i: int, rank: int, top: int) -> Window:
    """Where to look next, when a sample has pointed beside the mark or to more numbers than can be kept."""
    window = census.windows[i]
    if rank > census.above[i] and census.overflows(i):
        return replace(window, inside=int(census.within[i]))
    # What is larger than everything is NaN (let in by the user) and counts as infinite, as does rank 0.
    if rank == 0 or rank <= census.above[i] and window.high == top:
        return Window(top - 1, top, 0, certain=True)
    reach = 4 * (window.high - window.low)
    if rank <= census.above[i]:
        return Window(window.high, min(top, window.high + reach), HELD)
    return Window(max(0, window.low - reach), window.low, HELD)


def _guess(census: Census, i: int, share: float, every: int) -> Window | None:
    """A window that holds the element with this share of all above it, judging by a sample, almost surely."""
    seen = int(census.seen[i])
    margin = _SIGMAS * (seen * share * (1 - share)) ** 0.5 + 3
    upper = census.find(i, max(1, int(seen * share - margin)))
    lower = census.find(i, min(seen, int(seen * share + margin) + 1))
    if upper is None or lower is None:
        return None
    return Window(lower.low, upper.high, census.count(i, lower.low, upper.high) * every)
