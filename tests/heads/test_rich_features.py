"""Features that serve better once the data changes: concatenated, by rounds, and a large model beside a small one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from torch import nn
from transformers import AutoModel, ViTConfig, ViTModel

from hf_fuse import FuseConfig, FuseTrainer
from hf_fuse.errors import CheckpointError, FuseError
from hf_fuse.heads.bonsai import Bonsai, worst_group_loss
from hf_fuse.heads.concatenated import Concatenated, concatenated_layer, distilled
from hf_fuse.heads.head import Head
from hf_fuse.heads.levi import Levi


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(n_class=4, return_X_y=True)
    return X / 16, y


def test_concatenated_layers_are_the_mean_of_logits(tmp_path):
    torch.manual_seed(0)
    layers = [nn.Linear(3, 4), nn.Linear(5, 4, bias=False)]
    first, second = torch.randn(7, 3), torch.randn(7, 5)
    joined = torch.cat([first, second], dim=1)
    mean = (layers[0](first) + layers[1](second)) / 2
    assert torch.allclose(concatenated_layer(layers)(joined), mean, atol=1e-6)
    head = Concatenated(start=layers, epochs=0).fit(joined, [0, 1, 2, 3, 0, 1, 2])
    assert head.decision_function(joined) == pytest.approx(mean.detach().numpy(), abs=1e-5)
    head.save_pretrained(tmp_path)
    assert np.array_equal(Head.from_pretrained(tmp_path).decision_function(joined), head.decision_function(joined))
    again = clone(head)  # of a fitted head, with all that it was made with
    assert np.array_equal(again.fit(joined, [0, 1, 2, 3, 0, 1, 2]).scores(joined), head.scores(joined))
    assert Concatenated(batch_norm=True, batch_size=3).fit(joined, [0, 1, 2, 3, 0, 1, 2]).predict(joined).shape == (7,)
    for bad, message in [
        ({"start": [nn.Linear(3, 4), nn.Linear(5, 3)]}, "the same of each model"),
        ({"start": [nn.Linear(3, 4)]}, "3 features and 4 classes; the data has 8 and 4"),
        ({"start": layers, "batch_norm": True}, "Leave out batch_norm"),
    ]:
        with pytest.raises(FuseError, match=message):
            Concatenated(**bad).fit(joined, [0, 1, 2, 3, 0, 1, 2])


def test_concatenated_features_of_two_seeds(digits):
    X, y = digits
    train, test = slice(0, 300), slice(300, None)
    features = []
    for seed in (0, 1):
        random = np.random.default_rng(seed)
        features.append(np.maximum(X @ random.standard_normal((64, 12)), 0))
    alone = [
        Concatenated(epochs=10, learning_rate=1e-2).fit(f[train], y[train]).score(f[test], y[test]) for f in features
    ]
    both = np.concatenate(features, axis=1)
    for batch_norm in (False, True):
        joined = Concatenated(epochs=10, learning_rate=1e-2, batch_norm=batch_norm).fit(both[train], y[train])
        assert joined.score(both[test], y[test]) > max(alone) - 0.01
    body = distilled(nn.Sequential(nn.Linear(64, 24), nn.ReLU()), 24, torch.tensor(X).float(), features, epochs=20)
    with torch.no_grad():
        student = body(torch.tensor(X).float()).numpy()
    # Linear in the student's features: as much of the members as the same number of raw features holds.
    residual = [f[test] - student[test] @ np.linalg.lstsq(student[train], f[train], rcond=None)[0] for f in features]
    assert all(r.var() < 0.2 * f[test].var() for r, f in zip(residual, features))


def test_worst_group_loss():
    losses = torch.tensor([1.0, 2.0, 3.0, 10.0])
    groups = [torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([0, 0, 1, 1]).bool(), torch.zeros(4).bool()]
    assert worst_group_loss(losses, groups) == 6.5
    assert worst_group_loss(losses, [torch.ones(4).bool()]) == losses.mean(), "one group is plain training"
    assert worst_group_loss(losses, groups) >= losses.mean()
    with pytest.raises(FuseError, match="all groups are empty"):
        worst_group_loss(losses, groups[2:])


def spurious(X, y, share, seed):
    """Digits 0 and 1 with a pixel that tells the class in ``share`` of all samples, and the opposite in the others."""
    random = np.random.default_rng(seed)
    labels = np.where(random.random(len(y)) < 0.15, 1 - y, y)  # so that the shape alone is right less often
    shown = np.where(random.random(len(y)) < share, labels, 1 - labels)
    return np.concatenate([X, 6.0 * shown[:, None] - 3.0], axis=1), labels


def test_rounds_find_what_one_training_leaves_out(digits, tmp_path):
    X, y = digits
    X, y = X[y < 2], y[y < 2]
    train = spurious(X[:240], y[:240], 0.95, seed=0)
    test = spurious(X[240:], y[240:], 0.05, seed=1)  # the pixel now says the opposite
    size = {"hidden": 32, "first_steps": 30, "round_steps": 100, "synthesis_steps": 60, "learning_rate": 1e-3}
    bonsai = Bonsai(rounds=2, **size, epochs=0).fit(*train)
    assert bonsai.rounds_ == 2
    # The rounds themselves: plain training follows the pixel, that of the worst group the shape.
    rows, targets = torch.tensor(train[0]).float(), torch.tensor(train[1])
    shifted, truth = torch.tensor(test[0]).float(), torch.tensor(test[1])
    accuracies, groups = [], [torch.ones(240, dtype=torch.bool)]
    for steps in (30, 100):
        torch.manual_seed(0)
        network = bonsai._network(65, 2)
        bonsai._train_round(network, rows, targets, groups, steps)
        accuracies.append((network(shifted).argmax(1) == truth).double().mean().item())
        right = network(rows).argmax(1) == targets
        groups = [right, ~right]
    assert accuracies[0] < 0.2 < 0.6 < accuracies[1]
    assert bonsai.transform(test[0]).shape == (len(test[1]), 32)
    tuned = Bonsai(rounds=2, **size, epochs=3).fit(*train)
    assert np.array_equal(tuned.transform(test[0]), bonsai.transform(test[0])), "the features stay"
    tuned.save_pretrained(tmp_path)
    same = Head.from_pretrained(tmp_path)
    assert np.array_equal(same.predict(test[0]), tuned.predict(test[0])) and same.rounds_ == 2
    same.partial_fit(*test)
    assert np.array_equal(same.transform(test[0]), bonsai.transform(test[0])), "the features still stay"


def vit(seed, **changes):
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return ViTModel(ViTConfig(**size | {"image_size": 8, "patch_size": 4, "num_channels": 1} | changes))


def test_levi_trains_the_small_model_beside_a_frozen_one(digits, tmp_path, monkeypatch):
    X, y = digits
    pixels = torch.tensor(X, dtype=torch.float32).view(-1, 1, 8, 8)
    rows = [{"pixel_values": image, "labels": int(label)} for image, label in zip(pixels, y)]
    large, small = vit(0), vit(1, hidden_size=8, num_hidden_layers=1)
    before = {name: values.clone() for name, values in large.state_dict().items()}
    model = Levi(large, small, num_labels=4, hidden=16)
    assert model.settings["layers"] == [0, 1, 2] and not any(
        "pretrained" in name for name, _ in model.named_parameters()
    )
    args = FuseConfig(
        str(tmp_path / "run"), max_steps=60, per_device_train_batch_size=32, learning_rate=1e-2, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    FuseTrainer(model, args, train_dataset=rows[:300]).train()
    model.eval()
    with torch.no_grad():
        logits = model(pixel_values=pixels[300:500]).logits
    assert (logits.argmax(1).numpy() == y[300:500]).mean() > 0.6
    assert all(torch.equal(values, before[name]) for name, values in large.state_dict().items())
    model.save_pretrained(tmp_path / "levi")
    same = Levi.from_pretrained(tmp_path / "levi", vit(0))
    with torch.no_grad():
        assert torch.equal(same(pixel_values=pixels[300:310]).logits, model(pixel_values=pixels[300:310]).logits)
    with pytest.raises(CheckpointError, match="does not fit this large model"):
        Levi.from_pretrained(tmp_path / "levi", vit(0, hidden_size=24))
    monkeypatch.setattr("hf_fuse.heads.levi.save_file", lambda _, path: path.write_bytes(b"half of it") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path / "levi")
    Levi.from_pretrained(tmp_path / "levi", vit(0))  # the weights of before are intact
    with pytest.raises(CheckpointError, match="holds no levi.json"):
        Levi.from_pretrained(tmp_path, large)


def test_levi_without_the_small_model_is_a_probe_of_the_large_one():
    large, small = vit(0), vit(1)
    model = Levi(large, small, num_labels=3, layers=[-1], hidden=8).eval()
    for parameter in small.parameters():
        parameter.data.zero_()
    pixels = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        states = large(pixel_values=pixels, output_hidden_states=True).hidden_states[-1].mean(1)
        expected = model.adapters[0](torch.cat([states, torch.zeros(4, 16)], dim=1))
        assert torch.allclose(model(pixel_values=pixels).logits, expected, atol=1e-6)
    with pytest.raises(FuseError, match="layers: .5.; expected indices from -3 to 2"):
        Levi(large, small, num_labels=3, layers=[5])
    assert isinstance(AutoModel.from_config(small.config), ViTModel)
