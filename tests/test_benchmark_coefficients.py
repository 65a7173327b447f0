"""The benchmark of learned coefficients on a toy: both ways find the same gradient, and every row is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "recipes" / "benchmarks"
TINY = ["--layers", "2", "--hidden", "32", "--intermediate", "48", "--heads", "4", "--kv-heads", "2", "--vocab", "64"]


def test_coefficients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.syspath_prepend(SCRIPTS)
    import coefficients

    monkeypatch.setattr(coefficients, "measured", lambda given: coefficients.gradient(**given))
    figures = tmp_path / "figures.json"
    arguments = [*TINY, "--models", "1", "2", "--autograd", "--dtype", "float32"]
    assert coefficients.main([*arguments, "--work-dir", str(tmp_path / "family"), "--json", str(figures)]) == 0
    rows = {(row["way"], row["models"]): row for row in json.loads(figures.read_text())["rows"]}
    assert len(rows) == 5 and "contraction" in capsys.readouterr().out
    for count in (1, 2):
        assert rows["contraction", count]["norm"] > 0
        assert rows["contraction", count]["norm"] == pytest.approx(rows["autograd", count]["norm"], rel=1e-3)
