"""MixLoRA against plain LoRA, against a forward pass written out, and against the files of its authors."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from checks_adapters import batch, logits, move, take_factors
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_adapters import llama

from hf_fuse import MixLoraConfig, router_statistics
from hf_fuse.adapters.experts import FeedForwardExperts, LinearExperts, PlainLora
from hf_fuse.adapters.routed_layer import routed_layers, routing_override

FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", *FEED_FORWARD]


def config(**settings) -> MixLoraConfig:
    usual = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "num_experts": 4, "target_modules": ALL}
    return MixLoraConfig(**usual | {"task_type": "CAUSAL_LM"} | settings)


def adapted(model=None, seed: int = 0, **settings):
    return move(get_peft_model(model or llama(), config(**settings)), seed)


def written_out(layer, x_Td: torch.Tensor, weights_TE: torch.Tensor, scaling: float) -> torch.Tensor:
    """The paper's formula, one expert after the other; Llama's layer."""
    base, experts = layer.base_layer, layer.experts["default"]

    def factors(name, expert, x):
        if not hasattr(experts, f"A_{name}"):
            return 0
        return scaling * x @ getattr(experts, f"A_{name}")[expert].T @ getattr(experts, f"B_{name}")[expert].T

    y_Td = 0
    for expert in range(weights_TE.shape[1]):
        gate = base.gate_proj(x_Td) + factors("gate_proj", expert, x_Td)
        up = base.up_proj(x_Td) + factors("up_proj", expert, x_Td)
        h_Tf = F.silu(gate) * up
        y_Td = y_Td + weights_TE[:, expert, None] * (base.down_proj(h_Tf) + factors("down_proj", expert, h_Tf))
    return y_Td


def top_two(layer, x_Td: torch.Tensor) -> torch.Tensor:
    probabilities_TE = (x_Td @ layer.experts["default"].router.T).softmax(-1)
    highest_T2 = probabilities_TE.topk(2).values
    return probabilities_TE * (probabilities_TE >= highest_T2[:, 1:]) / highest_T2.sum(-1, keepdim=True)


def test_one_expert_is_lora():
    plain = move(get_peft_model(llama(), LoraConfig(r=4, lora_alpha=8, target_modules=ALL)))
    mixed = get_peft_model(llama(), config(num_experts=1, top_k=1))
    take_factors(mixed, plain)
    assert torch.equal(logits(mixed), logits(plain))


@pytest.mark.parametrize("targets", [FEED_FORWARD, ["gate_proj"], ["up_proj", "down_proj"]])
def test_feed_forward_as_written_out(targets):
    model = adapted(target_modules=targets)
    layer = routed_layers(model)[0]
    x_BSd = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    x_Td = x_BSd.view(-1, 16)
    expected = written_out(layer, x_Td, top_two(layer, x_Td), 2.0).view_as(x_BSd)
    torch.testing.assert_close(layer(x_BSd), expected, rtol=1e-5, atol=1e-6)


def test_order_of_experts_does_not_matter_and_equal_ones_need_no_router():
    model = adapted()
    expected = logits(model)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for layer in routed_layers(model):
            if isinstance(layer.experts["default"], FeedForwardExperts):
                for parameter in layer.experts["default"].parameters():
                    parameter.copy_(parameter[order])
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for layer in routed_layers(model):
            for parameter in layer.experts["default"].parameters():
                if parameter.dim() == 3:
                    parameter.copy_(parameter[:1].expand_as(parameter))
        before = logits(model)
        for layer in routed_layers(model):
            if hasattr(layer.experts["default"], "router"):
                layer.experts["default"].router.normal_(std=3)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)


def reference_folder(folder, weights: dict, **more) -> None:
    """As MoE-PEFT and the authors' repository write it."""
    folder.mkdir(exist_ok=True)
    settings = {
        "bias": "none", "peft_type": "MIXLORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "r": 4,
        "lora_alpha": 8, "lora_dropout": 0.05, "target_modules": ALL, "routing_strategy": "mixlora", "num_experts": 4,
        "top_k": 2,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings | more))
    torch.save(weights, folder / "adapter_model.bin")


def reference_weights(older: bool = False) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(4)
    shapes = {"gate_proj": (36, 16), "up_proj": (36, 16), "down_proj": (16, 36)}
    attention = {"q_proj": (16, 16), "k_proj": (8, 16), "v_proj": (8, 16), "o_proj": (16, 16)}
    weights = {}
    for i in range(2):
        prefix = f"mixlora.layers.{i}."
        weights[prefix + ("gate.weight" if older else "mlp.moe_gate.weight")] = torch.randn(4, 16, generator=random)
        for name, (out, inner) in shapes.items():
            for e in range(4):
                place = prefix + (f"experts.{e}.{name}." if older else f"mlp.{name}.experts.{e}.")
                weights[place + "lora_A.weight"] = torch.randn(4, inner, generator=random) * 0.3
                weights[place + "lora_B.weight"] = torch.randn(out, 4, generator=random) * 0.3
        for name, (out, inner) in attention.items():
            weights[f"{prefix}self_attn.{name}.lora_A.weight"] = torch.randn(4, inner, generator=random) * 0.3
            weights[f"{prefix}self_attn.{name}.lora_B.weight"] = torch.randn(out, 4, generator=random) * 0.3
    return weights


@pytest.mark.parametrize("older", [False, True])
def test_folder_of_the_references(tmp_path, older):
    weights = reference_weights(older)
    reference_folder(tmp_path, weights, routing_strategy="mixtral" if older else "mixlora")
    for low in (False, True):
        model = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low).eval()

    # The same weights put into a plain Llama by hand.
    by_hand = llama().eval()
    names = {"gate": "gate.weight"} if older else {"gate": "mlp.moe_gate.weight"}
    for i, layer in enumerate(by_hand.model.layers):
        prefix = f"mixlora.layers.{i}."
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            A, B = (weights[f"{prefix}self_attn.{part}.lora_{side}.weight"] for side in "AB")
            getattr(layer.self_attn, part).weight.data += 2.0 * B @ A

        def forward(x, mlp=layer.mlp, prefix=prefix):
            probabilities = (x @ weights[prefix + names["gate"]].T).softmax(-1)
            values, chosen = probabilities.topk(2)
            values = values / values.sum(-1, keepdim=True)
            out = torch.zeros_like(x)
            for e in range(4):

                def raised(inputs, name, e=e, prefix=prefix, mlp=mlp):
                    place = prefix + (f"experts.{e}.{name}." if older else f"mlp.{name}.experts.{e}.")
                    A, B = weights[place + "lora_A.weight"], weights[place + "lora_B.weight"]
                    return getattr(mlp, name)(inputs) + 2.0 * inputs @ A.T @ B.T

                weight = (values * (chosen == e)).sum(-1, keepdim=True)
                out += weight * raised(F.silu(raised(x, "gate_proj")) * raised(x, "up_proj"), "down_proj")
            return out

        layer.mlp.forward = forward
    torch.testing.assert_close(logits(model), logits(by_hand), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "again")), logits(model))


def test_folder_of_the_references_with_dora(tmp_path):
    # The magnitudes are not in it; they begin as the norms of the trained matrices: where they change nothing.
    reference_folder(tmp_path / "dora", reference_weights(), use_dora=True)
    reference_folder(tmp_path / "plain", reference_weights())
    found, expected = (logits(PeftModel.from_pretrained(llama(), tmp_path / kind)) for kind in ("dora", "plain"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_weights_of_another_model(tmp_path):
    reference_folder(tmp_path, reference_weights())
    with pytest.raises(Exception, match=r"mixlora.layers.1.*no such place"):
        PeftModel.from_pretrained(llama(layers=1), tmp_path)
    weights = reference_weights()
    del weights["mixlora.layers.0.mlp.up_proj.experts.2.lora_B.weight"]
    reference_folder(tmp_path, weights)
    with pytest.raises(Exception, match=r"layers.0.mlp.B_up_proj: experts \[0, 1, 3\]"):
        PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_balance_at_uniform_routing_is_k(top_k):
    model = get_peft_model(llama(), config(top_k=top_k, router_init_range=0.0, router_aux_loss_coef=0.5)).train()
    inputs = batch()
    assert model(**inputs, labels=inputs["input_ids"]).aux_loss.item() == pytest.approx(0.5 * top_k, abs=1e-6)


def balance_by_hand(router_logits, kept: torch.Tensor, pooled: bool) -> float:
    shares, means = [], []
    for logits_BSE in router_logits:
        logits_TE = logits_BSE.detach().reshape(-1, 4)[kept]
        shares.append(F.one_hot(logits_TE.topk(2).indices, 4).float().mean(0).sum(0))
        means.append(logits_TE.softmax(-1).mean(0))
    if pooled:
        shares, means = [sum(shares) / 2], [sum(means) / 2]
    return sum(4 * (f * p).sum().item() for f, p in zip(shares, means)) / len(shares)


@pytest.mark.parametrize("reduction", ["global", "per_layer"])
def test_balance_counts_no_padding(reduction):
    model = adapted(router_aux_loss_coef=1.0, aux_reduction=reduction).train()
    inputs = batch(rows=3)
    inputs["attention_mask"][0, 3:] = 0
    inputs["attention_mask"][2, 5:] = 0
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    first = model(**inputs, labels=labels)
    kept = inputs["attention_mask"].bool().flatten()
    expected = balance_by_hand(first.router_logits, kept, pooled=reduction == "global")
    assert first.aux_loss.item() == pytest.approx(expected, rel=1e-5)
    statistics = router_statistics(model)
    inputs["input_ids"] = torch.where(inputs["attention_mask"] == 0, 7, inputs["input_ids"])
    assert torch.equal(model(**inputs, labels=labels).aux_loss, first.aux_loss)
    for name, values in router_statistics(model).items():
        assert all(torch.equal(value, statistics[name][key]) for key, value in values.items())
        assert values["load"].sum().item() == pytest.approx(1)
        assert values["probability"].sum().item() == pytest.approx(1)
        assert 0 < values["entropy"] <= 1 and values["dropped"] == 0
        assert not any(value.requires_grad for value in values.values())


def test_loss_contains_the_balance_in_training_only():
    model = adapted(router_aux_loss_coef=1.0)
    inputs = batch()
    labels = inputs["input_ids"]
    evaluated = model.eval()(**inputs, labels=labels)
    assert "aux_loss" not in evaluated
    trained = model.train()(**inputs, labels=labels)
    assert trained.aux_loss_folded
    torch.testing.assert_close(trained.loss, evaluated.loss + trained.aux_loss)
    # The Trainer's way under label smoothing: no labels, the loss is made outside.
    apart = model(**inputs)
    assert not apart.aux_loss_folded and torch.equal(apart.aux_loss, trained.aux_loss)
    # A quarter of the labels of an optimizer step, the rest in other micro-batches.
    counted = labels[:, 1:].numel()
    part = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(4 * counted))
    torch.testing.assert_close(part.loss, (evaluated.loss + trained.aux_loss) / 4)
    as_tuple = model(**inputs, labels=labels, return_dict=False)
    torch.testing.assert_close(as_tuple[0], trained.loss)
    switched_off = adapted(router_aux_loss_coef=1.0, router_loss=False).train()(**inputs, labels=labels)
    assert switched_off.get("aux_loss") is None and len(switched_off.router_logits) == 2


def test_balance_trains_the_router_alone_of_its_layer():
    model = adapted(model=llama(layers=1), router_aux_loss_coef=1.0).train()
    model(**batch()).aux_loss.backward()
    for name, parameter in model.named_parameters():
        if "mlp" in name and parameter.requires_grad:
            assert (parameter.grad is not None and bool(parameter.grad.any())) == ("router" in name), name


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer_with_accumulation(tmp_path, smoothing):
    """coef x balance is added once per optimizer step, however many micro-batches there are."""
    row = batch(rows=1)["input_ids"][0]  # always the same one, as the balance of parts is not that of the whole
    rows = [{"input_ids": row, "labels": row}] * 8

    def loss(accumulation: int) -> float:
        model = adapted(router_aux_loss_coef=1000.0)
        arguments = transformers.TrainingArguments(
            tmp_path, max_steps=1, per_device_train_batch_size=8 // accumulation, report_to=[], use_cpu=True,
            gradient_accumulation_steps=accumulation, logging_steps=1, save_strategy="no", disable_tqdm=True,
            label_smoothing_factor=smoothing,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        return trainer.state.log_history[0]["loss"]

    if smoothing:  # the labels never reach the model: FuseTrainer adds what this Trainer can't know of
        assert loss(1) < 10
        return
    whole, parts = loss(1), loss(4)
    assert 1900 < whole < 3000
    assert parts == pytest.approx(whole, rel=1e-6)


def test_switch_drops_what_exceeds_the_capacity():
    settings = {"routing_strategy": "mixlora-switch", "expert_capacity": 2, "jitter_noise": 0.0}
    model = adapted(**settings, router_aux_loss_coef=1.0).train()
    assert model.peft_config["default"].router_z_loss_coef == 1e-3
    inputs = batch(rows=2, length=12)
    output = model(**inputs, labels=inputs["input_ids"])
    for statistics, weights_BSE in zip(router_statistics(model).values(), output.router_weights):
        assert ((weights_BSE != 0).sum(1) <= 2).all()
        dropped = (weights_BSE == 0).all(-1).float().mean()
        assert statistics["dropped"].item() == pytest.approx(dropped.item()) and dropped > 0
    logits(model)
    layer = next(layer for layer in routed_layers(model) if hasattr(layer.experts["default"], "router"))
    layer.recorded = []
    layer(torch.randn(2, 12, 16))
    assert (layer.recorded[0].weights_TE != 0).any(-1).all(), "evaluation drops nothing"


def test_jitter_leaves_the_input_alone():
    model = adapted(jitter_noise=0.5).train()
    layer = next(layer for layer in routed_layers(model) if layer.key.endswith("mlp"))
    x = torch.randn(1, 4, 16)
    before = x.clone()
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(x, before)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_dora_as_written_out():
    model = adapted(use_dora=True, top_k=4, target_modules=["q_proj", *FEED_FORWARD])
    mlp = next(layer for layer in routed_layers(model) if layer.key.endswith("mlp"))
    experts, base = mlp.experts["default"], mlp.base_layer
    x_Td = torch.randn(6, 16, generator=torch.Generator().manual_seed(2))

    def projected(name, expert, x):
        parameters = (getattr(experts, f"{kind}_{name}")[expert] for kind in ("A", "B", "magnitude"))
        A, B, magnitude = parameters
        matrix = getattr(base, name).weight + 2.0 * B @ A
        return x @ (magnitude[:, None] * matrix / matrix.norm(dim=1, keepdim=True)).T

    weights_TE = (x_Td @ experts.router.T).softmax(-1)
    expected = sum(
        weights_TE[:, e, None]
        * projected("down_proj", e, F.silu(projected("gate_proj", e, x_Td)) * projected("up_proj", e, x_Td))
        for e in range(4)
    )
    torch.testing.assert_close(mlp(x_Td[None])[0], expected, rtol=1e-4, atol=1e-5)

    plain = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], use_dora=True))
    lora = plain.base_model.model.model.layers[0].self_attn.q_proj
    own = next(layer for layer in routed_layers(model) if layer.key.endswith("0.self_attn.q_proj"))
    with torch.no_grad():
        lora.lora_A["default"].weight.copy_(own.experts["default"].A)
        lora.lora_B["default"].weight.copy_(own.experts["default"].B)
        lora.lora_magnitude_vector["default"].weight.copy_(own.experts["default"].magnitude)
    torch.testing.assert_close(own(x_Td), lora(x_Td), rtol=1e-4, atol=1e-5)


def test_experts_may_differ_from_the_plain_lora():
    model = adapted(r=4, expert_lora={"r": 2, "lora_alpha": 3, "use_rslora": True}, rank_pattern={"k_proj": 1})
    for layer in routed_layers(model):
        experts = layer.experts["default"]
        if isinstance(experts, FeedForwardExperts):
            assert experts.A_up_proj.shape == (4, 2, 16) and experts.lora.scaling == pytest.approx(3 / 2**0.5)
        else:
            assert experts.A.shape[0] == (1 if layer.key.endswith("k_proj") else 4)


def test_routing_can_be_overridden():
    model = adapted()
    usual = logits(model)
    with routing_override(model, [0, 1]):
        torch.testing.assert_close(logits(model), usual)
    with routing_override(model, [2]):
        weak = logits(model)
        layer = next(layer for layer in routed_layers(model) if layer.key.endswith("mlp"))
        layer.recorded = []
        layer(torch.randn(1, 5, 16))
        routes, layer.recorded = layer.recorded[0], None
        third = routes.logits_TE.argsort(-1, descending=True)[..., 2]
        assert torch.equal(routes.weights_TE, F.one_hot(third, 4).float())
    assert not torch.allclose(weak, usual)
    assert torch.equal(logits(model), usual)


def test_several_adapters_of_different_sizes():
    model = adapted()
    first = logits(model)
    model.add_adapter("small", config(num_experts=2, top_k=1, r=1, target_modules="all-linear"))
    model.set_adapter("small")
    move(model, adapter="small")
    assert {layer.key for layer in routed_layers(model) if "small" in layer.experts} == {
        layer.key for layer in routed_layers(model)
    }
    assert not torch.allclose(logits(model), first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with pytest.raises(ValueError, match="can't be active together"):
        model.base_model.set_adapter(["default", "small"])


def test_adapters_by_sample_are_refused():
    model = adapted()
    with pytest.raises(ValueError, match="adapter_names"):
        model(**batch(), adapter_names=["default", "__base__"])


def test_padding_of_encoder_and_decoder():
    torch.manual_seed(0)
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
    )
    model = move(
        get_peft_model(t5, MixLoraConfig(r=2, num_experts=4, router_aux_loss_coef=1.0, lora_dropout=0.0))
    ).train()
    model.base_model.model.config.dropout_rate = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    inputs = batch(rows=2, length=6)
    masks = {"attention_mask": inputs["attention_mask"].clone(), "decoder_attention_mask": inputs["attention_mask"]}
    masks["attention_mask"][0, 4:] = 0
    masks["decoder_attention_mask"][1, 2:] = 0
    output = model(inputs["input_ids"], decoder_input_ids=inputs["input_ids"], **masks)
    expected = [
        balance_by_hand([logits], masks[name].bool().flatten(), pooled=False)
        for logits, name in zip(output.router_logits, masks)
    ]
    assert output.aux_loss.item() == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_mixtures_are_refused():
    torch.manual_seed(0)
    mixtral = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
            vocab_size=40, num_local_experts=2,
        )
    )  # fmt: skip
    names = set(dict(mixtral.named_modules()))
    with pytest.raises(TypeError, match=r"down_proj belongs to the experts .* mixture of experts already"):
        get_peft_model(mixtral, config())
    assert set(dict(mixtral.named_modules())) == names, "nothing was changed"
    with pytest.warns(UserWarning, match="no router"):
        model = get_peft_model(mixtral, config(target_modules=["q_proj", "v_proj"]))
    assert all(isinstance(layer.experts["default"], PlainLora) for layer in routed_layers(model))
    inputs = batch()
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()


def test_split_feed_forward_layers_get_a_router_per_projection():
    torch.manual_seed(0)
    opt = transformers.OPTForCausalLM(
        transformers.OPTConfig(
            hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32,
            vocab_size=40, word_embed_proj_dim=16,
        )
    )  # fmt: skip
    with pytest.warns(UserWarning, match="router of its own"):
        model = get_peft_model(opt, config(target_modules=["fc1", "fc2", "q_proj"]))
    kinds = {layer.key.rpartition(".")[2]: type(layer.experts["default"]) for layer in routed_layers(model)}
    assert kinds == {"fc1": LinearExperts, "fc2": LinearExperts, "q_proj": PlainLora}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 9}, r"top_k is 9, expected 1 to 4"),
        ({"top_k": 0}, r"top_k is 0"),
        ({"num_experts_pattern": {"layers.0.mlp": 1}}, r"top_k is 2, expected 1 to 1"),
        ({"top_k": 1.5}, r"top_k is 1.5"),
        ({"num_experts": 0}, r"num_experts is 0"),
        ({"num_experts": True}, r"num_experts is True, expected an integer"),
        ({"num_experts": "8"}, r"num_experts is '8', expected an integer >= 1, or a list of them"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern"),
        ({"routing_strategy": "mixlroa"}, r"routing_strategy: there is no 'mixlroa'. Did you mean 'mixlora'"),
        ({"r": 0}, r"r is 0"),
        ({"lora_dropout": 1.5}, r"lora_dropout is 1.5"),
        ({"router_temperature": 0.0}, r"router_temperature is 0.0, expected a number > 0"),
        ({"router_activation": "relu"}, r"router_activation is 'relu'"),
        ({"aux_reduction": "mean"}, r"aux_reduction is 'mean', expected 'global', 'per_layer' or 'sum'"),
        ({"act_fn": "no_such"}, r"act_fn is 'no_such'"),
        ({"bias": "all"}, r"bias is 'all', expected 'none'"),
        ({"expert_lora": {"rank": 3}}, r"expert_lora is .* expected a dict with some of r, lora_alpha"),
        ({"expert_lora": [8]}, r"expert_lora is \[8\], expected a dict"),
        ({"expert_lora": {"r": 0}}, r"expert_lora is .* r an integer >= 1"),
        ({"expert_lora": {"lora_dropout": 1.5}}, r"expert_lora is .* lora_dropout in \[0, 1\)"),
        ({"target_parameters": ["experts.down_proj"]}, r"target_parameters"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_targets_as_moe_peft_writes_them():
    assert config(target_modules={"q_proj": True, "o_proj": False}).target_modules == {"q_proj"}


def test_wrong_targets():
    with pytest.raises(TypeError, match="Embedding cannot have LoRA experts"):
        get_peft_model(llama(), config(target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no Linear .* kind 'all-linear' in layers \[7\]"):
        get_peft_model(llama(), config(target_modules=None, layers_to_transform=[7]))


class Int8Linear(torch.nn.Module):
    """Stands for the quantised layers of bitsandbytes and others: no float weight to look at."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().max() / 127
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.scale = scale.item()

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale)


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_quantised_base():
    base = llama()
    for layer in base.model.layers:
        for parent, names in ((layer.mlp, FEED_FORWARD), (layer.self_attn, ["q_proj", "v_proj"])):
            for name in names:
                setattr(parent, name, Int8Linear(getattr(parent, name)))
    expected = logits(base)
    model = get_peft_model(base, config())
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    inputs = batch()
    move(model).train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert torch.equal(logits(model.unload()), expected)


def test_compiles_into_one_graph():
    model = adapted(llama(layers=1), target_modules=FEED_FORWARD, router_aux_loss_coef=1.0).train()
    inputs = batch()
    inputs["labels"] = inputs["input_ids"]
    eager = model(**inputs)
    compiled = torch.compile(model, backend="eager", fullgraph=True)(**inputs)
    assert type(compiled) is type(eager)
    torch.testing.assert_close(compiled.loss, eager.loss)
    torch.testing.assert_close(compiled.aux_loss, eager.aux_loss)
    assert router_statistics(model).keys() == {"model.layers.0.mlp"}


def test_through_the_hub(tmp_path, hub, repo_id, hub_cache):
    llama().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = adapted(base)
    model.push_to_hub(repo_id)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), repo_id)), logits(model))
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(repo_id)), logits(model))
