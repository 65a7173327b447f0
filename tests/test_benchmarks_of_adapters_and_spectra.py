"""The two smaller benchmarks on toy sizes: they run whole, check what they time, and notice a wrong result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_fuse import cli
from hf_fuse.merge.methods import _spectral

SCRIPTS = Path(__file__).parents[1] / "recipes" / "benchmarks"
TINY = ["--layers", "2", "--hidden", "32", "--intermediate", "48", "--heads", "4", "--kv-heads", "2", "--vocab", "64"]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)


def test_adapter_merging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    import adapter_merging
    from process_usage import Usage

    def inside(command: list[str], environment: dict) -> Usage:
        """The same programs, without the seconds that a process takes to start."""
        with monkeypatch.context() as patch:
            if command[1] == "-c":
                patch.setattr(sys, "argv", ["-c", *command[3:]])
                exec(compile(command[2], "peft", "exec"), {})
            else:
                cli.app(command[3:], standalone_mode=False)
        return Usage(wall=1.0, cpu=1.0, rss=1, anonymous=1, others=0.0)

    monkeypatch.setattr(adapter_merging, "measure", inside)
    arguments = [*TINY, "--rank", "4", "--repeats", "1", "--svd", "--work-dir", str(tmp_path)]
    assert adapter_merging.main([*arguments, "--json", str(tmp_path / "figures.json")]) == 0
    programs = json.loads((tmp_path / "figures.json").read_text())["programs"]
    assert list(programs) == ["peft cat", "peft svd", "concatenated", "truncated"]
    for name in ("concatenated", "truncated"):
        assert programs[name]["relative_error"] < 1e-6 and programs[name]["wall_to_cat"]["median"] == 1
    assert programs["peft cat"]["relative_error"] < 1e-2 and programs["peft svd"]["relative_error"] < 1e-2
    assert "hf-fuse, truncated" in capsys.readouterr().out
    # What is wrong is found out.
    file = tmp_path / "truncated" / "adapter_model.safetensors"
    state = load_file(file)
    save_file({name: 1.01 * tensor for name, tensor in state.items()}, file)
    adapters = [tmp_path / f"adapter-{number}" for number in range(3)]
    assert adapter_merging.check(tmp_path / "truncated", adapters, 4, 3) == pytest.approx(0.0201, rel=0.01)


def test_spectral(tmp_path: Path):
    import spectral

    genuine = _spectral.thin_svd
    assert (
        spectral.main(["--shapes", "24x16", "16x24", "--repeats", "1", "--json", str(tmp_path / "figures.json")]) == 0
    )
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    counts = {name: {row["decompositions"] for row in shapes.values()} for name, shapes in rows.items()}
    assert counts == {"tsv_m": {5}, "iso_c": {1}, "iso_cts": {6}, "opcm": {2}, "subspace_boosting": {1}}
    assert all(row["to_best"] >= row["to_direct"] * 0.999 > 0 for shapes in rows.values() for row in shapes.values())
    assert _spectral.thin_svd is genuine
    with spectral.recorded() as found:
        spectral.caller("iso_c", torch.ones(2, 4, 6))()
    assert len(found) == 1 and torch.equal(found[0], torch.full((4, 6), 2.0))
    with pytest.raises(SystemExit):
        spectral.main(["--shapes", "24by16"])
