"""``hf-fuse train`` from recipe to folder: what it writes loads elsewhere, resumed and parallel runs give the same
numbers, and whatever goes wrong leaves what was there."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import HubServer
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import digests
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ViTConfig,
    ViTForImageClassification,
)

import hf_fuse
from hf_fuse import cli
from hf_fuse.data.stdlib_text import stdlib_domains
from hf_fuse.demo_training import ModelSize, byte_tokenizer, new_model
from hf_fuse.errors import CheckpointError, FuseError, OutputError, RecipeError
from hf_fuse.hub import push
from hf_fuse.train import train
from hf_fuse.trainer import FuseTrainer
from hf_fuse.training_launch import _failure

LENGTH = 48


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base`` (a Llama), ``vit``, and rows of real text with and without labels."""
    folder = tmp_path_factory.mktemp("train")
    tokenizer = byte_tokenizer(LENGTH)
    new_model(ModelSize(hidden=16, feed_forward=32, layers=2, heads=2, context=LENGTH), tokenizer, 0).save_pretrained(
        folder / "base"
    )
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    vit = ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
        num_channels=1,
    )  # fmt: skip
    ViTForImageClassification(vit).save_pretrained(folder / "vit")
    source, docs, _ = stdlib_domains(source_characters=100_000)
    texts = [document[start : start + LENGTH - 2] for document in docs.train for start in range(0, 800, LENGTH)]
    write_rows(folder / "docs.jsonl", [{"text": text} for text in texts if text][:48])
    lines = [
        {"text": document[:40], "label": name}
        for name, domain in (("code", source), ("words", docs))
        for document in domain.train[:16]
    ]
    write_rows(folder / "kinds.jsonl", lines)
    return folder


def write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def recipe_of(home: Path, adapter: dict | None = None, **training) -> dict:
    settings = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 2,
                "save_steps": 2, "lr_scheduler_type": "constant", "use_cpu": True}  # fmt: skip
    adapter = {"adapter": adapter} if adapter else {}
    return {"model": str(home / "base"), **adapter, "data": str(home / "docs.jsonl"), "train": settings | training}


LORA = {"method": "lora", "r": 4, "target_modules": ["q_proj", "up_proj"], "lora_dropout": 0.1}
MIXLORA = {"method": "mixlora", "r": 2, "num_experts": 3, "target_modules": ["gate_proj", "up_proj", "down_proj"]}


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


# What a run makes


def test_an_adapter_that_loads_elsewhere_and_can_be_made_again(home, tmp_path):
    recipe = recipe_of(home, MIXLORA, objectives={"router_z": 1e-3}, max_steps=12)
    recipe["data"] = {"train": recipe["data"], "eval": str(home / "docs.jsonl"), "max_length": LENGTH}
    result = train(recipe, output=tmp_path / "out")
    assert result.steps == 12 and result.output == tmp_path / "out"
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    batch = AutoTokenizer.from_pretrained(tmp_path / "out")(["import torch"], return_tensors="pt")
    before = base(**batch).logits
    loaded = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    direct = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()  # finds the base by itself
    with torch.no_grad():
        after = loaded(**batch).logits
        assert torch.equal(direct(**batch).logits, after) and (after - before).abs().max() > 1e-2
    assert result.trainable == sum(tensor.numel() for tensor in adapter_of(tmp_path / "out").values())
    assert result.figures["eval_perplexity"] == pytest.approx(torch.tensor(result.figures["eval_loss"]).exp().item())
    names = {path.name for path in result.output.iterdir()}
    assert {"README.md", "fuse_recipe.yaml", "train_results.json", "loss.png", "expert_usage.png"} <= names
    assert "training_args.bin" not in names and not (tmp_path / "out.partial").exists()
    card = (result.output / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model_relation"] == "adapter"
    assert "import hf_fuse" in card and str(tmp_path) not in card and str(home) not in card
    train(result.output / "fuse_recipe.yaml", output=tmp_path / "again")
    assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == (
        result.output / "adapter_model.safetensors"
    ).read_bytes()


def test_a_whole_model(home, tmp_path):
    result = train(recipe_of(home, max_steps=20), output=tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(result.output)
    assert model.config.use_cache and result.trainable == model.num_parameters()
    ids = torch.tensor([AutoTokenizer.from_pretrained(result.output)("Return a list of ")["input_ids"]])
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(home / "base")
        assert model(ids, labels=ids).loss < base(ids, labels=ids).loss - 0.5
    card = (result.output / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model_relation"] == "finetune"
    assert "AutoModelForCausalLM.from_pretrained" in card


def test_what_is_replayed_is_not_forgotten(home, tmp_path):
    rows = map(json.loads, (home / "kinds.jsonl").read_text().splitlines())
    write_rows(tmp_path / "code.jsonl", [{"text": row["text"]} for row in rows if row["label"] == "code"])
    data = {"train": str(tmp_path / "code.jsonl"), "eval": str(home / "docs.jsonl"), "format": "text"}
    recipe = recipe_of(home, max_steps=8, eval_strategy="no", save_strategy="no") | {"data": data}
    plain = train(recipe, output=tmp_path / "plain").figures["eval_loss"]
    recipe["data"] = data | {"replay": str(home / "docs.jsonl")}
    recipe["train"] |= {"objectives": {"replay": 1.0}}
    result = train(recipe, output=tmp_path / "replayed")
    assert result.figures["eval_loss"] < plain - 0.1
    card = (tmp_path / "replayed" / "README.md").read_text()
    assert "docs.jsonl" in card and str(home) not in card


def test_images_that_stay_comparable_with_an_old_model(home, tmp_path):
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    for index in range(8):
        folder = tmp_path / "pictures" / ("dark", "light")[index % 2]
        folder.mkdir(exist_ok=True)
        Image.new("L", (8, 8), 30 + 180 * (index % 2) + index).save(folder / f"{index}.png")
    recipe = {"model": str(home / "vit"), "data": str(tmp_path / "pictures"),
              "train": {"objectives": {"bct": 1.0}, "old_model": str(home / "vit"), "max_steps": 2, "use_cpu": True,
                        "logging_steps": 1, "save_strategy": "no"}}  # fmt: skip
    train(recipe, output=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "old_model: vit" in card and str(home) not in card


def test_going_on_with_an_adapter(home, tmp_path):
    train(recipe_of(home, LORA, max_steps=2), output=tmp_path / "first")
    recipe = recipe_of(home, max_steps=2) | {"model": f"{home / 'base'}"}
    recipe["model"] = {"path": str(home / "base"), "adapter": str(tmp_path / "first")}
    train(recipe, output=tmp_path / "second")
    first, second = adapter_of(tmp_path / "first"), adapter_of(tmp_path / "second")
    assert first.keys() == second.keys()
    assert 0 < max((second[name] - first[name]).abs().max() for name in first) < 0.1


def test_text_classes(home, tmp_path):
    recipe = recipe_of(home, LORA | {"target_modules": ["q_proj", "v_proj"]}, max_steps=40)
    recipe["data"] = {"train": str(home / "kinds.jsonl"), "eval": str(home / "kinds.jsonl")}
    result = train(recipe, {"train.eval_strategy": "no"}, output=tmp_path / "out")
    assert result.figures["eval_accuracy"] > 0.7 and set(result.figures) >= {"eval_macro_f1", "train_loss"}
    base = AutoModelForSequenceClassification.from_pretrained(home / "base", num_labels=2)
    model = PeftModel.from_pretrained(base, result.output).eval()
    rows = [json.loads(line) for line in (home / "kinds.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(result.output)
    with torch.no_grad():
        said = [int(model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax()) for row in rows]
    right = [number == ["code", "words"].index(row["label"]) for number, row in zip(said, rows)]
    assert sum(right) / len(right) == pytest.approx(result.figures["eval_accuracy"])
    recipe["model"], recipe["adapter"] = {"path": recipe["model"], "adapter": str(result.output)}, None
    recipe["train"] |= {"max_steps": 1, "learning_rate": 0.0}
    further = train(recipe, {"train.eval_strategy": "no"}, output=tmp_path / "further")
    assert further.figures["eval_accuracy"] == result.figures["eval_accuracy"]  # its head came along


def test_image_classes(home, tmp_path):
    import datasets
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits(n_class=3)
    pictures = [Image.fromarray((image * 15.9).astype("uint8")) for image in digits.images[:200]]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["0", "1", "2"])})
    datasets.Dataset.from_dict({"image": pictures, "label": digits.target[:200]}, features).save_to_disk(
        tmp_path / "digits"
    )
    recipe = recipe_of(home, {"method": "lora", "target_modules": ["q_proj", "v_proj"]}, max_steps=60)
    recipe |= {"model": str(home / "vit"), "data": {"train": str(tmp_path / "digits"), "eval_fraction": 0.25}}
    recipe["train"]["per_device_train_batch_size"] = 25
    result = train(recipe, output=tmp_path / "out")
    assert result.figures["eval_accuracy"] > 0.8
    saved = adapter_of(tmp_path / "out")
    assert any("classifier" in name for name in saved)  # the new head is saved with the adapter
    whole = train(recipe | {"adapter": None}, output=tmp_path / "whole")
    assert AutoModelForImageClassification.from_pretrained(whole.output).config.id2label == {0: "0", 1: "1", 2: "2"}


def test_the_example_recipe_and_its_twin_in_python_give_the_same_adapter(tmp_path, monkeypatch):
    import importlib.util

    recipes = Path(__file__).parents[1] / "recipes"
    spec = importlib.util.spec_from_file_location("mixlora_finetune", recipes / "mixlora_finetune.py")
    twin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(twin)
    monkeypatch.chdir(tmp_path)
    twin.make_example(twin.EXAMPLE, base_steps=2, rows=40)
    figures = twin.fine_tune(twin.EXAMPLE, Path("by-hand"))
    result = train(recipes / "mixlora.yaml")
    assert result.steps == 5 and result.figures["eval_loss"] == pytest.approx(figures["eval_loss"], abs=1e-6)
    by_hand, by_recipe = adapter_of(Path("by-hand")), adapter_of(result.output)
    assert by_hand.keys() == by_recipe.keys()
    assert all(torch.equal(value, by_recipe[name]) for name, value in by_hand.items())


# Interrupted, resumed, parallel


class Stop(Exception):
    pass


def stopping_at(step: int, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] = Stop) -> None:
    genuine = FuseTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise error
        return genuine(self, *args, **kwargs)

    monkeypatch.setattr(FuseTrainer, "training_step", training_step)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(home, tmp_path, monkeypatch):
    recipe, output = recipe_of(home, LORA, max_steps=6, lr_scheduler_type="linear"), tmp_path / "out"
    whole = train(recipe, output=tmp_path / "whole")
    train(recipe_of(home, LORA, max_steps=1), output=output)
    old = digests(output)
    with monkeypatch.context() as patch:
        stopping_at(5, patch)
        with pytest.raises(Stop):
            train(recipe, output=output, overwrite=True)
    assert digests(output) == old  # the old output is as it was, and the checkpoints lie beside it
    assert {path.name for path in (tmp_path / "out.partial").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    with pytest.raises(OutputError, match="exists"):
        train(recipe, output=output)
    with pytest.raises(RecipeError, match='adapter differs .* "r": 4.* "r": 8'):
        train(recipe, {"adapter.r": 8}, output=output, resume=True)
    (tmp_path / "out.partial" / "checkpoint-5").mkdir()  # as a kill while saving leaves it
    result = train(recipe, output=output, resume=True)
    assert result.steps == 6 and not (tmp_path / "out.partial").exists()
    expected, found = adapter_of(whole.output), adapter_of(output)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_an_unfinished_run_is_neither_dropped_nor_taken_up_unasked(home, tmp_path, monkeypatch):
    recipe, output = recipe_of(home, LORA), tmp_path / "out"
    with pytest.raises(OutputError, match="no checkpoint to resume from"):
        train(recipe, output=output, resume=True)
    with monkeypatch.context() as patch:
        stopping_at(3, patch)
        with pytest.raises(Stop):
            train(recipe, output=output)
    with pytest.raises(OutputError, match="unfinished run left checkpoint-2 .*--resume.*--overwrite"):
        train(recipe, output=output)
    assert train(recipe, output=output, overwrite=True).steps == 4
    # A finished run can be taken further.
    assert train(recipe, {"train.max_steps": 6}, output=output, resume=True).steps == 6


def test_ctrl_c_says_what_is_kept(home, tmp_path, monkeypatch, capsys):
    stopping_at(3, monkeypatch, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        hf_fuse.train(recipe_of(home, LORA), output=tmp_path / "out")
    assert "out.partial/checkpoint-2 is kept; --resume goes on from it" in capsys.readouterr().err


def test_a_failure_before_the_first_checkpoint_leaves_nothing(home, tmp_path, monkeypatch):
    stopping_at(1, monkeypatch)
    with pytest.raises(Stop):
        train(recipe_of(home, LORA), output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from hf_fuse.train import train
from hf_fuse.trainer import FuseTrainer
from hf_fuse.training_launch import _failure
genuine = FuseTrainer.training_step
def training_step(self, *args, **kwargs):
    if self.state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return genuine(self, *args, **kwargs)
FuseTrainer.training_step = training_step
train(sys.argv[1], output=sys.argv[2], overwrite=True)
"""


def test_a_killed_run_can_be_resumed(home, tmp_path):
    recipe, output = recipe_of(home, LORA), tmp_path / "out"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train(recipe, output=output)
    whole, old = adapter_of(output), digests(output)
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "recipe.yaml"), str(output)])
    assert done.returncode == -signal.SIGKILL
    assert digests(output) == old
    train(recipe, output=output, resume=True)
    assert digests(output) != old and not list(tmp_path.glob("*out.*"))
    assert all(torch.equal(value, whole[name]) for name, value in adapter_of(output).items())


def test_two_processes_train_as_one(home, tmp_path, capfd):
    recipe = recipe_of(home, LORA | {"lora_dropout": 0.0})
    one = train(recipe, output=tmp_path / "one")
    capfd.readouterr()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["--output", str(tmp_path / "two"), "--num_processes=2", "--train.per_device_train_batch_size", "4"]
    cli.app(["train", str(tmp_path / "recipe.yaml"), *arguments], standalone_mode=False)
    said = capfd.readouterr()
    assert [line.split(":")[0] for line in said.out.splitlines()] == [
        "trained",
        "steps",
        "trainable parameters",
        "train loss",
    ]
    assert said.err.count("step 2/4: loss") == 1 and said.err.count("training 640 of") == 1
    assert "Warning" not in said.err and "Traceback" not in said.err
    expected, found = adapter_of(one.output), adapter_of(tmp_path / "two")
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-6), name
    results = json.loads((tmp_path / "two" / "train_results.json").read_text())
    assert results["train_loss"] == pytest.approx(one.figures["train_loss"], rel=1e-5)


def test_a_killed_process_is_named_and_one_that_spoke_is_not_repeated():
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    def failure(exitcode: int) -> FuseError:
        return _failure(ChildFailedError("train", {1: ProcessFailure(1, 123, exitcode, "")}))

    assert "process 1 of the training was killed (SIGKILL)" in str(failure(-9))
    assert failure(1).said_by_lead and not hasattr(failure(-9), "said_by_lead")


def test_the_number_of_processes_is_checked(home, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(RecipeError, match=r"num_processes is 2, but 1 process\(es\) were started"):
        train(recipe_of(home, LORA) | {"num_processes": 2}, output=tmp_path / "out")


# The Hub


def test_a_pushed_adapter_loads_by_its_id(home, tmp_path, hub: HubServer, repo_id: str, hub_cache):
    base_id = f"{repo_id}-base"
    push(home / "base", base_id)
    recipe = recipe_of(home, MIXLORA) | {"model": base_id}
    result = train(recipe, output=tmp_path / "out", push=repo_id)
    assert result.address == f"{hub.url}/{repo_id}"
    files = set(hub.files(repo_id))
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "fuse_recipe.yaml"} <= files
    assert not any(
        name.startswith("checkpoint") or name.endswith((".bin", ".pt", "trainer_state.json")) for name in files
    )
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        direct = AutoModelForCausalLM.from_pretrained(repo_id).eval()(ids).logits
        base = AutoModelForCausalLM.from_pretrained(base_id)
        assert torch.equal(PeftModel.from_pretrained(base, repo_id).eval()(ids).logits, direct)
        assert not torch.equal(AutoModelForCausalLM.from_pretrained(base_id)(ids).logits, direct)
    metadata = yaml.safe_load((result.output / "README.md").read_text().split("---")[1])
    assert metadata["base_model"] == [base_id] and metadata["library_name"] == "peft"
    recipe = yaml.safe_load((result.output / "fuse_recipe.yaml").read_text())
    assert recipe["model"] == {"path": base_id, "revision": hub.head(base_id)} and "push" not in recipe


def test_a_push_that_would_be_refused_is_found_before_training(home, tmp_path, hub: HubServer):
    with pytest.raises(FuseError, match="guild"):
        train(recipe_of(home, LORA), output=tmp_path / "out", push="guild/model")
    assert list(tmp_path.iterdir()) == []


# What can be wrong with a recipe


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"model": "nowhere/at/all"}, CheckpointError, "no such folder, and not a Hub id"),
        ({"adapter": LORA | {"target_modules": ["w_proj"]}}, RecipeError, "adapter: .*w_proj.* not found"),
        ({"adapter": LORA | {"lora_alfa": 1}}, RecipeError, "unknown key 'lora_alfa'"),
        ({"data": "nowhere.jsonl"}, FuseError, "nowhere.jsonl: no such file"),
        (
            {"train": {"eval_strategy": "steps", "eval_steps": 2}},
            RecipeError,
            "eval_strategy needs data to evaluate on",
        ),
        ({"train": {"objectives": {"nonsense": 1}}}, RecipeError, "nonsense"),
        ({"train": {"objectives": {"replay": 0.1}}}, RecipeError, "replay needs data.replay"),
        ({"data": {"train": "DOCS", "replay": "DOCS"}}, RecipeError, "Add train.objectives.replay: 0.1"),
        ({"model": {"path": "BASE", "adapter": "BASE"}, "adapter": None}, CheckpointError, "is no adapter"),
        ({"output": None}, RecipeError, "output: say which folder to make"),
    ],
)
def test_a_mistake_is_found_before_any_work(change, kind, message, home, tmp_path):
    recipe = recipe_of(home, LORA) | {"output": str(tmp_path / "out")} | change
    if isinstance(recipe["model"], dict):
        recipe["model"] = {key: str(home / "base") for key in recipe["model"]}
    with pytest.raises(kind, match=message) as caught:
        train(recipe)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_a_model_of_another_kind(home, tmp_path):
    with pytest.raises(CheckpointError, match="is a ViTForImageClassification, but the data trains a causal language"):
        train(recipe_of(home) | {"model": str(home / "vit")}, output=tmp_path / "out")


def test_a_run_that_diverges_saves_nothing(home, tmp_path, monkeypatch):
    genuine = FuseTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        return genuine(self, *args, **kwargs) * float("nan")

    monkeypatch.setattr(FuseTrainer, "compute_loss", compute_loss)
    with pytest.raises(FuseError, match="no longer finite after training"):
        train(recipe_of(home, LORA, max_steps=1, save_strategy="no"), output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_weights_so_large_that_the_loss_is_not_finite(home, tmp_path):
    recipe = recipe_of(home, LORA, max_steps=2, save_strategy="no", learning_rate=1e30)
    recipe["data"] = {"train": recipe["data"], "eval": recipe["data"]}
    with pytest.raises(FuseError, match="eval_loss: is no longer finite after training"):
        train(recipe, output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_another_base(home, tmp_path):
    train(recipe_of(home, LORA, max_steps=1), output=tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    tokenizer.save_pretrained(tmp_path / "wider")
    new_model(ModelSize(hidden=32, layers=1, heads=2, context=LENGTH), tokenizer, 0).save_pretrained(tmp_path / "wider")
    recipe = recipe_of(home) | {"model": f"{tmp_path / 'wider'}+{tmp_path / 'adapter'}"}
    with pytest.raises(CheckpointError, match="adapter: is no adapter for .*wider"):
        train(recipe, output=tmp_path / "out")


def test_no_perplexity_of_smoothed_labels(home, tmp_path):
    recipe = recipe_of(home, LORA, max_steps=1, label_smoothing_factor=0.3)
    recipe["data"] = {"train": recipe["data"], "eval": recipe["data"]}
    assert "eval_perplexity" not in train(recipe, output=tmp_path / "out").figures


def test_a_dry_run_checks_and_leaves_nothing(home, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(home, LORA)))
    arguments = ["train", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "out"), "--dry-run"]
    cli.app([*arguments, "--adapter.r", "2"], standalone_mode=False)
    said = capsys.readouterr()
    assert said.out == "" and "training 320 of" in said.err and "48 rows" in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    with pytest.raises(RecipeError, match="--adaptor.r: no such option or recipe key. Did you mean 'adapter'"):
        cli.app([*arguments, "--adaptor.r", "2"], standalone_mode=False)
    with pytest.raises(
        FuseError, match="objectives.router_z: needs the logits of routers, but LlamaForCausalLM has none"
    ):
        cli.app([*arguments, "--adapter", "null", "--train.objectives", "{router_z: 0.1}"], standalone_mode=False)
