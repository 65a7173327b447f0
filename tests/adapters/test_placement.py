"""Sensitivity-aware placement (SPT)."""

from __future__ import annotations

import pytest
import torch
import transformers
from checks_adapters import batch, logits
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_adapters import bert, gpt2, llama, vit

from hf_fuse import FuseError
from hf_fuse.adapters.placement import plan_placement, plot_sensitivity, sensitivity, shira_config


def batches(count: int = 3, rows: int = 2) -> list[dict]:
    made = [batch(rows=rows, seed=seed) for seed in range(count)]
    return [inputs | {"labels": inputs["input_ids"]} for inputs in made]


@pytest.fixture(scope="module")
def scores() -> dict[str, torch.Tensor]:
    return sensitivity(llama(hidden=32), batches(), progress=False)


def test_scores_are_squared_gradients():
    model, inputs = llama(), batches(1)[0]
    found = sensitivity(model, [inputs], progress=False)
    model.eval()
    model(**inputs).loss.backward()
    for name, score in found.items():
        torch.testing.assert_close(score, model.get_parameter(name).grad.square())
    assert all(score.dtype == torch.float32 and (score >= 0).all() for score in found.values())


def test_scores_add_up_over_batches_and_repeat():
    model, data = llama(), batches(3)
    whole = sensitivity(model, data, progress=False)
    single = [sensitivity(model, [inputs], progress=False) for inputs in data]
    for name, score in whole.items():
        torch.testing.assert_close(score, sum(part[name] for part in single))
    again = sensitivity(model, iter(data), progress=False)
    assert all(torch.equal(score, again[name]) for name, score in whole.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_at_most_so_many_batches_and_the_mode_is_kept():
    model, data = llama().train(), batches(3)
    found = sensitivity(model, data, max_batches=1, progress=False)
    first = sensitivity(model, data[:1], progress=False)
    assert all(torch.equal(score, first[name]) for name, score in found.items())
    assert model.training


def test_per_example_squares_before_it_adds():
    model, data = llama(), batches(1, rows=3)
    found = sensitivity(model, data, per_example=True, progress=False)
    rows = [{name: value[i : i + 1] for name, value in data[0].items()} for i in range(3)]
    expected = sensitivity(model, rows, progress=False)
    together = sensitivity(model, data, progress=False)
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(found[name], expected[name])
    assert not torch.allclose(found[name], together[name], rtol=0.1)


def test_scaling_the_loss_changes_no_plan():
    model, data = llama(hidden=32), batches(2)
    plain = sensitivity(model, data, progress=False)
    scaled = sensitivity(model, data, loss=lambda m, inputs: 1024 * m(**inputs).loss, progress=False)
    for name, score in plain.items():
        assert torch.equal(score * 1024**2, scaled[name])
    one, other = (plan_placement(s, 2000, ranks=(1, 2), progress=False) for s in (plain, scaled))
    assert one.ranks == other.ranks and one.vectors == other.vectors and one.parameters == other.parameters
    assert all(torch.equal(mask, other.masks[name]) for name, mask in one.masks.items())


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (llama(), batches()[0]),
        (gpt2(), batches()[0]),
        (bert(), batch() | {"labels": torch.tensor([0, 2])}),
        (bert(transformers.BertForMaskedLM), batches()[0]),
    ],
    ids=["llama", "gpt2", "bert_classifier", "bert_masked"],
)
def test_only_the_backbone_is_scored(model, inputs):
    names = sensitivity(model, [inputs], progress=False).keys()
    assert not [
        n
        for n in names
        if any(part in n for part in ("embed", "wte", "wpe", "lm_head", "classifier", "cls.")) and "LayerNorm" not in n
    ]
    layers = [n for n, p in model.named_parameters() if ".layers." in n or ".h." in n or ".layer." in n]
    assert set(layers) <= set(names)


def test_vision_models_keep_patches_and_class_token_out():
    model, pixels = vit(), torch.randn(2, 3, 8, 8)
    found = sensitivity(
        model, [{"pixel_values": pixels}], loss=lambda m, inputs: m(**inputs)[0].square().mean(), progress=False
    )
    assert found and not any("token" in name or "position" in name or "projection.weight" in name for name in found)


def test_frozen_and_excluded_weights_are_never_chosen():
    model = llama()
    model.model.layers[0].requires_grad_(False)
    found = sensitivity(model, batches(), exclude=r"mlp\.", progress=False)
    plan = plan_placement(found, 10**9, ranks=(1, 2), progress=False)
    chosen = [*plan.ranks, *plan.masks, *plan.vectors]
    assert chosen and not any("layers.0." in name or "mlp" in name for name in chosen)
    for unfit in (model.requires_grad_(False), get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))):
        with pytest.raises(FuseError, match="pass the bare model.* requires_grad_"):
            sensitivity(unfit, batches(), progress=False)


def test_plan_by_hand():
    """Rank 1 of a (4, 6) matrix costs 10 and needs, with alpha 5, two weights above the threshold."""
    many, few, vector, cold = torch.zeros(4, 6), torch.zeros(4, 6), torch.zeros(10), torch.zeros(4, 6)
    many[0, :3] = torch.tensor([9.0, 8.0, 7.0])
    few[2, 1] = 6.0
    vector[:2] = 5.0
    scores = {"many.weight": many, "few.weight": few, "norm.weight": vector, "cold.weight": cold}

    def plan(budget, **options):
        return plan_placement(scores, budget, ranks=(1,), alpha=5, beta=5, progress=False, **options)

    alone = plan(9)  # a LoRA would cost 10, so only the first weight fits
    assert (alone.ranks, alone.parameters, alone.masks.keys()) == ({}, 1, {"many.weight"})
    assert alone.masks["many.weight"].nonzero().tolist() == [[0, 0]] and 8 <= alone.threshold < 9
    lora = plan(10)
    assert (lora.ranks, lora.masks, lora.vectors, lora.parameters) == ({"many": 1}, {}, [], 10)
    with_mask = plan(11)
    assert with_mask.ranks == {"many": 1} and with_mask.masks["few.weight"].nonzero().tolist() == [[2, 1]]
    assert plan(20).parameters == 11  # the vector would bring 10 more
    everything = plan(21)
    assert everything.vectors == ["norm.weight"] and everything.parameters == 21 and everything.threshold < 5
    assert plan(10**6).parameters == 21 and "cold" not in plan(10**6).ranks
    structured = plan(10**6, unstructured=False)
    assert (structured.ranks, structured.masks, structured.vectors, structured.parameters) == ({"many": 1}, {}, [], 10)


def test_larger_budgets_only_add(scores):
    plans = [plan_placement(scores, budget, ranks=(1, 2, 4), progress=False) for budget in range(0, 9000, 600)]
    for budget, plan in zip(range(0, 9000, 600), plans):
        assert plan.parameters <= budget
    for small, large in zip(plans, plans[1:]):
        assert small.parameters <= large.parameters and small.threshold >= large.threshold
        assert all(large.ranks[module] >= rank for module, rank in small.ranks.items())
        assert set(small.vectors) <= set(large.vectors)
        for name, mask in small.masks.items():
            assert name.removesuffix(".weight") in large.ranks or (large.masks[name] | ~mask).all()
    assert len({plan.parameters for plan in plans}) > 8


def test_the_count_is_that_of_peft(scores):
    plan = plan_placement(scores, 4000, ranks=(1, 2, 4), unstructured=False, progress=False)
    assert len(set(plan.ranks.values())) > 1
    model = get_peft_model(llama(hidden=32), plan.lora_config(lora_alpha=4))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == plan.parameters
    ranks = {
        n.removeprefix("base_model.model."): m.r["default"] for n, m in model.named_modules() if hasattr(m, "lora_A")
    }
    assert ranks == plan.ranks
    assert set(plan.target_modules) == set(ranks) and plan.rank_pattern


def test_scores_predict_what_a_small_step_gains():
    """A step of size eps on the chosen weights takes eps * sum of their scores off the loss; on others, less."""
    model, inputs = llama(hidden=32).eval(), batches(1)[0]
    found = sensitivity(model, [inputs], progress=False)
    plan = plan_placement(found, 500, ranks=(16,), progress=False)
    assert not plan.ranks and len(plan.masks) > 2 and plan.parameters > 100
    loss = model(**inputs).loss
    gradients = dict(zip(found, torch.autograd.grad(loss, [model.get_parameter(name) for name in found])))

    def gain(masks):
        stepped = llama(hidden=32).eval()
        with torch.no_grad():
            for name, mask in masks.items():
                stepped.get_parameter(name).sub_(1e-2 * gradients[name] * mask)
            return loss.item() - stepped(**inputs).loss.item()

    masks = plan.masks | {name: torch.ones_like(found[name], dtype=torch.bool) for name in plan.vectors}
    assert sum(int(mask.sum()) for mask in masks.values()) == plan.parameters
    predicted = 1e-2 * sum(found[name][mask].sum() for name, mask in masks.items()).item()
    assert gain(masks) == pytest.approx(predicted, rel=0.05)
    random = torch.Generator().manual_seed(0)
    others = {
        name: torch.randperm(mask.numel(), generator=random).view(mask.shape) < mask.sum()
        for name, mask in masks.items()
    }
    assert gain(masks) > 2 * gain(others) > 0


def test_shira_trains_the_most_sensitive_weights(tmp_path):
    model = llama(hidden=32)
    found = sensitivity(model, batches(), progress=False)
    score = found["model.layers.0.self_attn.q_proj.weight"]
    tuned = get_peft_model(model, shira_config(model, found, r=2, target_modules=["q_proj"]))
    layer = tuned.base_model.model.model.layers[0].self_attn.q_proj
    rows, columns = layer.shira_indices["default"].long()
    assert len(rows) == 2 * 64
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask[rows, columns] = True
    assert score[mask].min() >= score[~mask].max()
    with torch.no_grad():
        layer.shira_weight["default"].normal_()
    tuned.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(hidden=32), tmp_path)), logits(tuned))


def test_chart(scores, tmp_path):
    assert plot_sensitivity(scores, tmp_path / "chart.svg").read_text().count("self_attn.q_proj") == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"budget": -1}, "budget -1"),
        ({"ranks": ()}, "ranks"),
        ({"ranks": (0, 2)}, "ranks"),
        ({"alpha": 0.5}, "alpha 0.5"),
        ({"scores": {}}, "scores"),
        ({"scores": {"a.weight": torch.tensor([[float("nan")]])}}, "scores"),
    ],
)
def test_wrong_plans(wrong, message):
    arguments = {"scores": {"a.weight": torch.ones(2, 2)}, "budget": 5} | wrong
    with pytest.raises(FuseError, match=message):
        plan_placement(**arguments, progress=False)


def test_wrong_batches():
    model, inputs = llama(), batch()
    with pytest.raises(FuseError, match="batch 1: the loss is None"):
        sensitivity(model, [inputs], progress=False)
    with pytest.raises(FuseError, match="batch 1: the loss is nan"):
        sensitivity(model, [inputs | {"labels": torch.full_like(inputs["input_ids"], -100)}], progress=False)
    with pytest.raises(FuseError, match="there are none"):
        sensitivity(model, [], progress=False)
    with pytest.raises(FuseError, match="too small for a LoRA"):
        plan_placement({"a.weight": torch.ones(2, 2)}, 0, progress=False).lora_config()
