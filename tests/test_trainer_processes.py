"""Training on two processes for real: the same losses and parameters as on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import training_cases
from safetensors.torch import load_file
from training_cases import CASES, make_trainer, train

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
# The four samples of a process one by one, or at once.
LAYOUTS = [(case, 1, 4) for case in CASES] + [("language", 4, 1), ("classes", 4, 1)]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two_processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [training_cases.__file__, str(folder), *(":".join(map(str, layout)) for layout in LAYOUTS)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize(("case", "batch", "accumulation"), LAYOUTS)
def test_two_processes_train_as_one(case, batch, accumulation, two_processes, tmp_path):
    name = f"{case}-{batch}-{accumulation}"
    logs, trained = train(make_trainer(case, tmp_path, 8, 1))
    assert len(logs) == 4
    for one, two in zip(logs, json.loads((two_processes / f"{name}.json").read_text())):
        assert two == pytest.approx(one, rel=2e-5, abs=2e-5)
    others = load_file(two_processes / f"{name}.safetensors")
    assert others.keys() == trained.keys()
    for parameter, value in trained.items():
        assert (value - others[parameter]).abs().max() < 1e-6, parameter
