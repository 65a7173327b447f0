"""Weight matching: the spec's example, exact recovery of every family, and the same function in every case."""

from __future__ import annotations

import pytest
import torch
from tiny_models import load_weights

import hf_fuse

from .align_cases import MODELS, saved, shuffled


@pytest.mark.parametrize("kind", MODELS)
def test_a_shuffled_copy_is_put_back_bit_for_bit(tmp_path, kind):
    source = saved(kind, tmp_path / "model")
    copy, _ = shuffled(source, tmp_path / "copy")
    assert any(not torch.equal(value, load_weights(copy)[name]) for name, value in load_weights(source).items())
    made = hf_fuse.align({"method": "weight_matching", "model": str(copy), "reference": str(source)}, tmp_path / "out")
    assert made.difference < 1e-5
    assert made.to_dict()["cosine_after"] == pytest.approx(1.0)
    found = load_weights(made.output)
    for name, value in load_weights(source).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)
