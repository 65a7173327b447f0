"""Activation matching: exact recovery in every family; bad data is told before any work."""

from __future__ import annotations

import pytest
import torch
from tiny_models import load_weights

import hf_fuse
from hf_fuse.errors import FuseError
from hf_fuse.merge.align.live import Moments

from .align_cases import saved, shuffled, written_digits, written_texts

pytestmark = pytest.mark.usefixtures("no_charts")


def data_for(kind, folder):
    return str(written_digits(folder / "digits.parquet") if kind == "vit" else written_texts(folder / "texts.jsonl"))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "bert_classifier", "t5", "vit"])
def test_a_shuffled_copy_is_put_back(tmp_path, kind):
    source = saved(kind, tmp_path / "model")
    copy, _ = shuffled(source, tmp_path / "copy")
    recipe = {"method": "activation_matching", "model": str(copy), "reference": str(source)}
    made = hf_fuse.align(recipe | {"data": data_for(kind, tmp_path), "batch_size": 24}, tmp_path / "out")
    assert all(group.after > group.before for group in made.found.groups)
    inner = [group for group in made.found.groups if group.group.endswith("inner")]
    assert inner and all(group.after == pytest.approx(1, abs=1e-4) for group in inner)
    found = load_weights(made.output)
    for name, value in load_weights(source).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


def test_correlations_are_those_of_torch_and_constant_units_have_none():
    one, other = torch.randn(2, 40, 5, generator=torch.Generator().manual_seed(0))
    other[:, 1] = 3.0
    moments = Moments.empty(5, 5)
    for rows in (slice(0, 7), slice(7, 40)):
        moments.add(one[rows], other[rows])
    expected = torch.corrcoef(torch.cat([one.T, other.T]))[:5, 5:].nan_to_num()
    torch.testing.assert_close(moments.correlation_mn, expected, atol=1e-5, rtol=0)
    assert not moments.correlation_mn[:, 1].any()


def test_data_that_does_not_fit_is_told_before_any_work(tmp_path):
    source = saved("llama", tmp_path / "model")
    recipe = {"method": "activation_matching", "model": str(source), "reference": str(source)}
    with pytest.raises(FuseError, match="reads text, but data holds none"):
        hf_fuse.align(recipe | {"data": str(written_digits(tmp_path / "digits.parquet"))}, tmp_path / "out")
    with pytest.raises(FuseError, match="Say data: FILE"):
        hf_fuse.align(recipe, tmp_path / "out")
    with pytest.raises(FuseError, match="no such file"):
        hf_fuse.align(recipe | {"data": "nowhere.jsonl"}, tmp_path / "out")
    (source / "tokenizer.json").unlink()
    with pytest.raises(FuseError, match="its tokenizer cannot be loaded"):
        hf_fuse.align(recipe | {"data": str(written_texts(tmp_path / "texts.jsonl"))}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
