"""Bandits over auxiliary data sets: figures of the specification, and a run that finds out which data set helps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig
from training_cases import llama

from hf_fuse import FuseConfig
from hf_fuse.data.bandits import Exp3, Ucb1, exp3_probabilities, flattened, ucb1_bounds
from hf_fuse.data.flad import FladTrainer
from hf_fuse.errors import FuseError


def test_exp3_by_hand():
    assert exp3_probabilities([2, 0.5, 0], 10).round(3).tolist() == [0.368, 0.322, 0.310]
    assert exp3_probabilities([5.0, 0.0], 1).tolist() == [0.5, 0.5], "exploration only, at first"
    assert exp3_probabilities([1e6, 0.0], 10**6)[0] == pytest.approx(1, abs=2e-3), "no overflow"
    bandit = Exp3(3)
    bandit.update(1, 0.6)
    assert bandit.rewards == pytest.approx([0, 1.8, 0]) and bandit.pulls == [0, 1, 0] and bandit.step == 2


def test_ucb1_by_hand():
    bounds = ucb1_bounds([0.4, 0.3, 0.1], [6, 3, 1], 10)
    assert bounds.argmax() == 2 and bounds[2] == pytest.approx(2.246, abs=1e-3)
    bandit = Ucb1(3, smoothing=0.1)
    for arm in range(3):
        assert bandit.choose() == arm, "each once at first"
        bandit.update(arm, 0.1 * arm)
    assert bandit.choose() == 2
    bandit.update(2, 1.2)
    assert bandit.rewards[2] == pytest.approx(0.2 + 0.1 * (1.2 - 0.2))


@pytest.mark.parametrize("kind", [Exp3, Ucb1])
def test_a_bandit_finds_the_best_arm_and_goes_on_where_it_was(kind):
    def run(bandit, steps):
        chosen = []
        for _ in range(steps):
            arm = bandit.choose()
            assert bandit.choose() == arm
            bandit.update(arm, [0.1, 0.7, 0.0][arm])
            chosen.append(arm)
        return chosen

    whole = run(kind(3, seed=4), 300)
    # UCB1 goes on exploring at about log t: with gaps of 0.6 still often at 300.
    assert np.bincount(whole[200:], minlength=3).argmax() == 1
    first = kind(3, seed=4)
    assert run(first, 120) == whole[:120]
    second = kind(3, seed=4)
    second.restore(first.state())
    assert run(second, 180) == whole[120:]
    assert run(kind(3, seed=5), 50) != whole[:50] or kind is Ucb1


def test_the_published_sampler_flattens():
    assert flattened(np.array([0.7, 0.2, 0.1])).round(3).tolist() == [0.464, 0.281, 0.255]
    for arms, share in ((3, 0.576), (10, 0.232), (35, 0.074)):
        assert flattened(np.eye(arms)[0])[0] == pytest.approx(share, abs=1e-3)


def rows(kind, count=24):
    """Sequences that count up by one ("near" too), or unrelated tokens."""
    random = torch.Generator().manual_seed({"target": 0, "near": 1, "far": 2}[kind])
    found = []
    for _ in range(count):
        start = int(torch.randint(3, 20, (1,), generator=random))
        ids = torch.arange(start, start + 8) if kind != "far" else torch.randint(3, 30, (8,), generator=random)
        found.append({"input_ids": ids, "labels": ids})
    return found


def make(folder, batch=8, accumulation=1, peft_config=None, **options):
    data = options.pop("train_dataset", rows("target"))
    names = {"auxiliary_datasets", "policy", "flatten", "reward_parameters"} & options.keys()
    chosen = {"auxiliary_datasets": {"far": rows("far"), "near": rows("near")}} | {n: options.pop(n) for n in names}
    args = FuseConfig(
        str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, learning_rate=0.02,
        report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1, lr_scheduler_type="constant",
        **{"max_steps": 8, "save_strategy": "no"} | options,
    )  # fmt: skip
    return FladTrainer(llama(), args, train_dataset=data, peft_config=peft_config, **chosen)


@pytest.mark.parametrize("policy", ["exp3", "ucb1"])
def test_the_data_set_that_helps_is_found(policy, tmp_path):
    trainer = make(tmp_path, policy=policy, max_steps=20)
    trainer.train()
    means = np.array(trainer.bandit.rewards) / (20 if policy == "exp3" else 1)
    assert means[1] > means[0] + 0.1, "gradients of the near data set point the same way"
    shares = [entry["near_share"] for entry in trainer.state.log_history if "near_share" in entry]
    assert shares[-1] == trainer.bandit.pulls[1] / 20 and sum(trainer.bandit.pulls) == 20
    assert {"task_loss", "replay", "far_share"} <= trainer.state.log_history[0].keys()


def test_the_reward_is_the_cosine_of_both_gradients(tmp_path):
    trainer = make(tmp_path, max_steps=1, auxiliary_datasets={"near": rows("near", 8)}, train_dataset=rows("target", 8))
    rewards = []
    trainer.bandit.update = lambda arm, reward: rewards.append(reward)
    before = llama()
    trainer.train()
    gradients = []
    for name in ("target", "near"):
        batch = {key: torch.stack([row[key] for row in rows(name, 8)]) for key in ("input_ids", "labels")}
        loss = before(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        gradients.append(torch.autograd.grad(loss, before.lm_head.weight)[0].flatten())
    expected = torch.nn.functional.cosine_similarity(*gradients, dim=0).item()
    assert rewards == [pytest.approx(expected, abs=1e-4)]


def test_with_lora_the_last_matrix_is_compared(tmp_path):
    trainer = make(tmp_path, max_steps=6, peft_config=LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
    (compared,) = trainer._reward_parameters
    names = [name for name, parameter in trainer.model.named_parameters() if parameter is compared]
    assert names == ["base_model.model.model.layers.1.mlp.down_proj.lora_B.default.weight"]
    trainer.train()
    assert sum(trainer.bandit.pulls) == 6 and any(trainer.bandit.rewards)


def test_steps_without_auxiliary_data_teach_the_bandit_nothing(tmp_path):
    trainer = make(tmp_path, max_steps=5, objectives={"replay": {"start": 0.0, "end": 1.0, "after": 3, "until": 4}})
    trainer.train()
    assert sum(trainer.bandit.pulls) < 5 and any(trainer.bandit.rewards)


def test_splitting_the_batch_changes_nothing_and_resuming_neither(tmp_path):
    def run(folder, batch, accumulation, resume=None, **options):
        trainer = make(folder, batch, accumulation, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole", 8, 1)
    parts = run(tmp_path / "parts", 2, 4)
    assert parts.bandit.pulls == whole.bandit.pulls
    assert parts.bandit.rewards == pytest.approx(whole.bandit.rewards, abs=1e-3)
    for one, other in zip(whole.model.parameters(), parts.model.parameters()):
        assert (one - other).abs().max() < 1e-5
    run(tmp_path / "cut", 8, 1, save_strategy="steps", save_steps=5)
    resumed = run(tmp_path / "cut", 8, 1, resume=str(tmp_path / "cut" / "checkpoint-5"))
    assert resumed.bandit.state() == whole.bandit.state()
    for one, other in zip(whole.model.parameters(), resumed.model.parameters()):
        assert torch.equal(one, other)
    with pytest.raises(FuseError, match="was trained with the auxiliary data sets far, near, not near"):
        run(
            tmp_path / "cut", 8, 1, resume=str(tmp_path / "cut" / "checkpoint-5"),
            auxiliary_datasets={"near": rows("near")},
        )  # fmt: skip


def test_bad_input_is_one_error(tmp_path):
    with pytest.raises(FuseError, match="auxiliary_datasets: is empty"):
        make(tmp_path, auxiliary_datasets={})
    with pytest.raises(FuseError, match="expected exp3 or ucb1"):
        make(tmp_path, policy="ucb")
    with pytest.raises(FuseError, match="fits none of the"):
        make(tmp_path, reward_parameters="lora")
    with pytest.raises(FuseError, match="near: is empty or a stream"):
        make(tmp_path, auxiliary_datasets={"near": []})
    assert make(tmp_path, flatten=True).bandit.probabilities() == pytest.approx([0.5, 0.5])
