"""Sweeps over toy models: what is tried, what is kept, what is refused before any work."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_models import Family, digests, llama_family, load_weights
from typer.testing import CliRunner

import hf_fuse
from hf_fuse.cli import app
from hf_fuse.errors import FuseError, OutputError, RecipeError
from hf_fuse.merge.sweep import sweep
from hf_fuse.merge.sweep_settings import read_sweep

# Scores a merge by how far its first tensor is from 0.3 of the way between base and expert: known optimum, real files.
SCORER = """
import json, sys
from pathlib import Path
import numpy
from safetensors.numpy import load_file
def load(folder):
    return {k: v for p in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(p).items()}
merged, base, expert = (load(folder)["model.norm.weight"] for folder in sys.argv[1:])
share = float(numpy.median((merged - base) / (expert - base)))
print("some chatter")
print(json.dumps({"error": abs(share - 0.3), "share": share, "name": "not a number"}))
"""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return llama_family(tmp_path_factory.mktemp("models"), models=2, shards=1)


@pytest.fixture(scope="module")
def command(family: Family, tmp_path_factory: pytest.TempPathFactory) -> str:
    script = tmp_path_factory.mktemp("a folder") / "score.py"
    script.write_text(SCORER)
    return f"{shlex.quote(sys.executable)} {shlex.quote(str(script))} {{model}} {family.base} {family.tuned[0]}"


def recipe(family: Family, **section: object) -> dict:
    """Task arithmetic with one expert, ``lambda`` swept: the best is known."""
    given = {"parameters": {"parameters.lambda": [0.0, 0.25, 1.0]}, "goal": "minimize"} | section
    return {
        "method": "task_arithmetic",
        "base_model": str(family.base),
        "models": [str(family.tuned[0])],
        "sweep": {key: value for key, value in given.items() if value is not None},
    }


def test_grid_keeps_the_best_and_records_all(family: Family, command: str, tmp_path: Path) -> None:
    output = tmp_path / "best"
    result = sweep(recipe(family, metric={"command": command}), output)
    assert [trial.parameters for trial in result.trials] == [{"parameters.lambda": x} for x in (0.0, 0.25, 1.0)]
    assert [round(trial.score, 3) for trial in result.trials] == [0.3, 0.05, 0.7]
    assert result.best.parameters == {"parameters.lambda": 0.25}
    assert [trial.number for trial in result.ranked] == [2, 1, 3]
    same = {key: value for key, value in recipe(family).items() if key != "sweep"}
    plain = hf_fuse.merge(same | {"parameters": {"lambda": 0.25}}, output=tmp_path / "other" / "best")
    assert digests(output) == digests(plain)
    record = json.loads((tmp_path / "best.sweep.json").read_text())
    assert record["best"] == 2 and record["goal"] == "minimize"
    assert record["trials"][1]["figures"]["share"] == pytest.approx(0.25, abs=1e-3)
    assert (tmp_path / "best.sweep.png").stat().st_size > 5000
    assert {path.name for path in tmp_path.iterdir()} == {"best", "best.sweep.json", "best.sweep.png", "other"}


def test_goal_maximize_and_key(family: Family, command: str, tmp_path: Path) -> None:
    asked = recipe(family, metric={"command": command, "key": "share"}, goal="maximize")
    result = sweep(asked, tmp_path / "best")
    assert result.best.parameters == {"parameters.lambda": 1.0}
    assert result.best.score == pytest.approx(1.0, abs=1e-3)


def test_several_keys_methods_and_second_metrics(family: Family, command: str, tmp_path: Path) -> None:
    asked = recipe(
        family,
        parameters={"method": ["task_arithmetic", "ties"], "models.0.weight": [0.25, 0.5]},
        metric={"command": command},
        second="delta_norm",
    )
    result = sweep(asked, tmp_path / "best", plot=tmp_path / "plots" / "trade.svg")
    assert len(result.trials) == 4
    assert result.best.parameters == {"method": "task_arithmetic", "models.0.weight": 0.25}
    assert result.best.second == pytest.approx(0.25, rel=1e-3)
    assert "delta norm" in (tmp_path / "plots" / "trade.svg").read_text() and not (tmp_path / "best.sweep.png").exists()
    other = sweep(
        recipe(family, metric={"command": command, "key": "error"}, second={"key": "share"}), tmp_path / "other"
    )
    assert [round(trial.second, 2) for trial in other.trials] == [0.0, 0.25, 1.0]


def test_random_search_is_seeded_and_stays_in_range(family: Family, command: str, tmp_path: Path) -> None:
    section = {
        "parameters": {"parameters.lambda": {"low": 0.1, "high": 1, "log": True}, "seed": {"low": 1, "high": 9,
                       "integer": True}},
        "search": "random", "trials": 4, "metric": {"command": command},
    }  # fmt: skip
    first = sweep(recipe(family, **section), tmp_path / "first")
    again = sweep(recipe(family, **section), tmp_path / "again")
    assert [t.parameters for t in first.trials] == [t.parameters for t in again.trials]
    assert all(0.1 <= t.parameters["parameters.lambda"] <= 1 for t in first.trials)
    assert {type(t.parameters["seed"]) for t in first.trials} == {int}
    other = sweep(recipe(family, **section, seed=1), tmp_path / "other", trials=2)
    assert len(other.trials) == 2 and other.trials[0].parameters != first.trials[0].parameters


def test_random_search_over_lists_never_repeats_itself(family: Family, command: str, tmp_path: Path) -> None:
    result = sweep(recipe(family, search="random", trials=50, metric={"command": command}), tmp_path / "best")
    assert sorted(trial.parameters["parameters.lambda"] for trial in result.trials) == [0.0, 0.25, 1.0]


def test_optuna_finds_the_optimum_of_a_known_function(family: Family, command: str, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="the extra tune is not installed")
    section = {
        "parameters": {"parameters.lambda": {"low": 0, "high": 1}}, "search": "optuna", "trials": 14,
        "metric": {"command": command},
    }  # fmt: skip
    result = sweep(recipe(family, **section), tmp_path / "best")
    assert len(result.trials) == 14 and result.best.score < 0.06
    again = sweep(recipe(family, **section), tmp_path / "again", trials=3)
    assert [t.parameters for t in again.trials] == [t.parameters for t in result.trials[:3]]


def test_optuna_missing_is_said_before_any_work(family: Family, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    asked = recipe(family, search="optuna", trials=2, metric={"command": "python x {model}"})
    with pytest.raises(RecipeError, match=r'pip install "hf-fuse\[tune\]"'):
        sweep(asked, tmp_path / "best")
    assert not list(tmp_path.iterdir())


def test_perplexity_is_that_of_evaluate_models(tmp_path: Path) -> None:
    family = llama_family(tmp_path / "models", models=1, shards=1)
    texts = [tmp_path / "one.txt", tmp_path / "two.txt"]
    texts[0].write_text("the cat sat on the mat soon " * 5)
    texts[1].write_text("a bird flew over the tree " * 5)
    asked = recipe(family, metric={"perplexity": [str(path) for path in texts]}, goal=None)
    result = sweep(asked, tmp_path / "best")
    report = hf_fuse.evaluate_models([tmp_path / "best"], texts=texts)
    one, two = (row.value for row in report.rows if row.metric == "perplexity")
    assert result.best.score == pytest.approx((one * two) ** 0.5)
    assert result.best.score == min(trial.score for trial in result.trials)
    assert set(result.best.figures) >= {"perplexity one.txt", "perplexity two.txt"}


def test_accuracy_of_a_dataset(tiny_family, tmp_path: Path) -> None:
    from PIL import Image
    from transformers import ViTImageProcessor

    family = tiny_family("vit")
    images = tmp_path / "images" / "test"
    for label in range(3):
        (images / f"LABEL_{label}").mkdir(parents=True)
        Image.new("RGB", (8, 8), (80 * label, 10, 200)).save(images / f"LABEL_{label}" / "one.png")
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    base = tmp_path / "base"
    base.mkdir()
    for path in family.base.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    processor.save_pretrained(base)
    asked = {
        "method": "task_arithmetic", "base_model": str(base), "models": [str(family.tuned[0])],
        "sweep": {"parameters": {"parameters.lambda": [0, 1]},
                  "metric": {"dataset": str(tmp_path / "images"), "label_column": "label"}},
    }  # fmt: skip
    result = sweep(asked, tmp_path / "best")
    assert not result.settings.lower_is_better
    assert result.best.score == max(trial.score for trial in result.trials)
    assert all(0 <= trial.score <= 1 for trial in result.trials)


def test_failed_trials_are_noted_and_skipped(family: Family, tmp_path: Path) -> None:
    script = tmp_path / "picky.py"
    script.write_text(
        "import sys, pathlib, yaml\n"
        "value = yaml.safe_load((pathlib.Path(sys.argv[1]) / 'fuse_recipe.yaml').read_text())['parameters']['lambda']\n"
        "if value == 0: sys.exit('I do not like it')\n"
        "print('nan' if value == 0.25 else 'nothing' if value == 0.5 else value)\n"
    )
    asked = recipe(
        family, parameters={"parameters.lambda": [0, 0.25, 0.5, 1]}, metric={"command": f"{sys.executable} {script} "
                        "{model}"}
    )  # fmt: skip
    result = sweep(asked, tmp_path / "best")
    assert result.best.number == 4 and (tmp_path / "best" / "model.safetensors").exists()
    notes = [trial.note for trial in result.trials]
    assert "I do not like it" in notes[0] and "not finite" in notes[1] and "'nothing'" in notes[2] and not notes[3]
    assert [trial.score for trial in result.trials] == [None, None, None, 1.0]


def test_no_trial_succeeds_no_output(family: Family, tmp_path: Path) -> None:
    asked = recipe(family, metric={"command": f"{sys.executable} -c 'import sys; sys.exit(3)' {{model}}"})
    with pytest.raises(FuseError, match="none of 3 trials succeeded.*status 3"):
        sweep(asked, tmp_path / "best")
    assert not list(tmp_path.iterdir())


def test_a_command_that_hangs_is_ended_with_its_children(family: Family, tmp_path: Path) -> None:
    script = tmp_path / "hang.py"
    script.write_text(
        "import subprocess, sys, time\n"
        "child = 'import sys, time; time.sleep(2); open(sys.argv[1], chr(119))'\n"
        f"subprocess.Popen([sys.executable, '-c', child, {str(tmp_path / 'alive')!r}])\n"
        "time.sleep(60)\n"
    )
    asked = recipe(family, parameters={"parameters.lambda": [1]}, metric={"command": f"{sys.executable} {script} "
                   "{model}", "timeout": 1})  # fmt: skip
    with pytest.raises(FuseError, match="took longer than 1 s"):
        sweep(asked, tmp_path / "best")
    time.sleep(2)
    assert not (tmp_path / "alive").exists()


def test_existing_output_is_refused_and_replaced_only_when_done(family: Family, command: str, tmp_path: Path) -> None:
    output = tmp_path / "best"
    sweep(recipe(family, metric={"command": command}), output)
    before = digests(tmp_path)
    with pytest.raises(OutputError, match="exists"):
        sweep(recipe(family, metric={"command": command}), output)
    failing = recipe(family, metric={"command": f"{sys.executable} -c 'raise SystemExit(1)' {{model}}"})
    with pytest.raises(FuseError, match="none of"):
        sweep(failing, output, overwrite=True)
    assert digests(tmp_path) == before
    maximal = recipe(family, metric={"command": command}, goal="maximize")
    assert sweep(maximal, output, overwrite=True).best.number == 3
    shares = load_weights(output)["model.norm.weight"], load_weights(family.tuned[0])["model.norm.weight"]
    assert (shares[0] - shares[1]).abs().max() < 1e-6
    assert json.loads((tmp_path / "best.sweep.json").read_text())["best"] == 3


WRONG = [
    ({"metrik": {}}, "unknown key 'metrik'. Did you mean 'metric'?"),
    ({"metric": {"comand": "x {model}"}}, "unknown key 'comand' in metric. Did you mean 'command'?"),
    ({"metric": {"command": "python score.py"}}, "no {model}"),
    ({"metric": {"command": "no-such-program {model}"}}, "no program 'no-such-program'"),
    ({"metric": {"perplexity": ["no-such.txt"]}}, "no such text file"),
    ({"metric": {"perplexity": ["a"], "dataset": "b"}}, "exactly one of"),
    ({"metric": "delta_norm"}, "says nothing about how good"),
    ({"metric": None}, "'metric' is missing"),
    ({"goal": None}, "say minimize or maximize"),
    ({"goal": "minimise"}, "goal: Input should be 'minimize' or 'maximize'"),
    ({"search": "random"}, "say how many merges"),
    ({"search": "gird"}, "search: Input should be"),
    ({"trials": 2}, "grid has 3 combinations, more than trials allows"),
    ({"parameters": {}}, "at least 1"),
    ({"parameters": {"parameters.lambda": []}}, "empty list"),
    ({"parameters": {"parameters.lambda": 1}}, "expected a list of values or"),
    ({"parameters": {"parameters.lambda": {"low": 0, "hihg": 1}}}, "Did you mean 'high'?"),
    ({"parameters": {"parameters.lambda": {"low": 1, "high": 0}}}, "not below high"),
    ({"parameters": {"parameters.lambda": {"low": 0, "high": 1}}}, "is a range; a grid needs a list"),
    ({"parameters": {"parameters.lamda": [1]}}, "Did you mean 'lambda'?"),
    ({"parameters": {"parmeters.lambda": [1]}}, "Did you mean 'parameters'?"),
    ({"parameters": {"parameters.lambda": [1, "much"]}}, "'much'"),
    ({"parameters": {"models.3.weight": [1]}}, "not the index of one of"),
    ({"parameters": {"output": ["x"]}}, "output can't be swept"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
def test_faults_are_found_before_any_work(family: Family, tmp_path: Path, change: dict, message: str) -> None:
    asked = recipe(family, **{"metric": {"command": f"{sys.executable} score.py {{model}}"}} | change)
    with pytest.raises(FuseError) as caught:
        sweep(asked, tmp_path / "best")
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_what_is_no_sweep_file(family: Family, tmp_path: Path) -> None:
    plain = {key: value for key, value in recipe(family).items() if key != "sweep"}
    with pytest.raises(RecipeError, match="has no section sweep"):
        read_sweep(plain)
    with pytest.raises(RecipeError, match="cannot be read"):
        read_sweep(tmp_path / "missing.yaml")
    with pytest.raises(RecipeError, match="does not push"):
        sweep(recipe(family, metric={"command": "python x {model}"}) | {"push": "a/b"}, tmp_path / "best")
    with pytest.raises(RecipeError, match="no folder is given"):
        sweep(recipe(family, metric={"command": "python x {model}"}))


def test_mergekit_files_can_be_swept(family: Family, command: str, tmp_path: Path) -> None:
    asked = {
        "merge_method": "task_arithmetic", "base_model": str(family.base),
        "models": [{"model": str(family.tuned[0]), "parameters": {"weight": 1.0}}],
        "sweep": {"parameters": {"models.0.parameters.weight": [0.25, 1.0]}, "metric": {"command": command},
                  "goal": "minimize"},
    }  # fmt: skip
    assert sweep(asked, tmp_path / "best").best.parameters == {"models.0.parameters.weight": 0.25}


def test_command_line(family: Family, command: str, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(recipe(family, metric={"command": command})))
    run = [sys.executable, "-m", "hf_fuse", "sweep", str(file), "--output", str(tmp_path / "best")]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.strip()[:1].isdigit()]
    assert [row[:2] for row in rows] == [["2", "0.25"], ["1", "0"], ["3", "1"]]
    assert "trial 3: lambda 1: score 0.7" in done.stderr
    refused = CliRunner().invoke(app, run[3:])
    assert isinstance(refused.exception, OutputError) and "exists" in str(refused.exception)
    as_json = CliRunner().invoke(app, [*run[3:], "--overwrite", "--json", "--models.0.weight", "2"])
    assert json.loads(as_json.stdout)["trials"][1]["figures"]["share"] == pytest.approx(0.5, abs=1e-3)
