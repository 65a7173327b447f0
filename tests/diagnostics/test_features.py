"""Diagnostics of features: figures of the specifications, limits, and callbacks on digits."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification

from hf_fuse import FuseConfig, FuseTrainer
from hf_fuse.diagnostics.callbacks import (
    FeatureCallback,
    SeparabilityStop,
    collapse,
    collect_features,
    layer_information,
    likeness,
)
from hf_fuse.diagnostics.neural_collapse import neural_collapse
from hf_fuse.diagnostics.separability import separability
from hf_fuse.diagnostics.unit_matching import cka_of_layers, linear_cka, match_units
from hf_fuse.diagnostics.v_information import complexity, v_information
from hf_fuse.errors import FuseError
from hf_fuse.heads.simplex import simplex


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def collapsed(noise, samples=2000, classes=4, radius=3.0):
    means = radius * simplex(classes).double()
    labels = torch.arange(samples) % classes
    return means[labels] + noise * random(samples, classes - 1), labels, means


def test_neural_collapse_of_a_noisy_simplex():
    features, labels, means = collapsed(0.1)
    found = neural_collapse(features, labels, means, torch.zeros(4))
    # Within: each direction has variance .01, S_between is 3^2 / 3 = 3 in each of three: 3 * .01 / 3 / 4.
    assert found.within == pytest.approx(0.01 / 4, rel=0.05)
    assert found.within_ratio == pytest.approx(3 * 0.01 / 9, rel=0.05)
    assert found.norms < 0.01 and found.angles < 0.01 and found.duality < 1e-3 and found.mismatch == 0
    exact = neural_collapse(*collapsed(0.0)[:2], means, torch.zeros(4))
    assert max(exact.to_dict().values()) < 1e-7
    moved = neural_collapse(features + 7, labels, means - means.mean(0), -(means @ torch.full((3,), 7.0).double()))
    assert moved.to_dict() == pytest.approx(found.to_dict(), abs=1e-9), "the origin does not matter"


def test_neural_collapse_sees_what_is_not_collapsed():
    features, labels, means = collapsed(1.5)
    assert neural_collapse(features, labels).within > 0.3
    stretched = features * torch.tensor([3.0, 1, 1])
    assert neural_collapse(stretched, labels).angles > 0.2 and neural_collapse(stretched, labels).norms > 0.2
    turned = neural_collapse(features, labels, means.flip(0))
    assert turned.duality > 1 and turned.mismatch > 0.5
    assert "duality" not in neural_collapse(features, labels).to_dict()
    wide = torch.cat([features, torch.zeros(len(features), 5)], dim=1)
    assert neural_collapse(wide, labels).within == pytest.approx(neural_collapse(features, labels).within)
    with pytest.raises(FuseError, match=r"of 1 class\(es\)"):
        neural_collapse(features, torch.zeros(len(features), dtype=torch.long))
    with pytest.raises(FuseError, match="class means are equal"):
        neural_collapse(torch.ones(4, 2), torch.tensor([0, 0, 1, 1]))
    with pytest.raises(FuseError, match="needs samples with labels"):
        collapse(features, None, torch.nn.Linear(3, 4))
    with pytest.raises(FuseError, match="a row for each class up to 3 and 3 columns"):
        neural_collapse(features, labels, means[:2])


def test_cka_of_a_copy_and_of_strangers():
    features = random(50, 6)
    rotation = torch.linalg.qr(random(6, 6, seed=1)).Q
    for debiased in (True, False):
        assert linear_cka(features, 3 * features @ rotation + 5, debiased=debiased) == pytest.approx(1.0)
    strangers = [linear_cka(random(50, 6, seed=n), random(50, 6, seed=n + 100), debiased=True) for n in range(20)]
    biased = [linear_cka(random(50, 6, seed=n), random(50, 6, seed=n + 100), debiased=False) for n in range(20)]
    assert abs(sum(strangers)) / 20 < 0.02 < 0.08 < sum(biased) / 20 < 0.2, "the specification found .125"
    by_hand = features - features.mean(0)
    other = random(50, 4, seed=3) - random(50, 4, seed=3).mean(0)
    expected = (by_hand.T @ other).norm() ** 2 / ((by_hand.T @ by_hand).norm() * (other.T @ other).norm())
    assert linear_cka(by_hand, other, debiased=False) == pytest.approx(expected.item())
    layers = [random(50, 6, seed=n) for n in range(3)]
    whole = cka_of_layers(layers[:2], layers)
    for i in range(2):
        assert whole[i].tolist() == pytest.approx([linear_cka(layers[i], other) for other in layers])
    with pytest.raises(FuseError, match="hardly ever change"):
        linear_cka(features, torch.ones(50, 3))
    with pytest.raises(FuseError, match="shapes"):
        linear_cka(features, random(49, 6))
    with pytest.raises(FuseError, match="too few"):
        linear_cka(features[:3], features[:3])


def test_units_are_matched():
    features, order = random(200, 8), torch.randperm(8, generator=torch.Generator().manual_seed(0))
    found = match_units(features, 2 * features[:, order] + 1 + 0.01 * random(200, 8, seed=1))
    assert torch.equal(order[found.one_to_one], torch.arange(8)) and found.redundancy == pytest.approx(0, abs=1e-6)
    assert found.correlations.min() > 0.999
    doubled = torch.cat([features[:, :4], features[:, :4] + 0.1 * random(200, 4, seed=2)], dim=1)
    once = match_units(doubled, features)
    assert once.redundancy > 0.3, "two copies of a unit want the same partner"
    assert set(once.to_dict()) == {"one_to_one", "best", "redundancy"}
    with pytest.raises(FuseError, match="fewer than the first"):
        match_units(features, features[:, :3])


def test_v_information_of_a_noisy_signal():
    signal = random(20000)
    features = (signal + 0.5 * random(20000, seed=1))[:, None]
    assert v_information(features, signal) == pytest.approx(0.805, abs=0.02)
    assert v_information(random(2000, 3, seed=2), random(2000, seed=3)) == pytest.approx(0, abs=0.01)
    assert v_information(torch.cat([features, features], dim=1)[:100], signal[:100]) == pytest.approx(
        v_information(features[:100], signal[:100]), abs=1e-6
    )
    strangers = random(20000, 1, seed=4)
    assert complexity([features, features], signal) < complexity([strangers, features], signal) < 1.0
    with pytest.raises(FuseError, match="a linear model fits all of them"):
        v_information(random(5, 5), random(5))
    with pytest.raises(FuseError, match="same for all samples"):
        v_information(features, torch.ones(20000))


def test_separability_rises_with_the_gap_between_clusters(monkeypatch):
    near, far = (torch.cat([random(50, 4), random(50, 4, seed=1) + gap]) for gap in (1.0, 20.0))
    assert separability(far, 2) > 5 > 2 * separability(random(100, 4, seed=2), 2) > 0
    assert separability(far, 2) > 3 * separability(near, 2)
    assert separability(2 * far + 3, 2) == pytest.approx(separability(far, 2)), "scale and place do not matter"
    twice = torch.cat([far, far])
    assert separability(twice, 2) == pytest.approx(separability(far, 2) * 198 / 98, rel=0.02), "edges of length 0 count"
    monkeypatch.setattr("hf_fuse.diagnostics.separability.LARGEST", 80)
    assert separability(far, 2) == separability(far, 2) != separability(far, 2, seed=1), "a draw of 80"
    with pytest.raises(FuseError, match="1 clusters of 100 samples"):
        separability(far, 1)
    with pytest.raises(FuseError, match="all equal"):
        separability(torch.ones(10, 2), 2)


@pytest.fixture
def digits():
    X, y = load_digits(n_class=3, return_X_y=True)
    pixels = torch.tensor(X, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(pixels, y)]


def trainer(digits, folder, *callbacks, epochs=3, save_strategy="no"):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4,
        num_channels=1, num_labels=3,
    )  # fmt: skip
    args = FuseConfig(
        str(folder), num_train_epochs=epochs, per_device_train_batch_size=32, learning_rate=5e-3, report_to=[],
        use_cpu=True, save_strategy=save_strategy, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    return FuseTrainer(ViTForImageClassification(config), args, train_dataset=digits[:200], callbacks=list(callbacks))


def test_features_collapse_while_training_on_digits(digits, tmp_path):
    watch = FeatureCallback(collapse, digits[200:300], chart=tmp_path / "collapse.png")
    deep = FeatureCallback(layer_information, digits[200:300], layers=True, chart=tmp_path / "layers.png")
    run = trainer(digits, tmp_path, watch, deep, epochs=4)
    start, _ = collect_features(run.model, watch.batches)
    run.add_callback(alike := FeatureCallback(likeness(start), digits[200:300]))
    before, labels = collect_features(run.model, watch.batches)
    assert before.shape == (100, 16) and labels.tolist() == [row["labels"] for row in digits[200:300]]
    run.train()
    assert [row["epoch"] for row in watch.history] == [1.0, 2.0, 3.0, 4.0]
    assert watch.history[-1]["within"] < neural_collapse(before, labels).within / 2
    assert watch.history[-1]["mismatch"] <= watch.history[0]["mismatch"]
    assert [row["within"] for row in run.state.log_history if "within" in row] == [r["within"] for r in watch.history]
    assert (tmp_path / "collapse.png").stat().st_size > 5000 and (tmp_path / "layers.png").stat().st_size > 5000
    assert likeness(before)(before, None, run.model)["one_to_one"] == pytest.approx(1.0)
    assert 0 < alike.history[-1]["cka"] < 0.99 and alike.history[-1]["one_to_one"] < 0.99
    # What differs most in the end is told by the layer before, and less by the embeddings of the pixels.
    assert deep.history[-1].keys() == {"epoch", "step", "layer_0", "complexity"}
    with pytest.raises(FuseError, match="charts are written as"):
        FeatureCallback(collapse, digits, chart=tmp_path / "collapse.doc")


def test_training_stops_when_separability_rises_no_more(digits, tmp_path):
    stop = SeparabilityStop(3, digits[200:300], patience=2, threshold=100.0)  # no rise is that large
    run = trainer(digits, tmp_path, stop, epochs=9)
    run.train()
    assert run.state.epoch == 3.0
    run.train()
    assert run.state.epoch == 3.0 and len(stop.history) == 3, "another training begins anew"
    # Resumed after the first epoch, it counts that one too.
    again = SeparabilityStop(3, digits[200:300], patience=2, threshold=100.0)
    trainer(digits, tmp_path / "cut", again, epochs=2, save_strategy="epoch").train()
    later = SeparabilityStop(3, digits[200:300], patience=2, threshold=100.0)
    run = trainer(digits, tmp_path / "cut", later, epochs=9)
    run.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-7"))
    assert run.state.epoch == 3.0 and [row["epoch"] for row in later.history] == [1.0, 2.0, 3.0]
    patient = SeparabilityStop(3, digits[200:300], patience=2, threshold=-1.0)  # every value counts as a rise
    run = trainer(digits, tmp_path, patient, epochs=3)
    run.train()
    assert run.state.epoch == 3.0
