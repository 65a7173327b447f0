"""The maths that the spectral methods share."""

import pytest
import torch
from checks_spectral import low_rank, merged
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_fuse.merge.methods._spectral import distinct, polar_factor, thin_svd, triplets
from hf_fuse.merge.post.subspace_boosting import subspace_boosting


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("shape", [(30, 30), (90, 20), (20, 90), (1, 7), (7, 1), (1, 1), (257, 3)])
def test_thin_svd_of_any_shape(shape, dtype, tolerance):
    matrix = random(*shape, dtype=dtype)
    found = thin_svd(matrix)
    rank = min(shape)
    assert found.left_MR.shape == (shape[0], rank) and found.right_RN.shape == (rank, shape[1])
    assert all(part.dtype == dtype for part in found)
    torch.testing.assert_close(found.product(), matrix, rtol=0, atol=tolerance * float(matrix.abs().max()) * 10)
    expected = torch.linalg.svdvals(matrix.double())
    torch.testing.assert_close(found.values_R.double(), expected, rtol=0, atol=tolerance * float(expected[0]))
    for side in (found.left_MR.T @ found.left_MR, found.right_RN @ found.right_RN.T):
        torch.testing.assert_close(side, torch.eye(rank, dtype=dtype), rtol=0, atol=tolerance * 5)


@settings(max_examples=30, deadline=None)
@given(st.integers(-126, 100), st.integers(0, 100))
def test_the_unit_of_the_numbers_is_exactly_a_factor(exponent, seed):
    matrix = random(9, 6, seed=seed)
    one, other = thin_svd(matrix), thin_svd(matrix * 2.0**exponent)
    if exponent > -80:  # below, small entries of the product leave the normal range of fp32
        assert torch.equal(one.left_MR, other.left_MR) and torch.equal(one.values_R * 2.0**exponent, other.values_R)
    assert other.values_R.isfinite().all() and (other.values_R > 0).all()


def test_rank_of_products_and_of_nothing():
    low = random(64, 4) @ random(4, 48, seed=1)
    assert len(triplets(low).values_R) == 4
    assert len(triplets(torch.zeros(5, 3)).values_R) == 0
    assert torch.equal(triplets(torch.zeros(5, 3)).product(), torch.zeros(5, 3))
    assert triplets(torch.zeros(0, 3)).product().shape == (0, 3)


def test_a_failed_divide_and_conquer_is_done_again_in_fp64(monkeypatch):
    real, seen = torch.linalg.svd, []

    def fails_in_fp32(matrix, **options):
        seen.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", fails_in_fp32)
    matrix = random(6, 6)
    found = thin_svd(matrix)
    assert seen == [torch.float32, torch.float64] and found.values_R.dtype == torch.float32
    torch.testing.assert_close(found.product(), matrix, rtol=0, atol=1e-5)


def test_polar_factor_is_the_nearest_orthonormal_matrix():
    tall = random(40, 12)
    factor = polar_factor(tall)
    torch.testing.assert_close(factor.T @ factor, torch.eye(12), rtol=0, atol=1e-5)
    symmetric = factor.T @ tall
    torch.testing.assert_close(symmetric, symmetric.T, rtol=0, atol=1e-4)
    assert torch.linalg.eigvalsh(symmetric).min() > 0
    torch.testing.assert_close(polar_factor(tall.T), factor.T)


def test_polar_factor_of_repeated_columns_has_no_arbitrary_directions():
    column = torch.nn.functional.normalize(random(20, 1), dim=0)
    noise = 1e-6 * random(20, 1, seed=1)
    factor = polar_factor(torch.cat([column, column + noise], 1))
    torch.testing.assert_close(factor, column.expand(20, 2) / 2**0.5, rtol=0, atol=1e-4)


def test_distinct_keeps_one_of_each():
    one, other = random(5, 5), random(5, 5, seed=1)
    kept = distinct([one, other, one.clone(), other * (1 + 1e-5), 2 * one])
    assert [torch.equal(k, w) for k, w in zip(kept, [one, other, 2 * one])] == [True] * 3


@pytest.mark.parametrize("exponent", [-70, 60])
@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts", "opcm", "subspace_boosting"])
def test_squares_that_leave_the_range_of_fp32_do_not_matter(method, exponent):
    """Deltas of 1e-21, or 1e18: their squares are zero, or infinite, in fp32."""

    def run(deltas):
        return subspace_boosting(sum(deltas)) if method == "subspace_boosting" else merged(method, *deltas)

    families = [
        [random(20, 30, seed=seed) for seed in range(3)],
        [low_rank(20, 30, 2, seed=seed) for seed in (0, 0, 1)],
        [low_rank(300, 6, 2, seed=seed) for seed in range(3)],
    ]
    for deltas in families:
        scaled = run([delta * 2.0**exponent for delta in deltas])
        torch.testing.assert_close(scaled * 2.0**-exponent, run(deltas), rtol=1e-6, atol=1e-6)
