import pytest
import torch
from checks_spectral import low_rank, merged, nearly_shared, polar, rotated

from hf_fuse import merge_state_dicts


def tsv(*deltas, **options):
    return merged("tsv_m", *deltas, **options)


@pytest.mark.parametrize(
    "deltas, expected",
    [
        (([[3, 0], [0, 1]], [[0, 0], [0, 2]]), [[3, 0], [0, 2]]),
        (([[3, 0], [0, 1]], [[1, 1], [1, 1]]), [[2.853553, -0.353553], [-0.353553, 2.146447]]),
        (([[3, 0], [0, 1]],), [[3, 0], [0, 1]]),
    ],
)
def test_worked_examples_of_the_authors_code(deltas, expected):
    torch.testing.assert_close(tsv(*deltas), torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-6)


def test_low_rank_task_vectors_keep_to_their_span():
    """Null-space directions of the authors' code push the sum away by 0.6 of its length."""
    one, other = low_rank(64, 64, 2, seed=0), low_rank(64, 64, 2, seed=1)
    found = tsv(one, other)
    assert (found - one - other).norm() / (one + other).norm() < 0.15
    assert torch.linalg.matrix_rank(found) == 4


def test_a_task_that_leaves_the_matrix_alone_counts_as_absent():
    one = [[3.0, 0.0], [0.0, 1.0]]
    torch.testing.assert_close(tsv(one, [[0.0, 0.0], [0.0, 0.0]]), torch.tensor(one))
    assert torch.equal(tsv([[0.0, 0.0], [0.0, 0.0]]), torch.zeros(2, 2))
    torch.testing.assert_close(tsv(one, [[1.0, 2.0], [3.0, 4.0]], weights=[1, 0]), torch.tensor(one))


def test_identical_task_vectors_count_once():
    """The authors' code returns 3 I (arbitrary in its second direction) for the first of these."""
    for matrix in ([[3.0, 0.0], [0.0, 1.0]], [[1.0, 2.0], [3.0, 4.0]]):
        torch.testing.assert_close(tsv(matrix, matrix), torch.tensor(matrix))
    torch.manual_seed(0)
    nearly = torch.randn(20, 20)
    torch.testing.assert_close(tsv(nearly, nearly * (1 + 1e-6)), nearly)


def test_common_direction_is_shared_not_doubled():
    """Not duplicates, but with one direction in common: no arbitrary direction may appear."""
    one, other = torch.diag(torch.tensor([4.0, 0, 0, 0])), torch.diag(torch.tensor([2.0, 0, 0, 0]))
    torch.testing.assert_close(tsv(one, other), torch.diag(torch.tensor([3.0, 0, 0, 0])), rtol=0, atol=1e-5)


def test_more_models_than_rows_are_averaged():
    rows = [torch.tensor([[float(k), 1.0, 2.0]]) for k in range(3)]
    torch.testing.assert_close(tsv(*rows), torch.tensor([[1.0, 1.0, 2.0]]))


def test_rank_is_shared_in_integers():
    """int(r * (1 / K)) of the authors loses a direction at K = 49."""
    matrices = [torch.zeros(49, 49) for _ in range(49)]
    for k, matrix in enumerate(matrices):
        matrix[k, k] = 1.0 + k
    torch.testing.assert_close(tsv(*matrices), torch.diag(1.0 + torch.arange(49)), rtol=0, atol=1e-4)


def test_what_is_no_matrix_is_averaged_and_weights_scale():
    base = {"w": torch.zeros(6), "conv": torch.zeros(2, 3, 2, 2), "m": torch.zeros(4, 4)}
    torch.manual_seed(0)
    models = [{name: torch.randn_like(t) for name, t in base.items()} for _ in range(2)]
    found = merge_state_dicts(models, "tsv_m", base=base, parameters={"lambda": 0.5})
    for name in ("w", "conv"):
        torch.testing.assert_close(found[name], (models[0][name] + models[1][name]) / 4)
    halved = merge_state_dicts(models, "tsv_m", base=base, weights=[0.5, 0.5])
    for name in base:
        torch.testing.assert_close(halved[name], found[name])


def test_embeddings_are_averaged_unless_the_recipe_says_otherwise():
    names = ("model.embed_tokens.weight", "lm_head.weight", "text_projection.weight", "layers.0.up_proj.weight")
    base = {name: torch.zeros(6, 6) for name in names}
    torch.manual_seed(0)
    models = [{name: torch.randn(6, 6) for name in names} for _ in range(2)]

    def averaged(**parameters):
        found = merge_state_dicts(models, "tsv_m", base=base, parameters=parameters)
        return [torch.allclose(found[name], (models[0][name] + models[1][name]) / 2) for name in names]

    assert averaged() == [True, True, True, False]
    assert averaged(spectral=True) == [False] * 4
    assert averaged(spectral=False) == [True] * 4
    assert averaged(spectral=[{"filter": "lm_head", "value": True}]) == [True, False, True, False]
    assert averaged(spectral=[{"filter": "up_proj", "value": False}]) == [True] * 4


def test_orthogonal_equivariance():
    one, other = torch.randn(2, 12, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotated(tsv, one, other)


def test_tolerance_drops_the_rounding_of_merged_adapters():
    """LoRA models that were merged and saved in bfloat16: their deltas have full rank, most of it rounding."""
    base = torch.randn(64, 64, generator=torch.Generator().manual_seed(5)).bfloat16().float()
    deltas = [low_rank(64, 64, 2, seed=k) for k in range(2)]
    models = [(base + delta).bfloat16().float() for delta in deltas]
    total = deltas[0] + deltas[1]

    def far(**parameters):
        found = merge_state_dicts([{"w": m} for m in models], "tsv_m", base={"w": base}, parameters=parameters)["w"]
        return float((found - base - total).norm() / total.norm())

    assert far(tolerance=0.02) < 0.2 < 0.4 < far()


def direct(deltas):
    """The paper's formula, term by term."""
    room = min(deltas[0].shape) // len(deltas)
    parts = [[part[..., :room] for part in (u, s, v.T)] for u, s, v in (torch.linalg.svd(d, False) for d in deltas)]
    left, values, right = (torch.cat(kind, -1) for kind in zip(*parts))
    return polar(left) @ torch.diag(values) @ polar(right.T)


@pytest.mark.parametrize("shape", [(20, 20), (40, 12), (12, 40)])
def test_full_rank_task_vectors_follow_the_formula(shape):
    random = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(tsv(*random), direct(random), rtol=0, atol=1e-10)
    # Directions that differ by 1e-4 are two: taking them for one changes most of the result.
    shared = nearly_shared(3, *shape)
    expected = direct(shared)
    for found in (tsv(*shared), tsv(*(delta.float() for delta in shared)).double()):
        assert (found - expected).norm() < 2e-2 * expected.norm()
