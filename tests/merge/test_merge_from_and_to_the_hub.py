"""Parents on the Hub, the result on the Hub: through the unmodified client and the loopback server."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import HubServer
from safetensors.torch import load, load_file, save

import hf_fuse
from hf_fuse.errors import FuseError
from hf_fuse.merge import finish
from hf_fuse.merge.coefficients import read_coefficients

USER = "ada"  # to whom conftest gives the token


@pytest.fixture
def parents(hub: HubServer, hub_cache: Path, tiny_family) -> list[str]:
    """A base and two fine-tunes as repositories of the loopback Hub, with licences."""
    ids = []
    for folder in tiny_family("plain").all[:3]:
        files = {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}
        files["README.md"] = b"---\nlicense: mit\n---\n"
        files["modeling_custom.py"] = b"raise SystemExit('code of a stranger')\n"
        ids.append(f"{USER}/{uuid.uuid4().hex[:8]}")
        hub.add_repo(ids[-1], files)
    return ids


def recipe_of(parents: list[str], **more) -> dict:
    base, *models = parents
    return {"method": "task_arithmetic", "base_model": base, "models": models, "parameters": {"lambda": 0.5}, **more}


def test_merge_push_and_load(hub, repo_id, parents, tmp_path):
    from huggingface_hub import ModelCard
    from transformers import AutoModelForCausalLM

    folder = hf_fuse.merge(recipe_of(parents), tmp_path / "merged", push=repo_id)
    files = set(hub.files(repo_id))
    assert {"model.safetensors", "config.json", "README.md", "fuse_recipe.yaml"} <= files
    assert not [name for name in files if name.endswith(".py")], "code of the parents is not carried over"
    card = ModelCard(hub.read(repo_id, "README.md").decode())
    assert sorted(card.data.base_model) == sorted(parents)
    assert card.data.to_dict()["base_model_relation"] == "merge" and card.data.license == "mit"
    assert {"merge", "hf_fuse", "task_arithmetic"} <= set(card.data.tags)
    pushed = AutoModelForCausalLM.from_pretrained(repo_id).state_dict()
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(pushed[name], tensor)


def test_the_pushed_recipe_is_pinned_and_makes_the_same_bytes_after_a_parent_moved_on(hub, repo_id, parents, tmp_path):
    first = hf_fuse.merge(recipe_of(parents), tmp_path / "first", push=repo_id)
    stored = yaml.safe_load(hub.read(repo_id, "fuse_recipe.yaml"))
    assert stored["base_model"]["revision"] == hub.head(parents[0])
    assert [model["revision"] for model in stored["models"]] == [hub.head(parent) for parent in parents[1:]]
    shard = next(name for name in sorted(hub.files(parents[1])) if name.endswith(".safetensors"))
    changed = {name: tensor * 3 for name, tensor in load(hub.read(parents[1], shard)).items()}
    hub.add_commit(parents[1], {shard: save(changed, {"format": "pt"})})
    (tmp_path / "stored.yaml").write_bytes(hub.read(repo_id, "fuse_recipe.yaml"))
    again = hf_fuse.merge(tmp_path / "stored.yaml", tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    fresh = hf_fuse.merge(recipe_of(parents), tmp_path / "fresh")
    assert (fresh / "model.safetensors").read_bytes() != (first / "model.safetensors").read_bytes()


def test_parents_that_disagree_on_the_licence(hub, parents, tmp_path, caplog):
    hub.add_commit(parents[2], {"README.md": b"---\nlicense: llama3\n---\n"})
    folder = hf_fuse.merge(recipe_of(parents), tmp_path / "merged")
    front = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert "license" not in front and "llama3" in caplog.text and "mit" in caplog.text


def test_a_read_only_token_is_refused_before_any_work(hub, repo_id, parents, tmp_path, monkeypatch):
    token = hub.token(USER, role="read")
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(FuseError, match="read") as caught:
        hf_fuse.merge(recipe_of(parents), tmp_path / "merged", push=repo_id)
    assert token not in str(caught.value)
    assert not (tmp_path / "merged").exists() and not hub.requests("PUT")


def test_somebody_else_pushed_since_the_plan(hub, repo_id, parents, tmp_path, monkeypatch):
    hub.add_repo(repo_id, {"README.md": b"theirs"})
    write = finish.write_companions

    def meanwhile(*arguments):
        hub.add_commit(repo_id, {"notes.txt": b"somebody else"})
        write(*arguments)

    monkeypatch.setattr(finish, "write_companions", meanwhile)
    with pytest.raises(FuseError, match="someone pushed to 'main' since you planned"):
        hf_fuse.merge(recipe_of(parents), tmp_path / "merged", push=repo_id)
    assert hub.read(repo_id, "README.md") == b"theirs"
    assert (tmp_path / "merged" / "model.safetensors").exists(), "the merge itself is kept, to be pushed again"


def test_offline_after_one_online_run(hub, parents, tmp_path, monkeypatch):
    from huggingface_hub import constants

    first = hf_fuse.merge(recipe_of(parents), tmp_path / "first")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.log.clear()
    again = hf_fuse.merge(recipe_of(parents), tmp_path / "again")
    assert not hub.log
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


def test_learned_coefficients_are_of_commits(hub, parents, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "the cat sat on the mat"}\n')
    base, *models = parents
    data = {"data": str(tmp_path / "texts.jsonl")}
    recipe = {"estimator": "expert_merging", "base_model": base, "models": [{"path": m} | data for m in models]}
    folder = hf_fuse.learn(recipe | {"parameters": {"epochs": 1}}, tmp_path / "learned")
    for name in ("merge.yaml", "fuse_recipe.yaml"):
        stored = yaml.safe_load((folder / name).read_text())
        assert [ref["revision"] for ref in (stored["base_model"], *stored["models"])] == [hub.head(p) for p in parents]
    again = hf_fuse.learn(folder / "fuse_recipe.yaml", tmp_path / "again")
    assert read_coefficients(str(again)).values == read_coefficients(str(folder)).values
    assert (hf_fuse.merge(folder / "merge.yaml", tmp_path / "merged") / "model.safetensors").exists()
