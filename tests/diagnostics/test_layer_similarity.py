"""Two models side by side: a copy is alike, one with permuted units matches out of place."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_fuse import cli
from hf_fuse.data.stdlib_text import stdlib_domains
from hf_fuse.demo_training import ModelSize, byte_tokenizer, new_model
from hf_fuse.diagnostics.layer_similarity import compare_layers
from hf_fuse.errors import FuseError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    tokenizer = byte_tokenizer(64)
    size = ModelSize(hidden=16, feed_forward=24, layers=2, heads=2, context=64)
    for seed, name in enumerate(("first", "second")):
        model = new_model(size, tokenizer, seed=seed)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(root / "first")
    with torch.no_grad():
        for name, values in model.named_parameters():
            inward = any(part in name for part in ("embed", "q_proj", "k_proj", "v_proj", "gate", "up_proj", "lm_head"))
            if values.dim() == 1:
                values.copy_(values[order])
            elif inward:
                values.copy_(values[:, order])
            else:
                values.copy_(values[order])
    model.save_pretrained(root / "permuted")
    tokenizer.save_pretrained(root / "permuted")
    other = byte_tokenizer(64)
    other.add_tokens(["the"])
    new_model(size, other, seed=0).save_pretrained(root / "other")
    other.save_pretrained(root / "other")
    text = "\n\n".join(next(d for d in stdlib_domains(source_characters=50_000) if d.name == "docs").train[:6])
    (root / "text.txt").write_text(text[:3000])
    return root


def test_a_copy_and_a_permuted_copy(folders):
    text = (folders / "text.txt").read_text().split("\n\n")
    same = compare_layers(str(folders / "first"), str(folders / "first").rstrip("/") + "/../permuted", text)
    assert same.cka.diagonal().tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    for row in same.matching:
        assert row["one_to_one"] == pytest.approx(1.0, abs=1e-4) and row["in_place"] < 0.4
    apart = compare_layers(str(folders / "first"), str(folders / "second"), text, positions=300)
    assert apart.positions == 300
    assert all(row["one_to_one"] < 0.9 for row in apart.matching) and apart.cka.max() < 0.99


def test_the_command(folders, capsys, tmp_path):
    pair = [str(folders / "first"), str(folders / "second")]
    chart = tmp_path / "cka.png"
    cli.app(
        ["similarity", *pair, "--text", str(folders / "text.txt"), "--positions", "200", "--plot", str(chart)],
        standalone_mode=False,
    )
    said = capsys.readouterr().out
    assert "200 tokens" in said and "redundancy" in said and chart.stat().st_size > 5000
    cli.app(["similarity", *pair, "--text", str(folders / "text.txt"), "--json"], standalone_mode=False)
    assert len(json.loads(capsys.readouterr().out)["cka"]) == 3
    with pytest.raises(FuseError, match="charts are written as"):
        cli.app(["similarity", "no", "models", "--text", "none", "--plot", "cka.doc"], standalone_mode=False)


def test_models_that_cannot_be_compared(folders):
    with pytest.raises(FuseError, match="cut the texts differently"):
        compare_layers(str(folders / "first"), str(folders / "other"), ["this is the end of the text"])
    with pytest.raises(FuseError, match="too few to compare"):
        compare_layers(str(folders / "first"), str(folders / "second"), ["x"])
