"""Every registered loss trains with FuseTrainer: what it needs is gathered, and layouts of batches agree."""

from __future__ import annotations

import ast
import inspect
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file
from training_cases import (
    BATCH_CASES,
    CASES,
    COMPARING_CASES,
    bert,
    classes_data,
    language_data,
    llama,
    make_trainer,
    old_bert,
    padded,
    train,
)

from hf_fuse import FuseConfig, registry
from hf_fuse.errors import FuseError, RecipeError
from hf_fuse.input_points import mixture, moved
from hf_fuse.model_features import classifier_inputs, sample_features
from hf_fuse.objectives import Schedule, read_objectives
from hf_fuse.replay import ReplayStream

# Not trained in the cases of other layouts: another trainer supplies what they need, or what they do is drawn anew.
ELSEWHERE = {
    "old_knowledge": "tests/adapters/test_mixda.py",
    "decoupled_mixup": "below",
    "mixed_barlow": "below",
    "soft_load_balance": "tests/losses/test_router_losses.py",
    "localized_balance": "tests/losses/test_router_losses.py",
    **dict.fromkeys(
        ["adamixup", "aggregate_responses", "block_rank", "ens_loss", "hpm", "ignite", "m3col"],
        "tests/losses/test_optional_losses_in_training.py",
    ),
}


def test_every_loss_is_trained_in_some_layouts():
    in_layouts = {name for case in CASES.values() for name in case["objectives"]}
    comparing = {name for case in (COMPARING_CASES | BATCH_CASES).values() for name in case["objectives"]}
    for name in registry.names("losses"):
        in_batch = getattr(registry.get("losses", name).module, "IN_BATCH", False)
        assert name in ELSEWHERE or name in (comparing if in_batch else in_layouts), name
        assert not in_batch or name not in in_layouts, f"{name} depends on how a batch is split"


@pytest.mark.parametrize("name", registry.names("losses"))
def test_every_loss_says_when_to_prefer_it(name):
    loss = registry.get("losses", name)
    assert len(inspect.cleandoc(loss.module.__doc__).split("\n\n")) > 1, "the module's second paragraph"
    if getattr(loss.module, "IN_BATCH", False):
        assert "micro-batch" in loss.function.__doc__ or "of its parts" in loss.function.__doc__
    imported = {node.module for node in ast.walk(ast.parse(inspect.getsource(loss.module))) if _imports(node)}
    assert not {module for module in imported if module.startswith(("hf_fuse.trainer", "hf_fuse.distill"))}


def _imports(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module is not None


# ---- mixing


def test_mixed_inputs_start_from_mixed_embeddings():
    model, ids = bert().eval(), torch.randint(3, 30, (4, 6), generator=torch.Generator().manual_seed(0))
    partners, shares = torch.tensor([1, 2, 3, 0]), torch.tensor([0.3, 1.0, 0.0, 0.5])
    with moved(model, {"input_ids": ids}, mixture(partners, shares)) as given:
        mixed = model(**given).logits
    plain = model(input_ids=ids).logits
    assert torch.allclose(mixed[1], plain[1], atol=1e-6) and torch.allclose(mixed[2], plain[3], atol=1e-6)
    points = model.get_input_embeddings()(ids)
    by_hand = model(inputs_embeds=0.3 * points[:1] + 0.7 * points[1:2]).logits
    assert torch.allclose(mixed[:1], by_hand, atol=1e-5)
    assert not model.get_input_embeddings()._forward_hooks

    pixels = {"pixel_values": torch.rand(4, 1, 3, 3)}
    with moved(model, pixels, mixture(partners, shares)) as given:
        assert torch.allclose(
            given["pixel_values"][0], 0.3 * pixels["pixel_values"][0] + 0.7 * pixels["pixel_values"][1]
        )


def test_decoupled_mixup_trains_on_mixed_samples_and_evaluates_whole_ones(tmp_path):
    mixed = {"objectives": {"task": 0, "decoupled_mixup": 1.0}, "mixup_alpha": 0.5}
    trainer = make_trainer("classes", tmp_path, 8, 1, **mixed)
    batch = next(iter(trainer.get_train_dataloader()))
    assert (
        sorted(batch["partners"].tolist()) == list(range(8)) and ((batch["shares"] >= 0) & (batch["shares"] <= 1)).all()
    )
    assert "partners" not in next(iter(trainer.get_eval_dataloader()))
    logs, _ = train(trainer)
    assert all(entry["decoupled_mixup"] == pytest.approx(entry["loss"]) for entry in logs[:3])
    assert "eval_decoupled_mixup" not in logs[-1] and logs[-1]["eval_loss"] > 0
    plain, _ = train(make_trainer("classes", tmp_path, 8, 1, objectives={"task": 1}))
    assert logs[0]["loss"] != pytest.approx(plain[0]["loss"], rel=1e-3)


def test_masks_of_mixed_texts_are_united(tmp_path):
    torch.manual_seed(0)
    rows = classes_data()
    for index, row in enumerate(rows):
        row["attention_mask"] = (torch.arange(6) < 2 + index % 4).long()
        del row["second_input_ids"]
    mixed = {"objectives": {"task": 0, "decoupled_mixup": 1.0}, "mixup_alpha": 0.5, "data": lambda: rows}
    trainer = make_trainer("classes", tmp_path, 8, 1, max_steps=1, **mixed)
    seen = []
    trainer.model.register_forward_pre_hook(lambda m, a, k: seen.append(k["attention_mask"]), with_kwargs=True)
    train(trainer)
    own = torch.stack([row["attention_mask"] for row in rows[:8]])
    assert (seen[0] >= own).all() and seen[0].sum() > own.sum()


def test_mixing_needs_its_loss_and_no_other_task(tmp_path):
    for changes, message in (
        ({"objectives": {"decoupled_mixup": 1.0}}, "objectives.decoupled_mixup: needs mixup_alpha"),
        ({"objectives": {"decoupled_mixup": 1.0}, "mixup_alpha": 0.2}, "Set objectives.task to 0"),
        ({"objectives": {"task": 0.5}, "mixup_alpha": 0.2}, "mixup_alpha is given, but none of the objectives uses it"),
        ({"objectives": {"bct": 1.0}}, "objectives.bct: needs old_model"),
        ({"objectives": {"replay": 1.0}}, "objectives.replay: needs replay_dataset"),
    ):
        with pytest.raises(FuseError, match=message):
            make_trainer("classes", tmp_path, 8, 1, **changes)
    for setting in ({"mixup_alpha": -1.0}, {"replay_batch_size": 0}):
        with pytest.raises(RecipeError, match=next(iter(setting))):
            FuseConfig(str(tmp_path), **setting)


def test_mixed_barlow_trains(tmp_path):
    objectives = {"mixed_barlow": {"weight": 0.01, "projection": 8}, "barlow_twins": {"weight": 0.01}}
    logs, _ = train(make_trainer("classes", tmp_path, 8, 1, objectives=objectives, max_steps=2))
    assert math.isfinite(logs[1]["mixed_barlow"]) and logs[0]["mixed_barlow"] > 0


# ---- replay


def test_a_replay_stream_is_cycled_and_split_alike():
    data = list(range(10))

    def stream(**changes):
        return ReplayStream(data, list, **{"batch_size": 4, "accumulation": 1, "seed": 3} | changes)

    whole = [stream().micro_batches(step, 1)[0] for step in range(5)]
    assert sorted(whole[0] + whole[1] + whole[2][:2]) == data  # a cycle
    assert sorted(whole[2][2:] + whole[3] + whole[4]) == data and whole[2][2:] + whole[3] + whole[4] != data
    small = stream(batch_size=1, accumulation=4)
    assert [[row for batch in small.micro_batches(step, 4) for row in batch] for step in range(5)] == whole
    processes = [stream(batch_size=2, process=rank, processes=2) for rank in range(2)]
    assert [[row for p in processes for row in p.micro_batches(step, 1)[0]] for step in range(5)] == whole
    assert [stream().micro_batches(step, 1)[0] for step in (4, 1)] == [whole[4], whole[1]]
    for nothing in ([], iter(data)):
        with pytest.raises(FuseError, match="replay_dataset: is empty or a stream"):
            ReplayStream(nothing, list, batch_size=1, accumulation=1)


def test_replay_is_the_loss_of_the_second_data_set(tmp_path):
    other = [row for row in language_data(40) if len(row["input_ids"]) > 8][:8]
    changes = {"replay_dataset": other, "objectives": {"replay": 0.5}, "max_steps": 1}
    logs, trained = train(make_trainer("language", tmp_path, 4, 2, **changes))
    model = llama()
    expected, task = (model(**padded(rows)).loss for rows in (other, language_data()[:8]))
    assert logs[0]["replay"] == pytest.approx(expected.item(), rel=1e-5)
    assert logs[0]["task_loss"] == pytest.approx(task.item(), rel=1e-5)
    (task + 0.5 * expected).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(trained[name], parameter - 0.1 * parameter.grad, atol=1e-6), name
    assert "eval_replay" not in logs[-1]


def test_resuming_goes_on_with_the_same_replay_and_probe(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = train(make_trainer("replayed", tmp_path, 4, 2, **settings))
    resumed = train(
        make_trainer("replayed", tmp_path, 4, 2, **settings), resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    for entry, expected in zip(resumed[0], whole[0], strict=True):
        assert entry == pytest.approx(expected, rel=1e-6)
    state = load_file(tmp_path / "checkpoint-4" / "objective_states_0.safetensors")
    assert state.keys() == {"probe_regression.probe.weight"}


def test_a_probe_of_weight_0_changes_nothing(tmp_path):
    _, plain = train(make_trainer("replayed", tmp_path, 8, 1, objectives={"replay": 0.5, "probe_regression": 0}))
    _, without = train(make_trainer("replayed", tmp_path, 8, 1, objectives={"replay": 0.5}))
    assert all(torch.equal(plain[name], value) for name, value in without.items())


# ---- old models


def test_old_features_and_means_are_those_of_the_old_model(tmp_path, third_party):
    seen = {}

    def looks(features_ND, labels_N, old_features_ND, old_class_means_CD, old_head_CD, old_bias_C):
        seen.update(means=old_class_means_CD, features=old_features_ND, head=old_head_CD, bias=old_bias_C)
        return features_ND.sum() * 0

    third_party(looks)
    old = old_bert()
    trainer = make_trainer("classes", tmp_path, 8, 1, objectives={"looks": 1.0}, old_model=lambda: old, max_steps=1)
    optimized = {id(p) for p in trainer.create_optimizer().param_groups[0]["params"]}
    train(trainer)
    rows = classes_data()
    inputs = {"input_ids": torch.stack([row["input_ids"] for row in rows])}
    with classifier_inputs(old) as taken:
        outputs = old(**inputs)
    features = sample_features(old, inputs, outputs, taken)
    labels = torch.tensor([row["labels"] for row in rows])
    means = torch.stack([features[labels == label].mean(0) for label in range(3)])
    assert torch.allclose(seen["means"], means, atol=1e-5)
    assert seen["head"] is old.classifier.weight and seen["bias"] is old.classifier.bias
    assert not seen["features"].requires_grad and not any(id(p) in optimized for p in old.parameters())
    assert all(parameter.grad is None for parameter in old.parameters())


def test_old_models_of_other_kinds(tmp_path):
    with pytest.raises(FuseError, match="old_model nowhere: can't be loaded"):
        make_trainer("old", tmp_path, 8, 1, old_model=lambda: "nowhere")
    old_bert().save_pretrained(tmp_path / "old")
    from_folder = train(make_trainer("old", tmp_path, 8, 1, old_model=lambda: str(tmp_path / "old")))
    given = train(make_trainer("old", tmp_path, 8, 1))
    assert from_folder[0][0]["bct"] == pytest.approx(given[0][0]["bct"], rel=1e-6)
    encoder = transformers.BertModel(transformers.BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1,
                                                             num_attention_heads=2, intermediate_size=8))  # fmt: skip
    with pytest.raises(FuseError, match="classifier of whole samples, but BertModel has none"):
        make_trainer("old", tmp_path, 8, 1, old_model=lambda: encoder, objectives={"bct": 1.0})
    with pytest.raises(FuseError, match="but LlamaForCausalLM has none.*AutoModelForSequenceClassification"):
        make_trainer("language", tmp_path, 8, 1, objectives={"nested_dropout": 1.0})


# ---- curricula, attention


def test_a_curriculum_from_contrast_to_cross_entropy():
    curve = {"start": 1, "end": 0, "shape": "quadratic"}
    task, (objective,) = read_objectives({"sup_con": {"weight": curve}, "task": {"start": 0, "end": 1}})
    assert [objective.weight(step, 100) for step in (0, 50, 100)] == pytest.approx([1, 0.75, 0])
    assert task == Schedule(0, 1)


def test_the_attention_of_one_layer_changes_with_the_step(tmp_path, third_party):
    seen = []

    def sharp(attention):
        seen.append(attention)
        return attention.square().sum(-1).mean()

    third_party(sharp)
    changes = {"objectives": {"sharp": 0.1}, "model": lambda: llama(attn_implementation="eager")}
    train(make_trainer("language", tmp_path, 8, 1, max_steps=2, learning_rate=0.0, **changes))
    batches = [padded(language_data()[8 * step : 8 * step + 8]) for step in range(2)]
    model = llama(attn_implementation="eager")
    for step, batch in enumerate(batches):
        expected = model(**batch, output_attentions=True).attentions[step]
        assert torch.allclose(seen[step], expected, atol=1e-6) and seen[step].requires_grad
    with pytest.raises(FuseError, match="attn_implementation='eager'"):
        make_trainer("language", tmp_path, 8, 1, objectives={"sharp": 0.1})
