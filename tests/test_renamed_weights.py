"""Models that transformers saves under other names than their own: what is read back is what was saved."""

import json

import pytest
import torch
from attached_cases import images, vit
from safetensors.torch import load_file
from training_cases import three_steps, train
from transformers import ViTForImageClassification

from hf_fuse import FuseConfig, FuseTrainer
from hf_fuse.renamed_weights import restore_renamed

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def trained(folder, **settings):
    args = FuseConfig(**three_steps(folder, 8, 1) | {"save_strategy": "steps", "save_steps": 1} | settings)
    trainer = FuseTrainer(vit(), args, train_dataset=images(), eval_dataset=images(5))
    return trainer, train


def test_files_have_other_names(tmp_path):
    vit().save_pretrained(tmp_path)
    assert not load_file(tmp_path / "model.safetensors").keys() <= vit().state_dict().keys()


@pytest.mark.parametrize("shard", ["1GB", "10KB"])
def test_weights_are_restored(shard, tmp_path):
    vit(5).save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (shard == "10KB")
    model = vit()
    restore_renamed(model, tmp_path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in vit(5).state_dict().items())


def test_a_resumed_vit_goes_on(tmp_path):
    trainer, run = trained(tmp_path)
    logs, whole = run(trainer)
    trainer, run = trained(tmp_path)
    resumed_logs, resumed = run(trainer, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed_logs[-1]["eval_loss"] == pytest.approx(logs[-1]["eval_loss"], rel=1e-6)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_the_best_vit_is_loaded_at_the_end(tmp_path):
    rate = {"learning_rate": 5.0}  # so that it gets worse
    trainer, run = trained(tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, **rate)
    logs, last = run(trainer)
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    best = ViTForImageClassification.from_pretrained(state["best_model_checkpoint"]).state_dict()
    assert state["best_global_step"] < 3
    assert all(torch.equal(value, best[name]) for name, value in last.items())
