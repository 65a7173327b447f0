import pytest
import torch

from hf_fuse import merge_state_dicts


def varm(*models, base=None, weights=None, **parameters):
    models = [torch.as_tensor(m, dtype=torch.float32) for m in models]
    base = torch.zeros_like(models[0]) if base is None else torch.as_tensor(base, dtype=torch.float32)
    merged = merge_state_dicts(
        [{"w": m} for m in models], "varm", base={"w": base}, weights=weights, parameters=parameters
    )
    return merged["w"]


def test_worked_example():
    # e = 1, 5
    assert varm([1, 1], [3, 1]).tolist() == pytest.approx([2.666667, 1])
    assert varm([2, 3], [4, 3], base=[1, 2]).tolist() == pytest.approx([3.666667, 3])


def test_magnitudes():
    # e = 1, 2
    assert varm([1, 1], [3, 1], change="abs").tolist() == pytest.approx([7 / 3, 1])


@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_small_and_large_changes(scale):
    merged = varm([scale, scale], [3 * scale, scale]) / scale
    assert merged.tolist() == pytest.approx([2.666667, 1])


def test_unchanged_models():
    assert varm([0, 0], [3, 1]).tolist() == [3, 1]
    assert varm([1, 2], [1, 2], base=[1, 2]).tolist() == [1, 2]


def test_weights():
    assert varm([1, 1], [3, 1], weights=[5.0, 1.0]).tolist() == pytest.approx([2, 1])


def test_scope():
    base = {"a": torch.zeros(2), "b": torch.zeros(2)}
    models = [{"a": torch.ones(2), "b": torch.zeros(2)}, {"a": torch.zeros(2), "b": 2 * torch.ones(2)}]
    apart = merge_state_dicts(models, "varm", base=base)
    whole = merge_state_dicts(models, "varm", base=base, parameters={"scope": "model"})
    assert apart["a"].tolist() == [1, 1] and apart["b"].tolist() == [2, 2]
    assert whole["a"].tolist() == pytest.approx([0.2, 0.2]) and whole["b"].tolist() == pytest.approx([1.6, 1.6])
