import pytest
import torch

from hf_fuse import merge_state_dicts


def stock(base, *models, **parameters):
    return merge_state_dicts(
        [{"w": torch.tensor(m)} for m in models], "model_stock", base={"w": torch.tensor(base)}, parameters=parameters
    )["w"]


def test_worked_example():
    assert stock([1.0, 1.0], [2.0, 1.0], [2.0, 2.0]).tolist() == pytest.approx([1.828427, 1.414214], abs=1e-6)


def test_orthogonal_gives_the_base_and_identical_the_model():
    assert stock([1.0, 1.0], [2.0, 1.0], [1.0, 2.0]).tolist() == [1.0, 1.0]
    assert stock([1.0, 1.0], [2.0, 3.0], [2.0, 3.0]).tolist() == pytest.approx([2.0, 3.0])


def test_tiny_identical_task_vectors_count_fully():
    """An absolute epsilon in the cosine would send these back to the base."""
    assert stock([0.0, 0.0], [1e-7, 2e-7], [1e-7, 2e-7]).tolist() == pytest.approx([1e-7, 2e-7])


def test_mean_of_cosines_for_three():
    models = [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]
    c = (2**-0.5 + 0 + 0.5) / 3
    t = 3 * c / (1 + 2 * c)
    assert t == pytest.approx(0.668854, abs=1e-6)
    mean = torch.tensor(models).mean(0)
    assert torch.allclose(stock([0.0, 0.0, 0.0], *models), t * mean, atol=1e-6)


def test_opposed_task_vectors_stay_at_the_base_unless_told_otherwise():
    one, other = [1.0, 0.0], [-0.8, 0.6]  # cosine -0.8
    assert stock([0.0, 0.0], one, other).tolist() == [0.0, 0.0]
    mean = torch.tensor([one, other]).mean(0)
    assert torch.allclose(stock([0.0, 0.0], one, other, clamp=False), -8 * mean, atol=1e-5)


def test_beyond_the_pole_is_clamped_to_the_base():
    third = 3**0.5 / 2
    models = [[1.0, 0.0], [-0.5, third], [-0.5, -third]]  # mean cosine -0.5: the ratio has its pole there
    assert torch.isfinite(stock([0.0, 0.0], *models)).all()
    assert stock([0.0, 0.0], *models).abs().max() < 1e-3


def test_rows():
    base = torch.zeros(2, 2)
    one, other = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    merged = merge_state_dicts([{"w": one}, {"w": other}], "model_stock", base={"w": base}, parameters={"rows": True})[
        "w"
    ]
    assert torch.allclose(merged, torch.tensor([[1.0, 0.0], [0.0, 0.0]]), atol=1e-6)
