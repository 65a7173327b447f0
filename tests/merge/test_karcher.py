"""karcher and multislerp, the means of directions."""

import math

import pytest
import torch

from hf_fuse import merge_state_dicts
from hf_fuse.errors import RecipeError


def mean(method, *vectors, base=None, weights=None, **parameters):
    vectors = [torch.as_tensor(v, dtype=torch.float32) for v in vectors]
    base = None if base is None else {"w": torch.as_tensor(base, dtype=torch.float32)}
    models = [{"w": v} for v in vectors]
    return merge_state_dicts(models, method, base=base, weights=weights, parameters=parameters)["w"]


def test_karcher_worked_examples():
    assert mean("karcher", [1, 0], [0, 2]).tolist() == pytest.approx([1.060660] * 2, abs=1e-6)
    three = mean("karcher", [1, 0, 0], [0, 1, 0], [0, 1, 1])
    assert three.tolist() == pytest.approx([0.588188, 0.900127, 0.372845], abs=2e-6)
    assert mean("karcher", [0, 0], [2, 0]).tolist() == pytest.approx([1, 0])
    assert mean("karcher", [3, 4], [-3, -4]).tolist() == pytest.approx([3, 4])


def test_multislerp_worked_examples():
    assert mean("multislerp", [1, 0], [0, 2]).tolist() == pytest.approx([1.060660] * 2, abs=1e-6)
    weighted = mean("multislerp", [1, 0], [0, 2], weights=[3.0, 1.0])
    assert weighted.tolist() == pytest.approx([1.185854, 0.395285], abs=1e-6)
    three = mean("multislerp", [1, 0, 0], [0, 1, 0], [0, 1, 1])
    assert three.tolist() == pytest.approx([0.541680, 0.924706, 0.383026], abs=1e-6)


@pytest.mark.parametrize("method", ["karcher", "multislerp"])
@pytest.mark.parametrize("scale", [1e-6, 1e-25, 1e20])
def test_length_does_not_matter(method, scale):
    """mergekit's Karcher mean returns zeros for vectors shorter than 1e-5."""
    merged = mean(method, [scale, 0], [0, 2 * scale])
    assert (merged / scale).tolist() == pytest.approx([1.060660] * 2, abs=1e-5)
    assert not mean(method, [0, 0], [0, 0], [0, 0]).any()


def test_two_equal_weights_agree():
    vectors = torch.randn(2, 50_000, generator=torch.Generator().manual_seed(0))
    vectors[1] += 0.5 * vectors[0]
    torch.testing.assert_close(mean("karcher", *vectors), mean("multislerp", *vectors), rtol=1e-5, atol=1e-6)


def test_karcher_mean_is_stationary():
    """At the mean, the weighted sum of the directions to all vectors along the sphere is zero."""
    vectors = torch.randn(4, 300, generator=torch.Generator().manual_seed(1)).double().abs()
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0])
    merged = mean("karcher", *vectors.float(), weights=weights.tolist(), max_iter=100, tol=1e-9).double()
    units = vectors / vectors.norm(dim=1, keepdim=True)
    u = merged / merged.norm()
    cosine = units @ u
    logs = cosine.acos()[:, None] / cosine.acos().sin()[:, None] * (units - cosine[:, None] * u)
    assert (weights[:, None] * logs).sum(0).norm() < 1e-5
    assert merged.norm().item() == pytest.approx(
        float(weights.double() @ vectors.norm(dim=1) / weights.sum()), rel=1e-6
    )


def test_karcher_iterations():
    vectors = [1, 0, 0], [0, 1, 0], [0, 1, 1]
    none = mean("karcher", *vectors, max_iter=0)
    torch.testing.assert_close(none, mean("multislerp", *vectors), rtol=1e-5, atol=1e-6)
    assert mean("karcher", *vectors, max_iter=1).tolist() != none.tolist()


def test_multislerp_around_a_base():
    base, *models = torch.randn(3, 400, generator=torch.Generator().manual_seed(2))
    merged = mean("multislerp", *models, base=base)
    torch.testing.assert_close(merged, base + mean("multislerp", *(m - base for m in models)), rtol=1e-5, atol=1e-5)


def test_balanced_directions():
    assert mean("multislerp", [1, 2], [-3, -6]).tolist() == pytest.approx([-1, -2])
    with pytest.raises(RecipeError, match="balance out"):
        mean("multislerp", [1.0, 0], [-0.5, math.sqrt(0.75)], [-0.5, -math.sqrt(0.75)])
    for method in ("karcher", "multislerp"):
        with pytest.raises(RecipeError, match="sum to 0"):
            mean(method, [1, 0], [0, 1], weights=[0.0, 0.0])


def test_nearly_equal_models_keep_their_mean():
    """Fine-tunes of one base: angles of a thousandth must not be lost in rounding."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(200_000, generator=generator)
    models = [base + 1e-3 * torch.randn(200_000, generator=generator) for _ in range(3)]
    average = torch.stack(models).double().mean(0)
    for method in ("karcher", "multislerp"):
        assert (mean(method, *models).double() - average).norm() / average.norm() < 2e-6
