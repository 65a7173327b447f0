"""Small parts for training that are no losses: scaled gradients, hypernetworks, binary weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_cases import llama, make_trainer, train

from hf_fuse.binary_weights import BinaryWeight, ReSTECallback, binarise, fold_binary, reste, reste_exponent
from hf_fuse.errors import FuseError
from hf_fuse.gradient_scale import (
    GradientScale,
    agm_factors,
    contributions,
    iemf_factor,
    inverse_effectiveness,
    scale_gradient,
)
from hf_fuse.hypernetwork import HyperNetwork, magnitude_invariant

# ---- gradients of modalities


def test_scaled_gradients():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    y = scale_gradient(x, 0.25)
    assert torch.equal(y, x)
    y.square().sum().backward()
    assert x.grad.tolist() == [0.5, -1.0]
    layer = nn.Linear(2, 1)
    layer(torch.ones(1, 2)).sum().backward()
    scale = GradientScale(layer, 3.0)
    layer.zero_grad()
    layer(torch.ones(1, 2)).sum().backward()
    assert layer.weight.grad.tolist() == [[3.0, 3.0]] and layer.bias.grad.item() == 3
    scale.factor = 0.5
    layer(torch.ones(1, 2)).sum().backward()  # a second micro-batch
    assert layer.bias.grad.item() == 3.5
    scale.remove()
    layer(torch.ones(1, 2)).sum().backward()
    assert layer.bias.grad.item() == 4.5


def test_agm():
    both, first, second = (torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    one, other = contributions(both, first, second)
    assert torch.allclose(one + other, both, atol=1e-6)
    assert torch.allclose(one, 0.5 * (both - second + first))
    # tau is 1.5 and 1 / 1.5 for running means whose difference is log 1.5.
    factors = agm_factors((0.5, 1.2), (0.0, math.log(1.5)), alpha=0.5)
    assert factors == pytest.approx((0.773, 1.089), abs=1e-3)
    assert agm_factors((0.5, 1.2), (0.5, 1.2)) == pytest.approx((1, 1))


def test_iemf():
    assert inverse_effectiveness(20, 10, 25) == pytest.approx(0.928, abs=1e-3)
    assert inverse_effectiveness(10, 10, 20) == pytest.approx(1)
    assert math.isfinite(inverse_effectiveness(1, 1, 0))
    logits, labels = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1])
    known = logits.softmax(-1)[torch.arange(5), labels].sum().item()
    even = iemf_factor(torch.zeros(5, 3), logits, logits, labels)
    assert even == pytest.approx(inverse_effectiveness(5 / 3, known, known), rel=1e-5)


# ---- hypernetworks


def test_inputs_of_constant_size():
    values = torch.rand(7, 2)
    assert torch.allclose(magnitude_invariant(values).square().sum(-1), torch.full((7,), 2.0))
    assert torch.allclose(magnitude_invariant(torch.tensor([0.0, 1.0])), torch.tensor([1.0, 0, 0, 1]), atol=1e-6)


def test_a_hypernetwork_starts_as_the_model_and_learns_a_family():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    x, ends = torch.randn(64, 3), torch.tensor([[1.0, 0, 0], [0, -2, 0]])
    start = model(x).detach()
    hyper = HyperNetwork(model, inputs=1, hidden=16)
    assert torch.equal(hyper(torch.tensor([0.3]), x), start)
    optimizer = torch.optim.Adam(hyper.parameters(), lr=0.03)
    for step in range(150):
        g = torch.tensor([step % 2.0])
        loss = F.mse_loss(hyper(g, x)[:, 0], x @ ends[step % 2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = [hyper.parameters_at(torch.tensor([g]))["weight"][0] for g in (0.0, 1.0)]
    assert torch.allclose(torch.stack(found), ends, atol=0.1)
    assert (hyper.model.weight.grad != 0).any()


# ---- binary weights


def test_reste():
    x = torch.tensor([0.05, 0.5, 1, 1.4, 1.6, -0.5, 0.0], requires_grad=True)
    y = reste(x, 3.0)
    assert y.tolist() == [1, 1, 1, 1, 1, -1, 1]
    y.sum().backward()
    assert x.grad.tolist() == pytest.approx([4.64, 0.529, 0.333, 0.266, 0, 0.529, 4.64], abs=2e-3)
    x.grad = None
    reste(x, 1.0).sum().backward()
    assert x.grad.tolist() == pytest.approx([1, 1, 1, 1, 0, 1, 1])
    assert [reste_exponent(p) for p in (0, 0.5, 1)] == pytest.approx([1, 2, 3])


def test_a_model_of_binary_weights_trains_and_folds(tmp_path):
    changes = {"objectives": {}, "callbacks": [ReSTECallback()], "model": binary}
    trainer = make_trainer("language", tmp_path, 8, 1, **changes)
    logs, _ = train(trainer)
    model = trainer.model
    layer = model.model.layers[0].mlp.up_proj
    assert layer.parametrizations.weight[0].exponent.item() == pytest.approx(reste_exponent(2 / 3))
    raw = layer.parametrizations.weight.original
    ids = torch.arange(3, 9)[None]
    before = model.eval()(input_ids=ids).logits
    assert len(layer.weight.detach().unique()) == 2
    assert layer.weight.abs().max().item() == pytest.approx(raw.abs().mean().item(), rel=1e-5)
    assert len(fold_binary(model)) == 4
    assert model.state_dict().keys() == llama().state_dict().keys()
    assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-6)
    assert not any(isinstance(module, BinaryWeight) for module in model.modules())


def binary():
    model = llama()
    assert binarise(model, ["up_proj", "down_proj"]) == [
        f"model.layers.{layer}.mlp.{name}" for layer in range(2) for name in ("up_proj", "down_proj")
    ]
    return model


def test_what_cannot_be_binarised():
    with pytest.raises(FuseError, match="no linear layer of LlamaForCausalLM is called nothing"):
        binarise(llama(), ["nothing"])
    with pytest.raises(FuseError, match="up_proj is parametrised already"):
        binarise(binary(), ["up_proj"])
