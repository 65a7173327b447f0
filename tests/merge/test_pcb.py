import pytest
import torch

from hf_fuse import merge_state_dicts
from hf_fuse.merge.methods import _threshold
from hf_fuse.merge.methods.pcb import _tanh


def pcb(*deltas, weights=None, dtype="float64", **parameters):
    deltas = [torch.as_tensor(d, dtype=getattr(torch, dtype)) for d in deltas]
    base = {"w": torch.zeros_like(deltas[0])}
    models = [{"w": d} for d in deltas]
    return merge_state_dicts(models, "pcb", base=base, weights=weights, parameters=parameters, dtype=dtype)["w"]


def reference(tau, density=0.05, clip=0.01, scale=1.2):
    """The formulas with sorted tensors, all at once."""
    count, n = tau.shape
    ordered = tau.abs().sort(dim=1).values
    low, high = ordered[:, [int(n * clip)]], ordered[:, [max(int(n * (1 - clip) - 1), 0)]]
    clamped = tau.abs().clamp(low, high)
    normal = (clamped - low) / (high - low)
    signed = tau.sign() * normal
    inter = torch.stack([torch.tanh(signed[i] * signed).sum(0) for i in range(count)])
    importance = torch.exp(count * normal**2) * inter
    least = importance.sort(dim=1).values[:, [int(n * (1 - density))]]
    most = importance.max(dim=1, keepdim=True).values
    score = (importance.clamp(min=least) - least) / (most - least)
    return scale * (tau.sign() * clamped * score).sum(0) / score.sum(0).clamp(min=1e-12)


def family(size, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(size, generator=generator, dtype=torch.float64)
    own = torch.randn(count, size, generator=generator, dtype=torch.float64)
    return (0.7 * shared + own) * torch.tensor([[1.0], [2.0], [0.5], [1.0]])[:count]


@pytest.mark.parametrize("density", [0.02, 0.2, 0.6, 0.97, 1.0])
@pytest.mark.parametrize("clip", [0.01, 0.1])
def test_against_sorted_tensors(density, clip):
    tau = family(3000)
    merged = pcb(*tau, density=density, clip=clip)
    torch.testing.assert_close(merged, reference(tau, density, clip), atol=1e-9, rtol=1e-9)


def test_worked_example():
    """By hand: N = |tau| / 4 with nothing clamped, two models."""
    tau = torch.tensor([[4.0, 0, 2, -4], [4, 0, -4, 4]], dtype=torch.float64)
    t = torch.tanh(torch.tensor([1.0, 0.25, 0.5], dtype=torch.float64))
    e = torch.exp(torch.tensor([2.0, 0.5], dtype=torch.float64))
    # Model 1: [e2 2t1, 0, e.5 (t.25 - t.5), 0]; model 2: [e2 2t1, 0, e2 (t1 - t.5), 0].
    one, two = [2 * e[0] * t[0], 0, e[1] * (t[1] - t[2]), 0], [2 * e[0] * t[0], 0, e[0] * (t[0] - t[2]), 0]
    low = one[2]  # the least importance of model 1 is negative
    score = [[1, -low / (one[0] - low), 0, -low / (one[0] - low)], [1, 0, two[2] / two[0], 0]]
    expected = [4, 0, -4, -4]
    # The clip quantiles of four elements: indices 0 and int(4 * 1 - 1) = 3.
    merged = pcb(*tau, density=1, clip=0, **{"lambda": 1.0})
    assert merged.tolist() == pytest.approx(expected)
    assert score[0][3] > 0 and score[1][2] > 0


@pytest.mark.parametrize("size", [40_000, 300_000])
def test_fp32_with_samples_and_candidates_only(monkeypatch, size):
    monkeypatch.setattr(_threshold, "SAMPLE_ABOVE", 30_000)
    tau = family(size, count=4).float()
    expected = reference(tau.double()).float()
    merged = pcb(*tau, dtype="float32")
    # Where several scores are next to nothing their ratio is anything, so compare where they count.
    close = (merged - expected).abs() <= 2e-4 * expected.abs() + 1e-5
    assert close.double().mean() > 0.999
    assert ((merged != 0) == (expected != 0)).double().mean() > 0.99999


@pytest.mark.parametrize("scale", [1e-9, 1e6])
def test_unit_of_the_weights_does_not_matter(scale):
    tau = family(2000)
    torch.testing.assert_close(pcb(*(scale * tau)) / scale, pcb(*tau), rtol=1e-6, atol=1e-9)


def test_zero_task_vector_takes_no_part():
    tau = family(2000)
    zero = torch.zeros(2000, dtype=torch.float64)
    merged = pcb(tau[0], zero, tau[1])
    assert merged.isfinite().all() and 50 < (merged != 0).sum() <= 200
    assert not pcb(zero, zero).any()


def test_one_model_and_identical_models_keep_the_largest():
    tau = family(1000)[0]
    for count in (1, 3):
        merged = pcb(*[tau] * count, density=0.05, clip=0.01, **{"lambda": 1.0})
        kept = merged != 0
        assert 10 < kept.sum() <= 50 and tau[kept].abs().min() >= tau.abs().topk(50).values.min()
        ceiling = tau.abs().sort().values[int(1000 * 0.99 - 1)]
        torch.testing.assert_close(merged[kept], tau[kept].clamp(-ceiling, ceiling))


def test_equal_magnitudes():
    assert pcb([0.5, -0.5, 0.5], [0.5, 0.5, 0.5], density=1, **{"lambda": 1.0}).tolist() == pytest.approx(
        [0.5, 0, 0.5]  # the second element has the least score there is, which is 0
    )


def test_weights_and_scope():
    tau = family(1000)
    torch.testing.assert_close(pcb(*tau, weights=[2.0] * 3), 2 * pcb(*tau))
    base = {"a": torch.zeros(1000), "b": torch.zeros(1000)}
    models = [{"a": row.float(), "b": 100 * row.float()} for row in tau]
    apart = merge_state_dicts(models, "pcb", base=base, parameters={"scope": "tensor"})
    whole = merge_state_dicts(models, "pcb", base=base)
    assert ((apart["a"] != 0) == (apart["b"] != 0)).all() and not whole["a"].any() and whole["b"].any()


def test_tanh():
    x = torch.linspace(-1, 1, 10_001)
    torch.testing.assert_close(_tanh(x.clone()), x.double().tanh().float(), rtol=3e-7, atol=1e-9)
