"""Nothing asks whether code of a model folder may run: the question would be answered by whatever is piped in."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from hf_fuse.compress.loading import load_compressed
from hf_fuse.compress.path_ensemble import NAME, load_path_ensemble
from hf_fuse.distill.teachers import load_teacher, tokenizer_of
from hf_fuse.errors import FuseError
from hf_fuse.heads.features import EncoderFeatures
from hf_fuse.heads.levi import SETTINGS, WEIGHTS, Levi
from hf_fuse.merge.twin_model import TwinModel
from hf_fuse.merge.twin_restore import FORMAT, KIND, SHARED
from hf_fuse.old_model import _loaded


@pytest.fixture
def asked(monkeypatch):
    """Says yes to every question, as a pipe may do."""
    questions = []
    monkeypatch.setattr("builtins.input", lambda question="": questions.append(question) or "y")
    return questions


@pytest.fixture
def stranger(tmp_path):
    """A folder whose config and tokenizer name classes in a file beside them, which leaves a trace when it is run."""
    folder = tmp_path / "stranger"
    folder.mkdir()
    trace = tmp_path / "it ran"
    (folder / "code.py").write_text(f"from pathlib import Path\nPath({str(trace)!r}).touch()\n", encoding="utf-8")
    names = {"AutoConfig": "code.Config", "AutoModel": "code.Model", "AutoTokenizer": ["code.Tokenizer", None]}
    names |= {"AutoModelForCausalLM": "code.Model", "AutoImageProcessor": "code.Processor"}
    config = {"model_type": "strange", "architectures": ["AutoModelForCausalLM"], "auto_map": names}
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        (folder / name).write_text(json.dumps(config), encoding="utf-8")
    return folder


def of_stranger(folder):
    """A model of transformers that says it comes from there."""
    model = BertModel(
        BertConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    model.name_or_path = model.config._name_or_path = str(folder)
    return model


def levi(folder):
    (folder / SETTINGS).write_text('{"num_labels": 2}', encoding="utf-8")
    save_file({"x": torch.zeros(1)}, folder / WEIGHTS)
    Levi.from_pretrained(folder, of_stranger(folder))


def twin(folder):
    store = folder.parent / "store"
    store.mkdir()
    folder.rename(store / SHARED)
    said = {"kind": KIND, "format": FORMAT, "shared": SHARED, "method": "linear", "tasks": {}}
    (store / "store.json").write_text(json.dumps(said), encoding="utf-8")
    TwinModel.from_store(store)


def path_ensemble(folder):
    save_file(
        {f"vit.{NAME}.scale_PD": torch.ones(3, 2), f"vit.{NAME}.kept_P": torch.ones(3)}, folder / "model.safetensors"
    )
    load_path_ensemble(folder)


def features(folder):
    EncoderFeatures(of_stranger(folder)).transform(["some text"])


def tokenizer(folder):
    assert tokenizer_of(of_stranger(folder)) is None
    raise FuseError("as expected")


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: load_teacher(str(folder), {"trust_remote_code": True}),
        lambda folder: _loaded(str(folder)),
        load_compressed,
        levi,
        twin,
    ]
    + [path_ensemble, features, tokenizer],
    ids=["teacher", "old model", "compressed", "levi", "twin", "path ensemble", "features", "tokenizer"],
)
def test_no_code_of_a_folder_is_run_and_nobody_is_asked(load, stranger, asked):
    with pytest.raises((FuseError, ValueError)):
        load(stranger)
    assert asked == [] and not (stranger.parent / "it ran").exists()
