import pytest
import torch

from hf_fuse import merge_state_dicts
from hf_fuse.merge.methods._masks import task_mask

TAU = ([1, 0.5, 0], [0, 0.5, 0], [0, 0.4, 0])


def consensus(*deltas, weights=None, **parameters):
    deltas = [torch.as_tensor(d, dtype=torch.float32) for d in deltas]
    base = {"w": torch.zeros_like(deltas[0])}
    models = [{"w": d} for d in deltas]
    return merge_state_dicts(models, "consensus", base=base, weights=weights, parameters=parameters)["w"]


def test_worked_example():
    tau = torch.tensor(TAU, dtype=torch.float64)  # 0.4 against 0.4 * (1.4 - 0.4): decided by the last bit
    masks = [task_mask(row, tau.sum(0), 0.4).tolist() for row in tau]
    assert masks == [[1, 1, 0], [0, 1, 0], [0, 1, 0]]
    assert consensus(*TAU).tolist() == pytest.approx([0, 1.4, 0])
    assert consensus(*TAU, agreement=1).tolist() == pytest.approx([1, 1.4, 0])
    assert consensus(*TAU, agreement=0).tolist() == pytest.approx([1, 1.4, 0])
    assert consensus(*TAU, agreement=2, **{"lambda": 0.5}).tolist() == pytest.approx([0, 0.7, 0])


def test_one_model_and_more_agreement_than_models():
    assert consensus([3, -1, 0]).tolist() == [3, -1, 0]
    assert consensus(*TAU, agreement=9, mask_scale=0.39).tolist() == pytest.approx([0, 1.4, 0])


def test_mask_is_strict():
    """Equal on both sides: not needed; where all is zero, no mask."""
    assert task_mask(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0]), 1.0).tolist() == [0, 0]


def test_weights_and_mask_scale_per_model():
    taus = [1.0, 0.2], [1.0, 1.0]
    # |2 tau_1| = 2 and 0.4 against 0.4 * 1; then 1 against 0.4 * 2 and 0.4 * 0.4.
    assert consensus(*taus, weights=[2.0, 1.0]).tolist() == pytest.approx([3, 0])
    assert consensus(*taus, weights=[2.0, 1.0], mask_scale=0.3).tolist() == pytest.approx([3, 1.4])


def test_consensus_of_trimmed_and_elected():
    taus = [4.0, -3, 0.5, 1], [3.0, 4, -0.2, 0.1], [5.0, 0.1, 6, 0.3]
    # Trimmed to two elements each: [4, -3, 0, 0], [3, 4, 0, 0], [5, 0, 6, 0].
    merged = consensus(*taus, density=0.5, mask_scale=0.2, agreement=1)
    assert merged.tolist() == pytest.approx([12, 1, 6, 0])
    # The second element's sign is +: -3 does not take part.
    merged = consensus(*taus, density=0.5, election=True, mask_scale=0.2, agreement=1)
    assert merged.tolist() == pytest.approx([12, 4, 6, 0])


def test_against_plain_arithmetic():
    tau = torch.randn(4, 2000, generator=torch.Generator().manual_seed(0))
    total = tau.sum(0)
    masks = tau.abs() > 0.5 * (total - tau).abs()
    for agreement in range(5):
        expected = 0.3 * total * (masks.sum(0) >= agreement)
        merged = consensus(*tau, mask_scale=0.5, agreement=agreement, **{"lambda": 0.3})
        torch.testing.assert_close(merged, expected)
