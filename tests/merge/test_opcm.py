import pytest
import torch
from checks_spectral import low_rank, merged, rotated

from hf_fuse import merge_state_dicts
from hf_fuse.errors import RecipeError
from hf_fuse.merge.methods.opcm import protected

A, B = [[3.0, 0.0], [0.0, 1.0]], [[1.0, 2.0], [0.0, 1.0]]


def opcm(*deltas, **options):
    return merged("opcm", *deltas, **options)


@pytest.mark.parametrize(
    "zero_diagonal, expected",
    [(True, [[2.249712, 1.499808], [0, 0.749904]]), (False, [[2.290994, 1.145497], [0, 1.145497]])],
)
def test_worked_examples_of_the_authors_code(zero_diagonal, expected):
    found = opcm(A, B, zero_diagonal=zero_diagonal)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6)


def test_the_same_model_twice_changes_nothing():
    torch.testing.assert_close(opcm(A, A), torch.tensor(A))
    matrix = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(opcm(matrix, matrix, matrix), matrix)


def test_zero_task_vectors_count_as_absent():
    """The authors' code halves diag(3, 1) for the second, and divides 0 by 0 for two of them."""
    zero = [[0.0, 0.0], [0.0, 0.0]]
    torch.testing.assert_close(opcm(A, zero), torch.tensor(A))
    torch.testing.assert_close(opcm(zero, A), torch.tensor(A))
    assert torch.equal(opcm(zero, zero), torch.zeros(2, 2))


def direct(deltas, alpha, zero_diagonal=True):
    """The authors' loop with full bases and a rescaling after every model."""
    norms, scale, now = [deltas[0].norm()], 1.0, deltas[0]
    for delta in deltas[1:]:
        left, values, right = torch.linalg.svd(now, full_matrices=True)
        share = (values.cumsum(0) / values.sum()).clamp(max=1.0)  # rounding would make alpha 1 a lottery
        k = int((share > alpha).int().argmax())
        turned = left.T @ delta @ right.T
        if zero_diagonal:
            turned.diagonal().zero_()
        turned[:k, :k] = 0
        total = scale * now + left @ turned @ right
        norms.append(delta.norm())
        scale = total.norm() / torch.stack(norms).mean()
        now = total / scale
    return now


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(7, 7), (11, 5), (5, 11)])
def test_thin_form_and_one_rescaling_are_the_authors_loop(shape, alpha):
    deltas = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for zero_diagonal in (True, False):
        found = opcm(*deltas, alpha=alpha, zero_diagonal=zero_diagonal)
        torch.testing.assert_close(found, direct(list(deltas), alpha, zero_diagonal), rtol=0, atol=1e-12)


@pytest.mark.parametrize("alpha, expected", [(0, 0), (0.3, 0), (0.5, 1), (0.74, 1), (0.75, 2), (0.9, 3), (1, 0)])
def test_number_of_protected_directions(alpha, expected):
    assert protected(torch.tensor([4.0, 2.0, 1.0, 1.0]), alpha) == expected
    assert protected(torch.zeros(0), alpha) == 0


def test_one_length_for_the_whole_model_and_sums_for_what_is_no_matrix():
    base = {"m": torch.zeros(4, 4), "v": torch.zeros(5), "model.embed_tokens.weight": torch.zeros(6, 4)}
    torch.manual_seed(0)
    models = [{name: torch.randn_like(t) for name, t in base.items()} for _ in range(3)]
    found = merge_state_dicts(models, "opcm", base=base)

    def length(state):
        return torch.cat([t.flatten() for t in state.values()]).norm()

    torch.testing.assert_close(length(found), torch.stack([length(m) for m in models]).mean())
    for name in ("v", "model.embed_tokens.weight"):
        total = sum(m[name] for m in models)
        ratio = found[name] / total
        torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-5, atol=0)
    assert not torch.allclose(found["m"] / sum(m["m"] for m in models), ratio.flatten()[0])


def test_low_rank_models_are_projected_within_their_span():
    one, other = low_rank(30, 20, 2, seed=0), low_rank(30, 20, 2, seed=1)
    found = opcm(one, other)
    left, _, right = torch.linalg.svd(torch.cat([one, other], 1), full_matrices=False)
    assert (found - left[:, :4] @ (left[:, :4].T @ found)).norm() < 1e-4 * found.norm()
    turned = torch.linalg.svd(one)
    expected = turned[0][:, :2].T @ other @ turned[2][:2].T
    expected.diagonal().zero_()
    got = turned[0][:, :2].T @ (found / (found.norm() / (one.norm() + other.norm()) * 2)) @ turned[2][:2].T
    assert got.isfinite().all() and torch.linalg.matrix_rank(found) <= 4


def test_options_of_the_whole_model_must_be_one_number():
    base = {"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}
    with pytest.raises(RecipeError, match="earlier_length differs between tensors.*Give one value"):
        merge_state_dicts([base, base], "opcm", base=base, parameters={"earlier_length": [{"filter": "a", "value": 2}]})


def test_any_pieces_and_threads_give_the_same_bits():
    base = {"m": torch.zeros(40, 30), "v": torch.zeros(700_000), "lm_head.weight": torch.zeros(50, 30)}
    generator = torch.Generator().manual_seed(0)
    models = [{name: torch.randn(t.shape, generator=generator) for name, t in base.items()} for _ in range(2)]
    first = merge_state_dicts(models, "opcm", base=base)
    for workers, chunk in ((1, 1024), (3, 1 << 20), (2, 5 * 1024)):
        again = merge_state_dicts(models, "opcm", base=base, workers=workers, chunk_elements=chunk)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_orthogonal_equivariance():
    one, other = torch.randn(2, 12, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotated(opcm, one, other)
