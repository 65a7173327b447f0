"""Adapters with a router on every Linear: MoLA, LoRAMoE, HydraLoRA and DynMoLE against their formulas."""

from __future__ import annotations

import json
import math

import pytest
import torch
from checks_adapters import batch, logits, move
from peft import PeftModel, get_peft_model
from tiny_adapters import llama

from hf_fuse import DynMoleConfig, HydraLoraConfig, LoraMoeConfig, MolaConfig
from hf_fuse.adapters.routed_layer import routed_layers

SMALL = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": ["q_proj", "up_proj"]}


def adapted(config_class, layers: int = 2, **settings):
    return move(get_peft_model(llama(layers=layers), config_class(**SMALL | settings)))


def gates(layer, x_Td):
    return (x_Td @ layer.experts["default"].router.T).softmax(-1)


def expected_output(layer, x_Td, weights_TE):
    experts = layer.experts["default"]
    out = layer.base_layer(x_Td)
    for e in range(weights_TE.shape[1]):
        A = experts.A if experts.A.dim() == 2 else experts.A[e]
        out = out + 2.0 * weights_TE[:, e, None] * (x_Td @ A.T @ experts.B[e].T)
    return out


def tokens():
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(1))


def test_mola_as_written_out():
    model = adapted(MolaConfig, num_experts=4)
    layer, x_Td = routed_layers(model)[1], tokens()
    highest = gates(layer, x_Td).topk(2)
    weights_TE = torch.zeros(6, 4).scatter(1, highest.indices, highest.values / highest.values.sum(1, keepdim=True))
    torch.testing.assert_close(layer(x_Td), expected_output(layer, x_Td, weights_TE), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config_class", [LoraMoeConfig, HydraLoraConfig])
def test_dense_mixtures_as_written_out(config_class):
    model = adapted(config_class, num_experts=4)
    for layer in routed_layers(model):
        expected = expected_output(layer, tokens(), gates(layer, tokens()))
        torch.testing.assert_close(layer(tokens()), expected, rtol=1e-5, atol=1e-6)
        assert layer.experts["default"].A.shape[:-1] == ((2,) if config_class is HydraLoraConfig else (4, 2))


def test_dynmole_without_entropy_and_limits_is_dense():
    model = adapted(DynMoleConfig, num_experts=4, top_p=1.0, entropy_threshold=1.0, keep_top_k=4)
    layer = routed_layers(model)[0]
    expected = expected_output(layer, tokens(), gates(layer, tokens()))
    torch.testing.assert_close(layer(tokens()), expected, rtol=1e-5, atol=1e-6)


def test_dynmole_uses_all_experts_where_the_router_is_undecided():
    model = adapted(DynMoleConfig, num_experts=4, keep_top_k=1, top_p=0.1)
    layer = routed_layers(model)[0]
    router = layer.experts["default"].router
    x_Td = tokens()
    with torch.no_grad():
        router.zero_()
        router[2, 0] = 100.0  # certain where the first feature is large, undecided where it is 0
    x_Td[:3, 0], x_Td[3:, 0] = 1.0, 0.0
    layer.recorded = []
    layer(x_Td)
    weights_TE = layer.recorded[0].weights_TE
    assert torch.equal((weights_TE != 0).sum(1), torch.tensor([1, 1, 1, 4, 4, 4]))
    torch.testing.assert_close(weights_TE[3:], torch.full((3, 4), 0.25))


def test_dynmole_loss_at_uniform_routing():
    # Entropy 1 and, as all experts are used by all tokens, sum F P = 1 / E.
    model = adapted(DynMoleConfig, num_experts=4, router_aux_loss_coef=0.5, router_dyn_loss_coef=0.25)
    with torch.no_grad():
        for layer in routed_layers(model):
            layer.experts["default"].router.zero_()
    assert model.train()(**batch()).aux_loss.item() == pytest.approx(0.75, abs=1e-6)


def test_mola_balance_is_summed_over_routers_and_one_for_each_if_uniform():
    model = get_peft_model(llama(), MolaConfig(**SMALL, num_experts=[2, 4], router_aux_loss_coef=0.5))
    with torch.no_grad():
        for layer in routed_layers(model):
            layer.experts["default"].router.zero_()
    assert model.train()(**batch()).aux_loss.item() == pytest.approx(0.5 * 4, abs=1e-6)
    model.peft_config["default"].router_z_loss_coef = 0.25
    z = 2 * math.log(2) ** 2 + 2 * math.log(4) ** 2
    assert model.train()(**batch()).aux_loss.item() == pytest.approx(0.5 * 4 + 0.25 * z, abs=1e-6)
    assert model.train()(**batch(), labels=batch()["input_ids"]).aux_loss_folded
    silent = get_peft_model(llama(), MolaConfig(**SMALL, num_experts=2)).train()
    assert silent(**batch()).get("aux_loss") is None


def test_mola_gives_layers_different_numbers_of_experts_and_ranks():
    model = get_peft_model(
        llama(layers=4),
        MolaConfig(
            **SMALL,
            num_experts=[2, 6],
            num_experts_pattern={r"layers.3.*up_proj": 3},
            rank_pattern={"q_proj": 5},
            alpha_pattern={"q_proj": 10},
        ),
    )
    shapes = {layer.key: layer.experts["default"].A.shape for layer in routed_layers(model)}
    names = ("self_attn.q_proj", "mlp.up_proj")
    found = [[tuple(shapes[f"model.layers.{i}.{name}"][:2]) for name in names] for i in range(4)]
    assert found == [[(2, 5), (2, 2)], [(2, 5), (2, 2)], [(6, 5), (6, 2)], [(6, 5), (3, 2)]]
    assert {layer.experts["default"].lora.scaling for layer in routed_layers(model)} == {2.0}


def test_lists_of_experts_that_do_not_fit():
    parts = MolaConfig(**SMALL, num_experts=[2, 3, 4])
    assert [parts.experts_at(f"layers.{layer}.up_proj", 4) for layer in range(4)] == [2, 2, 3, 4]
    with pytest.raises(ValueError, match=r"num_experts has 3 entries for 2 layers"):
        get_peft_model(llama(layers=2), parts)
    with pytest.raises(ValueError, match=r"lm_head is in no numbered layer"):
        get_peft_model(llama(), MolaConfig(**SMALL | {"target_modules": ["lm_head"]}, num_experts=[2, 3]))


def test_loramoe_balance_by_kind_of_task():
    model = adapted(LoraMoeConfig, num_experts=4, blc_weight=2.0).train()
    with torch.no_grad():
        for layer in routed_layers(model):
            layer.experts["default"].router.zero_()
    inputs = batch()
    assert model(**inputs).aux_loss.item() == pytest.approx(0, abs=1e-6)
    model.peft_config["default"].blc_alpha = 0.25
    # Loads of 1 + delta and 1 - delta, half of each: variance delta^2 n / (n - 1) over 8 loads.
    output = model(**inputs, labels=inputs["input_ids"], task_types=torch.tensor([0, 1]))
    assert output.aux_loss.item() == pytest.approx(2.0 * 0.25**2 * 8 / 7, rel=1e-5)
    with pytest.raises(Exception, match="task_types"):
        model(**inputs)


@pytest.mark.parametrize("config_class", [DynMoleConfig, LoraMoeConfig])
def test_feed_forward_layers_by_default(config_class):
    model = get_peft_model(llama(), config_class(num_experts=2))
    names = {layer.key.rpartition(".")[2] for layer in routed_layers(model)}
    assert names == {"gate_proj", "up_proj", "down_proj"}
    model.add_adapter("second", config_class(num_experts=2))
    assert all({*layer.experts} == {"default", "second"} for layer in routed_layers(model))


@pytest.mark.parametrize("config_class", [HydraLoraConfig, LoraMoeConfig])
def test_the_authors_name_for_the_number_of_experts(config_class):
    assert config_class(lora_nums=3).num_experts == 3


def test_folder_of_the_references(tmp_path):
    random = torch.Generator().manual_seed(0)
    weights = {}
    for i in range(2):
        place = f"mola.layers.{i}.self_attn.q_proj."
        weights[place + "moe_gate.weight"] = torch.randn(3, 16, generator=random)
        for e in range(3):
            weights[f"{place}experts.{e}.lora_A.weight"] = torch.randn(2, 16, generator=random)
            weights[f"{place}experts.{e}.lora_B.weight"] = torch.randn(16, 2, generator=random)
    torch.save(weights, tmp_path / "adapter_model.bin")
    settings = {
        "bias": "none", "peft_type": "MOLA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "lora_dropout": 0.05,
        "target_modules": ["q_proj"], "routing_strategy": "mola", "num_experts": 3, "top_k": 2,
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    model = PeftModel.from_pretrained(llama(), tmp_path)
    for i, layer in enumerate(routed_layers(model)):
        experts = layer.experts["default"]
        assert torch.equal(experts.router, weights[f"mola.layers.{i}.self_attn.q_proj.moe_gate.weight"])
        for e in range(3):
            place = f"mola.layers.{i}.self_attn.q_proj.experts.{e}.lora_"
            assert torch.equal(experts.A[e], weights[f"{place}A.weight"])
            assert torch.equal(experts.B[e], weights[f"{place}B.weight"])
    assert not torch.equal(logits(model), logits(llama()))


@pytest.mark.parametrize(
    ("config_class", "settings", "message"),
    [
        (MolaConfig, {"num_experts": [2, 4], "top_k": 3}, r"top_k is 3, expected 1 to 2"),
        (DynMoleConfig, {"num_experts": 2, "keep_top_k": 3}, r"keep_top_k is 3, expected 1 to 2"),
        (DynMoleConfig, {"entropy_index": 3.0}, r"entropy_index is 3.0"),
        (DynMoleConfig, {"entropy_type": "gini"}, r"entropy_type is 'gini'"),
        (DynMoleConfig, {"top_p": 0.0}, r"top_p is 0.0"),
        (LoraMoeConfig, {"blc_alpha": 2.0}, r"blc_alpha is 2.0"),
    ],
)
def test_wrong_settings(config_class, settings, message):
    with pytest.raises(ValueError, match=message):
        config_class(**settings)
