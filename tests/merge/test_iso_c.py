import pytest
import torch
from checks_spectral import low_rank, merged, rotated

from hf_fuse import merge_state_dicts


def iso(*deltas, **options):
    return merged("iso_c", *deltas, **options)


@pytest.mark.parametrize(
    "deltas, expected",
    [
        (([[3, 0], [0, 1]], [[1, 0], [0, 1]]), [[3, 0], [0, 3]]),
        (([[3, 0], [0, 1]], [[1, 2], [0, 1]]), [[3, 1], [-1, 3]]),
        (([[3, 0], [0, 1]],), [[2, 0], [0, 2]]),
        (([[0, 0], [0, 0]],), [[0, 0], [0, 0]]),
    ],
)
def test_worked_examples_of_the_authors_code(deltas, expected):
    torch.testing.assert_close(iso(*deltas), torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-6)


def test_null_space_stays_empty():
    """The authors' code returns I, with an arbitrary second direction."""
    torch.testing.assert_close(iso([[2, 0], [0, 0]]), torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    low = low_rank(64, 64, 4, seed=0)
    found = iso(low)
    left, values, right = torch.linalg.svd(low)
    inside = left[:, :4] @ (left[:, :4].T @ found @ right[:4].T) @ right[:4]
    assert (found - inside).norm() < 1e-4 * found.norm()
    torch.testing.assert_close(torch.linalg.svdvals(found)[:4], values[:4].mean().expand(4), rtol=1e-4, atol=0)


def test_sum_of_matrices_and_mean_of_the_rest():
    base = {"m": torch.zeros(5, 8), "v": torch.zeros(5)}
    torch.manual_seed(0)
    models = [{name: torch.randn_like(t) for name, t in base.items()} for _ in range(3)]
    found = merge_state_dicts(models, "iso_c", base=base, parameters={"lambda": 2.0})
    torch.testing.assert_close(found["v"], 2 * torch.stack([m["v"] for m in models]).mean(0))
    values = torch.linalg.svdvals(sum(m["m"] for m in models))
    torch.testing.assert_close(torch.linalg.svdvals(found["m"]), 2 * values.mean().expand(5), rtol=1e-5, atol=0)


def test_task_vectors_that_cancel():
    assert torch.equal(iso([[1.0, 2.0], [3.0, 4.0]], [[-1.0, -2.0], [-3.0, -4.0]]), torch.zeros(2, 2))


def test_orthogonal_equivariance():
    one, other = torch.randn(2, 12, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotated(iso, one, other)
