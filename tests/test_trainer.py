"""FuseTrainer: every term right in every layout, logged under its name; and errors before any work."""

import json
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from training_cases import (
    CASES,
    bert,
    classes_data,
    language_data,
    llama,
    make_trainer,
    mixlora,
    mixtral,
    padded,
    train,
)

from hf_fuse import FuseConfig, FuseTrainer, MolaConfig
from hf_fuse.errors import CheckpointError, FuseError, RecipeError
from hf_fuse.objectives import Schedule, read_objectives

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
LORA = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


def assert_same(run, other, tolerance=2e-5):
    for entry, expected in zip(run[0], other[0], strict=True):
        assert entry == pytest.approx(expected, rel=tolerance, abs=tolerance)
    for name, value in run[1].items():
        assert (value - other[1][name]).abs().max() < tolerance / 10, name


# ---- layouts


@pytest.mark.parametrize("case", CASES)
def test_accumulated_micro_batches_train_as_one_batch(case, tmp_path):
    whole = train(make_trainer(case, tmp_path, 8, 1))
    assert_same(train(make_trainer(case, tmp_path, 1, 8)), whole)
    assert len(whole[0]) == 4


def test_a_step_is_the_gradient_of_the_mean_over_all_labels(tmp_path):
    """Against the sums written out: layouts could be equal and all of them wrong."""
    logs, trained = train(make_trainer("language", tmp_path, 2, 4, objectives={"logit_z": 0.1}, max_steps=1))
    model, batch = llama(), padded(language_data()[:8])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    kept = batch["labels"][:, 1:] != -100
    task = F.cross_entropy(logits[kept], batch["labels"][:, 1:][kept])
    z = logits[kept].logsumexp(-1).square().mean()
    (task + 0.1 * z).backward()
    assert logs[0]["task_loss"] == pytest.approx(task.item(), rel=1e-5)
    assert logs[0]["logit_z"] == pytest.approx(z.item(), rel=1e-5)
    assert logs[0]["loss"] == pytest.approx((task + 0.1 * z).item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.allclose(trained[name], parameter - 0.1 * parameter.grad, atol=1e-6), name


def test_a_model_that_ignores_the_count_is_not_multiplied_by_the_steps(tmp_path):
    _, trained = train(make_trainer("plain_classes", tmp_path, 2, 4, max_steps=1))
    model, rows = bert(), classes_data()[:8]
    model.train()
    model(
        input_ids=torch.stack([r["input_ids"] for r in rows]), labels=torch.tensor([r["labels"] for r in rows])
    ).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(trained[name], parameter - 0.1 * parameter.grad, atol=1e-6), name


def test_an_adapter_alone_is_trained(tmp_path):
    changes = {"peft_config": lambda: LORA}
    torch.manual_seed(0)
    whole = train(make_trainer("language", tmp_path, 8, 1, **changes))
    assert whole[1] and all("lora_" in name for name in whole[1])
    assert_same(train(make_trainer("language", tmp_path, 2, 4, **changes)), whole)
    assert {"task_loss", "logit_z"} <= whole[0][0].keys()


def test_gradient_checkpointing_changes_nothing(tmp_path):
    for case in ("language", "mixlora"):
        plain = train(make_trainer(case, tmp_path, 4, 2))
        assert_same(train(make_trainer(case, tmp_path, 4, 2, gradient_checkpointing=True)), plain)


def test_bf16_autocast_keeps_the_terms_in_fp32(tmp_path):
    plain, _ = train(make_trainer("language", tmp_path, 4, 2))
    logs, trained = train(make_trainer("language", tmp_path, 4, 2, bf16=True))
    for entry, expected in zip(logs, plain):
        assert entry["task_loss" if "loss" in entry else "eval_loss"] == pytest.approx(
            expected["task_loss" if "loss" in entry else "eval_loss"], rel=2e-2
        )
    assert logs[0]["logit_z"] != plain[0]["logit_z"]
    assert all(value.dtype == torch.float32 for value in trained.values())


# ---- logs


def test_a_logging_window_is_the_mean_of_its_steps(tmp_path):
    changes = {"max_steps": 4, "objectives": {"logit_z": 0.1, "comp_sum": {"start": 0, "end": 1, "until": 3}}}
    every, _ = train(make_trainer("language", tmp_path, 4, 2, **changes))
    pairs, _ = train(make_trainer("language", tmp_path, 4, 2, logging_steps=2, **changes))
    for window, (first, second) in zip(pairs, zip(every[0:4:2], every[1:4:2])):
        for name in ("loss", "task_loss", "logit_z"):
            assert window[name] == pytest.approx((first[name] + second[name]) / 2, rel=1e-6)
    # The warm-up starts at 0: the loss is computed, and logged, from the second step on.
    assert "comp_sum" not in every[0]
    assert pairs[0]["comp_sum"] == pytest.approx(every[1]["comp_sum"], rel=1e-6)
    assert [entry["comp_sum_weight"] for entry in every[:4]] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert "logit_z_weight" not in every[0]


def test_the_logged_loss_is_the_weighted_sum_of_the_terms(tmp_path):
    logs, _ = train(make_trainer("classes", tmp_path, 2, 4))
    for entry in logs[:-1]:
        total = 0.5 * entry["task_loss"] + entry["class_balanced"] + 0.3 * entry["ldam"] + 2 * entry["dkl"]
        assert entry["loss"] == pytest.approx(total, rel=1e-5)
        assert entry["dkl"] > 1e-4


def test_without_objectives_the_logs_are_the_trainers(tmp_path):
    logs, _ = train(make_trainer("plain_classes", tmp_path, 4, 2))
    assert logs[0].keys() == {"loss", "grad_norm", "learning_rate", "epoch", "step"}
    assert logs[-1].keys() == {"eval_loss", "epoch", "step"}


def test_eval_loss_is_the_task_loss_over_the_whole_set(tmp_path):
    trainer = make_trainer("language", tmp_path, 3, 1)
    metrics = trainer.evaluate()
    batch = padded(language_data()[:13])
    expected = llama().eval()(**batch).loss.item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_comp_sum"] > 0
    assert trainer.evaluate(metric_key_prefix="test")["test_loss"] == pytest.approx(expected, rel=1e-5)


def test_predictions_hold_the_logits_alone(tmp_path, third_party):
    def spread(hidden_states):
        return hidden_states[-1].float().var()

    third_party(spread)
    shapes = []

    def metrics(predictions):
        shapes.append(predictions.predictions.shape)
        return {}

    trainer = make_trainer("plain_classes", tmp_path, 4, 1, objectives={"spread": 1.0}, compute_metrics=metrics)
    assert trainer.evaluate()["eval_spread"] > 0
    assert shapes == [(13, 3)]


# ---- the task loss in its forms


def test_label_smoothing_smooths_the_task_loss_alone(tmp_path):
    smooth, _ = train(make_trainer("smoothing", tmp_path, 4, 2))
    plain, _ = train(make_trainer("smoothing", tmp_path, 4, 2, label_smoothing_factor=0.0))
    assert smooth[0]["logit_z"] == pytest.approx(plain[0]["logit_z"], rel=1e-6)
    batch = padded(language_data()[:8])
    logits = llama()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=0.2)
    assert smooth[0]["task_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_task_of_weight_0_is_replaced(tmp_path):
    """comp_sum with tau 1 is cross-entropy."""
    plain = train(make_trainer("language", tmp_path, 4, 2, objectives={}))
    replaced = train(make_trainer("language", tmp_path, 4, 2, objectives={"task": 0, "comp_sum": {"tau": 1.0}}))
    assert [e["loss"] for e in replaced[0][:-1]] == pytest.approx([e["loss"] for e in plain[0][:-1]], rel=1e-5)
    for name, value in plain[1].items():
        assert torch.allclose(value, replaced[1][name], atol=1e-6)


def test_two_views_under_dropout_differ_and_are_not_evaluated(tmp_path):
    changes = {"model": lambda: bert(hidden_dropout_prob=0.3), "objectives": {"dkl": 1.0}}
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in classes_data()]
    logs, _ = train(make_trainer("classes", tmp_path, 4, 2, data=lambda: rows, **changes))
    assert all(entry["dkl"] > 1e-3 for entry in logs[:-1])
    assert "eval_dkl" not in logs[-1]


# ---- routers


def test_router_objectives_leave_out_the_models_own_balance_loss(tmp_path):
    logs, _ = train(make_trainer("mixtral", tmp_path, 8, 1))
    plain, _ = train(make_trainer("mixtral", tmp_path, 8, 1, objectives={}))
    assert logs[0]["task_loss"] == pytest.approx(plain[0]["loss"], rel=1e-6)
    assert "aux_loss" not in logs[0]
    model, batch = mixtral(), padded(language_data()[:8])
    router_logits = model(**batch, output_router_logits=True).router_logits
    kept = batch["attention_mask"].flatten() == 1
    z = torch.stack([layer[kept].logsumexp(-1).square().mean() for layer in router_logits]).mean()
    assert logs[0]["router_z"] == pytest.approx(z.item(), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_models_own_balance_loss_counts_once(smoothing, tmp_path):
    changes = {
        "model": lambda: mixtral(output_router_logits=True),
        "objectives": {},
        "label_smoothing_factor": smoothing,
    }
    logs, _ = train(make_trainer("mixtral", tmp_path, 8, 1, max_steps=1, **changes))
    model, batch = mixtral(), padded(language_data()[:8])
    expected = 0.5 * model(**batch, output_router_logits=True).aux_loss.item()
    assert logs[0]["aux_loss"] == pytest.approx(expected, rel=1e-5)
    assert logs[0]["loss"] == pytest.approx(logs[0]["task_loss"] + expected, rel=1e-5)
    # Eight times one sample has other statistics, but no other scale.
    small, _ = train(make_trainer("mixtral", tmp_path, 1, 8, max_steps=1, **changes))
    assert small[0]["aux_loss"] == pytest.approx(expected, rel=0.1)
    assert small[0]["task_loss"] == pytest.approx(logs[0]["task_loss"], rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_an_adapters_balance_loss_counts_once(smoothing, tmp_path):
    changes = {"peft_config": lambda: mixlora(router_aux_loss_coef=0.5), "label_smoothing_factor": smoothing}
    logs, _ = train(make_trainer("mixlora", tmp_path, 8, 1, objectives={}, **changes))
    # 0.5 times top_k = 2 if routing were uniform.
    assert logs[0]["aux_loss"] == pytest.approx(1.0, abs=0.1)
    assert logs[0]["loss"] == pytest.approx(logs[0]["task_loss"] + logs[0]["aux_loss"], rel=1e-5)
    small, _ = train(make_trainer("mixlora", tmp_path, 1, 8, objectives={}, **changes))
    assert small[0]["aux_loss"] == pytest.approx(logs[0]["aux_loss"], rel=0.1)


@pytest.mark.parametrize("smoothing", [0.0, 1e-9])
def test_the_balance_losses_of_a_mixture_and_of_its_adapter_both_count(smoothing, tmp_path):
    adapter = MolaConfig(target_modules=["q_proj"], num_experts=4, router_aux_loss_coef=0.5)
    changes = {"peft_config": lambda: adapter, "objectives": {}, "label_smoothing_factor": smoothing, "max_steps": 1}
    alone, _ = train(make_trainer("mixtral", tmp_path, 8, 1, **changes))
    both, _ = train(
        make_trainer("mixtral", tmp_path, 8, 1, model=lambda: mixtral(output_router_logits=True), **changes)
    )
    own = 0.5 * mixtral()(**padded(language_data()[:8]), output_router_logits=True).aux_loss.item()
    assert both[0]["task_loss"] == pytest.approx(alone[0]["task_loss"], rel=1e-5)
    assert both[0]["aux_loss"] == pytest.approx(alone[0]["aux_loss"] + own, rel=1e-5)
    assert both[0]["loss"] == pytest.approx(both[0]["task_loss"] + both[0]["aux_loss"], rel=1e-5)


@pytest.mark.parametrize("case", ["mixlora", "mixtral"])
def test_router_statistics_and_the_chart_of_expert_usage(case, tmp_path):
    trainer = make_trainer(case, tmp_path, 4, 2, save_strategy="steps", save_steps=2, max_steps=4)
    logs, _ = train(trainer)
    layer = "model.layers.1.mlp" if case == "mixlora" else "layer_1"
    entry = {key.removeprefix(f"router/{layer}/"): value for key, value in logs[0].items()}
    assert 0 <= entry["load_min"] <= 0.25 <= entry["load_max"] <= 0.5  # two different experts per token
    assert 0 < entry["entropy"] <= 1
    assert [sum(load) for load in trainer.router_usage.loads.values()] == pytest.approx([1, 1])
    for folder in ("", "checkpoint-2", "checkpoint-4"):
        assert (tmp_path / folder / "expert_usage.png").read_bytes().startswith(b"\x89PNG")
    quiet, _ = train(make_trainer(case, tmp_path / "quiet", 4, 2, router_statistics=False))
    assert not any("router/" in key for key in quiet[0])
    assert not list((tmp_path / "quiet").glob("*.png"))


def test_loads_are_those_of_the_routers_choices(tmp_path):
    trainer = make_trainer("mixtral", tmp_path, 2, 4, max_steps=1)
    train(trainer)
    batch = padded(language_data()[:8])
    router_logits = mixtral()(**batch, output_router_logits=True).router_logits
    chosen = router_logits[0][batch["attention_mask"].flatten() == 1].topk(2).indices
    expected = torch.bincount(chosen.flatten(), minlength=4) / chosen.numel()
    assert trainer.router_usage.loads["layer_0"] == pytest.approx(expected.tolist())


def test_tokens_beyond_capacity_are_logged_as_dropped(tmp_path):
    adapter = {
        "router_aux_loss_coef": 0.0,
        "lora_dropout": 0.0,
        "routing_strategy": "mixlora-switch",
        "expert_capacity": 1,
    }
    changes = {"peft_config": lambda: mixlora(**adapter), "objectives": {}, "max_steps": 1, "save_strategy": "steps"}
    logs, _ = train(make_trainer("mixlora", tmp_path, 4, 2, save_steps=1, **changes))
    # One token per sequence and expert is kept: at most 4 of each sequence's 4 to 11.
    assert 0.3 < logs[0]["router/model.layers.0.mlp/dropped"] < 0.95
    assert not any("dropped" in key for key in train(make_trainer("mixlora", tmp_path, 4, 2))[0][0])


def test_the_chart_of_a_run_that_never_logs(tmp_path):
    settings = {"logging_strategy": "no", "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    train(make_trainer("mixlora", tmp_path, 4, 2, **settings))
    assert (tmp_path / "checkpoint-1" / "expert_usage.png").is_file()
    assert (tmp_path / "expert_usage.png").is_file()


# ---- state


class running_centre(nn.Module):
    """A loss with state: distance of the mean logits from their moving average."""

    def __init__(self, *, momentum: float = 0.5):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("centre", torch.zeros(3))

    def forward(self, logits_NC, labels_N):
        mean = logits_NC.float().mean(0)
        loss = (mean - self.centre).square().sum()
        self.centre = self.momentum * self.centre + (1 - self.momentum) * mean.detach()
        return loss


def test_resuming_goes_on_with_the_same_losses_and_states(tmp_path, third_party):
    third_party(running_centre)
    settings = {"objectives": {"running_centre": {"weight": 0.5, "momentum": 0.9}}, "save_steps": 2, "max_steps": 4}
    whole = train(make_trainer("classes", tmp_path, 4, 2, save_strategy="steps", **settings))
    assert "eval_running_centre" not in whole[0][-1]
    resumed = make_trainer("classes", tmp_path, 4, 2, save_strategy="steps", **settings)
    assert_same(train(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-2")), whole, tolerance=1e-6)

    (state,) = (tmp_path / "checkpoint-2").glob("objective_states*")
    state.unlink()
    with pytest.raises(CheckpointError, match="running_centre carries state"):
        train(
            make_trainer("classes", tmp_path, 4, 2, **settings), resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


def test_parameters_of_a_loss_are_refused(third_party, tmp_path):
    class probe(nn.Linear):
        def __init__(self):
            super().__init__(3, 1)

    third_party(probe)
    with pytest.raises(RecipeError, match="probe has trainable parameters"):
        FuseConfig(output_dir=str(tmp_path), objectives={"probe": 1.0})


def test_a_subclass_offers_further_tensors(tmp_path, third_party):
    def towards_teacher(logits_NC, labels_N, teacher_logits_NC):
        return (logits_NC - teacher_logits_NC).square().mean()

    class Distilling(FuseTrainer):
        extra_tensors = frozenset({"teacher_logits"})

        def named_tensors(self, needed, model, inputs, outputs):
            found = super().named_tensors(needed, model, inputs, outputs)
            return found | {"teacher_logits": torch.ones_like(found["logits"])}

    third_party(towards_teacher)
    model, rows = bert(), classes_data()[:8]
    args = {"output_dir": str(tmp_path), "objectives": {"towards_teacher": 1.0}, "use_cpu": True, "report_to": "none",
            "max_steps": 1, "per_device_train_batch_size": 8, "logging_steps": 1, "save_strategy": "no"}  # fmt: skip
    trainer = Distilling(model, FuseConfig(**args), train_dataset=rows, eval_dataset=rows)
    logs, _ = train(trainer)
    logits = bert()(input_ids=torch.stack([row["input_ids"] for row in rows])).logits
    assert logs[0]["towards_teacher"] == pytest.approx((logits - 1).square().mean().item(), rel=1e-5)
    with pytest.raises(FuseError, match="needs teacher_logits, but the batches have only"):
        train(FuseTrainer(bert(), FuseConfig(**args), train_dataset=rows))


def test_columns_for_losses_survive_the_removal_of_unused_ones(tmp_path, third_party):
    from datasets import Dataset

    seen = []

    def remember(logits_NC, labels_N, sample_ids):
        seen.extend(sample_ids.tolist())
        return logits_NC.sum() * 0

    third_party(remember)
    data = Dataset.from_list(
        [{k: v.tolist() if torch.is_tensor(v) else v for k, v in r.items()} for r in classes_data()]
    )
    train(make_trainer("classes", tmp_path, 4, 1, max_steps=2, objectives={"remember": 1, "dkl": 1}, data=lambda: data))
    assert seen[:8] == list(range(8))


# ---- settings


def test_schedules():
    ramp = Schedule(0.0, 2.0, 0.25, 0.75)
    assert [ramp(step, 100) for step in (0, 25, 50, 75, 100)] == [0, 0, 1, 2, 2]
    cosine = Schedule(1.0, 0.0, 10, 20, "cosine")
    assert [cosine(step, 100) for step in (0, 10, 15, 20)] == pytest.approx([1, 1, 0.5, 0])
    assert cosine(12, 100) == pytest.approx(0.5 + 0.5 * math.cos(0.2 * math.pi))
    jump = Schedule(0.0, 1.0, 5, 5)
    assert [jump(step, 100) for step in (4, 5)] == [0, 1]


def test_objectives_in_every_form():
    task, objectives = read_objectives(
        {
            "logit_z": "1e-4",  # YAML 1.1
            "load_balance": {"start": 0, "end": 0.01, "until": 0.1, "shape": "cosine"},
            "comp_sum": {"weight": {"start": 1, "end": 0, "after": 10, "until": 20}, "tau": 0.7},
            "dkl": {"temperature": 0.1},
            "task": 0.5,
        }
    )
    assert task == Schedule(0.5, 0.5)
    assert [o.name for o in objectives] == ["logit_z", "load_balance", "comp_sum", "dkl"]
    assert [o.weight for o in objectives] == [
        Schedule(1e-4, 1e-4), Schedule(0, 0.01, 0, 0.1, "cosine"), Schedule(1, 0, 10, 20), Schedule(1, 1),
    ]  # fmt: skip
    assert [o.mean_over for o in objectives] == ["predictions", "tokens", "predictions", "predictions"]
    assert objectives[2].loss.keywords == {"tau": 0.7}


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ({"logit_zz": 1}, "there is no loss 'logit_zz'. Did you mean 'logit_z'?"),
        ({"tusk": 1}, "Did you mean 'task'?"),
        ({"comp_sum": {"tua": 1}}, "comp_sum has no parameter 'tua'. Did you mean 'tau'?"),
        ({"comp_sum": {"tau": 3}}, r"objectives.comp_sum: tau is 3, expected float \[0, 2\]"),
        ({"comp_sum": "much"}, "objectives.comp_sum is 'much', expected a number or a schedule"),
        ({"comp_sum": True}, "objectives.comp_sum is True"),
        ({"comp_sum": "1.2.3"}, "objectives.comp_sum is '1.2.3', expected a number"),
        ("comp_sum", "objectives is 'comp_sum', expected a mapping of names to weights"),
        (["comp_sum"], r"objectives is \['comp_sum'\], expected a mapping"),
        ({"comp_sum": float("nan")}, "objectives.comp_sum is nan"),
        ({"comp_sum": {"start": 0, "end": 1, "untill": 0.1}}, "a schedule has no 'untill'. Did you mean 'until'?"),
        ({"comp_sum": {"start": 0}}, "the schedule lacks 'end'"),
        ({"comp_sum": {"start": 0, "end": 1, "until": 1.5}}, "until is 1.5, expected a share of the training"),
        ({"comp_sum": {"start": 0, "end": 1, "after": 0.5, "until": 0.1}}, "comes later than until"),
        ({"comp_sum": {"start": 0, "end": 1, "shape": "cosin"}}, "Did you mean 'cosine'?"),
        ({"task": {"weight": 1, "tau": 1}}, "the task loss has no options"),
    ],
)
def test_wrong_objectives_are_refused_at_once(objectives, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        FuseConfig(output_dir=str(tmp_path), objectives=objectives)


def test_the_config_is_read_from_the_command_line_and_written_as_json(tmp_path):
    objectives = {"logit_z": 0.1, "comp_sum": {"weight": 0.5, "tau": 0.7}}
    parser = transformers.HfArgumentParser(FuseConfig)
    (config,) = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--objectives", json.dumps(objectives), "--router_statistics", "false"]
    )
    assert config.objectives == objectives
    assert not config.router_statistics
    assert json.loads(config.to_json_string())["objectives"] == objectives


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("language", {"objectives": {"router_z": 1}}, "needs the logits of routers, but LlamaForCausalLM has none"),
        ("language", {"objectives": {"looks": 1}}, "attn_implementation='eager'"),
        ("language", {"objectives": {"ldam": 1}, "data": lambda: [{"input_ids": torch.ones(3)}] * 13}, "has no labels"),
        ("classes", {"objectives": {"ldam": 1}, "model": lambda: bert(num_labels=2)}, "the model's classes are 0 to 1"),
        ("classes", {"objectives": {"named": 1}}, "needs bag_ids, but the batches have only input_ids"),
    ],
)
def test_what_can_not_be_given_is_refused_before_training(case, changes, message, tmp_path, third_party):
    def looks(attentions):
        return attentions[0].sum()

    def named(logits_NC, labels_N, bag_ids):
        return logits_NC.sum()

    third_party(looks if "looks" in changes["objectives"] else named)
    with pytest.raises(FuseError, match=message):
        trainer = make_trainer(case, tmp_path, 4, 2, **changes)
        trainer.add_callback(_NoStep())
        train(trainer)


def test_routers_of_encoder_and_decoder_are_no_objective(tmp_path):
    from peft import get_peft_model

    from hf_fuse import MixLoraConfig

    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    adapter = MixLoraConfig(num_experts=2, top_k=1, r=2, target_modules=["wi", "wo"])
    model = get_peft_model(transformers.T5ForConditionalGeneration(config), adapter)
    args = FuseConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", objectives={"router_z": 1})
    with pytest.raises(FuseError, match="router_z: the routers of T5.* see different tokens.*router_z_loss_coef"):
        FuseTrainer(model, args)


class _NoStep(transformers.TrainerCallback):
    def on_pre_optimizer_step(self, *args, **kwargs):
        pytest.fail("a step was made")


def test_wrong_arguments_are_explained(tmp_path, monkeypatch):
    args = FuseConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(FuseError, match="args is a TrainingArguments, expected a FuseConfig"):
        FuseTrainer(llama(), transformers.TrainingArguments(output_dir=str(tmp_path)))
    with pytest.raises(FuseError, match="AutoModelForCausalLM.from_pretrained"):
        FuseTrainer("some/model", args)
    with pytest.raises(FuseError, match="has an adapter already"):
        FuseTrainer(get_peft_model(llama(), LORA), args, peft_config=LORA)
    monkeypatch.delattr(transformers.Trainer, "loss_is_scaled_for_ga")
    with pytest.raises(FuseError, match="transformers 5.19 or later"):
        FuseTrainer(llama(), args)


def test_attentions_are_given_where_attention_is_eager(tmp_path, third_party):
    def sharpness(attentions, attention_mask=None):
        return torch.stack([layer.square().sum(-1).mean() for layer in attentions]).mean()

    third_party(sharpness)
    changes = {"objectives": {"sharpness": 0.1}, "model": lambda: llama(attn_implementation="eager")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logs, _ = train(make_trainer("language", tmp_path, 4, 2, **changes))
    assert 0 < logs[0]["sharpness"] <= 1
