"""della and della_linear, which share the drop step."""

import pytest
import torch

from hf_fuse import merge_state_dicts
from hf_fuse.errors import RecipeError
from hf_fuse.merge.methods._random import STEPS
from hf_fuse.merge.methods._rank_drop import ascending_order, keep_steps


def della(*deltas, method="della_linear", seed=0, weights=None, **parameters):
    base = {"w": torch.zeros_like(deltas[0])}
    models = [{"w": d} for d in deltas]
    return merge_state_dicts(models, method, base=base, parameters=parameters, seed=seed, weights=weights)["w"]


def test_worked_example():
    ranks = ascending_order(torch.tensor([[4.0, -1, 3, 2]])).argsort()[0].numpy()
    probabilities = keep_steps(4, 0.7, 0.07)[ranks] / STEPS
    assert probabilities.tolist() == pytest.approx([0.77, 0.63, 0.723333, 0.676667], abs=1e-5)
    assert (1 / probabilities).tolist() == pytest.approx([1.298701, 1.587302, 1.382488, 1.477832], abs=3e-5)


def test_kept_elements_are_divided_by_their_own_probability():
    tau = torch.tensor([[4.0, -1, 3, 2]]).repeat(5000, 1)
    merged = della(tau)
    factors = (merged / tau).view(-1, 4)
    expected = [1.298701, 1.587302, 1.382488, 1.477832]
    for column, factor in enumerate(expected):
        kept = factors[:, column] != 0
        torch.testing.assert_close(factors[kept, column], torch.full((int(kept.sum()),), factor), atol=5e-5, rtol=0)
        assert kept.double().mean().item() == pytest.approx(1 / factor, abs=5 * (0.25 / 5000) ** 0.5)
    # Unbiased: the standard error of an element's mean is |tau| sqrt((1 - p) / p / n).
    assert ((merged.mean(0) - tau[0]).abs() < 5 * tau[0].abs() * (0.6 / 5000) ** 0.5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_order_is_that_of_a_stable_sort(dtype):
    values = torch.randint(-5, 6, (50, 300), generator=torch.Generator().manual_seed(0)).to(dtype) * 1e-30
    assert torch.equal(ascending_order(values), values.abs().argsort(dim=-1, stable=True))
    values = torch.randn(7, 2001, generator=torch.Generator().manual_seed(1), dtype=dtype)
    assert torch.equal(ascending_order(values), values.abs().argsort(dim=-1, stable=True))


def test_rows_of_one_element_and_single_rows():
    column = della(torch.ones(4000, 1))
    kept = column != 0
    assert column.shape == (4000, 1) and kept.double().mean().item() == pytest.approx(0.7, abs=0.04)
    assert column[kept].unique().item() == pytest.approx(1 / 0.7, abs=1e-4)
    assert della(torch.ones(1, 9)).shape == (1, 9)


def test_ranks_within_row_or_tensor():
    tau = torch.cat([torch.full((1, 2000), 1.0), torch.full((1, 2000), 2.0)])
    within = (della(tau, epsilon=0.29) != 0).double().mean(1)
    across = (della(tau, epsilon=0.29, ranks="tensor") != 0).double().mean(1)
    assert within.tolist() == pytest.approx([0.7, 0.7], abs=0.05)
    assert across.tolist() == pytest.approx([0.7 - 0.145, 0.7 + 0.145], abs=0.05)


def test_convolutions_are_ranked_by_output_channel():
    tau = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(della(tau), della(tau.view(6, 75)).view(6, 3, 5, 5))


def test_ends_of_the_range():
    tau = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(della(tau, density=1), tau) and not della(tau, density=0).any()
    for density, epsilon in ((0.9, 0.15), (0.1, 0.1)):
        with pytest.raises(RecipeError, match="keep probabilities.*Make epsilon smaller"):
            della(tau, density=density, epsilon=epsilon)


@pytest.mark.parametrize("ranks", ["row", "tensor"])
def test_l1_rescaling_restores_the_norm_of_each_tensor(ranks):
    tau = torch.randn(400, 1100, generator=torch.Generator().manual_seed(0))
    merged = della(tau, density=0.3, epsilon=0.2, rescale="l1_norm", ranks=ranks)
    assert merged.abs().sum().item() == pytest.approx(tau.abs().sum().item(), rel=1e-5)
    plain = della(tau, density=0.3, epsilon=0.2, rescale="none", ranks=ranks)
    assert torch.equal(plain[plain != 0], tau[plain != 0]) and torch.equal(plain != 0, merged != 0)


def test_election_and_scale():
    taus = torch.tensor([3.0, -1.0]), torch.tensor([-1.0, -2.0])
    assert della(*taus, method="della", density=1).tolist() == pytest.approx([3.3, -1.65])
    assert della(*taus, method="della", density=1, normalize=False, **{"lambda": 1.0}).tolist() == [3, -3]
    assert della(*taus, density=1).tolist() == [2, -3]
    assert della(*taus, density=1, normalize=True, weights=[1.0, 3.0]).tolist() == [0, -1.75]


def test_seed():
    tau = torch.ones(50, 50)
    assert torch.equal(della(tau, seed=3), della(tau, seed=3)) and not torch.equal(della(tau, seed=3), della(tau))
