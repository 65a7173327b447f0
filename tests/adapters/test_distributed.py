"""Adapters in two processes, for real."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_gradients_of_two_processes():
    names = ["mixlora", "mola"]
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(HERE / "distributed_adapters.py"), *names],
        env=os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert "2 processes, 12 comparisons" in run.stdout
