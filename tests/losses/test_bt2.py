"""BT2: rotations that keep angles, the loss written out, and layers that come back from a checkpoint."""

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy, normalize
from training_cases import bert, make_trainer, old_bert, train

from hf_fuse.errors import CheckpointError, FuseError
from hf_fuse.losses.bt2 import bt2


def made(**options):
    torch.manual_seed(0)
    loss = bt2(**{"old_size": 8, "extra": 4} | options)
    loss.prepare(bert(), None)
    return loss


def test_the_embedding_keeps_the_angles_of_what_it_turns():
    loss, features = made(), torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    embedding = loss.embed(features)
    assert embedding.shape == (6, 20)
    unit = normalize(features, dim=-1)
    spare = normalize(loss.branch(unit.relu())[:, :4], dim=-1)
    before = torch.cat([spare, 2 * unit], -1)
    assert torch.allclose(embedding @ embedding.T, before @ before.T, atol=1e-5)
    for layer in (loss.rotation, loss.old_rotation):
        assert torch.allclose(layer.weight @ layer.weight.T, torch.eye(len(layer.weight)), atol=1e-5)


def test_the_loss_written_out():
    loss, random = made(), torch.Generator().manual_seed(2)
    features, old, means, other = (torch.randn(n, d, generator=random) for n, d in ((5, 16), (5, 8), (3, 8), (5, 16)))
    labels = torch.tensor([0, 1, 2, 0, 1])
    b = loss.embed(features)[:, :8]
    expected = 10 * cross_entropy(normalize(b, dim=-1) @ normalize(means, dim=-1).T, labels)
    expected = expected + 5 * (1 - cosine_similarity(b, old)).mean()
    assert loss(features, labels, old, means).item() == pytest.approx(expected.item(), rel=1e-5)
    expected = expected + (1 - cosine_similarity(features, other)).mean()
    assert loss(features, labels, old, means, other).item() == pytest.approx(expected.item(), rel=1e-5)
    means[2] = torch.nan
    assert loss(features, labels, old, means).isfinite()
    with pytest.raises(FuseError, match="old_size is 8, the old model's features have 7"):
        loss(features, labels, old[:, :7], means)
    with pytest.raises(FuseError, match=r"expected from extra \(4\)"):
        made(old_size=21)


def test_training_learns_the_layers_and_they_come_back(tmp_path):
    objectives = {"bt2": {"weight": 0.1, "scale": 3.0, "extra": 4}}
    settings = {"objectives": objectives, "old_model": old_bert, "save_strategy": "steps", "save_steps": 3}
    trainer = make_trainer("old", tmp_path, 8, 1, **settings)
    start = trainer.objectives[0].loss.rotation.weight.detach().clone()
    logs, _ = train(trainer)
    loss = trainer.objectives[0].loss
    assert (loss.rotation.weight - start).abs().max() > 1e-5
    assert torch.allclose(loss.rotation.weight @ loss.rotation.weight.T, torch.eye(16), atol=1e-5)
    assert logs[2]["bt2"] < logs[0]["bt2"]
    features = torch.randn(3, 16)
    again = bt2.from_checkpoint(tmp_path / "checkpoint-3")
    assert torch.allclose(again.embed(features), loss.embed(features), atol=1e-5)
    with pytest.raises(CheckpointError, match="has no layers of bt2"):
        bt2.from_checkpoint(tmp_path)
