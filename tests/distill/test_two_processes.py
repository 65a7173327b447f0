"""Two processes train as one: teachers live, cached and with other tokenizers, and objectives that keep a state."""

import json
import os
import subprocess
import sys

import distill_processes
import pytest
from cached_cases import CASES as CACHED
from cached_cases import write_cache
from distill_cases import another
from distill_processes import make_trainer
from safetensors.torch import load_file
from training_cases import language_data, llama, train

# What one process takes as a batch of 8: the four samples of each of two at once, in pairs, or one by one.
LAYOUTS = [
    *[("distill", *layout) for layout in [("language", 4, 1), ("language", 1, 4), ("chunks", 1, 4), ("base", 2, 2)]],
    ("distill", "classes", 4, 1),
    *[("cached", case, 1, 4) for case in CACHED],
    ("cached", "dual_classes", 4, 1),
    *[("attached", *layout) for layout in [("saf", 4, 1), ("mutual", 2, 2), ("lsskd", 4, 1), ("tgeo", 4, 1)]],
    ("fusion", "all", 2, 2),
]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_two_processes_train_as_one(tmp_path):
    cache = write_cache(tmp_path / "cache", language_data(), another(llama)())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [distill_processes.__file__, str(tmp_path), str(cache)]
    command += [":".join(map(str, layout)) for layout in LAYOUTS]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    alone = {}
    for cases, case, batch, accumulation in LAYOUTS:
        if (cases, case) not in alone:
            alone[cases, case] = train(make_trainer(cases, case, tmp_path / "alone", 8, 1, cache))
        logs, trained = alone[cases, case]
        name = f"{cases}-{case}-{batch}-{accumulation}"
        assert len(logs) > 2
        for one, two in zip(logs, json.loads((tmp_path / f"{name}.json").read_text()), strict=True):
            assert two == pytest.approx(one, rel=2e-5, abs=2e-5), name
        weights = load_file(tmp_path / f"{name}.safetensors")
        for parameter, value in trained.items():
            assert (value - weights[parameter]).abs().max() < 1e-6, (name, parameter)
