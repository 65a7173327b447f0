"""ram, ramplus_tl and arcee_fusion: what mergekit has beside the papers' methods."""

import pytest
import torch

from hf_fuse import merge_state_dicts


def merge(method, *deltas, base=None, dtype="float32", **parameters):
    deltas = [torch.as_tensor(d, dtype=getattr(torch, dtype)) for d in deltas]
    base = torch.zeros_like(deltas[0]) if base is None else torch.as_tensor(base, dtype=deltas[0].dtype)
    models = [{"w": base + d} for d in deltas]
    return merge_state_dicts(models, method, base={"w": base}, parameters=parameters, dtype=dtype)["w"]


TAU = [4.0, 0, 1e-6, 2, -1], [2.0, 3, 0, -2, 0], [0, 0, 0, 3, 0]


def test_ram():
    # Shared: (4 + 2) / 2 and (2 - 2 + 3) / 3; alone: 3 and -1; 1e-6 counts as unchanged.
    assert merge("ram", *TAU).tolist() == [3, 3, 0, 1, -1]
    assert merge("ram", *TAU, epsilon=0).tolist() == pytest.approx([3, 3, 1e-6, 1, -1])
    assert merge("ram", *TAU, epsilon=3.5).tolist() == [4, 0, 0, 0, 0]


def test_ram_plus():
    # Shared and own: 2 and 1 (clipped to alpha), 2 and 1, 1 and 0.
    merged = merge("ramplus_tl", *TAU, r=0.5, alpha=0.6)
    assert merged.tolist() == pytest.approx([3, 3 * 1.3, 0, 1, -1 * 1.3])
    merged = merge("ramplus_tl", *TAU, r=0.5, alpha=9)
    assert merged.tolist() == pytest.approx([3, 3 * 2, 0, 1, -1 * 2])
    assert merge("ramplus_tl", *TAU, r=0).tolist() == merge("ram", *TAU).tolist()


def test_ram_plus_counts_within_each_tensor():
    base = {"a": torch.zeros(2), "b": torch.zeros(2)}
    models = [
        {"a": torch.tensor([1.0, 1]), "b": torch.tensor([1.0, 0])},
        {"a": torch.tensor([1.0, 0]), "b": torch.tensor([0.0, 1])},
    ]
    merged = merge_state_dicts(models, "ramplus_tl", base=base, parameters={"r": 1.0, "alpha": 5.0})
    assert merged["a"].tolist() == [1, 2] and merged["b"].tolist() == [1, 1]


def fused(delta, base):
    """The definition, in fp64 with sorted importances."""
    delta, base = delta.double(), base.double()
    after, before = (base + delta).log_softmax(-1), base.log_softmax(-1)
    importance = delta.abs() * (after.exp() * (after - before)).sum(-1, keepdim=True)
    ordered = importance.flatten().sort().values
    lower, median, upper = (ordered[int(q * (len(ordered) - 1))] for q in (0.25, 0.5, 0.75))
    return delta * (importance >= median + 1.5 * (upper - lower))


@pytest.mark.parametrize("spread, dtype", [(0.5, "float32"), (1e-2, "float32"), (3e-4, "float32"), (0.5, "float64")])
def test_arcee_fusion(spread, dtype):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(130, 257, generator=generator)
    delta = spread * torch.randn(130, 257, generator=generator) * torch.rand(130, 1, generator=generator)
    merged = merge("arcee_fusion", delta, base=base, dtype=dtype) - base
    expected = fused(delta, base)
    taken, wanted = merged.abs() > 0.01 * spread, expected.abs() > 0.01 * spread
    assert 0.03 < wanted.double().mean() < 0.4 and (taken != wanted).sum() <= 2


def test_arcee_fusion_of_vectors_and_nothing():
    delta, base = torch.randn(2, 500, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        merge("arcee_fusion", delta, base=base) - base, fused(delta, base).float(), atol=1e-6, rtol=0
    )
    assert torch.equal(merge("arcee_fusion", torch.zeros(500), base=base), base)


def test_arcee_fusion_of_embeddings_larger_than_a_block():
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(3, 150_000, generator=generator)
    delta = 0.1 * torch.randn(3, 150_000, generator=generator)
    merged = merge("arcee_fusion", delta, base=base) - base
    assert ((merged.abs() > 1e-3) != (fused(delta, base).abs() > 1e-3)).sum() <= 5
