import pytest
import torch

from hf_fuse import merge_state_dicts

EYE, OTHER = torch.eye(2), torch.tensor([[0.0, 0.0], [1.0, 1.0]])


@pytest.mark.parametrize(
    "axis, expected",
    [("rows", [[0.707107, 0.0], [0.541196, 1.082392]]), ("columns", [[0.707107, 0.0], [0.707107, 1.0]])],
)
def test_worked_examples(axis, expected):
    merged = merge_state_dicts([{"w": EYE}, {"w": OTHER}], "nuslerp", parameters={"axis": axis})["w"]
    assert torch.allclose(merged, torch.tensor(expected), atol=1e-6)


def test_position_comes_from_the_weights():
    models = [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 2.0])}]
    assert merge_state_dicts(models, "nuslerp", weights=[3, 1])["w"].tolist() == pytest.approx([0.92388, 0.765367])
    # Cancelling weights say nothing, so the middle is taken.
    assert merge_state_dicts(models, "nuslerp", weights=[1, -1])["w"].tolist() == pytest.approx([0.707107, 1.414214])


def test_with_a_base_the_task_vectors_are_interpolated():
    base = {"w": torch.tensor([5.0, 5.0])}
    models = [{"w": torch.tensor([6.0, 5.0])}, {"w": torch.tensor([5.0, 7.0])}]
    merged = merge_state_dicts(models, "nuslerp", base=base)["w"]
    assert merged.tolist() == pytest.approx([5.707107, 6.414214])


def test_no_switch_to_linear_interpolation_for_close_models():
    angle = 0.02  # |cos| > 0.9995, where slerp is linear
    models = [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([angle, 0.0]).cos() * 0 + torch.tensor([1.0, angle])}]
    models[1]["w"] /= models[1]["w"].norm()
    merged = merge_state_dicts(models, "nuslerp", dtype="float64", out_dtype="float64")["w"]
    assert merged.norm().item() == pytest.approx(1.0, abs=1e-7)
    linear = merge_state_dicts(models, "slerp", dtype="float64", out_dtype="float64")["w"]
    assert linear.norm().item() < 1 - 1e-5
