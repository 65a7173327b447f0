"""Entropy of attention in the logs, and the reparametrisation that keeps it up."""

import logging
import math

import pytest
import torch
import transformers
from training_cases import bert, llama, make_trainer, mixlora, train

from hf_fuse import fold_sigma, sigma_reparametrise
from hf_fuse.attention_capture import attention_layers, captured_attention, eager_attention
from hf_fuse.diagnostics.attention_entropy import attention_entropy
from hf_fuse.errors import FuseError

IDS = torch.randint(3, 30, (3, 6), generator=torch.Generator().manual_seed(0))


# ---- entropy


def test_entropy_of_known_rows():
    peaked, even = torch.tensor([0.97, 0.01, 0.01, 0.01]), torch.full((4,), 0.25)
    weights = torch.stack([peaked.expand(4, 4), even.expand(4, 4)])[None]
    entropy, share = attention_entropy(weights)
    assert entropy.tolist() == pytest.approx([0.168, 1.386], abs=1e-3)
    assert share.tolist() == pytest.approx([0.168 / math.log(4), 1], abs=1e-3)
    assert [value.tolist() for value in attention_entropy(torch.ones(2, 3, 1, 1))] == [[0.0] * 3, [0.0] * 3]


def test_entropy_of_causal_and_padded_attention():
    causal = torch.ones(5, 5).tril() / torch.arange(1, 6).view(-1, 1)
    _, share = attention_entropy(causal[None, None])
    assert share.item() == pytest.approx(1, abs=1e-4)  # as even as it can be, row by row
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    left_padded = torch.zeros(1, 1, 5, 5)
    left_padded[0, 0, 2:, 2:] = causal[:3, :3]
    left_padded[0, 0, :2] = torch.eye(5)[:2]  # what padding attends to is of no interest
    entropy, share = attention_entropy(left_padded, mask)
    assert share.item() == pytest.approx(1, abs=1e-4)
    assert entropy.item() == pytest.approx((math.log(2) + math.log(3)) / 3, abs=1e-4)
    assert attention_entropy(left_padded, torch.zeros_like(mask))[0].item() == 0


def gpt2():
    tokens = {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, **tokens))


def t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=32, **sizes))


@pytest.mark.parametrize("make", [llama, bert, gpt2, t5])
def test_the_layers_are_found(make):
    torch.manual_seed(0)
    model = make().eval()
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})
    layers = attention_layers(model)
    before = model.config._attn_implementation
    (layer, index), *_ = layers.values()
    with eager_attention(model):
        model(**inputs, output_attentions=True)  # transformers leaves hooks of its own behind
        hooks = len(layer._forward_hooks)
        with captured_attention(layer, index) as seen:
            outputs = model(**inputs, output_attentions=True)
    attentions = getattr(outputs, "attentions", None) or outputs.encoder_attentions
    assert len(layers) == len(attentions) * (2 if model.config.is_encoder_decoder else 1)
    assert torch.equal(seen[0], attentions[0]) and seen[0].shape == (3, 2, 6, 6)
    assert model.config._attn_implementation == before and len(layer._forward_hooks) == hooks


def test_entropy_is_logged_and_changes_nothing_else(tmp_path):
    plain = train(make_trainer("language", tmp_path, 4, 2))
    trainer = make_trainer("language", tmp_path, 4, 2, attention_entropy_steps=2)
    logs, trained = train(trainer)
    assert all(torch.equal(trained[name], value) for name, value in plain[1].items())
    names = {key for key in logs[0] if key.startswith("attention/")}
    assert names == {
        f"attention/model.layers.{i}.self_attn/{key}" for i in (0, 1) for key in ("entropy", "share", "least_share")
    }
    assert 0 < logs[0]["attention/model.layers.0.self_attn/least_share"] <= 1
    assert not any(key.startswith("attention/") for key in logs[1]) and names < logs[2].keys()
    assert trainer.model.config._attn_implementation == "sdpa"


def test_collapse_is_told_once(tmp_path, caplog):
    model = llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 1000
    with caplog.at_level(logging.WARNING, logger="hf_fuse.attention_report"):
        train(
            make_trainer("language", tmp_path, 8, 1, model=lambda: model, attention_entropy_steps=1, learning_rate=0.0)
        )
    told = [record.getMessage() for record in caplog.records if "collapses" in record.getMessage()]
    assert len(told) == 2 and "model.layers.0.self_attn: attention collapses" in told[0]


# ---- sigma


def test_wrapping_changes_no_output_and_folding_gives_a_stock_model(tmp_path):
    for model in (llama(), bert()):
        model.eval()
        before, keys = model(IDS).logits, model.state_dict().keys()
        names = sigma_reparametrise(model)
        assert len(names) >= 14 or "classifier" in names
        assert torch.allclose(model(IDS).logits, before, atol=1e-5)
        fold_sigma(model)
        assert model.state_dict().keys() == keys
        assert torch.allclose(model(IDS).logits, before, atol=1e-5)


def test_the_largest_singular_value_is_the_gain():
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(6, 4))
    assert sigma_reparametrise(layer) == ["0"]
    gain = layer[0].parametrizations.weight[0].gain
    with torch.no_grad():
        layer[0].parametrizations.weight.original.normal_()
        gain.fill_(2.5)
    layer.train()
    for _ in range(60):
        layer(torch.ones(1, 6))
    assert torch.linalg.matrix_norm(layer[0].weight, ord=2).item() == pytest.approx(2.5, rel=1e-3)
    layer.eval()
    direction = layer[0].parametrizations.weight[0].direction.clone()
    layer(torch.ones(1, 6))
    assert torch.equal(direction, layer[0].parametrizations.weight[0].direction)


def test_a_step_does_not_grow_the_matrix_but_turns_it():
    """Along W itself the effective matrix doesn't change: its size is the gain's alone."""
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(5, 5, bias=False))
    sigma_reparametrise(layer)
    original = layer[0].parametrizations.weight.original
    layer(torch.randn(8, 5)).square().sum().backward()
    # The gradient of a function of W / sigma(W) has no part along W.
    assert (original.grad * original).sum().item() == pytest.approx(0, abs=1e-3 * original.grad.norm().item())
    assert layer[0].parametrizations.weight[0].gain.grad.abs() > 0


def test_training_reparametrised_and_folded(tmp_path):
    model = llama()
    sigma_reparametrise(model, ["q_proj", "k_proj"])
    trainer = make_trainer("language", tmp_path, 8, 1, model=lambda: model)
    logs, trained = train(trainer)
    assert len([name for name in trained if name.endswith("gain")]) == 4
    fold_sigma(model)
    model.save_pretrained(tmp_path / "folded")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    assert torch.allclose(again(IDS).logits, model.eval()(IDS).logits, atol=1e-6)


def test_what_can_not_be_reparametrised():
    from peft import get_peft_model

    model = llama()
    with pytest.raises(FuseError, match="no linear layers named nothing"):
        sigma_reparametrise(model, ["nothing"])
    sigma_reparametrise(model, ["q_proj"])
    with pytest.raises(FuseError, match="q_proj is reparametrised already"):
        sigma_reparametrise(model, ["q_proj"])
    with pytest.raises(FuseError, match="Merge it"):
        sigma_reparametrise(get_peft_model(llama(), mixlora()))
