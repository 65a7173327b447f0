import json

import pytest
import torch
from safetensors.torch import save_file

from hf_fuse import cli, inspect_models
from hf_fuse.diagnostics.task_vectors import print_inspection


@pytest.fixture
def family(tmp_path):
    base = {"layers.0.w": torch.tensor([3.0, 4.0, 0.0]), "layers.1.w": torch.zeros(2), "n": torch.arange(3)}
    deltas = {"a": ([1.0, 0.0, 1.0], [1.0, 1.0]), "b": ([1.0, 2.0, -1.0], [0.0, -3.0])}
    states = {"base": base} | {
        name: base | {"layers.0.w": base["layers.0.w"] + torch.tensor(x), "layers.1.w": torch.tensor(y)}
        for name, (x, y) in deltas.items()
    }
    for name, state in states.items():
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
    return tmp_path


def test_worked_example(family):
    found = inspect_models([str(family / "a"), str(family / "b")], str(family / "base"))
    first = found.tensors[0]
    assert first.name == "layers.0.w" and first.numel == 3
    assert first.norms == pytest.approx([2**0.5, 6**0.5])
    assert first.relative_norms == pytest.approx([2**0.5 / 5, 6**0.5 / 5])
    assert first.cosines[0, 1].item() == pytest.approx(0.0)  # 1 - 1
    assert first.sign_conflict[0, 1].item() == 0.5  # one of two elements that both changed
    total = found.total
    assert total.norms == pytest.approx([2.0, (6 + 9) ** 0.5])
    assert total.cosines[0, 1].item() == pytest.approx(-3 / (2 * 15**0.5))
    assert total.sign_conflict[0, 1].item() == pytest.approx(2 / 3)
    assert total.changed == pytest.approx([4 / 5, 4 / 5])
    assert [kind.name for kind in found.kinds] == ["layers.*.w"] and found.labels == ["a", "b"]


def test_command_prints_json_and_tables_and_saves_the_heat_map(family, capsys):
    arguments = ["inspect", str(family / "a"), str(family / "b"), "--base", str(family / "base")]
    cli.app([*arguments, "--json", "--plot", str(family / "cosines.png")], standalone_mode=False)
    shown = json.loads(capsys.readouterr().out)
    assert shown["all"]["norms"][0] == pytest.approx(2.0) and len(shown["tensors"]) == 2
    assert (family / "cosines.png").read_bytes()[:4] == b"\x89PNG"
    cli.app([*arguments, "--per-tensor"], standalone_mode=False)
    text = capsys.readouterr().out
    assert "layers.1.w" in text and "67%" in text


def test_one_model(family, capsys):
    from rich.console import Console

    found = inspect_models([str(family / "a")], str(family / "base"))
    print_inspection(found, Console())
    assert "40.00%" in capsys.readouterr().out  # 2 / 5, over both tensors
