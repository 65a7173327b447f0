import pytest
import torch

from hf_fuse import merge_state_dicts
from hf_fuse.merge.methods.sce import _variance

TAU = ([2, 0, -1, 1], [1, 1, 1, 1])


def sce(*deltas, **parameters):
    deltas = [torch.as_tensor(d, dtype=torch.float32) for d in deltas]
    base = {"w": torch.zeros_like(deltas[0])}
    return merge_state_dicts([{"w": d} for d in deltas], "sce", base=base, parameters=parameters)["w"]


def test_worked_examples():
    assert sce(*TAU, density=1).tolist() == pytest.approx([1.6, 1, 1, 1])
    assert sce(*TAU, density=0.5).tolist() == pytest.approx([0, 0, 1, 0])
    assert not sce(*TAU, density=0).any()


@pytest.mark.parametrize("scale", [1e-4, 1e-12])
def test_small_task_vectors_keep_their_weights(scale):
    """mergekit falls back to equal weights here."""
    merged = sce(*[[scale * x for x in tau] for tau in TAU], density=1)
    assert (merged / scale).tolist() == pytest.approx([1.6, 1, 1, 1])


def reference(tau, density):
    variance = tau.double().var(0, unbiased=False)
    count = max(1, int(density * variance.count_nonzero()))
    least = variance.topk(count).values.min() if count else torch.inf
    selected = tau.double() * (variance >= least)
    energy = selected.square().sum(1)
    weight = energy / energy.sum() if count else energy
    sign = torch.where(selected.sum(0) >= 0, 1.0, -1.0)
    agree = (selected * sign > 0) * weight[:, None]
    share = agree.sum(0)
    return (selected * agree).sum(0) / torch.where(share == 0, 1, share)


@pytest.mark.parametrize("density", [0.01, 0.1, 0.7])
@pytest.mark.parametrize("size", [100, 5000, 700_000])
def test_against_a_sort(density, size):
    generator = torch.Generator().manual_seed(size)
    tau = torch.randn(3, size, generator=generator) * torch.tensor([[1.0], [2.0], [0.5]])
    tau[:, ::5] = tau[0, ::5]  # where all agree there is nothing to select
    torch.testing.assert_close(sce(*tau, density=density), reference(tau, density).float(), atol=1e-6, rtol=1e-6)


def test_tensors_are_selected_apart():
    tau = torch.randn(2, 400, generator=torch.Generator().manual_seed(0))
    base = {"a": torch.zeros(400), "b": torch.zeros(400)}
    models = [{"a": row, "b": 1000 * row} for row in tau]
    merged = merge_state_dicts(models, "sce", base=base, parameters={"density": 0.2})
    torch.testing.assert_close(1000 * merged["a"], merged["b"], rtol=1e-5, atol=0)


def test_identical_models():
    tau = [0.1, -0.3, 7e-5]
    assert not sce(tau, tau, tau, density=0.9).any()
    assert sce(tau, tau, tau, density=1).tolist() == pytest.approx(tau)


def test_variance_of_equal_numbers_is_exactly_zero():
    numbers = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 0.1
    for count in (2, 3, 5, 7):
        assert not _variance(numbers.expand(count, -1)).any()


def test_a_model_equal_to_the_base_has_no_weight():
    assert sce([0, 0, 0], [1, -2, 3], density=1).tolist() == [1, -2, 3]
    assert not sce([0, 0], [0, 0], density=1).any()
