"""PST: its masks, its gradients, its schedule, and the stock checkpoint that it ends in."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from checks_adapters import batch, logits, move
from peft import PeftModel, get_peft_model
from tiny_adapters import bert, gpt2, llama
from torch import nn
from torch.nn.functional import linear

from hf_fuse import FuseConfig, FuseError, FuseTrainer, PstConfig, PstSchedule
from hf_fuse.adapters.low_rank import to_lora
from hf_fuse.adapters.pst import NAMES, PstLayer, kept_entries, scheduled_sparsity


def layer(size=(6, 5), **settings) -> PstLayer:
    torch.manual_seed(0)
    made = PstLayer(nn.Linear(*size), "a.layer")
    made.base_layer.requires_grad_(False)
    made.update_layer("default", PstConfig(r=2, score_r=3, **settings))
    return made


def filled(made: PstLayer) -> PstLayer:
    for name in NAMES:
        nn.init.normal_(getattr(made, name)["default"])
    return made


def gradients(made: PstLayer, x: torch.Tensor) -> dict[str, torch.Tensor]:
    made(x).square().sum().backward()
    return {name: getattr(made, name)["default"].grad for name in NAMES}


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.93])
def test_a_new_layer_is_pruned_by_magnitude(sparsity):
    made = layer(sparsity=sparsity)
    weight = made.base_layer.weight
    count = math.floor(sparsity * weight.numel())
    expected = weight.clone()
    expected.view(-1)[weight.abs().flatten().argsort()[:count]] = 0
    found = made.sparse_weight("default")
    assert torch.equal(found, expected) and int((found == 0).sum()) == count
    x = torch.randn(3, 6)
    torch.testing.assert_close(made(x), linear(x, expected, made.base_layer.bias))


def test_exactly_so_many_entries_go_and_of_equal_ones_the_first():
    scores = torch.tensor([[2.0, 1, 1], [1, 0, 3]])
    assert kept_entries(scores, 0.5).tolist() == [[True, False, False], [True, False, True]]
    assert kept_entries(torch.zeros(10, 10), 0.29).sum() == 71
    assert kept_entries(scores, 0).all()


def test_scores_are_what_the_paper_says():
    made = filled(layer(sparsity=0.4, beta=0.5, alpha_1=2.0, alpha_2=3.0))
    u, v, a, b, r, c = (getattr(made, name)["default"] for name in NAMES)
    changed = made.base_layer.weight + 0.5 * u @ v
    score = changed.abs() + 2 * a @ b + 3 * (r.view(5, 1) @ torch.ones(1, 6) + torch.ones(5, 1) @ c.view(1, 6))
    mask = torch.ones(30)
    mask[score.flatten().argsort()[:12]] = 0
    torch.testing.assert_close(made.sparse_weight("default"), changed * mask.view(5, 6))


def test_first_gradients_reach_all_but_the_factors_whose_partners_are_zero():
    found = gradients(layer(sparsity=0.5), torch.randn(4, 6))
    assert {name for name, gradient in found.items() if gradient.abs().max() == 0} == {"pst_u", "pst_a"}


def test_gradients_pass_straight_through_the_mask():
    """dL/dS := dL/dM, and |W'| is part of S; written out by hand."""
    made = filled(layer(sparsity=0.5, beta=0.7, alpha_1=1.3, alpha_2=0.4))
    x = torch.randn(4, 6)
    found = gradients(made, x)
    with torch.no_grad():
        u, v, a, b, _, _ = (getattr(made, name)["default"] for name in NAMES)
        changed = made.base_layer.weight + 0.7 * u @ v
        sparse = made.sparse_weight("default")
        grad_oi = (2 * made(x)).T @ x  # of the loss by the sparse weight
        grad_score = grad_oi * changed
        grad_changed = grad_oi * (sparse != 0) + grad_score * changed.sign()
    expected = {
        "pst_u": 0.7 * grad_changed @ v.T, "pst_v": 0.7 * u.T @ grad_changed, "pst_a": 1.3 * grad_score @ b.T,
        "pst_b": 1.3 * a.T @ grad_score, "pst_rows": 0.4 * grad_score.sum(1), "pst_columns": 0.4 * grad_score.sum(0),
    }  # fmt: skip
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4)


def test_without_sparsity_it_is_a_lora():
    made = filled(layer(sparsity=0.0))
    x = torch.randn(3, 6)
    u, v = made.pst_u["default"], made.pst_v["default"]
    torch.testing.assert_close(made(x), made.base_layer(x) + x @ v.T @ u.T)


def test_sparsity_rises_as_a_cube_between_the_first_tenth_and_the_last_three():
    assert [scheduled_sparsity(step, 100, 0.8) for step in (0, 10, 70, 99)] == [0, 0, 0.8, 0.8]
    assert scheduled_sparsity(40, 100, 0.8) == pytest.approx(0.8 * (1 - 0.5**3))


@pytest.mark.parametrize("build", [llama, gpt2, bert])
def test_default_targets_are_all_linear_layers_of_the_blocks(build):
    model = get_peft_model(build(), PstConfig(r=2, score_r=2))
    found = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, PstLayer)}
    blocks = {
        llama: {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        gpt2: {"c_attn", "c_proj", "c_fc"},
        bert: {"query", "key", "value", "dense"},
    }
    assert found == blocks[build]
    assert not isinstance(model.get_base_model().get_submodule("bert.pooler.dense" if build is bert else ""), PstLayer)


def _rows(count=16):
    ids = torch.randint(0, 40, (count, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.mark.parametrize("fused", [True, False])
def test_training_ends_in_a_stock_checkpoint_with_so_many_zeros(tmp_path, fused):
    seen = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            seen.append({m.sparsity["default"] for m in model.modules() if isinstance(m, PstLayer)})

    options = {"max_steps": 10, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "report_to": "none",
               "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}  # fmt: skip
    config = PstConfig(sparsity=0.6, r=2, score_r=2, task_type="CAUSAL_LM")
    if fused:
        arguments = FuseConfig(str(tmp_path / "run"), **options)
        trainer = FuseTrainer(llama(), arguments, peft_config=config, train_dataset=_rows(), callbacks=[Watch()])
    else:
        arguments = transformers.TrainingArguments(str(tmp_path / "run"), **options)
        model = get_peft_model(llama(), config)
        trainer = transformers.Trainer(model, arguments, train_dataset=_rows(), callbacks=[PstSchedule(), Watch()])
    trainer.train()
    assert all(len(one) == 1 for one in seen)
    assert [one.pop() for one in seen] == [scheduled_sparsity(step, 10, 0.6) for step in range(10)]
    tuned = trainer.model
    trained, start = logits(tuned), logits(llama())
    tuned.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "adapter")), trained)
    merged = tuned.merge_and_unload()
    merged.save_pretrained(tmp_path / "model")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(loaded), trained, rtol=1e-4, atol=1e-5)
    assert (trained - start).abs().max() > 1e-2
    for name, weight in loaded.named_parameters():
        if "_proj" in name:
            assert int((weight == 0).sum()) == math.floor(0.6 * weight.numel()), name


def test_merging_and_back_brings_the_same_bits(tmp_path):
    for build in (llama, gpt2):
        model = move(get_peft_model(build(), PstConfig(sparsity=0.4, r=2, score_r=2)))
        before, adapted = {n: p.clone() for n, p in model.named_parameters()}, logits(model)
        model.merge_adapter()
        torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_mistakes_get_one_clear_error(tmp_path):
    for settings, words in (
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"r": 0}, "r is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            PstConfig(**settings)
    model = get_peft_model(llama(), PstConfig(target_modules=["q_proj"]))
    with pytest.raises(FuseError, match="no LoRA can"):
        to_lora(model, tmp_path / "lora")
    model.add_adapter("second", PstConfig(target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="Activate one"):
        model(**batch())
    with pytest.raises(TypeError, match="only Linear and Conv1D"):
        get_peft_model(llama(), PstConfig(target_modules=["embed_tokens"]))
