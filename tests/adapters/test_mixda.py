"""Mixtures of domain adapters: the mixture, its gate, both stages."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from checks_adapters import batch, logits, move
from peft import PeftModel, get_peft_model
from tiny_adapters import bert, gpt2, llama, vit
from torch import nn

from hf_fuse import FuseConfig, FuseError, MixDaConfig
from hf_fuse.adapters.mixda import MixDaLayer
from hf_fuse.adapters.mixda_training import MixDaTrainer, load_domain_adapters, parameter_groups, recorded_outputs
from hf_fuse.losses.old_knowledge import old_knowledge

MASKED = transformers.BertForMaskedLM


def opt():
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=40, word_embed_proj_dim=16,
        max_position_embeddings=32,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def config(**settings) -> MixDaConfig:
    return MixDaConfig(**{"num_domains": 2, "gate_size": 16, "down_scale": 4} | settings)


def adapted(base, **settings):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The gate reads the last token")
        return move(get_peft_model(base, config(**settings))).eval()


def layers_of(model) -> list[MixDaLayer]:
    return [module for module in model.modules() if isinstance(module, MixDaLayer)]


def padded() -> dict[str, torch.Tensor]:
    inputs = batch(rows=3, length=7)
    for row, length in enumerate((7, 4, 1)):
        inputs["attention_mask"][row, length:] = 0
        inputs["input_ids"][row, length:] = 0
    return inputs


def test_output_is_the_mixture_of_the_paper():
    torch.manual_seed(0)
    layer = MixDaLayer(nn.Linear(12, 4), "layer")
    layer.update_layer("default", config(gate_layers=2))
    layer.set_adapter("default")
    move(layer).eval()
    u = torch.randn(2, 5, 12)
    domains, gate = layer.mixda_domain["default"], layer.mixda_gate["default"]
    hidden = u[:, -1]
    for number in range(2):
        hidden = F.relu(F.linear(hidden, getattr(gate, f"weight_{number}"), getattr(gate, f"bias_{number}")))
    g = F.linear(hidden, gate.weight_2, gate.bias_2).softmax(-1)  # (B, N + 1)
    expected = g[:, 2, None, None] * layer.base_layer(u)
    for j in range(2):
        inner = F.gelu(F.linear(u, domains.down_weight[j], domains.down_bias[j]))
        expected = expected + g[:, j, None, None] * F.linear(inner, domains.up_weight[j], domains.up_bias[j])
    torch.testing.assert_close(layer(u), expected)
    assert domains.down_weight.shape == (2, 3, 12)  # 12 / down_scale


def test_zero_adapters_and_a_gate_for_the_original_are_the_base():
    model = get_peft_model(bert(MASKED), config()).eval()
    base = logits(bert(MASKED))
    # At a random gate the original counts for about a third: not the base.
    assert (logits(model) - base).abs().max() > 5e-4
    for layer in layers_of(model):
        assert layer.mixda_domain["default"].up_weight.abs().max() == 0
        gate = layer.mixda_gate["default"]
        gate.weight_3.data.zero_()
        gate.bias_3.data = torch.tensor([-200.0, -200.0, 0.0])
    assert torch.equal(logits(model), base)
    assert torch.equal(logits(get_peft_model(bert(MASKED), config(gate="none"))), base)


def test_without_a_gate_outputs_are_added():
    layer = MixDaLayer(nn.Linear(12, 4), "layer")
    layer.update_layer("default", config(gate="none"))
    layer.set_adapter("default")
    move(layer)
    u = torch.randn(2, 5, 12)
    domains = layer.mixda_domain["default"]
    expected = layer.base_layer(u)
    for j in range(2):
        inner = F.gelu(F.linear(u, domains.down_weight[j], domains.down_bias[j]))
        expected = expected + F.linear(inner, domains.up_weight[j], domains.up_bias[j])
    torch.testing.assert_close(layer(u), expected)


@pytest.mark.parametrize(
    ("make", "ends"),
    [
        (llama, "mlp.down_proj"),
        (gpt2, "mlp.c_proj"),
        (bert, "output.dense"),
        (opt, "fc2"),
        (t5, "DenseReluDense.wo"),
        (vit, "mlp.fc2"),
    ],
)
def test_finds_the_outputs_of_feed_forward_layers(make, ends):
    model = adapted(make())
    keys = [layer.key for layer in layers_of(model)]
    assert len(keys) == {t5: 4, vit: 1}.get(make, 2) and all(key.endswith(ends) for key in keys)
    assert not any("attention" in key for key in keys)
    assert {layer.size for layer in layers_of(model)} <= {(24, 16), (36, 16), (64, 16)}


def test_models_without_known_layers_are_refused():
    with pytest.raises(ValueError, match="Sequential has no feed-forward layers of a known kind"):
        get_peft_model(nn.Sequential(nn.Linear(3, 3)), config())


@pytest.mark.parametrize("make", [llama, gpt2, lambda: bert(MASKED), opt])
def test_padding_does_not_matter(make):
    """The gate reads the last token that is not padding, also of a batch or sequence of one, and on either side."""
    model, inputs = adapted(make()), padded()
    with torch.no_grad():
        whole = model(**inputs).logits
        for row, length in enumerate((7, 4, 1)):
            alone = {name: value[row : row + 1, :length] for name, value in inputs.items()}
            found = model(**alone).logits
            assert found.shape == (1, length, 40)
            torch.testing.assert_close(found, whole[row : row + 1, :length], rtol=1e-4, atol=1e-5)
    layer, gates = layers_of(model)[0], []
    layer.mixda_gate["default"].register_forward_hook(lambda module, args, output: gates.append(output))
    model(**inputs)
    model(**inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])})
    assert not torch.allclose(gates[0][1], gates[1][1])


def test_padding_of_encoder_and_decoder():
    model, inputs = adapted(t5()), padded()
    targets = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    with torch.no_grad():
        whole = model(**inputs, labels=targets).logits
        alone = {name: value[1:2, :4] for name, value in inputs.items()}
        found = model(**alone, labels=targets[1:2, :4]).logits
    torch.testing.assert_close(found, whole[1:2, :4], rtol=1e-4, atol=1e-5)


def test_with_a_cache_the_mask_covers_more_than_the_input():
    model, inputs = adapted(llama()), batch(rows=2, length=6)
    inputs["attention_mask"][0, :2] = 0  # left padding, as for generation
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert tokens.shape == (2, 9)
    layer = layers_of(model)[0]
    seen = []
    layer.mixda_gate["default"].register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert seen == [(2, 36)] * 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_two_forward_passes(reentrant):
    """Layers run again after another batch, with other padding, went through the model."""

    def gradients(checkpointing: bool):
        model = adapted(llama()).train()
        for layer in layers_of(model):
            layer.mixda_gate["default"].dropout = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        one, other = padded(), batch(rows=3, length=7, seed=5)
        other["attention_mask"][:, 5:] = 0
        (model(**one).logits.square().mean() + model(**other).logits.square().mean()).backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for plain, checkpointed in zip(gradients(False), gradients(True)):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-7)


def test_a_gate_that_would_tell_the_answers_is_warned_of():
    with pytest.warns(UserWarning, match="gate='token'"):
        get_peft_model(llama(), config())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(llama(), config(gate="token"))
        get_peft_model(bert(MASKED), config())


def test_a_gate_per_token_sees_no_later_token():
    model, inputs = adapted(llama(), gate="token"), batch(rows=1, length=6)
    with torch.no_grad():
        whole = model(**inputs).logits
        short = model(**{name: value[:, :3] for name, value in inputs.items()}).logits
    torch.testing.assert_close(short, whole[:, :3], rtol=1e-5, atol=1e-6)


def test_old_knowledge_is_the_mean_squared_difference():
    model, inputs = adapted(bert(MASKED)), padded()
    with recorded_outputs(model) as pairs:
        model(**inputs)
    assert len(pairs) == 2
    kept = inputs["attention_mask"].bool()
    expected = sum((mixed - original)[kept].square().mean() for mixed, original in pairs) / 2
    found = old_knowledge(*zip(*pairs), inputs["attention_mask"])
    torch.testing.assert_close(found, expected)
    assert found > 0 and found.requires_grad
    # The paper's code compares a tensor with itself.
    same = get_peft_model(bert(MASKED), config(gate="none")).eval()
    with recorded_outputs(same) as pairs:
        same(**inputs)
    assert old_knowledge(*zip(*pairs)) == 0


def test_recording_needs_gradients_and_a_model_that_runs():
    model = adapted(bert(MASKED)).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(FuseError, match="use_reentrant"), recorded_outputs(model):
        model(**padded())
    with pytest.raises(FuseError, match="No active domain adapter"), recorded_outputs(model):
        pass
    assert all(layer.recorded is None for layer in layers_of(model))


class Facts(torch.utils.data.Dataset):
    """Masked facts of a domain, and generic text beside them."""

    def __len__(self):
        return 16

    def __getitem__(self, number):
        random = torch.Generator().manual_seed(number)
        ids = torch.randint(5, 40, (8,), generator=random)
        masked, labels = ids.clone(), torch.full((8,), -100)
        labels[3:5] = torch.tensor([7, 9])  # the knowledge: always these two
        masked[3:5] = 4
        generic = torch.randint(5, 40, (10,), generator=random)
        return {
            "input_ids": masked, "attention_mask": torch.ones(8, dtype=torch.long), "labels": labels,
            "generic_input_ids": generic, "generic_attention_mask": torch.ones(10, dtype=torch.long),
        }  # fmt: skip


def train_domain(weight: float, folder, steps: int = 12):
    """Stage one; the model and its logs."""
    base = bert(MASKED)
    base.get_input_embeddings().weight.data *= 30  # also of the head, which could not tell tokens apart otherwise
    model = get_peft_model(base, config(num_domains=1, gate="none", layers_to_transform=[1]))
    assert [layer.key for layer in layers_of(model)] == ["bert.encoder.layer.1.output.dense"]
    arguments = FuseConfig(
        output_dir=str(folder), objectives={"task": 0.5, "old_knowledge": weight}, max_steps=steps, seed=0,
        per_device_train_batch_size=8, logging_steps=steps // 2, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=0.02, gate_lr=0.05))
    trainer = MixDaTrainer(model, arguments, train_dataset=Facts(), optimizers=(optimizer, None))
    trainer.train()
    return model, [entry for entry in trainer.state.log_history if "task_loss" in entry]


def test_stage_one_learns_facts_and_keeps_the_rest(tmp_path):
    _, free = train_domain(1e-9, tmp_path)
    _, kept = train_domain(50.0, tmp_path)
    assert free[-1]["task_loss"] < 0.8 * free[0]["task_loss"] and kept[-1]["task_loss"] < kept[0]["task_loss"]
    assert kept[-1]["old_knowledge"] < 0.5 * free[-1]["old_knowledge"]
    first = kept[0]
    assert first["loss"] == pytest.approx(0.5 * first["task_loss"] + 50 * first["old_knowledge"], rel=1e-3)


def test_stage_two_mixes_what_stage_one_learned(tmp_path):
    for seed in (0, 1):
        domain = move(get_peft_model(bert(MASKED), config(num_domains=1, task_type="FEATURE_EXTRACTION")), seed)
        domain.save_pretrained(tmp_path / str(seed))
    model = get_peft_model(bert(), config(stage="task", task_type="SEQ_CLS")).train()
    load_domain_adapters(model, [tmp_path / "0", tmp_path / "1"])
    for seed in (0, 1):
        saved = PeftModel.from_pretrained(bert(MASKED), tmp_path / str(seed))
        for stored, layer in zip(layers_of(saved), layers_of(model)):
            for name, value in stored.mixda_domain["default"].named_parameters():
                assert torch.equal(getattr(layer.mixda_domain["default"], name)[seed], value[0])

    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=0.01, gate_lr=0.02))
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.02]
    for _ in range(2):  # the task adapter's first projection starts to move once its second has
        model(**batch(), labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {n for n in before if any(part in n for part in ("mixda_gate", "mixda_task", "modules_to_save"))}

    model.save_pretrained(tmp_path / "task")
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "task", is_trainable=True)
    assert torch.equal(logits(loaded), logits(model))
    trained = {name for name, value in loaded.named_parameters() if value.requires_grad}
    assert trained == changed


def test_domain_adapters_must_fit(tmp_path):
    move(get_peft_model(bert(MASKED), config(num_domains=1))).save_pretrained(tmp_path / "one")
    folder = tmp_path / "one"
    for settings, folders, message in (
        ({}, [folder], r"hold 1 domain adapter\(s\), but num_domains is 2"),
        ({}, [folder] * 3, "Check down_scale, and that num_domains"),
        ({"down_scale": 8}, [folder] * 2, "Check down_scale"),
        ({"layers_to_transform": [0]}, [folder] * 2, "in 2 layers, the model in 1; they differ in .*layer.1.output"),
        ({}, [tmp_path], "in 0 layers"),
    ):
        with pytest.raises(FuseError, match=message):
            load_domain_adapters(get_peft_model(bert(MASKED), config(**settings)), folders)


def test_task_adapter_starts_as_nothing_and_comes_behind_the_mixture():
    layer = MixDaLayer(nn.Linear(12, 4), "layer")
    layer.update_layer("default", config(stage="task", gate="none", task_reduction=2))
    layer.set_adapter("default")
    u = torch.randn(2, 5, 12)
    assert torch.equal(layer(u), layer.base_layer(u))
    move(layer)
    mixed, task = layer.mixture("default", u, layer.base_layer(u)), layer.mixda_task["default"]
    inner = F.silu(F.linear(mixed, task.down_weight[0], task.down_bias[0]))
    assert inner.shape[-1] == 2
    torch.testing.assert_close(layer(u), mixed + F.linear(inner, task.up_weight[0], task.up_bias[0]))
    assert not any(p.requires_grad for p in layer.mixda_domain.parameters())


def test_only_one_mixture_at_a_time():
    model = get_peft_model(bert(MASKED), config())
    model.add_adapter("other", config())
    with pytest.raises(ValueError, match="can't be active together"):
        model.base_model.set_adapter(["default", "other"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_domains": 0}, "num_domains is 0"),
        ({"stage": "two"}, "stage is 'two', expected 'domain' or 'task'"),
        ({"gate": "last"}, "gate is 'last', expected 'sequence', 'token' or 'none'"),
        ({"gate_dropout": 1.0}, "gate_dropout is 1.0"),
        ({"bias": "all"}, "bias is 'all'"),
    ],
)
def test_wrong_settings(setting, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MixDaConfig(**setting)
