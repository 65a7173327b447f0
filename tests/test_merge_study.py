"""The study's own arithmetic: what it says about orderings follows from the figures, and its data does not leak."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hf_fuse import registry


@pytest.fixture(scope="module")
def study() -> ModuleType:
    path = Path(__file__).parents[1] / "recipes" / "merge_study.py"
    spec = importlib.util.spec_from_file_location("merge_study", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["merge_study"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def suite(study: ModuleType):
    """Three experts, each right about one number of three: scores are how close a state is to each of them."""
    base = {"w": torch.zeros(3, 4)}
    experts = [{"w": torch.nn.functional.one_hot(torch.tensor(k), 3)[:, None].float().expand(3, 4)} for k in range(3)]

    def score(state: dict, part: str) -> list[float]:
        return [float(1 - (state["w"] - expert["w"]).abs()[k].mean()) for k, expert in enumerate(experts)]

    reference = {"w": torch.ones(3, 4)}
    return study.Suite("toy", "score", ["a", "b", "c"], base, [dict(e) for e in experts], reference, score)


def test_every_method_is_run_or_left_out_with_a_reason(study: ModuleType, suite) -> None:
    found = study.run_suite(suite, 0, study.QUICK)
    labels = {label.removesuffix(" (tuned)") for label in found["rows"]} | set(found["skipped"])
    assert set(registry.names("merge")) <= labels
    assert found["rows"]["base"].norm == 0 and found["rows"]["linear"].scores == pytest.approx([1 / 3] * 3)
    arithmetic = found["rows"]["task_arithmetic"]  # disjoint task vectors add up without loss
    assert arithmetic.scores == pytest.approx([1.0] * 3) and arithmetic.norm == pytest.approx(3**0.5)
    assert sum(found["rows"]["task_arithmetic (tuned)"].scores) == pytest.approx(3.0)
    assert found["conflict"] == {"cosine": pytest.approx(0), "opposite signs": pytest.approx(0)}
    assert found["rows"]["experts, each on its own"].scores == [1.0] * 3


def test_summary_and_verdicts_follow_from_the_figures(study: ModuleType, suite) -> None:
    runs = [study.run_suite(suite, seed, study.QUICK) for seed in range(2)]
    runs[1]["rows"]["linear"].scores = [0.9, 0.9, 0.9]
    by = {summary.label: summary for summary in study.summarise(runs)}
    soup = by["linear"]
    assert soup.seeds == pytest.approx([1 / 3, 0.9]) and soup.mean == pytest.approx((1 / 3 + 0.9) / 2)
    assert soup.spread == pytest.approx((0.9 - 1 / 3) / 2**0.5) and soup.worst == pytest.approx(soup.mean)
    said = study.compared(by, "linear", "task_arithmetic (tuned)")
    assert "holds" in said and "2 of 2 seeds" in said
    assert "does not hold" in study.compared(by, "task_arithmetic (tuned)", "linear")
    runs[1]["rows"]["linear"].scores = [1.1] * 3
    by = {summary.label: summary for summary in study.summarise(runs)}
    assert "is open" in study.compared(by, "linear", "task_arithmetic (tuned)")
    assert any("mean cosine of 0.00" in line for line in study.findings(list(by.values()), [runs[0]["conflict"]]))


def test_grids_name_only_what_methods_have(study: ModuleType) -> None:
    for name, values in study.GRIDS.items():
        if name in registry.names("merge"):
            assert set(values) <= set(registry.get("merge", name).options), name
    for name in registry.names("merge"):
        method = registry.get("merge", name)
        for parameters in study.grid(method, None):
            for key, value in parameters.items():
                method.option(key, name).check(value, name)
    assert len(study.grid(registry.get("merge", "ties"), None)) == 16
    assert study.grid(registry.get("merge", "linear"), None) == []


def test_guises_differ_and_keep_the_shape(study: ModuleType) -> None:
    images = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    shown = {name: show(images) for name, show in study.guises(0).items()}
    assert len(shown) >= 6
    for name, seen in shown.items():
        assert seen.shape == images.shape and not torch.equal(seen, images)
        if name != "noisy":
            assert torch.equal(seen.abs().flatten(1).sort().values, images.abs().flatten(1).sort().values)
        assert all(name == other or not torch.equal(seen, seen_too) for other, seen_too in shown.items())
