"""Losses for narrower uses, trained: what only FuseTrainer gives them, what checkpoints keep, and other models."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from training_cases import (
    ENCODER,
    bert_of,
    classes_data,
    digits_data,
    half_labelled_data,
    language_data,
    llama,
    make_trainer,
    padded,
    train,
    vit_mae,
)

from hf_fuse.errors import FuseError


def few_classes(classes, **changes):
    torch.manual_seed(0)
    return bert_of(num_labels=classes, **changes)


def assert_same(run, other, tolerance=1e-6):
    for entry, expected in zip(run[0], other[0], strict=True):
        assert entry == pytest.approx(expected, rel=tolerance, abs=tolerance)
    for name, value in run[1].items():
        assert (value - other[1][name]).abs().max() < tolerance, name


# ---- state


@pytest.mark.parametrize(
    ("case", "states"),
    [
        ("remembered", {"look.bank.values", "look.classes.values"}),
        ("half_labelled", {"ler.prior_C", "ler.present"}),
        ("anchored", {"entropy_bonus.anchor_0", "entropy_bonus.updated_step"}),
        ("compared_further", {"isogclr.table.values", "isogclr.table.written", "amcl.temperatures.0.out.weight"}),
    ],
)
def test_resuming_goes_on_with_what_is_remembered(case, states, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 5}
    whole = train(make_trainer(case, tmp_path, 8, 1, **settings))
    resumed = make_trainer(case, tmp_path, 8, 1, **settings)
    assert_same(train(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-3")), whole)
    saved = load_file(tmp_path / "checkpoint-3" / "objective_states_0.safetensors")
    assert states <= saved.keys()
    if "look.bank.written" in saved:
        assert saved["look.bank.written"].nonzero().flatten().tolist() == [*range(24)]
    if "isogclr.table.values" in saved:
        tau = saved["isogclr.table.values"][:24, 1]
        assert (tau > 0.05).sum() > 12 and len(tau.unique()) > 12 and saved["isogclr.table.written"].sum() == 24
    model_file = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert not any("anchor" in name or "temperatures" in name for name in model_file)


def test_an_anchor_is_a_moving_average_of_what_is_trained(tmp_path):
    trainer = make_trainer("anchored", tmp_path, 8, 1, max_steps=2)
    start = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    after = []
    trainer.add_callback(_AtSteps(lambda model: after.append([p.detach().clone() for p in model.parameters()])))
    train(trainer)
    loss = next(o.loss for o in trainer.objectives if o.name == "entropy_bonus")
    for index, (first, one_step) in enumerate(zip(start, after[0])):
        assert torch.allclose(getattr(loss, f"anchor_{index}"), (first + one_step) / 2, atol=1e-6)
    assert loss.updated_step == 1


class _AtSteps(transformers.TrainerCallback):
    def __init__(self, look):
        self.look = look

    def on_step_end(self, args, state, control, model, **kwargs):
        self.look(model)


def test_unlabelled_samples_reach_ler(tmp_path):
    trainer = make_trainer("half_labelled", tmp_path, 8, 1, max_steps=1, learning_rate=0.0)
    logs, _ = train(trainer)
    model = few_classes(3)
    rows = half_labelled_data()[:8]
    logits = model(input_ids=torch.stack([row["input_ids"] for row in rows])).logits
    kept = torch.tensor([row["labels"] == -100 for row in rows])
    confidence, predicted = (logits / 0.1).softmax(-1).max(-1)
    kept &= (confidence >= 0.5) & (predicted < 2)
    assert kept.sum() > 0
    loss = F.cross_entropy(logits / 0.05, (logits / 0.05).softmax(-1), reduction="none")
    assert logs[0]["ler"] == pytest.approx((loss * kept).mean().item(), rel=1e-4, abs=1e-6)


# ---- what is drawn


def test_adamixup_trains_its_policy(tmp_path):
    trainer = make_trainer("classes", tmp_path, 8, 1, objectives={"adamixup": {"weight": 1.0, "hidden": 8}})
    policy = trainer.objectives[0].loss.policy
    start = policy[0].weight.detach().clone()
    logs, _ = train(trainer)
    assert (policy[0].weight - start).abs().max() > 1e-4
    assert logs[0]["adamixup"] > math.log(2) / 2 and "eval_adamixup" not in logs[-1]


def two_classes():
    return [row | {"labels": row["labels"] % 2} for row in classes_data()]


def test_ens_loss_trains(tmp_path):
    changes = {"model": lambda: few_classes(2), "data": two_classes, "objectives": {"task": 0, "ens_loss": 1.0}}
    logs, trained = train(make_trainer("classes", tmp_path, 8, 1, max_steps=2, **changes))
    assert logs[0]["ens_loss"] == pytest.approx(logs[0]["loss"]) and math.isfinite(logs[-1]["eval_ens_loss"])
    assert not torch.equal(trained["classifier.weight"], few_classes(2).classifier.weight)


def bags_data():
    """Bags of four samples with their mean."""
    rows = classes_data()
    means = torch.tensor([row["labels"] for row in rows]).float().view(-1, 4).mean(-1)
    return [row | {"labels": means[index // 4].item(), "bag_ids": index // 4} for index, row in enumerate(rows)]


def test_batches_of_bags_may_be_split_between_bags(tmp_path):
    changes = {
        "model": lambda: few_classes(1),
        "data": bags_data,
        "objectives": {"task": 0, "aggregate_responses": {"weight": 1.0, "instance": 0.3}},
    }
    whole = train(make_trainer("classes", tmp_path, 8, 1, **changes))
    split = train(make_trainer("classes", tmp_path, 4, 2, **changes))
    assert_same((split[0][:3], split[1]), (whole[0][:3], whole[1]), tolerance=2e-5)
    assert whole[0][0]["aggregate_responses"] > 0


def test_ignite_flattens_a_regression_model(tmp_path):
    changes = {"model": lambda: few_classes(1), "data": bags_data, "max_steps": 8, "learning_rate": 0.02}
    norms = {}
    for multiplied in (0, 1.0):
        objectives = {"ignite": {"weight": multiplied, "rho": 1.0, "learning_rate": 0.0}}
        trainer = make_trainer("classes", tmp_path, 8, 1, objectives=objectives, **changes)
        _, _ = train(trainer)
        model, rows = trainer.model.eval(), bags_data()
        mean = model(input_ids=torch.stack([row["input_ids"] for row in rows])).logits.mean()
        parameters = [p for p in model.parameters() if p.requires_grad]
        slopes = torch.autograd.grad(mean, parameters, allow_unused=True)
        norms[multiplied] = sum(s.square().sum().item() for s in slopes if s is not None) ** 0.5
    assert norms[1.0] < 0.9 * norms[0]


# ---- attention


def documents_data(count: int = 32) -> list[dict[str, torch.Tensor]]:
    """Language in three documents, one of which answers what the last two tokens ask."""
    rows = language_data(count)
    for index, row in enumerate(rows):
        tokens = torch.arange(len(row["input_ids"]))
        asks = tokens >= len(tokens) - 2
        row["document_ids"] = torch.where(asks, -100, tokens * 3 // len(tokens))
        row["asking_tokens"] = asks.long()
        row["relevant_documents"] = torch.nn.functional.one_hot(torch.tensor(index % 3), 3)
    return rows


def with_documents(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    batch = padded(rows)
    for name, filler in (("document_ids", -100), ("asking_tokens", 0)):
        columns = [row[name] for row in rows]
        batch[name] = torch.nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=filler)
    return batch | {"relevant_documents": torch.stack([row["relevant_documents"] for row in rows])}


def asked(folder, batch, accumulation, **changes):
    settings = {"model": lambda: llama(attn_implementation="eager"), "data": documents_data}
    settings |= {"data_collator": with_documents, "objectives": {"block_rank": 0.3}}
    return make_trainer("language", folder, batch, accumulation, **settings | changes)


def test_block_rank_is_the_same_in_parts(tmp_path):
    whole = train(asked(tmp_path, 8, 1))
    assert_same(train(asked(tmp_path, 1, 8)), whole, tolerance=2e-5)
    assert all(entry["block_rank"] > 0.1 for entry in whole[0][:3])


def test_block_rank_turns_attention_to_the_documents_that_answer(tmp_path):
    first = torch.tensor([1, 0, 0])
    settings = {
        "objectives": {"task": 0, "block_rank": {"weight": 1.0, "layer": 0}},
        "data": lambda: [row | {"relevant_documents": first} for row in documents_data()],
    }
    logs, _ = train(asked(tmp_path, 8, 1, optim="adamw_torch", learning_rate=0.02, max_steps=20, **settings))
    assert logs[-2]["block_rank"] < 0.5 * logs[0]["block_rank"]
    with pytest.raises(FuseError, match="attn_implementation='eager'"):
        asked(tmp_path, 8, 1, model=llama)


# ---- other models


def clip():
    torch.manual_seed(0)
    towers = {
        "text_config": ENCODER | {"max_position_embeddings": 8, "eos_token_id": 2},
        "vision_config": {name: value for name, value in ENCODER.items() if name != "vocab_size"}
        | {"image_size": 8, "patch_size": 4, "num_channels": 1},
    }
    return transformers.CLIPModel(transformers.CLIPConfig(**towers, projection_dim=8))


def test_m3col_trains_two_towers(tmp_path):
    rows = [
        {"pixel_values": image["pixel_values"], "input_ids": text["input_ids"]}
        for image, text in zip(digits_data(), classes_data())
    ]
    changes = {"model": clip, "data": lambda: rows, "objectives": {"task": 0, "m3col": 1.0}}
    logs, trained = train(make_trainer("classes", tmp_path, 8, 1, max_steps=2, **changes))
    assert logs[0]["m3col"] == pytest.approx(logs[0]["loss"]) and logs[0]["m3col"] > 0
    assert not torch.equal(trained["text_projection.weight"], clip().text_projection.weight)


def masked_images(folder, batch, accumulation, **changes):
    settings = {"model": vit_mae, "data": digits_data, "objectives": {"hpm": 0.5}} | changes
    return make_trainer("plain_classes", folder, batch, accumulation, **settings)


def test_hpm_is_the_same_in_parts(tmp_path):
    whole = train(masked_images(tmp_path, 8, 1))
    assert_same(train(masked_images(tmp_path, 1, 8)), whole, tolerance=2e-5)


def test_hpm_masks_what_it_predicts_to_be_hard(tmp_path):
    def without_noise():
        return [{"pixel_values": row["pixel_values"]} for row in digits_data()]

    changes = {"data": without_noise, "objectives": {"hpm": {"weight": 1.0, "hardest": 1.0}}}
    trainer = masked_images(tmp_path, 8, 1, **changes)
    seen = []
    trainer.model.vit.register_forward_hook(
        lambda module, args, given, output: seen.append((given.get("noise"), output)), with_kwargs=True
    )
    predicted = []
    trainer.objectives[0].loss.decoder.register_forward_hook(
        lambda module, args, output: predicted.append(output.logits[..., 0]) if not torch.is_grad_enabled() else None
    )
    train(trainer)
    # At first all is random; the third step has a pass before it that looks for hard patches, without gradient.
    assert [output.last_hidden_state.requires_grad for _, output in seen[:4]] == [True, True, False, True]
    noise, output = seen[3]
    assert [noise is None for noise, _ in seen] == [True, True, True, False] + [True] * (len(seen) - 4)
    assert (noise >= 1).sum(-1).tolist() == [12 // 3] * 8 and (output.mask[noise >= 1] == 1).all()
    hardest = predicted[0].topk(4, dim=-1).indices
    assert (noise.gather(-1, hardest) >= 1).all()
    with pytest.raises(FuseError, match="hpm: the model is a BertForSequenceClassification"):
        make_trainer("classes", tmp_path, 8, 1, objectives={"hpm": 1.0})


def test_hpm_looks_for_hard_patches_as_it_learns_to():
    model, (row, *_) = vit_mae(), digits_data(1)
    given = {"pixel_values": row["pixel_values"][None], "noise": row["noise"][None], "output_hidden_states": True}
    assert torch.equal(model(**given).hidden_states[-1], model.vit(**given).hidden_states[-1])
    assert not torch.equal(model(**given).hidden_states[-1], model.vit(**given).last_hidden_state)


def test_hpm_ranks_the_losses_that_vit_mae_has(tmp_path):
    logs, _ = train(masked_images(tmp_path, 8, 1, max_steps=1, learning_rate=0.0))
    trainer = masked_images(tmp_path, 8, 1)
    loss, model, rows = trainer.objectives[0].loss, vit_mae(), digits_data()[:8]
    pixels, noise = (torch.stack([row[name] for row in rows]) for name in ("pixel_values", "noise"))
    outputs = model(pixel_values=pixels, noise=noise, output_hidden_states=True)
    per_patch = (outputs.logits - model.patchify(pixels)).square().mean(-1)
    assert outputs.loss.item() == pytest.approx(per_patch[outputs.mask.bool()].mean().item(), rel=1e-5)
    predicted = loss.decoder(outputs.hidden_states[-1], outputs.ids_restore).logits[..., 0]
    expected = []
    for p, true, mask in zip(predicted, per_patch, outputs.mask.bool()):
        p, true = p[mask], true[mask]
        expected.append(torch.stack([F.softplus(p[i] - p[j]) for i in range(12) for j in range(12)
                                     if true[j] > true[i]]).mean())  # fmt: skip
    assert logs[0]["hpm"] == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)
