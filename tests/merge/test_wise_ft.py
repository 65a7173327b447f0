import pytest
import torch

from hf_fuse import merge_state_dicts
from hf_fuse.errors import RecipeError

BASE, MODEL = {"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([2.0, 1.0])}


@pytest.mark.parametrize("alpha, expected", [(0.5, [1.5, 1.0]), (0, [1.0, 1.0]), (1, [2.0, 1.0])])
def test_interpolates(alpha, expected):
    merged = merge_state_dicts([MODEL], "wise_ft", base=BASE, parameters={"alpha": alpha})["w"]
    assert merged.tolist() == expected


def test_alpha_has_a_range():
    with pytest.raises(RecipeError, match=r"alpha is 1.5, expected float \[0, 1\]"):
        merge_state_dicts([MODEL], "wise_ft", base=BASE, parameters={"alpha": 1.5})
