"""The study's own arithmetic: what it says follows from the figures, and every case is a recipe that passes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from hf_fuse.compress.recipe import load_compress_recipe


@pytest.fixture(scope="module")
def study() -> ModuleType:
    path = Path(__file__).parents[1] / "recipes" / "compression_study.py"
    spec = importlib.util.spec_from_file_location("compression_study", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["compression_study"] = module
    spec.loader.exec_module(module)
    return module


def test_cases_are_recipes_and_sources_come_before_what_is_made_of_them(study: ModuleType) -> None:
    for effort in (study.QUICK, study.FULL):
        known = {study.DENSE, study.MIXTURE}
        for case in study.cases(effort):
            assert case.source in known and case.label not in known
            known.add(case.label)
            recipe = {"method": case.method, "model": "somewhere", "parameters": case.parameters}
            load_compress_recipe(recipe | {"calibration": "text.txt"})


def test_what_is_said_follows_from_the_figures(study: ModuleType) -> None:
    def run(shift: float) -> dict:
        rows = {case.label: study.Row(study.DENSE, 0.5, 1.2, 2.0) for case in study.cases(study.QUICK)}
        rows["llm_drop attention, 1 of 3"] = study.Row(study.DENSE, 0.5, 1.08, 2.0)
        rows["fuse_gpt, grafted, 1 of 3"] = study.Row(study.DENSE, 0.5, 1.2 + shift, 2.0)
        return {"rows": rows}

    runs = [run(-0.1), run(0.1)]
    said = study.findings(runs, study.QUICK)
    assert said[0].startswith(
        "Which half of a layer can go: llm_drop attention, 1 of 3 is ahead of llm_drop mlp, 1 of 3"
    )
    assert "(2 of 2 seeds, perplexity -10.0%)" in said[0]
    assert "neither ahead of nor behind fuse_gpt, low-rank only, 1 of 3 (1 of 2 seeds" in said[1]
    found = study.summary(runs)["fuse_gpt, grafted, 1 of 3"]
    assert found["perplexity"] == pytest.approx((1.1 * 1.3) ** 0.5) and found["spread"] == pytest.approx(0.02**0.5)
