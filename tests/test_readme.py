"""Every snippet of the README runs, on toy models under the names that the demo gives its own; its table is current."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from hf_fuse import cli, load_recipe
from hf_fuse.compress.recipe import load_compress_recipe
from hf_fuse.data.select_recipe import load_select_recipe
from hf_fuse.decode.recipe import load_decode_recipe
from hf_fuse.distill.fusion_recipe import load_fusion_recipe
from hf_fuse.distill.teach_recipe import load_teach_recipe
from hf_fuse.readme import README, with_tables
from hf_fuse.training_recipe import load_training_recipe

TEXT = README.read_text(encoding="utf-8")
# What a test can't do: other people's repositories, a GPU, launchers (tests/test_ranks.py has those), the setup itself.
ELSEWHERE = ("pip install", "accelerate launch", "--device cuda", "--push", "hf-fuse push")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.S | re.M)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``hf-fuse-demo`` with a base and two experts of four layers, and the README's recipes."""
    from hf_fuse.demo_training import ModelSize, byte_tokenizer, new_model

    root = tmp_path_factory.mktemp("readme")
    tokenizer = byte_tokenizer(64)
    model = new_model(ModelSize(hidden=32, feed_forward=48, layers=4, heads=2, context=64), tokenizer, seed=0)
    for seed, name in enumerate(("base", "expert-source", "expert-docs")):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * seed * torch.randn_like(parameter))
        model.save_pretrained(root / "hf-fuse-demo" / name)
        tokenizer.save_pretrained(root / "hf-fuse-demo" / name)
    (root / "README.md").write_text(TEXT[:2000])
    (root / "prompts.txt").write_text("Return the\nOnce upon a time\n")
    for name, paragraphs in {"pool": TEXT.split("\n\n"), "articles": TEXT.split("\n\n")[:5]}.items():
        (root / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in paragraphs))
    for block in blocks("yaml"):
        if name := re.match(r"# (\S+\.yaml)\n", block):
            (root / name[1]).write_text(block)
    return root


def test_commands_and_python_in_their_order(folder, monkeypatch):
    monkeypatch.chdir(folder)
    ran, names = 0, {}
    for language, block in re.findall(r"^```(bash|python)\n(.*?)^```", TEXT, flags=re.S | re.M):
        if language == "python":
            exec(compile(block, "README.md", "exec"), names)  # noqa: S102 - our own text
            ran += 1
            continue
        for line in block.splitlines():
            command = shlex.split(line, comments=True)
            if not command or any(part in line for part in ELSEWHERE):
                continue
            assert command[0] == "hf-fuse", line
            cli.app(command[1:], standalone_mode=False)
            ran += 1
    assert ran >= 8
    assert (folder / "merged-2" / "model.safetensors").exists() and (folder / "cosines.png").exists()


def test_recipes_run_or_are_at_least_valid(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    for number, block in enumerate(blocks("yaml")):
        if "\nsweep:" in block:
            continue  # not a recipe by itself; its command runs above
        (tmp_path / f"{number}.yaml").write_text(block)
        if "\nadapter:" in block:
            load_training_recipe(tmp_path / f"{number}.yaml")
            continue
        if "\npivot:" in block:
            load_fusion_recipe(tmp_path / f"{number}.yaml")
            continue
        if "\nteacher:" in block:
            load = load_training_recipe if "\nmodel:" in block else load_teach_recipe
            load(tmp_path / f"{number}.yaml")
            continue
        if "\nkeep:" in block:
            load_select_recipe(tmp_path / f"{number}.yaml")
            continue
        if "\ncalibration:" in block:
            load_compress_recipe(tmp_path / f"{number}.yaml")
            continue
        if "\ngeneration:" in block:
            load_decode_recipe(tmp_path / f"{number}.yaml")
            continue
        recipe = load_recipe(tmp_path / f"{number}.yaml")
        if "org/" not in block:
            import hf_fuse

            hf_fuse.merge(recipe, tmp_path / str(number))


def test_tables_are_current():
    assert with_tables(TEXT) == TEXT, "run: python -m hf_fuse.readme"


def test_commands_named_in_the_tree_and_ci_exist():
    lines = [line for line in TEXT.splitlines() if line.startswith("pip install") and line.endswith("&& pytest")]
    assert len(lines) == 1, ".ci/run takes the test command from here"
    assert Path(README.parent, ".ci", "run").exists()
    for path in re.findall(r"`(recipes/[\w/.]+|tests/[\w/.]+|hf_fuse/[\w/.]+)`", TEXT):
        assert Path(README.parent, path).exists(), path
