"""Identity maps predict the cache exactly, trained ones get closer; what was learned is saved and told apart."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import save
from tiny_adapters import gpt2, llama

from hf_fuse.decode import kv_prediction
from hf_fuse.decode.methods.kv_prediction import DESCRIPTION, MAPS, KvPrediction, default_layer_map
from hf_fuse.errors import CheckpointError, FuseError, OutputError

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 64, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)),  # biases
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=8)),  # norm per head
    "olmo2": lambda: transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**SIZES)),  # norm of all heads
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=4)),
}


def family(name: str):
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    with torch.no_grad():  # norms of 1 and biases of 0 would hide that they were forgotten
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def prompts():
    torch.manual_seed(0)
    ids = torch.randint(4, 40, (3, 7))
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, :1] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", FAMILIES)
def test_identity_maps_reproduce_the_model(name, prompts):
    model = family(name)
    predictor = KvPrediction(model, copy.deepcopy(model))
    settings = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    expected, found = model.generate(**prompts, **settings), predictor.generate(**prompts, **settings)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=2e-6, rtol=1e-5)
    for beams in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        torch.manual_seed(0)
        expected = model.generate(**prompts, max_new_tokens=4, **beams)
        torch.manual_seed(0)
        assert torch.equal(predictor.generate(**prompts, max_new_tokens=4, **beams), expected)
    single = prompts["input_ids"][:1, :1]
    assert torch.equal(predictor.generate(single, max_new_tokens=4), model.generate(single, max_new_tokens=4))


def test_the_model_reads_only_the_last_token_of_the_prompt(prompts):
    model, auxiliary = llama(4).eval(), llama(2, seed=1).eval()
    read = {"model": [], "auxiliary": []}
    for name, module in (("model", model.model.layers[0]), ("auxiliary", auxiliary.model.layers[0])):
        module.register_forward_pre_hook(lambda module, args, name=name: read[name].append(args[0].shape[1]))
    predictor = KvPrediction(model, auxiliary)
    for seen in read.values():
        seen.clear()
    predictor.generate(**prompts, max_new_tokens=3, pad_token_id=0, eos_token_id=None)
    assert read == {"model": [1, 1, 1], "auxiliary": [6]}


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_identity_maps_is_the_model_s(side, prompts):
    model = family("qwen3")
    predictor = KvPrediction(model, copy.deepcopy(model))
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    mask = mask if side == "left" else mask.flip(1)
    labels = ids.masked_fill(mask.cumsum(-1) <= 2, -100)
    parts = predictor(ids, labels.masked_fill(mask == 0, -100), mask)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits[:, :-1]
    wanted = labels.masked_fill(mask == 0, -100)[:, 1:]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
    torch.testing.assert_close(parts["language_model_loss"], expected)
    torch.testing.assert_close(parts["auxiliary_loss"], expected)
    assert parts["cache_loss"].item() < 1e-6
    # What lies in the padding has no influence.
    changed = predictor(torch.where(mask == 0, 5, ids), labels.masked_fill(mask == 0, -100), mask)
    torch.testing.assert_close(changed["loss"], parts["loss"])


def test_the_loss_is_that_of_generating_from_the_predicted_cache():
    model, auxiliary = llama(4).eval(), llama(2, seed=1).eval()
    predictor = KvPrediction(model, auxiliary)
    ids = torch.randint(4, 40, (1, 8))
    labels = ids.clone()
    labels[:, :5] = -100
    loss = predictor(ids, labels)["language_model_loss"]
    made = predictor.generate(ids[:, :5], max_new_tokens=1, return_dict_in_generate=True, output_logits=True)
    rest = model(ids[:, 5:], past_key_values=made.past_key_values).logits
    logits = torch.cat([made.logits[0][:, None], rest[:, :-1]], 1)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits[0], ids[0, 5:]))
    # A row without a prompt is cut in the middle.
    halves = ids.clone()
    halves[:, :4] = -100
    both = [predictor(ids, given)["language_model_loss"] for given in (ids, halves)]
    assert torch.equal(*both)


def test_training_moves_maps_and_auxiliary_model_only(tmp_path):
    from datasets import Dataset

    model, auxiliary = llama(3).eval(), llama(2, seed=1)
    predictor = KvPrediction(model, auxiliary)
    before = copy.deepcopy(predictor.state_dict())
    torch.manual_seed(0)
    ids = torch.randint(4, 40, (16, 8))
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    arguments = transformers.TrainingArguments(
        tmp_path / "out", max_steps=20, learning_rate=1e-2, per_device_train_batch_size=16, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True, logging_strategy="no", max_grad_norm=0,
    )  # fmt: skip
    first = predictor(ids, ids)
    transformers.Trainer(predictor, arguments, train_dataset=rows).train()
    last = predictor(ids, ids)
    for part in ("auxiliary_loss", "cache_loss"):
        assert last[part] < 0.9 * first[part]
    for name, value in predictor.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("model."), name

    predictor.save_pretrained(tmp_path / "maps")
    opened = kv_prediction(model, maps=str(tmp_path / "maps"))
    expected = predictor.eval().generate(ids, max_new_tokens=4)
    assert torch.equal(opened.generate(ids, max_new_tokens=4), expected)
    again = kv_prediction(model, copy.deepcopy(auxiliary), maps=str(tmp_path / "maps"))
    assert torch.equal(again.generate(ids, max_new_tokens=4), expected)
    with pytest.raises(OutputError, match="exists"):
        predictor.save_pretrained(tmp_path / "maps")
    with pytest.raises(CheckpointError, match="learned with another model than"):
        kv_prediction(llama(3, seed=9), maps=str(tmp_path / "maps"))
    with pytest.raises(CheckpointError, match="learned with another auxiliary_model than"):
        kv_prediction(model, llama(2, seed=9), maps=str(tmp_path / "maps"))
    with pytest.raises(CheckpointError, match="has no kv_prediction.json"):
        kv_prediction(model, maps=str(tmp_path))
    said = json.loads((tmp_path / "maps" / DESCRIPTION).read_text())
    for change in ({"layer_map": ["0", 0, 1]}, {"layer_map": 1}, {"model": None}):
        (tmp_path / "maps" / DESCRIPTION).write_text(json.dumps(said | change))
        with pytest.raises(CheckpointError, match="damaged|learned with another"):
            kv_prediction(model, auxiliary, maps=str(tmp_path / "maps"))
    (tmp_path / "maps" / DESCRIPTION).write_text(json.dumps(said))
    for content in (b"short", save({"key_maps.0.weight": torch.zeros(1)})):
        (tmp_path / "maps" / MAPS).write_bytes(content)
        with pytest.raises(CheckpointError, match="kv_maps.safetensors is damaged"):
            kv_prediction(model, auxiliary, maps=str(tmp_path / "maps"))


def test_layers_are_paired_as_the_authors_do():
    assert default_layer_map(36, 20) == [layer // 2 for layer in range(32)] + [16, 17, 18, 19]
    assert default_layer_map(4, 2) == [0, 0, 1, 1] and default_layer_map(3, 6) == [0, 2, 4]


def test_models_that_do_not_fit(prompts):
    with pytest.raises(FuseError, match="GPT2LMHeadModel doesn't have k_proj"):
        KvPrediction(gpt2(), llama())
    with pytest.raises(FuseError, match="doesn't have k_proj"):
        KvPrediction(llama(), gpt2())
    with pytest.raises(FuseError, match="expected 2 numbers of layers from 0 to 1"):
        KvPrediction(llama(), llama(), [0, 2])
    predictor = KvPrediction(llama(), llama())
    with pytest.raises(FuseError, match="assistant_model: not possible with a predicted cache"):
        predictor.generate(**prompts, assistant_model=llama())
