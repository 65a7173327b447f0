"""The study's own arithmetic: equal sizes are equal, and what it says follows from the figures."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def study() -> ModuleType:
    path = Path(__file__).parents[1] / "recipes" / "adapter_study.py"
    spec = importlib.util.spec_from_file_location("adapter_study", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["adapter_study"] = module
    spec.loader.exec_module(module)
    return module


def test_the_methods_train_equally_many_parameters(study: ModuleType) -> None:
    size = study.QUICK.size
    ranks, methods = study.equal_ranks(size), study.adapters(size.layers)
    assert set(ranks) == {"LoRA", "MixLoRA", "DynMoLE", "MoLA"}
    counts = []
    for name, rank in ranks.items():
        model = study.new_model(size, study.byte_tokenizer(size.context), 0)
        counts.append(study.trainable(study.with_adapter(model, methods[name](rank))))
    assert max(counts) / min(counts) < 1.1


def test_what_is_said_follows_from_the_figures(study: ModuleType) -> None:
    apart = {"layer 0": [[1.0, 0.0], [0.0, 1.0]], "layer 1": [[0.5, 0.5], [0.5, 0.5]]}
    assert study.separation(apart) == pytest.approx(0.5)

    def row(first: float, second: float, usage: dict | None = None):
        return study.Row([first, second], 10, 1e-3, 0.1, usage or {})

    assert study.average(row(2.0, 8.0)) == pytest.approx(4.0)  # geometric
    runs = [
        {"rows": {"base": row(8, 8), "LoRA": row(6, 6), "whole model": row(4, 4), "MixLoRA": row(5, 5, apart),
                  "DynMoLE": row(7, 7, apart), "MoLA": row(6 + change, 6 + change, apart)}}
        for change in (-1, 1)
    ]  # fmt: skip
    mixlora, dynmole, mola, sizes = study.findings(runs)
    assert mixlora.startswith("MixLoRA is ahead of LoRA: better in 2 of 2 seeds, by +25.0% of")
    assert dynmole.startswith("DynMoLE is behind LoRA: better in 0 of 2 seeds, by -25.0% of")
    assert mola.startswith("MoLA is neither ahead of nor behind LoRA: better in 1 of 2 seeds, by +0.0%")
    assert "differ by 0.50 in where their tokens go" in mixlora and "10 to 10 parameters of 10" in sizes
