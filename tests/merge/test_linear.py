import pytest
import torch

from hf_fuse import merge_state_dicts
from hf_fuse.errors import RecipeError


def states(*rows):
    return [{"w": torch.tensor(row)} for row in rows]


def test_uniform_soup():
    assert merge_state_dicts(states([2.0, 1.0], [1.0, 3.0]), "linear")["w"].tolist() == [1.5, 2.0]


def test_weights_are_normalised_by_their_sum_unless_told_otherwise():
    models = states([2.0, 1.0], [1.0, 3.0])
    assert merge_state_dicts(models, "linear", weights=[3, 1])["w"].tolist() == [1.75, 1.5]
    plain = merge_state_dicts(models, "linear", weights=[3, 1], parameters={"normalize": False})
    assert plain["w"].tolist() == [7.0, 6.0]


def test_weights_that_cancel_are_refused():
    with pytest.raises(RecipeError, match="sum to 0"):
        merge_state_dicts(states([2.0], [1.0]), "linear", weights=[1, -1])


def test_soup_is_task_arithmetic_with_lambda_one_over_k():
    torch.manual_seed(0)
    base = {"w": torch.randn(50, dtype=torch.float64)}
    models = [{"w": base["w"] + torch.randn(50, dtype=torch.float64)} for _ in range(4)]
    soup = merge_state_dicts(models, "linear", dtype="float64")
    arithmetic = merge_state_dicts(models, "task_arithmetic", base=base, parameters={"lambda": 0.25}, dtype="float64")
    torch.testing.assert_close(soup["w"], arithmetic["w"], rtol=1e-12, atol=1e-12)
