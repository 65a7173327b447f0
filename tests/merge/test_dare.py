"""dare_linear and dare_ties, which share the drop step."""

import pytest
import torch

from hf_fuse import merge_state_dicts
from hf_fuse.merge.methods._random import TensorRandom


def dare(deltas, method="dare_linear", seed=0, weights=None, **parameters):
    base = {"w": torch.zeros_like(deltas[0])}
    return merge_state_dicts(
        [{"w": d} for d in deltas], method, base=base, parameters=parameters, seed=seed, weights=weights
    )["w"]


def test_survivors_are_divided_by_the_density():
    tau = torch.tensor([1.0, -2.0, 3.0, -4.0]).repeat(2000)
    merged = dare([tau], density=0.5)
    kept = merged != 0
    assert torch.equal(merged[kept], 2 * tau[kept])
    assert kept.float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_unbiased():
    tau = torch.tensor([4.0, -1.0, 3.0, -2.0])
    mean = torch.stack([dare([tau], density=0.5, seed=seed) for seed in range(600)]).mean(0)
    # Standard error of an element: |tau| / sqrt(600).
    assert ((mean - tau).abs() < 4.5 * tau.abs() / 600**0.5).all()


@pytest.mark.parametrize("density", [0.01, 0.1, 0.37, 0.9])
def test_density_is_met(density):
    merged = dare([torch.ones(400_000)], density=density)
    share = (merged != 0).double().mean().item()
    assert share == pytest.approx(density, abs=5 * (density * (1 - density) / 400_000) ** 0.5)
    assert merged.mean().item() == pytest.approx(1, abs=5 * ((1 - density) / density / 400_000) ** 0.5)


def test_ends_of_the_range():
    tau = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dare([tau], density=1), tau)
    assert not dare([tau], density=0).any()


def test_masks_of_models_tensors_and_seeds_are_independent():
    def mask(seed, name, model):
        return torch.from_numpy((TensorRandom(seed, name).bits(model, 100_000) < 32768).astype("float32"))

    masks = [mask(0, "a", 0), mask(0, "a", 1), mask(0, "b", 0), mask(1, "a", 0), mask(0, "a", 0).roll(1)]
    correlation = torch.corrcoef(torch.stack(masks)) - torch.eye(len(masks))
    assert correlation.abs().max() < 0.02


def test_bits_are_uniform_and_seekable():
    bits = TensorRandom(0, "w").bits(0, 1 << 18)
    counts = torch.bincount(torch.from_numpy((bits >> 8).astype("int64")), minlength=256).double()
    chi2 = ((counts - 1024) ** 2 / 1024).sum().item()
    assert 170 < chi2 < 360  # 255 degrees of freedom
    later = TensorRandom(0, "w", start=1000).bits(0, 50)
    assert (later == bits[1000:1050]).all()


def test_l1_rescaling_restores_the_norm_of_each_tensor():
    tau = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    merged = dare([tau], density=0.3, rescale="l1_norm")
    assert merged.abs().sum().item() == pytest.approx(tau.abs().sum().item(), rel=1e-5)
    plain = dare([tau], density=0.3, rescale="none")
    assert torch.equal(plain[plain != 0], tau[plain != 0])


def test_dare_ties_adds_what_agrees():
    merged = dare([torch.tensor([3.0, -1.0]), torch.tensor([-1.0, -2.0])], "dare_ties", density=1)
    assert merged.tolist() == [3.0, -3.0]
    mean = dare([torch.tensor([3.0, -1.0]), torch.tensor([-1.0, -2.0])], "dare_ties", density=1, normalize=True)
    assert mean.tolist() == [3.0, -1.5]


def test_lambda_and_weights():
    assert dare([torch.ones(3)], density=1, weights=[0.5], **{"lambda": 4.0}).tolist() == [2.0] * 3


def test_bits_from_an_odd_element_on():
    bits = TensorRandom(0, "w").bits(1, 999)
    assert (TensorRandom(0, "w", start=333).bits(1, 100) == bits[333:433]).all()
    assert (TensorRandom(0, "w", start=7).bits(1, 1) == bits[7:8]).all()
