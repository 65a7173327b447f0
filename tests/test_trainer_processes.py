"""Training on two processes for real: the same losses and parameters as on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import training_cases
from safetensors.torch import load_file
from training_cases import BATCH_CASES, CASES, COMPARING_CASES, make_trainer, train

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
# The four samples of a process one by one, or at once.
LAYOUTS = [(case, 1, 4) for case in CASES] + [("language", 4, 1), ("classes", 4, 1)]
COMPARING_LAYOUTS = [(case, 4, 1) for case in COMPARING_CASES]
BATCH_LAYOUTS = [(case, 4, 1) for case in BATCH_CASES]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two_processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [
        training_cases.__file__,
        str(folder),
        *(":".join(map(str, layout)) for layout in LAYOUTS + BATCH_LAYOUTS + COMPARING_LAYOUTS),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def assert_same(run, folder: Path, name: str) -> None:
    logs, trained = run
    for one, two in zip(logs, json.loads((folder / f"{name}.json").read_text())):
        assert two == pytest.approx(one, rel=2e-5, abs=2e-5)
    others = load_file(folder / f"{name}.safetensors")
    assert others.keys() == trained.keys()
    for parameter, value in trained.items():
        assert (value - others[parameter]).abs().max() < 1e-6, parameter


@pytest.mark.parametrize(("case", "batch", "accumulation"), LAYOUTS)
def test_two_processes_train_as_one(case, batch, accumulation, two_processes, tmp_path):
    logs, trained = train(make_trainer(case, tmp_path, 8, 1))
    assert len(logs) == 4
    assert_same((logs, trained), two_processes, f"{case}-{batch}-{accumulation}")


@pytest.mark.parametrize(("case", "batch", "accumulation"), BATCH_LAYOUTS)
def test_losses_of_whole_micro_batches_do_not_grow_with_the_processes(
    case, batch, accumulation, two_processes, tmp_path
):
    logs, trained = train(make_trainer(case, tmp_path, batch, 2 * accumulation))
    assert logs[0]["aux_loss"] > 0.1
    # Not the evaluation: its batches are others.
    assert_same((logs[:3], trained), two_processes, f"{case}-{batch}-{accumulation}")


@pytest.mark.parametrize(("case", "batch", "accumulation"), COMPARING_LAYOUTS)
def test_losses_that_compare_samples_see_those_of_all_processes(case, batch, accumulation, two_processes, tmp_path):
    logs, trained = train(make_trainer(case, tmp_path, 2 * batch, accumulation))
    assert all(logs[0][name] > 0 for name in COMPARING_CASES[case]["objectives"])
    # Not the evaluation: its batches are others.
    assert_same((logs[:3], trained), two_processes, f"{case}-{batch}-{accumulation}")
