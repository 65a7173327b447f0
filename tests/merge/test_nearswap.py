import pytest
import torch

from hf_fuse import merge_state_dicts
from hf_fuse.errors import RecipeError


def nearswap(model, base, **parameters):
    tensors = [{"w": torch.as_tensor(v, dtype=torch.float32)} for v in (model, base)]
    return merge_state_dicts(tensors[:1], "nearswap", base=tensors[1], parameters=parameters)["w"]


def test_against_the_interpolation():
    model, base = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    weight = (0.3 / (model - base).abs()).clamp(max=1)
    torch.testing.assert_close(nearswap(model, base, t=0.3), weight * model + (1 - weight) * base)


def test_steps():
    assert nearswap([1.0, 2, 3, -1], [1.0, 1.75, 1, 1], t=0.5).tolist() == [1, 2, 1.5, 0.5]
    assert nearswap([1.0, 2], [3.0, 1], t=0).tolist() == [3, 1]


def test_parameter_and_number_of_models():
    assert nearswap([1.0], [0.0]).tolist() == pytest.approx([1e-4])
    with pytest.raises(RecipeError, match="nearswap takes exactly 1"):
        merge_state_dicts([{"w": torch.ones(1)}] * 2, "nearswap", base={"w": torch.ones(1)}, parameters={"t": 1})
