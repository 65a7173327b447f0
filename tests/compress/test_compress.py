"""``hf-fuse compress``: the command, the folder it leaves, and what is on disk when something goes wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import WORDS, digests, llama_family

import hf_fuse
from hf_fuse import registry
from hf_fuse.cli import run_command
from hf_fuse.compress.importance_chart import importance_chart
from hf_fuse.compress.recipe import load_compress_recipe
from hf_fuse.compress.subject import open_subject
from hf_fuse.errors import FuseError


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A sharded bf16 model, and text to calibrate and measure on."""
    source = llama_family(tmp_path / "models", models=0, dtype=torch.bfloat16).base
    (source / "README.md").write_text("---\nlicense: mit\n---\n# base\n")
    (tmp_path / "text.txt").write_text(" ".join(WORDS * 20))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"method: llm_drop\nmodel: {source}\nparameters: {{target: block, drop: 1}}\n"
        f"calibration: {{path: {tmp_path}/text.txt, length: 32}}\nevaluation: {tmp_path}/text.txt\n"
    )
    return path


def test_the_command_makes_a_folder_with_figures_chart_card_and_recipe(recipe, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    run_command(["compress", str(recipe), "-o", str(out), "--parameters.drop", "2", "--max_shard_size=2KB"])
    shown = capsys.readouterr().out
    assert f"compressed: {out}" in shown and "Dropped block of layers" in shown
    assert all(word in shown for word in ("parameters", "perplexity", "tokens per second", "after / before"))
    results = json.loads((out / "compress_results.json").read_text())
    assert results["after"]["parameters"] < results["before"]["parameters"] and results["after"]["perplexity"] > 1
    assert (out / "importance.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "model.safetensors.index.json").exists() and (out / "tokenizer.json").exists()
    card = (out / "README.md").read_text()
    assert "hf-fuse compress fuse_recipe.yaml --output compressed" in card and "license: mit" in card
    assert "base_model_relation: finetune" in card and "importance.png" in card and str(tmp_path) not in card
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 1 and config["dtype"] == "bfloat16"
    # The recipe that lies in the folder makes the same weights again.
    again = hf_fuse.compress(out / "fuse_recipe.yaml", tmp_path / "again").output
    weights = [name for name in digests(out) if name.endswith(".safetensors")]
    assert weights and all(digests(out)[name] == digests(again)[name] for name in weights)


def test_the_card_says_whose_figures_it_gives(recipe, tmp_path):
    for target, said in (("mlp", True), ("block", False)):
        made = hf_fuse.compress(recipe, tmp_path / target, overrides={"parameters.target": target})
        assert ("hf_fuse.load_compressed" in (made.output / "README.md").read_text()) == said


def test_mistakes_on_the_command_line_are_one_line_each(recipe, tmp_path, capsys):
    for arguments, words in [
        (["--paramters.drop", "2"], "Did you mean 'parameters'"),
        (["--parameters.dorp", "2"], "Did you mean 'drop'"),
        (["--device", "gpu9"], "gpu9"),
        (["--calibration.length", "65"], "64 positions"),
        (["--model", str(tmp_path / "nowhere")], "nowhere"),
    ]:
        with pytest.raises(SystemExit):
            run_command(["compress", str(recipe), "-o", str(tmp_path / "out"), *arguments])
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    with pytest.raises(SystemExit):
        run_command(["compress", str(recipe)])
    assert "no folder is given" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_the_old_output_intact(recipe, tmp_path, monkeypatch):
    out = hf_fuse.compress(recipe, tmp_path / "out").output
    before = digests(tmp_path)
    with pytest.raises(FuseError, match="exists"):
        hf_fuse.compress(recipe, out)
    monkeypatch.setattr("hf_fuse.compress.engine._draw", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hf_fuse.compress(recipe, out, overrides={"parameters.drop": 2}, overwrite=True)
    assert digests(tmp_path) == before


def test_calibration_is_spread_over_the_whole_text(recipe):
    made = load_compress_recipe(recipe, {"calibration.sequences": 3, "calibration.length": 10})
    subject = open_subject(made)
    ids = subject.candidate.processor(" ".join(WORDS * 20))["input_ids"]
    assert [part.tolist() for part in subject.calibration] == [[ids[i : i + 10]] for i in (0, 100, 200)]


def test_every_method_says_what_it_does():
    for name in registry.names("compress"):
        method = registry.get("compress", name)
        assert method.summary and method.options and isinstance(method.module.NEEDS_TEXT, bool)


def test_chart_without_negative_or_missing_numbers_and_with(tmp_path):
    pytest.importorskip("matplotlib")
    for values in ([0.5, 0.001], [0.1, -0.1], [0.1, float("nan")]):
        assert importance_chart({"block": values}, {"block": [1]}, tmp_path / "chart.svg").stat().st_size > 1000


@pytest.mark.parametrize("name", registry.names("compress"))
def test_example_recipes_are_valid_and_complete(name):
    folder = Path(__file__).parents[2] / "recipes" / "compress"
    assert load_compress_recipe(folder / f"{name}.yaml").method == name
