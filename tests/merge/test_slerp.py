import math

import pytest
import torch

from hf_fuse import merge_state_dicts


def slerp(a, b, **parameters):
    return merge_state_dicts([{"w": torch.tensor(a)}, {"w": torch.tensor(b)}], "slerp", parameters=parameters)["w"]


@pytest.mark.parametrize("t, expected", [(0.5, [0.707107, 1.414214]), (0.25, [0.923880, 0.765367])])
def test_worked_examples(t, expected):
    assert slerp([1.0, 0.0], [0.0, 2.0], t=t).tolist() == pytest.approx(expected, abs=1e-6)


def test_ends():
    a, b = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)).tolist()
    assert slerp(a, b, t=0).tolist() == pytest.approx(a)
    assert slerp(a, b, t=1).tolist() == pytest.approx(b)


def test_antiparallel_is_linear_and_a_zero_vector_counts_as_perpendicular():
    assert slerp([1.0, 0.0], [-1.0, 0.0]).tolist() == [0.0, 0.0]
    assert slerp([0.0, 0.0], [0.0, 2.0]).tolist() == pytest.approx([0.0, math.sqrt(2)])
    assert slerp([1.0, 0.0], [-1.0, 0.05]).tolist() == pytest.approx([0.0, 1.0009], abs=2e-4)


def test_equal_norms_stay_on_the_sphere():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.nn.functional.normalize(torch.randn(2, 400_000, generator=generator), dim=1)
    merged = merge_state_dicts([{"w": a}, {"w": b}], "slerp", parameters={"t": 0.3})["w"]
    assert merged.norm().item() == pytest.approx(1, abs=1e-5)
    assert torch.acos((merged @ a).clamp(-1, 1)).item() == pytest.approx(0.3 * torch.acos(a @ b).item(), abs=1e-4)


def test_the_base_is_the_first_model(tmp_path):
    from safetensors.torch import load_file, save_file

    import hf_fuse

    for name, values in {"a": [1.0, 0.0], "b": [0.0, 2.0]}.items():
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor(values)}, tmp_path / name / "model.safetensors")
    models = [str(tmp_path / "b"), str(tmp_path / "a")]
    recipe = {"method": "slerp", "models": models, "base_model": models[1], "parameters": {"t": 0.25}}
    merged = load_file(hf_fuse.merge(recipe, tmp_path / "out") / "model.safetensors")["w"]
    assert merged.tolist() == pytest.approx([0.923880, 0.765367], abs=1e-6)
