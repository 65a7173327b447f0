"""Run by torchrun with two processes: trains students of all kinds, for ``distill/test_two_processes.py``.

``torchrun distill_processes.py FOLDER CACHE CASES:CASE:BATCH:ACCUMULATION ...`` writes what ``training_cases.py`` does.
All in one launch, because starting two processes that import torch costs more than what they train.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import attached_cases
import cached_cases
import distill_cases
import fusion_cases
import torch
from safetensors.torch import save_file
from training_cases import train

FUSED = {"task": 0.5, "fuse_llm": 0.3, "gld": 0.2, "uld": 0.2}


def make_trainer(cases: str, case: str, output: Path, batch: int, accumulation: int, cache: Path) -> Any:
    """One of the cases of a module, in the given layout."""
    if cases == "fusion":
        return fusion_cases.make_trainer(output, batch, accumulation, [fusion_cases.aligned()], FUSED)
    module = {"distill": distill_cases, "attached": attached_cases, "cached": cached_cases}[cases]
    more = {"cache": cache} if cases == "cached" else {}
    return module.make_trainer(case, output, batch, accumulation, **more)


if __name__ == "__main__":
    folder, cache = map(Path, sys.argv[1:3])
    for layout in sys.argv[3:]:
        cases, case, batch, accumulation = layout.split(":")
        trainer = make_trainer(cases, case, folder, int(batch), int(accumulation), cache)
        assert trainer.accelerator.num_processes == 2, trainer.accelerator.state
        logs, trained = train(trainer)
        if trainer.is_world_process_zero():
            name = layout.replace(":", "-")
            (folder / f"{name}.json").write_text(json.dumps(logs))
            save_file(trained, folder / f"{name}.safetensors")
    torch.distributed.destroy_process_group()
