"""Pushes and pulls with the unmodified Hub client against the loopback server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import yaml
from hub_server import HubServer

import hf_fuse.hub as hub_module
from hf_fuse.errors import CheckpointError, FuseError, HubError
from hf_fuse.hub import check_push, fetch_snapshot, push, verify_files

TOKEN = os.environ["HF_TOKEN"]


def save_model(folder: Path, seed: int = 0, shard_size: str = "5GB") -> Path:
    """A Llama of 60 000 random parameters with a byte-level tokenizer, saved by transformers itself."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=256, eos_token_id=257, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=shard_size)
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [merge]\n---\n\n# A model\n")
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "single")


@pytest.fixture(scope="module")
def sharded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "sharded", seed=1, shard_size="60KB")


@pytest.fixture
def fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "COMMIT_RETRY_SECONDS", (0, 0))


def uploads(hub: HubServer) -> list:
    return hub.requests("PUT") + hub.requests("POST", "/(commit|branch|create|preupload)")


# Round trips


def test_sharded_push_and_from_pretrained(hub: HubServer, repo_id: str, hub_cache: Path, sharded_folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shards = {path.name for path in sharded_folder.glob("*.safetensors")}
    assert len(shards) > 2
    address = push(sharded_folder, repo_id)
    assert address == f"{hub.url}/{repo_id}"
    assert shards | {"model.safetensors.index.json", "config.json", "tokenizer.json"} <= set(hub.files(repo_id))
    assert len(hub.history(repo_id)) == 2  # the Hub's own first commit, and ours

    here, there = (AutoModelForCausalLM.from_pretrained(ref) for ref in (sharded_folder, repo_id))
    for name, tensor in here.state_dict().items():
        assert torch.equal(tensor, there.state_dict()[name]), name
    assert AutoTokenizer.from_pretrained(repo_id)("héllo").input_ids

    stored = [entry for entry in hub.log if entry.server == "cdn"]
    assert stored and not any("authorization" in entry.headers for entry in stored)
    assert any("authorization" in entry.headers for entry in hub.log)


def test_unchanged_push_makes_no_commit(hub: HubServer, repo_id: str, model_folder: Path) -> None:
    push(model_folder, repo_id)
    head = hub.head(repo_id)
    hub.log.clear()
    push(model_folder, repo_id)
    assert hub.head(repo_id) == head
    assert not hub.requests("POST", "/commit/") and not hub.requests("PUT")


def test_single_file_replaces_shards_in_one_commit(
    hub: HubServer, repo_id: str, model_folder: Path, sharded_folder: Path, hub_cache: Path
) -> None:
    push(sharded_folder, repo_id)
    hub.add_commit(repo_id, {"onnx/model.bin": b"\0other format", "picture.png": b"\0png", "notes.txt": b"mine"})
    before = len(hub.history(repo_id))
    push(model_folder, repo_id)
    assert len(hub.history(repo_id)) == before + 1
    files = set(hub.files(repo_id))
    assert {name for name in files if name.endswith((".safetensors", ".index.json"))} == {"model.safetensors"}
    assert {"onnx/model.bin", "picture.png", "notes.txt", ".gitattributes"} <= files
    folder, commit = fetch_snapshot(repo_id)
    assert commit == hub.head(repo_id)
    assert (folder / "model.safetensors").read_bytes() == (model_folder / "model.safetensors").read_bytes()


def test_stale_tokenizer_and_adapter_files_go(hub: HubServer, repo_id: str, model_folder: Path) -> None:
    old = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"\0", "vocab.txt": b"a", "spiece.model": b"\0",
           "additional_chat_templates/tool.jinja": b"x", "pytorch_model.bin": b"\0", "training_args.bin": b"\0",
           "LICENSE": b"text"}  # fmt: skip
    hub.add_repo(repo_id, old)
    push(model_folder, repo_id)
    assert set(hub.files(repo_id)) & set(old) == {"LICENSE"}


def test_the_pushed_recipe_says_nothing_of_the_disk(hub: HubServer, repo_id: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    text = (
        f"method: linear\nmodels:\n- path: {tmp_path}/Jane Doe/expert\n  weight: 1.0e-05\n- path: org/name\n"
        "- {path: ../mine/other, weight: {learned: ~/learned}}\nparameters: {filter: self_attn.*/x}\n"
    )
    (folder / "targets").mkdir()  # as of a fusion that keeps them
    for path in (folder, folder / "targets"):
        (path / "fuse_recipe.yaml").write_text(text)
    push(folder, repo_id)
    files = hub.files(repo_id)
    pushed = yaml.safe_load(files["fuse_recipe.yaml"].content)
    assert files["targets/fuse_recipe.yaml"].content == files["fuse_recipe.yaml"].content
    models = [
        {"path": "expert", "weight": 1e-5},
        {"path": "org/name"},
        {"path": "other", "weight": {"learned": "learned"}},
    ]
    assert pushed == {"method": "linear", "models": models, "parameters": {"filter": "self_attn.*/x"}}
    assert (folder / "fuse_recipe.yaml").read_text() == text


def test_tokenizer_is_kept_when_the_folder_has_none(hub: HubServer, repo_id: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    hub.add_repo(repo_id, {"tokenizer.json": b"{}", "model-00001-of-00002.safetensors": b"\0"})
    push(folder, repo_id)
    assert "tokenizer.json" in hub.files(repo_id)
    assert "model-00001-of-00002.safetensors" not in hub.files(repo_id)


def test_branch_with_a_slash(hub: HubServer, repo_id: str, model_folder: Path, sharded_folder: Path) -> None:
    push(model_folder, repo_id)
    main = hub.head(repo_id)
    address = push(sharded_folder, repo_id, revision="exp/1")
    assert address.endswith("/tree/exp%2F1")
    assert hub.head(repo_id) == main and "model.safetensors" in hub.files(repo_id)
    assert "model.safetensors" not in hub.files(repo_id, "exp/1")
    assert hub.history(repo_id, "exp/1")[1].sha == main
    assert fetch_snapshot(repo_id, "exp/1")[1] == hub.head(repo_id, "exp/1")
    new_repo = repo_id + "x"
    push(model_folder, new_repo, revision="exp/1")
    assert "config.json" in hub.files(new_repo, "exp/1") and "config.json" not in hub.files(new_repo)


def test_private_repository(hub: HubServer, repo_id: str, model_folder: Path, hub_cache: Path) -> None:
    push(model_folder, repo_id, private=True)
    assert hub.repos[repo_id].private
    with pytest.raises(HubError, match="no such repository on the Hub, or it is private"):
        fetch_snapshot(repo_id, token=hub.token("mallory"))
    assert fetch_snapshot(repo_id)[1] == hub.head(repo_id)


def test_privacy_asked_for_in_the_check_is_kept(hub: HubServer, repo_id: str, model_folder: Path) -> None:
    push(model_folder, repo_id, target=check_push(repo_id, private=True))
    assert hub.repos[repo_id].private


def test_private_push_to_a_public_repository_is_refused(hub: HubServer, repo_id: str, model_folder: Path) -> None:
    hub.add_repo(repo_id)
    with pytest.raises(HubError, match="is public, but a private repository was asked for"):
        push(model_folder, repo_id, private=True)
    assert not uploads(hub)


def test_adapter_round_trip(hub: HubServer, repo_id: str, model_folder: Path, hub_cache: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_folder)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    # PEFT names the local folder of the base in the card, which the Hub refuses.
    with pytest.raises(
        HubError, match=r"does not accept README.md: \"base_model\" with value .*Correct its front matter"
    ):
        push(tmp_path / "adapter", repo_id)
    assert len(hub.history(repo_id)) == 1 and not hub.requests("PUT")
    (tmp_path / "adapter" / "README.md").write_text("---\nlibrary_name: peft\nbase_model: lab/base\n---\n")
    push(tmp_path / "adapter", repo_id)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(hub.files(repo_id))
    folder, _ = fetch_snapshot(repo_id)
    assert (folder / "adapter_config.json").exists()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), repo_id)
    weights = {name: value for name, value in loaded.state_dict().items() if "lora_B" in name}
    assert weights and all(torch.any(value != 0) for value in weights.values())


def test_files_that_never_leave(hub: HubServer, repo_id: str, tmp_path: Path, caplog) -> None:
    folder = save_model(tmp_path / "model")
    (folder / "checkpoint-5").mkdir()
    (folder / ".cache").mkdir()
    names = ["training_args.bin", "optimizer.pt", "weights.pth", "modeling_evil.py", ".env", ".cache/token",
             "model.safetensors.partial", "checkpoint-5/model.safetensors", "rng_state.pth"]  # fmt: skip
    for name in names:
        (folder / name).write_bytes(b"\0secret")
    (folder / "plot.png").write_bytes(b"\0png")
    push(folder, repo_id)
    files = set(hub.files(repo_id))
    assert "plot.png" in files and not files & set(names)
    assert "training_args.bin (a pickle" in caplog.text and "modeling_evil.py (code)" in caplog.text


def test_multipart_upload(hub: HubServer, repo_id: str, sharded_folder: Path) -> None:
    hub.objects.clear()
    hub.multipart_bytes = 10_000
    push(sharded_folder, repo_id)
    assert len(hub.requests("PUT", r"/lfs/\w+/2$")) > 1
    for path in sharded_folder.glob("*.safetensors"):
        assert hub.read(repo_id, path.name) == path.read_bytes()


def test_pages_of_the_file_list(hub: HubServer, repo_id: str, sharded_folder: Path, model_folder: Path) -> None:
    hub.page_size = 2
    push(sharded_folder, repo_id)
    push(model_folder, repo_id)
    assert [name for name in hub.files(repo_id) if name.endswith(".safetensors")] == ["model.safetensors"]


# Access


def test_read_only_token_is_refused_before_any_upload(hub: HubServer, repo_id: str, model_folder: Path) -> None:
    token = hub.token("ada", "read")
    with pytest.raises(HubError, match="token is read-only.*settings/tokens"):
        check_push(repo_id, token=token)
    with pytest.raises(HubError, match="token is read-only"):
        push(model_folder, repo_id, token=token)
    assert repo_id not in hub.repos and not uploads(hub)


def test_organisations(hub: HubServer, repo_id: str, model_folder: Path) -> None:
    name = repo_id.split("/")[1]
    push(model_folder, f"lab/{name}")
    assert "config.json" in hub.files(f"lab/{name}")
    hub.log.clear()
    with pytest.raises(HubError, match="'ada' may only read in 'guild'"):
        check_push(f"guild/{name}")
    with pytest.raises(HubError, match="'ada' is not a member of 'elsewhere'.*ada, lab"):
        check_push(f"elsewhere/{name}")
    assert not uploads(hub)


def test_a_name_alone_means_the_users_namespace(hub: HubServer, repo_id: str, model_folder: Path) -> None:
    target = check_push(repo_id.split("/")[1])
    assert (target.repo_id, target.repo_exists, target.parent_commit) == (repo_id, False, None)
    push(model_folder, repo_id.split("/")[1], target=target)
    assert check_push(repo_id).parent_commit == hub.head(repo_id)


def test_fine_grained_tokens(hub: HubServer, repo_id: str, model_folder: Path) -> None:
    def scoped(kind: str, name: str, *permissions: str) -> str:
        scope = {"entity": {"type": kind, "name": name}, "permissions": ["repo.content.read", *permissions]}
        return hub.token("ada", "fineGrained", orgs={"lab": "write"}, scoped=[scope])

    with pytest.raises(HubError, match=r"no write access \(repo.write\) to 'ada', only to: nothing"):
        check_push(repo_id, token=scoped("user", "ada"))
    with pytest.raises(HubError, match="only to: lab"):
        check_push(repo_id, token=scoped("org", "lab", "repo.write"))
    this_repo = scoped("model", repo_id, "repo.write")
    with pytest.raises(HubError, match="may write to existing repositories only"):
        check_push(repo_id, token=this_repo)
    push(model_folder, repo_id, token=scoped("user", "ada", "repo.write"))
    assert check_push(repo_id, token=this_repo).parent_commit == hub.head(repo_id)


def test_the_hub_has_the_last_word_on_write_access(hub: HubServer, repo_id: str) -> None:
    """An organisation's contributor may write to some of its repositories only: whoami cannot tell, the Hub can."""
    hub.add_repo(repo_id)
    hub.fail("GET", "/auth-check/write", status=403)
    with pytest.raises(HubError, match="exists, but this Hub token may not write to it"):
        check_push(repo_id)
    hub.fail("GET", "/auth-check/write", status=404)  # a Hub that does not know the question
    assert check_push(repo_id).repo_exists


def test_wrong_and_missing_tokens(hub: HubServer, repo_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HubError, match="does not accept the token.*hf auth login"):
        check_push(repo_id, token="hf_expired00000000")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="no Hub token found.*hf auth login"):
        check_push(repo_id)


@pytest.mark.parametrize("name", ["a/b/c", "ada/--x", "ada/x.git", "/tmp/model"])
def test_ids_that_are_none(hub: HubServer, name: str) -> None:
    with pytest.raises(HubError, match="is not a Hub id: expected org/name"):
        check_push(name)
    assert not hub.log


def test_only_branches_can_be_pushed_to(hub: HubServer, repo_id: str) -> None:
    hub.repos[repo_id] = None  # not reached
    with pytest.raises(HubError, match="is a commit, and only a branch"):
        check_push(repo_id, revision="0" * 40)
    head = hub.add_repo(repo_id)
    hub.repos[repo_id].tags["v1"] = head
    with pytest.raises(HubError, match="'v1' is a tag, and only a branch"):
        check_push(repo_id, revision="v1")


# Other people, crashes, bad networks


def test_a_push_in_between_is_explained(hub: HubServer, repo_id: str, model_folder: Path) -> None:
    hub.add_repo(repo_id)
    target = check_push(repo_id)
    theirs = hub.add_commit(repo_id, {"notes.txt": b"theirs"})
    with pytest.raises(HubError, match=f"someone pushed to 'main' since you planned.*now at {theirs[:12]}"):
        push(model_folder, repo_id, target=target)
    assert hub.head(repo_id) == theirs
    push(model_folder, repo_id)  # looks again
    assert {"notes.txt", "config.json"} <= set(hub.files(repo_id))


def test_a_repository_created_in_between_is_not_touched(hub: HubServer, repo_id: str, model_folder: Path) -> None:
    target = check_push(repo_id)
    head = hub.add_repo(repo_id, {"model.safetensors": b"\0theirs"})
    with pytest.raises(HubError, match="someone created the repository since you planned"):
        push(model_folder, repo_id, target=target)
    target = check_push(repo_id, revision="new")
    hub.repos[repo_id].branches["new"] = head
    with pytest.raises(HubError, match="someone created the branch 'new' since you planned"):
        push(model_folder, repo_id, revision="new", target=target)
    assert hub.head(repo_id) == hub.head(repo_id, "new") == head


def test_target_of_another_push_is_refused(hub: HubServer, repo_id: str, model_folder: Path) -> None:
    target = check_push(repo_id)
    with pytest.raises(HubError, match="was checked as"):
        push(model_folder, "ada/another", target=target)
    with pytest.raises(HubError, match="was checked as"):
        push(model_folder, repo_id, revision="dev", target=target)


def test_killed_upload_leaves_the_old_model(
    hub: HubServer, repo_id: str, model_folder: Path, tmp_path: Path, hub_cache: Path
) -> None:
    push(model_folder, repo_id)
    head = hub.head(repo_id)
    new = save_model(tmp_path / "new", seed=7, shard_size="60KB")
    hub.stall_uploads = True
    code = f"from hf_fuse.hub import push; push({str(new)!r}, {repo_id!r})"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        assert hub.stalled.wait(60), "the upload never began"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    hub.stall_uploads = False
    time.sleep(0.1)
    assert hub.head(repo_id) == head
    folder, commit = fetch_snapshot(repo_id)
    assert commit == head
    assert (folder / "model.safetensors").read_bytes() == (model_folder / "model.safetensors").read_bytes()

    push(new, repo_id)
    assert hub.history(repo_id)[1].sha == head
    weights = {name for name in hub.files(repo_id) if name.endswith(".safetensors")}
    assert weights == {path.name for path in new.glob("*.safetensors")}
    for name in weights:
        assert hub.read(repo_id, name) == (new / name).read_bytes()


@pytest.mark.parametrize("landed", [False, True], ids=["refused", "answer lost"])
def test_server_error_on_commit_is_retried(
    hub: HubServer, repo_id: str, model_folder: Path, fast_retries: None, landed: bool, caplog
) -> None:
    hub.fail("POST", "/commit/", status=503, after=landed)
    push(model_folder, repo_id)
    assert len(hub.history(repo_id)) == 2  # never twice
    assert len(hub.requests("POST", "/commit/")) == (1 if landed else 2)
    assert "the Hub answered 503" in caplog.text
    large = [entry.path for entry in hub.requests("PUT")]
    assert len(large) == len(set(large))  # nothing was sent again


def test_server_error_that_stays(hub: HubServer, repo_id: str, model_folder: Path, fast_retries: None) -> None:
    hub.fail("POST", "/commit/", status=503, times=99)
    with pytest.raises(HubError, match="pushing failed: the Hub answered 503.*Try again later"):
        push(model_folder, repo_id)
    assert len(hub.requests("POST", "/commit/")) == 3
    assert len(hub.history(repo_id)) == 1
    hub.clear_faults()
    hub.log.clear()
    push(model_folder, repo_id)
    assert not hub.requests("PUT")  # the weights were stored by the first attempt


def test_lost_answer_and_a_push_on_top(hub: HubServer, repo_id: str, model_folder: Path, fast_retries: None) -> None:
    """The commit fails, and meanwhile somebody else's arrives: that must not be taken for ours."""
    hub.add_repo(repo_id)
    target = check_push(repo_id)
    hub.fail("POST", "/commit/", status=503)
    original = hub_module._has_landed

    def somebody_first(*args) -> bool:
        hub.add_commit(repo_id, {"model.safetensors": b"\0theirs"})
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub_module, "_has_landed", somebody_first)
        with pytest.raises(HubError, match="someone pushed to 'main' since you planned"):
            push(model_folder, repo_id, target=target)
    assert hub.read(repo_id, "model.safetensors") == b"\0theirs"


def test_network_gone(repo_id: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.hf_api as hf_api
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(hf_api.api, "endpoint", "http://127.0.0.1:9")
    for call in (lambda: push(model_folder, repo_id), lambda: fetch_snapshot(repo_id)):
        with pytest.raises(HubError, match=r"no answer from http://127.0.0.1:9.*ConnectError.*Check the network") as e:
            call()
        assert "\n" not in str(e.value)


def test_uploads_survive_a_flaky_store(hub: HubServer, repo_id: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", seed=100)
    hub.fail("PUT", "/lfs/", status=503, times=1)
    push(folder, repo_id)
    assert hub.read(repo_id, "model.safetensors") == (folder / "model.safetensors").read_bytes()


def test_xet_without_a_xet_server(hub: HubServer, repo_id: str, tmp_path: Path) -> None:
    """With Xet on, an endpoint that has none fails in one line that names the switch; nothing is committed."""
    pytest.importorskip("hf_xet")
    folder = save_model(tmp_path / "model", seed=42)
    code = f"""
from hf_fuse.errors import HubError
from hf_fuse.hub import push
try:
    push({str(folder)!r}, {repo_id!r})
except HubError as error:
    print(error)
"""
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_DISABLE_XET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert "pushing failed" in done.stdout and "HF_HUB_DISABLE_XET=1" in done.stdout, done.stdout + done.stderr
    assert len(done.stdout.strip().splitlines()) == 1
    assert len(hub.history(repo_id)) == 1
    assert TOKEN not in done.stdout + done.stderr


# Incomplete folders


def test_incomplete_folders_are_not_pushed(hub: HubServer, repo_id: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        push(tmp_path / "nothing", repo_id)
    folder = save_model(tmp_path / "cut", shard_size="60KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-7])
    with pytest.raises(CheckpointError, match=f"{shard.name}: truncated"):
        push(folder, repo_id)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"missing shard.*{shard.name}"):
        push(folder, repo_id)
    shard.write_bytes(content)
    (folder / "config.json").rename(folder / "config.json.bak")
    with pytest.raises(CheckpointError, match="config.json"):
        push(folder, repo_id)
    (folder / "config.json.bak").rename(folder / "config.json")
    partial = folder.rename(tmp_path / "cut.partial")
    with pytest.raises(CheckpointError, match="unfinished output"):
        push(partial, repo_id)
    partial.rename(folder)
    (tmp_path / "outside.txt").write_text("private")
    (folder / "link.txt").symlink_to(tmp_path / "outside.txt")
    with pytest.raises(CheckpointError, match="link.txt: links to a file outside the folder"):
        push(folder, repo_id)
    assert not hub.log


# Fetching


def test_fetch_takes_what_a_merge_needs(hub: HubServer, repo_id: str, model_folder: Path, hub_cache: Path) -> None:
    push(model_folder, repo_id)
    extra = {"pytorch_model.bin": b"\0pickle", "modeling_x.py": b"import os", "onnx/model.safetensors": b"\0",
             "consolidated.safetensors": b"\0", "additional_chat_templates/tool.jinja": b"x", "big.gguf": b"\0",
             "original/tokenizer.model": b"\0"}  # fmt: skip
    commit = hub.add_commit(repo_id, extra)
    hub.log.clear()
    folder, found = fetch_snapshot(repo_id)
    assert found == commit and folder.name == commit
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names & set(extra) == {"additional_chat_templates/tool.jinja"}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"} <= names
    resolved = [entry.path for entry in hub.requests("*", "/resolve/")]
    assert resolved and all(f"/resolve/{commit}/" in path for path in resolved)
    assert len(hub.requests("GET", rf"/api/models/{repo_id}(/revision/main)?$")) == 1  # the branch is asked for once


def test_fetch_a_branch_that_moves(hub: HubServer, repo_id: str, model_folder: Path, hub_cache: Path) -> None:
    push(model_folder, repo_id)
    _, first = fetch_snapshot(repo_id)
    hub.add_commit(repo_id, {"notes.txt": b"x"})
    assert fetch_snapshot(repo_id)[1] == hub.head(repo_id) != first
    assert fetch_snapshot(repo_id, first)[1] == first


def test_pickles_need_permission(hub: HubServer, repo_id: str, hub_cache: Path) -> None:
    hub.add_repo(repo_id, {"pytorch_model.bin": b"\0pickle", "config.json": b"{}"})
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model.bin\).*--allow-pickle"):
        fetch_snapshot(repo_id)
    assert not hub.requests("*", "pytorch_model.bin")
    folder, _ = fetch_snapshot(repo_id, allow_pickle=True)
    assert (folder / "pytorch_model.bin").read_bytes() == b"\0pickle"


def test_repository_without_weights(hub: HubServer, repo_id: str, hub_cache: Path) -> None:
    hub.add_repo(repo_id, {"config.json": b"{}"})
    with pytest.raises(CheckpointError, match="no safetensors weights found. It has: .*config.json"):
        fetch_snapshot(repo_id)


def test_missing_and_gated_repositories(hub: HubServer, repo_id: str, model_folder: Path, hub_cache: Path) -> None:
    with pytest.raises(HubError, match=f"{repo_id}: no such repository on the Hub"):
        fetch_snapshot(repo_id)
    push(model_folder, repo_id)
    with pytest.raises(HubError, match="has no branch, tag or commit 'nope'"):
        fetch_snapshot(repo_id, "nope")
    with pytest.raises(HubError, match="has no branch, tag or commit '1111"):
        fetch_snapshot(repo_id, "1" * 40)
    hub.repos[repo_id].gated = True
    with pytest.raises(HubError, match=f"is gated. Accept its conditions at {hub.url}/{repo_id}"):
        fetch_snapshot(repo_id, token=hub.token("eve"))


def run_offline(code: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def test_offline_second_load(hub: HubServer, repo_id: str, model_folder: Path) -> None:
    push(model_folder, repo_id)
    folder, commit = fetch_snapshot(repo_id)  # into the cache that subprocesses share
    hub.log.clear()
    done = run_offline(
        "from hf_fuse.hub import fetch_snapshot, check_push\n"
        "from hf_fuse.errors import HubError\n"
        f"print(*fetch_snapshot({repo_id!r}))\n"
        f"print(*fetch_snapshot({repo_id!r}, {commit!r}))\n"
        "for call in (lambda: fetch_snapshot('ada/never'), lambda: check_push('ada/x')):\n"
        "    try: call()\n"
        "    except HubError as error: print(error)\n"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == [f"{folder} {commit}"] * 2
    assert lines[2].startswith("ada/never: not in the cache") and "HF_HUB_OFFLINE is set" in lines[2]
    assert lines[3].startswith("ada/x: pushing needs the Hub, but HF_HUB_OFFLINE is set")
    assert not hub.log  # not one request


def test_no_network_uses_the_cache(
    hub: HubServer, repo_id: str, model_folder: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.hf_api as hf_api
    from huggingface_hub import constants

    push(model_folder, repo_id)
    expected = fetch_snapshot(repo_id)
    for module, name in ((constants, "ENDPOINT"), (hf_api.api, "endpoint")):
        monkeypatch.setattr(module, name, "http://127.0.0.1:9")
    assert fetch_snapshot(repo_id) == expected


def test_partly_cached_is_an_error_offline(hub: HubServer, repo_id: str, sharded_folder: Path) -> None:
    push(sharded_folder, repo_id)
    folder, _ = fetch_snapshot(repo_id)
    lost = sorted(folder.glob("*.safetensors"))[0]
    lost.unlink()
    done = run_offline(f"from hf_fuse.hub import fetch_snapshot; fetch_snapshot({repo_id!r})")
    assert done.returncode != 0
    assert f"{repo_id}: not in the cache, or only in part" in done.stderr


def test_corrupted_download_is_found(hub: HubServer, repo_id: str, model_folder: Path, hub_cache: Path) -> None:
    push(model_folder, repo_id)
    digest = hub.files(repo_id)["model.safetensors"].sha256
    hub.damage(repo_id, "model.safetensors")
    folder, commit = fetch_snapshot(repo_id)  # accepted: the length is right
    with pytest.raises(CheckpointError, match=f"model.safetensors.*sha256:{digest}, the file on disk is sha256") as e:
        verify_files(repo_id, commit, folder)
    assert f"hf cache verify {repo_id}" in str(e.value)


def test_changed_small_file_is_found(hub: HubServer, repo_id: str, model_folder: Path, tmp_path: Path) -> None:
    push(model_folder, repo_id)
    folder, commit = fetch_snapshot(repo_id)
    verify_files(repo_id, commit, folder)
    (tmp_path / "copy").mkdir()
    text = (folder / "config.json").read_text()
    (tmp_path / "copy" / "config.json").write_text(text.replace("silu", "gelu"))
    with pytest.raises(CheckpointError, match="config.json: damaged.*sha1:"):
        verify_files(repo_id, commit, tmp_path / "copy")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds none of the files"):
        verify_files(repo_id, commit, tmp_path / "empty")


def test_cut_download_is_resumed(
    hub: HubServer, repo_id: str, model_folder: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    push(model_folder, repo_id)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.damage(repo_id, "model.safetensors", "cut")
    folder, commit = fetch_snapshot(repo_id)
    verify_files(repo_id, commit, folder)
    ranges = [entry.headers.get("range") for entry in hub.requests("GET", server="cdn")]
    assert any(value and value != "bytes=0-" for value in ranges)


# Secrets


def test_the_token_shows_up_nowhere(
    hub: HubServer, repo_id: str, model_folder: Path, hub_cache: Path, caplog, capfd, fast_retries: None, monkeypatch
) -> None:
    import logging

    caplog.set_level("DEBUG")
    client_log = logging.getLogger("huggingface_hub")
    monkeypatch.setattr(client_log, "propagate", True)
    caplog.set_level("DEBUG", "huggingface_hub")
    failures = []
    push(model_folder, repo_id)
    hub.fail("POST", "/commit/", status=503, times=99)
    actions = [
        lambda: push(model_folder, repo_id + "2"),
        lambda: check_push("elsewhere/x"),
        lambda: fetch_snapshot("ada/none"),
        lambda: check_push(repo_id, token=TOKEN + "x"),
    ]
    for action in actions:
        with pytest.raises(FuseError) as caught:
            action()
        failures.append("".join(traceback.format_exception(caught.value)) + repr(caught.value))
    printed = capfd.readouterr()
    assert TOKEN not in caplog.text + "".join(failures) + printed.out + printed.err
    assert "huggingface_hub" in {record.name.split(".")[0] for record in caplog.records}
    assert TOKEN not in repr(check_push(repo_id))
    assert not any(TOKEN in str(entry.headers) + entry.path for entry in hub.log if entry.server == "cdn")
    assert all("\n" not in str(failure).strip().splitlines()[-1] for failure in failures)


def test_four_pushes_at_once(hub: HubServer, repo_id: str, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    hub.add_repo(repo_id)
    target = check_push(repo_id)
    folders = [save_model(tmp_path / str(seed), seed=seed) for seed in range(4)]

    def attempt(folder: Path) -> str:
        try:
            return push(folder, repo_id, target=target)
        except HubError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(attempt, folders))
    winners = [i for i, outcome in enumerate(outcomes) if outcome.startswith("http")]
    assert len(winners) == 1 and sum("someone pushed" in outcome for outcome in outcomes) == 3
    stored = hub.read(repo_id, "model.safetensors")
    assert stored == (folders[winners[0]] / "model.safetensors").read_bytes()
