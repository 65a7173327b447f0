import pytest
import torch
from checks_spectral import low_rank, merged, polar, rotated

from hf_fuse.merge.methods.iso_cts import directions_per_task

A, B = [4, 2, 1, 0], [4, 0, 1.5, 3]


def diag(values):
    return torch.diag(torch.tensor(values, dtype=torch.float32))


def cts(*deltas, **options):
    return merged("iso_cts", *deltas, **options)


def test_worked_example_of_the_authors_code():
    found = cts(diag(A), diag(B), common_space_fraction=0.5)
    torch.testing.assert_close(found, 3.625 * torch.eye(4), rtol=0, atol=1e-6)
    torch.testing.assert_close(merged("iso_c", diag(A), diag(B)), 3.875 * torch.eye(4), rtol=0, atol=1e-6)


def test_without_task_directions_it_is_iso_c():
    one, other = torch.randn(2, 10, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(cts(one, other, common_space_fraction=1.0), merged("iso_c", one, other))
    many = torch.randn(20, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(cts(*many), merged("iso_c", *many))


@pytest.mark.parametrize(
    "rank, count, fraction, expected",
    [(4, 2, 0.5, 1), (10, 3, 0.7, 1), (10, 2, 0.8, 1), (768, 8, 0.8, 19), (3, 3, 0.0, 1), (5, 3, 0.0, 1),
     (4, 20, 0.8, 0)],
)  # fmt: skip
def test_sharing_out_never_takes_more_than_there_is(rank, count, fraction, expected):
    """With 5 directions for 3 tasks the authors round up to 2 each, which is more than there are."""
    assert directions_per_task(rank, count, fraction) == expected
    assert directions_per_task(rank, count, fraction) * count <= rank


def test_low_rank_task_vectors_stay_in_their_span():
    deltas = [low_rank(40, 30, 3, seed=k) for k in range(2)]
    found = cts(*deltas)
    left, _, right = torch.linalg.svd(torch.stack(deltas).sum(0), full_matrices=False)
    assert (found - left[:, :6] @ (left[:, :6].T @ found @ right[:6].T) @ right[:6]).norm() < 1e-4 * found.norm()
    assert torch.linalg.matrix_rank(found) == 6


def test_duplicates_absent_tasks_and_nothing():
    matrix = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    assert cts(matrix, matrix).isfinite().all()
    torch.testing.assert_close(cts(matrix, torch.zeros(12, 12)), cts(matrix))
    assert torch.equal(cts(matrix, -matrix), torch.zeros(12, 12))
    assert torch.equal(cts(torch.zeros(12, 12)), torch.zeros(12, 12))


def test_orthogonal_equivariance():
    one, other = torch.randn(2, 12, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotated(cts, one, other)


def direct(deltas, fraction):
    """The authors' algorithm, term by term."""
    rank = min(deltas[0].shape)
    each = round((rank - int(rank * fraction)) / len(deltas))
    left, values, right = torch.linalg.svd(sum(deltas), full_matrices=False)
    common = rank - each * len(deltas)
    stack = [(left[:, :common], values[:common], right[:common])]
    for delta in deltas:
        u, s, v = torch.linalg.svd(delta - stack[0][0] @ stack[0][0].T @ delta, full_matrices=False)
        stack.append((u[:, :each], s[:each], v[:each]))
    left, values, right = (torch.cat(kind, dim) for kind, dim in zip(zip(*stack), (1, 0, 0)))
    return values.mean() * polar(left) @ polar(right)


@pytest.mark.parametrize("fraction", [0.4, 0.8])
@pytest.mark.parametrize("shape", [(20, 20), (40, 12), (12, 40)])
def test_full_rank_task_vectors_follow_the_algorithm(shape, fraction):
    deltas = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = cts(*deltas, common_space_fraction=fraction)
    torch.testing.assert_close(found, direct(deltas, fraction), rtol=0, atol=1e-10)
