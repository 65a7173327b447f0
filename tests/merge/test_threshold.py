"""Order statistics by counting passes, against sorting."""

import math

import pytest
import torch

from hf_fuse.merge.methods import _threshold
from hf_fuse.merge.methods._passes import Place, Seen
from hf_fuse.merge.methods._random import TensorRandom


def find(tensor, ranks, **options):
    """Runs the passes over ``[K, N]`` in blocks of 1000."""
    steps, total = _threshold.kth_largest_magnitude(ranks, tensor.shape[1], tensor.dtype, **options), None
    while True:
        try:
            wanted = steps.send(total)
        except StopIteration as done:
            return done.value
        total = wanted.total.clone()
        for start in range(0, tensor.shape[1], 1000):
            block = tensor[:, start : start + 1000 // wanted.share]
            wanted.add(block, total, Seen({}, TensorRandom(0, "w", start), Place("w", (), start)))


@pytest.mark.parametrize("sample_above", [10_000, 1 << 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_several_ranks_of_one_row(monkeypatch, sample_above, dtype):
    monkeypatch.setattr(_threshold, "SAMPLE_ABOVE", sample_above)
    tensor = torch.randn(2, 50_000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    ranks, rows = [1, 500, 50_000, 7, 40_000, 50_001], [0, 0, 0, 1, 1, 1]
    ordered = tensor.abs().sort(descending=True).values
    expected = [float(ordered[row, rank - 1]) if rank <= 50_000 else 0.0 for rank, row in zip(ranks, rows)]
    assert find(tensor, ranks, rows=rows) == expected


def test_ranks_of_what_is_computed_from_a_block():
    tensor = torch.randn(3, 5000, generator=torch.Generator().manual_seed(1))
    spread = (tensor[0] - tensor[1]).abs() + tensor[2].abs()
    found = find(tensor, [250], rows=[0], values=lambda b, seen, least: [(b[0] - b[1]).abs() + b[2].abs()])
    assert found == [float(spread.topk(250).values.min())]


def test_equal_values_and_nan():
    assert find(torch.full((1, 3000), 0.25), [1200]) == [0.25]
    tensor = torch.tensor([[3.0, math.nan, 1.0, 2.0]])
    assert find(tensor, [1]) == [math.inf] and find(tensor, [3]) == [2.0]


@pytest.mark.parametrize("sample_above", [10_000, 1 << 40])
def test_shares_of_what_is_not_zero(monkeypatch, sample_above):
    monkeypatch.setattr(_threshold, "SAMPLE_ABOVE", sample_above)
    tensor = torch.randn(2, 40_000, generator=torch.Generator().manual_seed(2))
    tensor[0, ::3] = 0
    tensor[1, 10:] = 0
    ordered = tensor.abs().sort(descending=True).values
    nonzero = int(tensor[0].count_nonzero())
    expected = [float(ordered[0, int(0.1 * nonzero) - 1]), float(ordered[1, 2]), float(ordered[1, 0])]
    assert find(tensor, [0.1, 0.3, 0.05], rows=[0, 1, 1], of_nonzero=True) == expected
    assert find(torch.zeros(1, 40_000), [0.1], of_nonzero=True) == [math.inf]
    assert find(torch.zeros(1, 50), [0.5], of_nonzero=True) == [math.inf]


def test_rows_without_what_is_too_small(monkeypatch):
    monkeypatch.setattr(_threshold, "SAMPLE_ABOVE", 10_000)
    tensor = torch.randn(2, 50_000, generator=torch.Generator().manual_seed(3))
    lengths = []

    def values(block, seen, least):
        assert len(least) == 2
        rows = [row[row.abs() >= one] for row, one in zip(block, least)]
        lengths.append(len(rows[0]) / block.shape[1])
        return rows

    exact = [float(tensor[k].abs().topk(rank).values.min()) for k, rank in enumerate((600, 5000))]
    assert find(tensor, [600, 5000], values=values) == exact
    assert min(lengths) < 0.03
    most: list[float] = []
    assert find(tensor, [600, 5000], values=values, largest=most) == exact
    assert most == tensor.abs().amax(1).tolist()


def quantized(count, step):
    return (torch.randn(count, generator=torch.Generator().manual_seed(4)) / step).round() * step


@pytest.mark.parametrize("held", [10, 1 << 20])
@pytest.mark.parametrize("make", [lambda n: torch.linspace(1, 0, n) ** 3, lambda n: quantized(n, 0.25), torch.zeros])
def test_a_sample_that_misleads_costs_passes_not_exactness(monkeypatch, held, make):
    monkeypatch.setattr(_threshold, "SAMPLE_ABOVE", 10_000)
    monkeypatch.setattr(_threshold, "HELD", held)
    tensor = make(60_000)[None]
    ordered = tensor[0].abs().sort(descending=True).values
    ranks = [1, 2, 6000, 12_000, 59_999, 60_000]
    assert find(tensor, ranks, rows=[0] * 6) == ordered[[rank - 1 for rank in ranks]].tolist()


@pytest.mark.parametrize("make", [torch.randn, lambda n, **_: quantized(n, 0.01)])
def test_one_full_pass_after_the_sample(monkeypatch, make):
    monkeypatch.setattr(_threshold, "SAMPLE_ABOVE", 10_000)
    tensor = make(200_000, generator=torch.Generator().manual_seed(5))[None]
    steps, shares = _threshold.kth_largest_magnitude([40_000], 200_000, torch.float32), []
    try:
        wanted = next(steps)
        while True:
            shares.append(wanted.share)
            total = wanted.total.clone()
            for start in range(0, 200_000, 1000):
                part = tensor[:, start : start + 1000 // wanted.share]
                wanted.add(part, total, Seen({}, TensorRandom(0, "w", start), Place("w", (), start)))
            wanted = steps.send(total)
    except StopIteration as done:
        assert done.value == [float(tensor.abs().topk(40_000).values.min())]
    assert shares == [64, 64, 1]
