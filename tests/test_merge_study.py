"""The study's own arithmetic: what it says about orderings follows from the figures, and its data does not leak."""

from __future__ import annotations

import pytest
import torch
from study import findings, merging, report, suites

from hf_fuse import registry


@pytest.fixture(scope="module")
def suite() -> suites.Suite:
    """Three experts, each right about one number of three: scores are how close a state is to each of them."""
    base = {"w": torch.zeros(3, 4)}
    experts = [{"w": torch.nn.functional.one_hot(torch.tensor(k), 3)[:, None].float().expand(3, 4)} for k in range(3)]

    def score(state: dict, part: str) -> list[float]:
        return [float(1 - (state["w"] - expert["w"]).abs()[k].mean()) for k, expert in enumerate(experts)]

    reference = {"w": torch.ones(3, 4)}
    return suites.Suite("toy", "score", ["a", "b", "c"], base, [dict(e) for e in experts], reference, score)


def test_every_method_is_run_or_left_out_with_a_reason(suite: suites.Suite) -> None:
    found = merging.run_suite(suite, 0, suites.QUICK)
    labels = {label.removesuffix(" (tuned)") for label in found["rows"]} | set(found["skipped"])
    assert set(registry.names("merge")) <= labels
    assert found["rows"]["base"].norm == 0 and found["rows"]["linear"].scores == pytest.approx([1 / 3] * 3)
    arithmetic = found["rows"]["task_arithmetic"]  # disjoint task vectors add up without loss
    assert arithmetic.scores == pytest.approx([1.0] * 3) and arithmetic.norm == pytest.approx(3**0.5)
    assert sum(found["rows"]["task_arithmetic (tuned)"].scores) == pytest.approx(3.0)
    assert found["conflict"] == {"cosine": pytest.approx(0), "opposite signs": pytest.approx(0)}
    assert found["rows"]["experts, each on its own"].scores == [1.0] * 3


def test_summary_and_verdicts_follow_from_the_figures(suite: suites.Suite) -> None:
    runs = [merging.run_suite(suite, seed, suites.QUICK) for seed in range(2)]
    runs[1]["rows"]["linear"].scores = [0.9, 0.9, 0.9]
    by = {summary.label: summary for summary in findings.summarise(runs)}
    soup = by["linear"]
    assert soup.seeds == pytest.approx([1 / 3, 0.9]) and soup.mean == pytest.approx((1 / 3 + 0.9) / 2)
    assert soup.spread == pytest.approx((0.9 - 1 / 3) / 2**0.5) and soup.worst == pytest.approx(soup.mean)
    said = findings.compared(by, "linear", "task_arithmetic (tuned)")
    assert "holds" in said and "2 of 2 seeds" in said
    assert "does not hold" in findings.compared(by, "task_arithmetic (tuned)", "linear")
    runs[1]["rows"]["linear"].scores = [1.1] * 3
    by = {summary.label: summary for summary in findings.summarise(runs)}
    assert "is open" in findings.compared(by, "linear", "task_arithmetic (tuned)")
    assert any("mean cosine of 0.00" in line for line in findings.findings(list(by.values()), [runs[0]["conflict"]]))


def test_table_holds_defaults_beside_tuned(suite: suites.Suite) -> None:
    run = merging.run_suite(suite, 0, suites.QUICK)
    lines = report.table(findings.summarise([run]))
    by = {line[0]: line for line in lines}
    assert [line[0] for line in lines[: len(findings.NOT_MERGES)]] == list(findings.NOT_MERGES)
    base = sum(run["rows"]["base"].scores) / 3
    assert by["base"][1:3] == (f"{base:.3f}", "0.00")
    row = by["task_arithmetic"]
    assert row[1:3] == ("1.000", "1.73") and row[5:7] == ("100%", "1.000")
    assert "task_arithmetic + subspace_boosting" in by and by["linear (the soup)"][3] == ""
    part = {"unit": "score", "tasks": suite.tasks, "findings": ["It holds."], "skipped": {}}
    text = report.markdown("toy", part, lines)
    assert text.count("\n| ") == len(lines) + 1 and "- It holds." in text


def test_grids_name_only_what_methods_have() -> None:
    for name, values in merging.GRIDS.items():
        if name in registry.names("merge"):
            assert set(values) <= set(registry.get("merge", name).options), name
    for name in registry.names("merge"):
        method = registry.get("merge", name)
        for parameters in merging.grid(method, None):
            for key, value in parameters.items():
                method.option(key, name).check(value, name)
    assert len(merging.grid(registry.get("merge", "ties"), None)) == 16
    assert merging.grid(registry.get("merge", "linear"), None) == []


def test_guises_differ_and_keep_the_shape() -> None:
    images = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    shown = {name: show(images) for name, show in suites.guises(0).items()}
    assert len(shown) >= 6
    for name, seen in shown.items():
        assert seen.shape == images.shape and not torch.equal(seen, images)
        if name != "noisy":
            assert torch.equal(seen.abs().flatten(1).sort().values, images.abs().flatten(1).sort().values)
        assert all(name == other or not torch.equal(seen, seen_too) for other, seen_too in shown.items())
