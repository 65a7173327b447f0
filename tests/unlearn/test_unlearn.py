"""Unlearning on digits: each method moves a model towards one trained anew, exact deletion is exact."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification

from hf_fuse import FuseConfig, FuseTrainer
from hf_fuse.errors import CheckpointError, FuseError
from hf_fuse.unlearn.datamodel_matching import datamodel_matching, logits_without
from hf_fuse.unlearn.l1_sparse import L1Sparse
from hf_fuse.unlearn.laf import FeatureAutoencoder, _saturating, laf
from hf_fuse.unlearn.metrics import membership_threshold, unlearning_report
from hf_fuse.unlearn.s3t import S3T, Plan, fine_tune, slice_orders


def collate(rows):
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def vit(layers=1):
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=8,
            patch_size=4,
            num_channels=1,
            num_labels=4,
        )  # fmt: skip
    )


def trained(rows):
    """A new model, without the overhead of a Trainer."""
    model, batch = vit().train(), collate(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 20 * 10)
    for _ in range(20):
        for numbers in torch.randperm(len(rows)).tensor_split(10):
            optimizer.zero_grad()
            model(**{name: values[numbers] for name, values in batch.items()}).loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def fitted(model, rows, folder, *callbacks, epochs=12):
    args = FuseConfig(
        str(folder), num_train_epochs=epochs, per_device_train_batch_size=16, learning_rate=5e-3, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    FuseTrainer(model, args, train_dataset=rows, data_collator=collate, callbacks=list(callbacks)).train()
    return model.eval()


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(n_class=4, return_X_y=True)
    pixels = torch.tensor(X, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    rows = [{"pixel_values": image, "labels": int(label)} for image, label in zip(pixels, y)]
    return rows[:160], rows[160:320]


@pytest.fixture(scope="module")
def case(digits):
    """A model trained on samples of which 20 have wrong labels, those samples, the rest, a model trained without."""
    train, test = digits
    train = [dict(row) for row in train]
    gone = torch.zeros(160, dtype=torch.bool)
    gone[[n for n, row in enumerate(train) if row["labels"] == 3][:20]] = True
    for n in gone.nonzero()[:, 0].tolist():
        train[n]["labels"] = 1
    retain, forget = ([row for row, g in zip(train, gone) if g == side] for side in (False, True))
    model, retrained = (trained(rows) for rows in (train, retain))
    report = unlearning_report(model, forget, retain, test, retrained=retrained, data_collator=collate)
    assert report.forget_accuracy > 0.6, "it has learned what it is to forget"
    return model, train, gone, retain, forget, test, retrained, report


def measured(case, model):
    _, _, _, retain, forget, test, retrained, _ = case
    return unlearning_report(model, forget, retain, test, retrained=retrained, data_collator=collate)


def test_the_report_of_the_model_itself(case):
    model, *_, retrained, report = case
    same = measured(case, retrained)
    assert same.kl_to_retrained == pytest.approx(0, abs=1e-6) and same.parameter_distance == 0
    assert set(report.to_dict()) == {
        "forget_accuracy", "retain_accuracy", "test_accuracy", "membership", "kl_to_retrained", "parameter_distance"
    }  # fmt: skip
    assert report.kl_to_retrained > 0.5 > same.forget_accuracy
    threshold = membership_threshold(torch.tensor([0.1, 0.2, 0.3, 2.0]), torch.tensor([0.25, 1.0, 3.0, 4.0]))
    assert threshold == pytest.approx(0.2), "half of the members and no stranger"
    _, _, _, retain, forget, test, *_ = case
    for sets, other, message in [
        ((forget, retain, []), None, "test: holds no rows"),
        ((forget, [{"pixel_values": row["pixel_values"]} for row in retain], test), None, "expected labels"),
        ((forget, retain, test), vit(layers=2), "with other parameters"),
    ]:
        with pytest.raises(FuseError, match=message):
            unlearning_report(model, *sets, retrained=other, data_collator=collate)


def test_l1_sparse_fine_tuning_forgets_and_prunes(case, tmp_path):
    model, _, _, retain, *_, before = case
    sparse = L1Sparse(1.0)
    tuned = fitted(copy.deepcopy(model), retain, tmp_path, sparse, epochs=6)
    found = measured(case, tuned)
    assert found.kl_to_retrained < before.kl_to_retrained * 0.7 and found.forget_accuracy < before.forget_accuracy
    assert found.retain_accuracy > 0.9
    assert (
        sparse.zeros
        > 0.005
        > sum((p == 0).double().mean().item() for n, p in model.named_parameters() if "bias" not in n)
    )


@pytest.mark.parametrize("step", ["proximal", "penalty"])
def test_the_l1_step_by_hand(step):
    class State:
        epoch, num_train_epochs = 2.0, 10

    sparse = L1Sparse(0.5, epochs_without=2, step=step)
    assert sparse.weight(State) == pytest.approx(0.5 * (1 - 2 / 8))
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[0.02, -1.0]])
    layer.weight.grad = torch.zeros(1, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    sparse.on_pre_optimizer_step(None, State, None, model=layer)
    optimizer.step()
    sparse.on_optimizer_step(None, State, None, optimizer=optimizer)
    expected = [0.0, -1.0 + 0.0375] if step == "proximal" else [0.02 - 0.0375, -1.0 + 0.0375]
    assert layer.weight[0].tolist() == pytest.approx(expected)
    late = type("Late", (), {"epoch": 9.0, "num_train_epochs": 10})
    assert sparse.weight(late) == 0.0
    with pytest.raises(FuseError, match="would never count"):
        L1Sparse(epochs_without=10).on_train_begin(None, State, None)
    with pytest.raises(FuseError, match="alpha is -1"):
        L1Sparse(-1)


def test_laf_forgets_without_labels(case):
    model, _, _, retain, forget, _, _, before = case
    unlabelled = [[{"pixel_values": row["pixel_values"]} for row in rows] for rows in (retain, forget)]
    found = laf(
        copy.deepcopy(model), *unlabelled, data_collator=collate, epochs=3, extraction_rate=1e-3, alignment_rate=1e-3
    )
    report = measured(case, found)
    assert report.forget_accuracy < before.forget_accuracy - 0.2
    assert report.retain_accuracy > report.forget_accuracy + 0.2
    repaired = laf(
        copy.deepcopy(model), retain, forget, data_collator=collate, epochs=3, extraction_rate=1e-3,
        alignment_rate=1e-3, repair_epochs=2,
    )  # fmt: skip
    assert measured(case, repaired).retain_accuracy >= report.retain_accuracy
    halves = [[{"pixel_values": row["pixel_values"].bfloat16()} for row in rows[:20]] for rows in (retain, forget)]
    laf(copy.deepcopy(model).bfloat16(), *halves, data_collator=collate, epochs=1, autoencoder_epochs=1)
    with pytest.raises(FuseError, match="all of its parameters are frozen"):
        laf(copy.deepcopy(model).requires_grad_(False), retain[:4], forget[:4], data_collator=collate)
    with pytest.raises(FuseError, match="one of the two sets is empty"):
        laf(model, retain, [])
    with pytest.raises(FuseError, match="needs a classifier"):
        laf(model.vit, retain, forget)


def test_the_loss_of_laf_saturates_as_specified():
    errors = torch.tensor([0.0, 1.0, 10.0, 1000.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(_saturating(errors).sum(), errors)
    assert gradient.tolist() == pytest.approx([1.0, 0.412, 0.0205, 2.7e-6], rel=0.01)
    network = FeatureAutoencoder(40)
    rows = torch.randn(3, 40)
    assert torch.allclose(network.error(rows), (network(rows)[0] - rows).square().sum(1) / 40)


def test_datamodel_matching_comes_near_the_retrained_model(case):
    model, train, gone, *_, before = case
    found = datamodel_matching(copy.deepcopy(model), train, gone, data_collator=collate, epochs=8, learning_rate=1e-3)
    report = measured(case, found)
    assert report.forget_accuracy < before.forget_accuracy
    assert report.kl_to_retrained < before.kl_to_retrained
    assert report.retain_accuracy > before.retain_accuracy - 0.1
    for mask in (torch.zeros(160), torch.ones(160)):
        with pytest.raises(FuseError, match="one of the two sets is empty"):
            datamodel_matching(model, train, mask.bool(), data_collator=collate)
    with pytest.raises(FuseError, match="159 values; expected one for each of the 160 samples"):
        datamodel_matching(model, train, gone[1:], data_collator=collate)


def test_attributions_are_those_of_training_without_the_samples():
    """A last layer trained to the optimum with and without ten samples: the prediction takes most of the way."""
    random = torch.Generator().manual_seed(0)
    features = torch.randn(160, 5, generator=random, dtype=torch.float64)
    labels = (features[:, :4] + 0.8 * torch.randn(160, 4, generator=random, dtype=torch.float64)).argmax(1)
    gone = torch.arange(160) < 6
    labels[:6] = (labels[:6] + 1) % 4

    def optimum(rows):
        layer = torch.nn.Linear(5, 4).double()
        optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=300, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(layer(features[rows]), labels[rows])
            loss.backward()
            return loss

        optimizer.step(closure)
        return layer

    whole, without = optimum(torch.ones(160, dtype=torch.bool)), optimum(~gone)
    found = logits_without(features, labels, gone, whole.weight, whole.bias, features, ridge=1e-6)
    wanted, start, reached = (
        (logits - logits.mean(1, keepdim=True)).detach() for logits in (without(features), whole(features), found)
    )
    assert (reached - wanted).norm() < 0.45 * (start - wanted).norm()
    # The Newton step itself: the Hessian of the loss of those that stay, by autograd.
    layer = torch.cat([whole.weight, whole.bias[:, None]], dim=1).detach()
    inputs = torch.cat([features, torch.ones(160, 1)], dim=1)[~gone]
    loss = lambda flat: torch.nn.functional.cross_entropy(  # noqa: E731
        inputs @ flat.view(4, 6).T, labels[~gone], reduction="sum"
    )
    hessian = torch.autograd.functional.hessian(loss, layer.flatten())
    gradient = torch.autograd.functional.jacobian(loss, layer.flatten())
    moved = layer - torch.linalg.lstsq(hessian, gradient, driver="gelsd").solution.view(4, 6)
    newton = features @ moved[:, :5].T + moved[:, 5]
    assert torch.allclose(newton - newton.mean(1, keepdim=True), reached, atol=0.02)


def test_orders_of_slices():
    assert slice_orders(4, 1) == [[0, 1, 2, 3]]
    assert slice_orders(4, 2) == [[0, 1, 2, 3], [2, 3, 0, 1]]
    assert slice_orders(3, 3) == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
    known = slice_orders(4, 2, rates=[0.9, 0.1, 0.2, 0.5])
    assert sorted([known[0][0], known[1][0]]) == [1, 2], "slices that will stay go first"
    assert all(sorted(order) == [0, 1, 2, 3] for order in known)
    assert all(len({order[place] for order in known}) == 2 for place in range(4))
    with pytest.raises(FuseError, match="sequences is 5"):
        slice_orders(4, 5)
    with pytest.raises(FuseError, match="2 numbers"):
        slice_orders(4, 1, rates=[0.1, 0.2])


@pytest.mark.parametrize(("sequences", "expected"), [(1, 4.0), (2, 6.0), (4, 8.33)])
def test_deletions_until_nothing_is_left(sequences, expected):
    draw, counts = np.random.default_rng(0), []
    for _ in range(3000):
        plan = Plan([[[0], [1], [2], [3]]], slice_orders(4, sequences), [[3], [2], [1], [0]], [[4] * sequences])
        count = 0
        while plan.serving(0)[1]:
            plan.delete([int(draw.integers(4))])
            count += 1
        counts.append(count)
    assert np.mean(counts) == pytest.approx(expected, rel=0.04)


SLICED = {"slices": 3, "sequences": 2, "rank": 2, "epochs": 1, "data_collator": collate, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def sliced(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("s3t")
    base = vit(layers=3)
    return folder, base, fine_tune(base, digits[0][:90], folder / "whole", **SLICED)


def test_slices_train_their_own_layers_only(sliced):
    from safetensors.torch import load_file

    folder, base, _ = sliced
    assert not any("lora" in name for name, _ in vit(layers=3).named_parameters())
    for place, layer in enumerate((2, 1, 0)):
        names = load_file(folder / "whole" / "shard-0" / "sequence-0" / f"slice-{place}.safetensors")
        assert names and all(f".layers.{layer}." in name or f".layer.{layer}." in name for name in names), names.keys()
    assert all(torch.equal(a, b) for a, b in zip(vit(layers=3).state_dict().values(), plain(base).values()))


def plain(model):
    return {name: values for name, values in model.state_dict().items() if "lora_" not in name}


def test_deletion_is_exact(sliced, digits, tmp_path):
    """What is left after deleting samples is bit for bit what training with other samples in their place gives."""
    folder, _, whole = sliced
    shutil.copytree(folder / "whole", tmp_path / "cut")
    cut = S3T.from_pretrained(tmp_path / "cut", vit(layers=3))
    batch = collate(digits[1][:20])
    assert torch.equal(cut.predict_proba(batch), whole.predict_proba(batch))
    victims = cut.plan.slices[0][1][:3]  # of the slice that is second in one sequence, last in the other
    other = [dict(row) for row in digits[0][:90]]
    for row in victims:
        other[row] = {"pixel_values": 1 - other[row]["pixel_values"], "labels": (other[row]["labels"] + 1) % 4}
    again = fine_tune(vit(layers=3), other, tmp_path / "other", **SLICED)
    assert not torch.equal(again.predict_proba(batch), whole.predict_proba(batch))
    stale = S3T.from_pretrained(tmp_path / "cut", vit(layers=3))
    with pytest.raises(FuseError, match="row 90: was not trained on"):
        cut.delete([*victims, 90])
    assert cut.plan.intact == [[3, 3]] and cut.plan.deleted == [], "all or nothing"
    with pytest.MonkeyPatch.context() as patch:  # killed when the files are to be removed
        patch.setattr("pathlib.Path.unlink", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            cut.delete(victims)
    stale.delete([])  # which takes up what another has deleted, and finishes it
    assert stale.plan.deleted == victims and torch.equal(stale.predict_proba(batch), cut.predict_proba(batch))
    again.delete(victims)
    assert torch.equal(again.predict_proba(batch), cut.predict_proba(batch)), "nothing of the samples is left"
    files = [
        sorted(p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*.safetensors"))
        for name in ("cut", "other")
    ]
    assert files[0] == files[1] and len(files[0]) == sum(cut.plan.intact[0]) < 6
    for file in files[0]:
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
    loaded = S3T.from_pretrained(tmp_path / "cut", vit(layers=3))
    assert torch.equal(loaded.predict_proba(batch), cut.predict_proba(batch)) and loaded.plan.deleted == victims
    loaded.delete([row for part in loaded.plan.slices[0] for row in part])
    with torch.no_grad():
        base = vit(layers=3).eval()(pixel_values=batch["pixel_values"]).logits.softmax(-1)
    assert torch.allclose(loaded.predict_proba(batch), base, atol=1e-6), "nothing left: the base model"
    assert not list((tmp_path / "cut").rglob("slice-*"))


def test_bad_input_of_s3t_is_one_error(sliced, digits, tmp_path):
    folder, *_ = sliced
    with pytest.raises(FuseError, match="slices is 4, but ViTForImageClassification has 3 layers"):
        fine_tune(vit(layers=3), digits[0], tmp_path / "x", **SLICED | {"slices": 4})
    with pytest.raises(FuseError, match="2 rows are too few"):
        fine_tune(vit(layers=3), digits[0][:2], tmp_path / "x", **SLICED)
    with pytest.raises(FuseError, match="exists"):
        fine_tune(vit(layers=3), digits[0], folder / "whole", **SLICED)
    with pytest.raises(CheckpointError, match="holds no s3t.json"):
        S3T.from_pretrained(tmp_path, vit(layers=3))
    other = vit(layers=3)
    other.classifier.bias.data.add_(1)
    with pytest.raises(CheckpointError, match="other weights"):
        S3T.from_pretrained(folder / "whole", other)
    (tmp_path / "s3t.json").write_text('{"slices": []}')
    with pytest.raises(CheckpointError, match="is damaged"):
        S3T.from_pretrained(tmp_path, vit(layers=3))
    plan = Plan(**json.loads((folder / "whole" / "s3t.json").read_text()))
    with pytest.raises(FuseError, match="row 90: was not trained on"):
        plan.delete([90])


def test_a_slice_changes_nothing_but_its_lora(sliced, digits, tmp_path):
    folder, _, _ = sliced
    shutil.copytree(folder / "whole", tmp_path / "copy")
    file = tmp_path / "copy" / "shard-0" / "sequence-0" / "slice-0.safetensors"
    for name in ("base_model.model.classifier.bias", "nowhere"):
        save_file({name: torch.ones(4)}, file)
        opened = S3T.from_pretrained(tmp_path / "copy", vit(layers=3))
        before = opened.model.base_model.model.classifier.bias.clone()
        with pytest.raises(CheckpointError, match=f"{name} is no LoRA matrix"):
            opened.predict_proba(collate(digits[1][:2]))
        assert torch.equal(opened.model.base_model.model.classifier.bias, before)
    file.write_bytes(b"short")
    with pytest.raises(CheckpointError, match="slice-0.safetensors: cannot be read"):
        opened.predict_proba(collate(digits[1][:2]))
