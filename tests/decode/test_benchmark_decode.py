"""The benchmark of decoding on toy sizes: every method is measured, and its ratios are those of the times beside it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "recipes" / "benchmarks"


def test_every_method_is_measured(monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPTS)
    import decode

    sizes = {"vocabulary": 50, "hidden": 64, "layers": 1, "prompt": 6, "new": 3, "repeats": 1}
    given = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["decode.py", *given])
    decode.main()
    _, _, *rows, last = capsys.readouterr().out.splitlines()
    found = {name: [float(figure) for figure in figures] for name, *figures in map(str.split, rows)}
    assert list(found) == ["ensemble", "proxy_tuning", "dynamic_logits_fusion", "scmoe"]
    for seconds, alone, ratio, anew, ratio_anew in found.values():
        assert ratio == pytest.approx(seconds / alone, rel=0.2) and ratio_anew == pytest.approx(seconds / anew, rel=0.2)
    assert last.startswith("kv_prediction, first token: ")
