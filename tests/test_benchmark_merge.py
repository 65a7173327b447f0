"""The benchmark on a toy family: it runs whole, its floor does what it says, its ratios are those of its runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

SCRIPTS = Path(__file__).parents[1] / "recipes" / "benchmarks"
TINY = {
    "layers": 2, "hidden": 32, "intermediate": 48, "heads": 4, "kv_heads": 2, "vocab": 64, "shards": 3, "models": 3,
}  # fmt: skip


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)


@pytest.fixture
def family(scripts: None, tmp_path: Path) -> list[Path]:
    from checkpoint_family import FamilySize, build_family

    return build_family(FamilySize(**TINY), tmp_path / "family")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    flags = [part for key, value in TINY.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    command = [sys.executable, str(SCRIPTS / "merge.py"), *flags, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_family_loads_and_its_changes_survive_bf16(family: list[Path]) -> None:
    from checkpoint_family import FamilySize
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in family]
    assert {name: tuple(t.shape) for name, t in models[0].items()} == FamilySize(**TINY).tensors()
    assert sum(t.numel() for t in models[0].values()) == FamilySize(**TINY).parameters
    assert all(t.dtype == torch.bfloat16 for t in models[0].values())
    name = "model.layers.1.mlp.up_proj.weight"
    base, first, second = (model[name].float() for model in models[:3])
    assert 0.015 < base.std() < 0.025
    assert 0.0001 < (first - base).std() < 0.0005
    assert not torch.equal(first, second)
    assert torch.nn.functional.cosine_similarity((first - base).flatten(), (second - base).flatten(), dim=0) > 0.2
    assert len(list(family[0].glob("model-*-of-00003.safetensors"))) == 3
    assert len(AutoTokenizer.from_pretrained(family[0])) == TINY["vocab"]


def test_family_is_the_same_again_and_is_kept(family: list[Path], tmp_path: Path) -> None:
    from checkpoint_family import FamilySize, build_family

    def content(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    again = build_family(FamilySize(**TINY), tmp_path / "again")
    assert [content(a) for a in again] == [content(b) for b in family]
    kept = (family[1] / "model-00001-of-00003.safetensors").stat().st_mtime_ns
    build_family(FamilySize(**TINY), tmp_path / "family")
    assert (family[1] / "model-00001-of-00003.safetensors").stat().st_mtime_ns == kept
    other = build_family(FamilySize(**TINY, seed=1), tmp_path / "family")
    assert content(other[1]) != content(again[1])


def test_floor_writes_the_bytes_asked_for(scripts: None, family: list[Path], tmp_path: Path) -> None:
    import merge
    from process_usage import measure

    output = tmp_path / "floor"
    count = 2_500_001
    used = measure([sys.executable, "-c", merge.FLOOR, str(output), str(count), *map(str, family)], dict(os.environ))
    assert (output / "model.safetensors").stat().st_size == count
    assert used.wall > 0
    assert used.cpu > 0


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
def test_anonymous_memory_counts_children_and_not_files(scripts: None, tmp_path: Path) -> None:
    from process_usage import measure

    (tmp_path / "file").write_bytes(bytes(200_000_000))
    mapped = (
        "import mmap, sys, time\n"
        "with open(sys.argv[1], 'rb') as f:\n"
        "    m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)\n"
        "    sum(m[i] for i in range(0, len(m), 4096)); time.sleep(0.2)\n"
    )
    child = "import time; held = b'x' * 200_000_000; time.sleep(0.3)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    file = measure([sys.executable, "-c", mapped, str(tmp_path / "file")], dict(os.environ))
    assert file.anonymous is not None
    assert file.anonymous < 100_000_000 < 200_000_000 <= file.rss
    held = measure([sys.executable, "-c", parent], dict(os.environ))
    assert held.anonymous is not None
    assert held.anonymous > 200_000_000


def test_a_failing_program_is_reported_with_its_last_lines(scripts: None) -> None:
    from process_usage import measure

    with pytest.raises(RuntimeError, match="no such model"):
        measure([sys.executable, "-c", "raise SystemExit('no such model')"], dict(os.environ))


def test_summary_pairs_neighbours(scripts: None) -> None:
    from merge import summarize
    from process_usage import Usage

    def used(*walls: float, anonymous: int = 1) -> list[dict]:
        return [asdict(Usage(wall, 2 * wall, 10, anonymous, 0.0)) for wall in walls]

    row = summarize({"floor": used(1, 2, 4), "hf_fuse": used(2, 6, 4, anonymous=7), "mergekit": used(20)}, 1.3)
    assert row["wall_to_floor"] == {"median": 2, "min": 1, "max": 3}
    assert row["wall_to_mergekit"] == {"median": 0.1, "min": 0.1, "max": 0.1}
    assert row["peak_anonymous"] == 7


def test_recipes_name_the_same_inputs_in_both_dialects(scripts: None) -> None:
    from merge import CASES, recipes

    family = [Path("base"), Path("tuned-1"), Path("tuned-2"), Path("tuned-3")]
    for method in CASES:
        ours, theirs, read = recipes(method, family)
        assert yaml.safe_load(yaml.safe_dump(ours)) == ours
        assert ours["method"] == theirs["merge_method"] == method
        assert [entry["path"] for entry in ours["models"]] == [entry["model"] for entry in theirs["models"]]
        named = {entry["path"] for entry in ours["models"]} | {ours.get("base_model", ours["models"][0]["path"])}
        assert {str(path) for path in read} == named


def test_whole_run_prints_ratios(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = run("--repeats", "1", "--methods", "ties", "--double", "--json", str(report))
    assert done.returncode == 0, done.stderr
    for word in ("ties", "wall / floor", "target", "anonymous MB", "cores", "OMP_NUM_THREADS 1"):
        assert word in done.stdout
    assert "in memory" in done.stdout
    found = json.loads(report.read_text())
    assert set(found["methods"]) == {"ties"}
    for method, row in found["methods"].items():
        runs = found["runs"][f"single/{method}"]
        assert row["wall_to_floor"]["median"] == runs["hf_fuse"][0]["wall"] / runs["floor"][0]["wall"]
        assert row["double"]["wall_to_floor"]["median"] > 0
    assert found["methods"]["ties"]["target"] == 2.5
    assert "nan" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mergekit", sys.executable), "cannot import mergekit"),
        (("--mergekit", "no-such-python"), "cannot import mergekit"),
        (("--hidden", "30"), "--hidden must be"),
        (("--repeats", "0"), "--repeats is 0"),
        (("--methods", "tise"), "invalid choice"),
    ],
)
def test_wrong_arguments_are_explained(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_too_little_room_is_said_first(tmp_path: Path) -> None:
    done = run("--vocab", "400000000", "--hidden", "4096", "--work-dir", str(tmp_path))
    assert done.returncode == 1
    assert "GB needed" in done.stderr
    assert not list(tmp_path.iterdir())
