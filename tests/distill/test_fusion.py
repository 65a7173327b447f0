"""hf-fuse fuse: from models with different tokenizers to one, in stages that survive being stopped."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from distill_cases import another
from fusion_cases import rows
from safetensors.torch import load_file
from tiny_models import digests
from tiny_tokenizers import byte_bpe, sentence_piece, word_piece
from training_cases import llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_fuse.checkpoint.writer import remove_tree
from hf_fuse.cli import app
from hf_fuse.distill import fusion
from hf_fuse.distill.fusion import fuse
from hf_fuse.errors import FuseError, OutputError, RecipeError
from hf_fuse.merge.engine import merge_state_dicts
from hf_fuse.train import train


def saved(folder, model, tokenizer):
    model.config.max_position_embeddings = 128
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    saved(root / "pivot", llama(vocab_size=400), byte_bpe())
    saved(root / "one", another(llama, vocab_size=512, hidden_size=24)(), sentence_piece())
    saved(root / "two", another(llama, vocab_size=600)(), word_piece())
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(8)))
    return root


def recipe(models, **changes):
    train = {
        "max_steps": 2, "learning_rate": 0.02, "per_device_train_batch_size": 4, "use_cpu": True, "logging_steps": 1,
        "report_to": "none", "save_steps": 1, "save_strategy": "steps",
    }  # fmt: skip
    return {
        "pivot": str(models / "pivot"), "sources": [str(models / "one"), str(models / "two")],
        "data": {"train": str(models / "rows.jsonl"), "max_length": 64}, "k": 8, "train": train,
        "merge": {"method": "sce", "parameters": {"density": 0.5}},
    } | changes  # fmt: skip


@pytest.fixture(scope="module")
def fused(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fused") / "out"
    return fuse(recipe(models, keep_targets=True), folder), folder


def test_targets_are_trained_and_merged(fused, models):
    made, folder = fused
    assert [*made.figures] == ["1-one", "2-two"] and all(f["train_loss"] > 0 for f in made.figures.values())
    assert 0.5 < made.figures["1-one"]["aligned with 1-one"] <= 1
    pivot, merged = (load_file(path / "model.safetensors") for path in (models / "pivot", folder))
    targets = [load_file(folder / "targets" / name / "model.safetensors") for name in made.figures]
    # SCE: between the targets and the pivot, and not one of them.
    assert all((one[name] - pivot[name]).abs().max() > 0 for one in targets for name in ("lm_head.weight",))
    expected = merge_state_dicts(targets, "sce", base=pivot, parameters={"density": 0.5})
    assert all(torch.equal(merged[name], value) for name, value in expected.items())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.get_vocab() == byte_bpe().get_vocab()
    assert model(**tokenizer("the module", return_tensors="pt")).logits.isfinite().all()
    left = {path.name for path in folder.iterdir()}
    assert left.isdisjoint({"caches", "merged", "fusion.yaml"}) and "fuse_results.json" in left
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    card = (folder / "README.md").read_text()
    assert "fusechat" in card and "with knowledge of one, two" in card and str(models) not in card
    assert "hf-fuse fuse" in card


def test_together_is_one_target_that_learns_from_all(models, tmp_path):
    train = recipe(models)["train"] | {"objectives": {"task": 0.5, "fusion_x": 0.5}, "max_steps": 1}
    made = fuse(recipe(models, strategy="together", train=train), tmp_path / "out")
    assert [*made.figures] == ["target"]
    assert not (tmp_path / "out" / "targets").exists()
    assert "fusellm" in (tmp_path / "out" / "README.md").read_text()
    before, after = (load_file(p / "model.safetensors") for p in (models / "pivot", tmp_path / "out"))
    assert any((before[name] - value).abs().max() > 0 for name, value in after.items())


def test_a_stopped_run_goes_on_where_it_was(fused, models, tmp_path, monkeypatch):
    """Killed while the second target is trained; stopped before the merge, before the end, and while clearing up."""
    folder, partial = tmp_path / "out", tmp_path / "out.partial"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(models)))
    command = [sys.executable, "-m", "hf_fuse", "fuse", str(tmp_path / "recipe.yaml"), "--output", str(folder)]
    run = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    end = time.time() + 120
    while not (partial / "targets" / "1-one").exists() and time.time() < end and run.poll() is None:
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert (partial / "fusion.yaml").exists() and not folder.exists()
    with pytest.raises(OutputError, match="unfinished run left it. Go on with it with --resume"):
        fuse(recipe(models), folder)
    with pytest.raises(RecipeError, match="had another recipe"):
        fuse(recipe(models, k=4), folder, resume=True)
    done = [path for path in partial.rglob("*.safetensors") if path.parent.name in ("0-pivot", "1-one", "2-two")]
    moments = {path: path.stat().st_mtime_ns for path in done if ".partial/targets/2" not in str(path)}
    assert len(moments) == 4
    for stage in ("_merge", "_finish"):
        with monkeypatch.context() as patched:
            patched.setattr(fusion, stage, _stop)
            with pytest.raises(KeyboardInterrupt):
                fuse(recipe(models), folder, resume=True)
        assert all(path.stat().st_mtime_ns == moment for path, moment in moments.items()), "made again"
    assert not folder.exists() and (partial / "targets" / "2-two").exists()
    monkeypatch.setattr("hf_fuse.train.train", None)  # nothing is trained any more
    with monkeypatch.context() as patched:
        patched.setattr(fusion, "remove_tree", lambda path: _stop() if path.name == "targets" else remove_tree(path))
        with pytest.raises(KeyboardInterrupt):
            fuse(recipe(models), folder, resume=True)
    assert not folder.exists() and not (partial / "caches").exists()
    made = fuse(recipe(models), folder, resume=True)
    assert made.figures == fused[0].figures
    assert digests(folder)["model.safetensors"] == digests(fused[1])["model.safetensors"]
    assert {path.name for path in tmp_path.iterdir()} == {"out", "recipe.yaml"}
    assert not any((folder / name).exists() for name in ("caches", "targets", "fusion.yaml", "merged"))


def _stop(*_):
    raise KeyboardInterrupt


def test_what_is_wrong_is_told_before_anything_is_computed(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fusion, "_taught", None)

    def refused(match, error=FuseError, **changes):
        with pytest.raises(error, match=match):
            fuse(recipe(models, **changes), tmp_path / "out")
        assert not any(tmp_path.iterdir())

    refused("no merge method is called 'sec'", RecipeError, merge="sec")
    refused(
        "sce has no 'densty'. Did you mean 'density'", RecipeError, merge={"method": "sce", "parameters": {"densty": 1}}
    )
    refused("unknown key 'piv", RecipeError, pivott="a")
    refused("packing puts several texts", RecipeError, data={"train": str(models / "rows.jsonl"), "packing": True})
    refused("no loss 'fuse_lm'", RecipeError, train={"objectives": {"fuse_lm": 1}})
    refused("density is 7", RecipeError, merge={"method": "sce", "parameters": {"density": 7}})
    refused("none of them is a distillation method", RecipeError, train={"objectives": {"task": 1}})
    refused("gld: needs 9 tokens .* keep 8", train={"objectives": {"gld": {"weight": 1, "k": 9}}})
    refused("gld: compares whole", RecipeError, train={"objectives": {"gld": 1}, "chunk_size": 4})
    refused("nowhere", sources=[str(tmp_path / "nowhere")])
    refused("no such file", data=str(tmp_path / "nowhere.jsonl"))
    refused("Run it with hf-fuse train", RecipeError, model="a")
    refused("adapters can't be fused", RecipeError, sources=[{"path": str(models / "one"), "adapter": "a"}])
    with pytest.raises(OutputError, match="no unfinished run to resume"):
        fuse(recipe(models), tmp_path / "out", resume=True)
    with pytest.raises(RecipeError, match="no folder is given"):
        fuse(recipe(models))


def test_training_recipes_have_sources(models, tmp_path, capsys):
    made = train(
        {
            "model": str(models / "pivot"), "sources": [str(models / "one"), {"path": str(models / "two"), "k": 4}],
            "data": {"train": str(models / "rows.jsonl"), "max_length": 64},
            "train": {"max_steps": 1, "objectives": {"task": 0.5, "uld": 0.5}, "use_cpu": True, "report_to": "none"},
        },
        output=tmp_path / "out",
    )  # fmt: skip
    assert made.figures["train_loss"] > 0
    assert "learning from one, two too" in (tmp_path / "out" / "README.md").read_text()
    assert str(models) not in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(RecipeError, match="a packed row is no single text"):
        train(
            {"model": str(models / "pivot"), "sources": [str(models / "one")],
             "data": {"train": str(models / "rows.jsonl"), "max_length": 64, "packing": True},
             "train": {"max_steps": 1, "use_cpu": True}}, output=tmp_path / "packed",
        )  # fmt: skip


def test_command(fused, models, tmp_path, capsys):
    """The recipe that the output carries makes it again."""
    arguments = ["fuse", str(fused[1] / "fuse_recipe.yaml"), "-o", str(tmp_path / "out"), "--json"]
    app(arguments, standalone_mode=False)
    printed = json.loads(capsys.readouterr().out)
    assert printed["targets"].keys() == {"1-one", "2-two"}
    assert digests(tmp_path / "out")["model.safetensors"] == digests(fused[1])["model.safetensors"]
