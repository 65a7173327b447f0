"""NOLA: its random matrices, its gradients, and what it has in common with LoRA."""

from __future__ import annotations

import hashlib
import json
import re

import pytest
import torch
from checks_adapters import batch, logits, move
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_adapters import gpt2, llama
from torch import nn

from hf_fuse import FuseError, NolaConfig
from hf_fuse.adapters import nola
from hf_fuse.adapters.low_rank import to_lora
from hf_fuse.adapters.nola import NolaLayer, random_sum, stream_keys, uniform_matrices
from hf_fuse.checkpoint.adapter import open_adapter


def layer(num_basis=5, r=2, size=(6, 4), seed=0, **settings) -> NolaLayer:
    torch.manual_seed(0)
    made = NolaLayer(nn.Linear(*size), "a.layer")
    made.update_layer("default", NolaConfig(num_basis=num_basis, r=r, seed=seed, **settings))
    return made


def basis(made: NolaLayer, part: int, count: int, size: int) -> torch.Tensor:
    return uniform_matrices(made.keys["default"][part], 0, count, size)


def test_random_matrices_are_known_bits():
    """A change of the hash would make every saved adapter another one."""
    keys = stream_keys(0, "model.layers.0.q_proj:A")
    numbers = uniform_matrices(keys, 0, 8, 4096)
    assert hashlib.sha256(numbers.numpy().tobytes()).hexdigest()[:16] == "0c713d69c997dcda"
    assert torch.equal(uniform_matrices(keys, 3, 2, 4096), numbers[3:5])


def test_random_matrices_are_uniform_and_independent():
    numbers = uniform_matrices(stream_keys(7, "x"), 0, 64, 4096)
    flat = numbers.flatten()
    assert flat.mean().abs() < 5 * (flat.numel() * 3) ** -0.5
    assert flat.var().item() == pytest.approx(1 / 3, rel=0.01)
    counts = torch.histc(flat, 100, -1, 1)
    assert ((counts - counts.mean()).square() / counts.mean()).sum() < 160  # chi squared, 99 degrees: 0.01 % quantile
    between = torch.corrcoef(numbers).fill_diagonal_(0)
    assert between.abs().max() < 6 * 4096**-0.5
    for lag in (1, 2, 64, 4096):
        assert (flat[lag:] * flat[:-lag]).mean().abs() * 3 < 5 * flat.numel() ** -0.5
    others = [uniform_matrices(stream_keys(seed, name), 0, 1, 4096)[0] for seed, name in ((8, "x"), (7, "y"))]
    assert torch.corrcoef(torch.stack([numbers[0], *others])).fill_diagonal_(0).abs().max() < 6 * 4096**-0.5


def test_factors_are_what_the_paper_says():
    made = layer(lora_alpha=3)
    alpha, beta = torch.randn(5), torch.randn(5)
    made.nola_alpha["default"].data, made.nola_beta["default"].data = alpha, beta
    A_0 = basis(made, 0, 1, 12)[0] / 6**0.5
    A = (A_0 + alpha @ basis(made, 1, 5, 12) / 5**0.5).view(2, 6)
    B = (beta @ basis(made, 2, 5, 8) / 5**0.5).view(4, 2)
    down, up = made.factors("default")
    torch.testing.assert_close(down, A)
    torch.testing.assert_close(up, B * 3 / 2)
    torch.testing.assert_close(made.get_delta_weight("default"), 1.5 * B @ A)
    x = torch.randn(3, 6)
    torch.testing.assert_close(made(x), made.base_layer(x) + 1.5 * x @ A.T @ B.T)


def test_gradient_of_a_coefficient_is_the_product_with_its_matrix():
    for count, size in ((5, 12), (3, 100_000)):  # the second in several pieces
        keys = stream_keys(1, "x")
        coefficients = torch.randn(count, requires_grad=True)
        outer = torch.randn(size)
        (random_sum(coefficients, keys, size) * outer).sum().backward()
        expected = uniform_matrices(keys, 0, count, size) @ outer / count**0.5
        torch.testing.assert_close(coefficients.grad, expected, rtol=1e-4, atol=1e-3)


def test_gradients_agree_with_lora_and_only_beta_moves_first():
    made = layer()
    x, target = torch.randn(3, 6), torch.randn(3, 4)
    down, up = (factor.detach().requires_grad_() for factor in made.factors("default"))
    (made.base_layer(x) + x @ down.T @ up.T - target).square().sum().backward()
    (made(x) - target).square().sum().backward()
    scale = made.settings["default"].lora_alpha / 2
    torch.testing.assert_close(
        made.nola_beta["default"].grad, scale * basis(made, 2, 5, 8) @ up.grad.flatten() / 5**0.5
    )
    assert made.nola_alpha["default"].grad.abs().max() == 0
    assert made.nola_beta["default"].grad.abs().min() > 0


def test_enough_matrices_span_every_lora():
    """With r * in of them, any A is a sum: NOLA holds every LoRA, as it does with an orthonormal basis."""
    r, inside, outside = 2, 6, 4
    made = layer(num_basis=12, r=r, size=(inside, outside), lora_alpha=r)
    A, B = torch.randn(r, inside), torch.randn(outside, r)
    A_0 = basis(made, 0, 1, 12)[0] / inside**0.5
    for name, part, wanted in (("nola_alpha", 1, A.flatten() - A_0), ("nola_beta", 2, B.flatten())):
        matrices = basis(made, part, 12, len(wanted)).double() / 12**0.5
        # Coefficients by way of an orthonormal basis of the same space.
        Q, R = torch.linalg.qr(matrices.T)
        assert torch.allclose(Q @ Q.T, torch.eye(len(wanted), dtype=torch.double), atol=1e-9)
        solved = torch.linalg.lstsq(matrices.T, wanted.double()).solution
        getattr(made, name)["default"].data = solved.float()
    torch.testing.assert_close(made.get_delta_weight("default"), B @ A, rtol=1e-3, atol=1e-3)


def test_the_seed_and_the_name_decide():
    same, again, other = layer(seed=3), layer(seed=3), layer(seed=4)
    named = NolaLayer(nn.Linear(6, 4), "another.layer")
    named.update_layer("default", NolaConfig(num_basis=5, r=2, seed=3))
    deltas = []
    for made in (same, again, other, named):
        made.nola_beta["default"].data.fill_(1)
        deltas.append(made.get_delta_weight("default"))
    assert torch.equal(deltas[0], deltas[1])
    assert not torch.allclose(deltas[0], deltas[2], atol=1e-2)
    assert not torch.allclose(deltas[0], deltas[3], atol=1e-2)


def test_neither_pieces_nor_torch_generators_matter(monkeypatch):
    made = layer(num_basis=64)
    made.nola_beta["default"].data.fill_(1)
    before = torch.random.get_rng_state()
    expected = made.get_delta_weight("default")
    assert torch.equal(torch.random.get_rng_state(), before)
    monkeypatch.setattr(nola, "CHUNK", {"cpu": 24})
    torch.testing.assert_close(made.get_delta_weight("default"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_learns_saves_little_and_loads_the_same(make, tmp_path):
    model = get_peft_model(make(), NolaConfig(num_basis=16, r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 32 * len(model.targeted_module_names)
    inputs = batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        losses.append(model.eval()(**inputs, labels=inputs["input_ids"]).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.97 * losses[0]
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 400 * len(model.targeted_module_names)
    assert torch.equal(logits(PeftModel.from_pretrained(make(), tmp_path)), logits(model))
    # The seed is part of the adapter.
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"seed": 1}))
    assert not torch.allclose(logits(PeftModel.from_pretrained(make(), tmp_path)), logits(model), atol=1e-3)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_merged_and_unmerged(make):
    model = move(get_peft_model(make(), NolaConfig(num_basis=8, r=4, target_modules="all-linear")))
    expected, base = logits(model), logits(make())
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_merging_is_refused_where_it_cannot_work():
    made = layer()
    made.nola_beta["default"].data.fill_(float("nan"))
    with pytest.raises(ValueError, match="a.layer.*NaN"):
        made.merge(safe_merge=True)
    made.base_layer.weight = nn.Parameter(torch.zeros(4, 6, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match="quantised"):
        made.merge()


@pytest.mark.parametrize("make", [llama, gpt2])
def test_becomes_a_plain_lora(make, tmp_path):
    config = NolaConfig(num_basis=8, r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = move(get_peft_model(make(), config))
    to_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    assert isinstance(loaded.peft_config["default"], LoraConfig)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-6, atol=1e-6)
    # And hf_fuse itself reads it as a change of weights.
    assert len(open_adapter(tmp_path, "exported").factors) == len(model.targeted_module_names)
    with pytest.raises(FuseError, match="low-rank"):
        to_lora(loaded, tmp_path / "again")


def test_compiles_without_breaks():
    made, x = layer(), torch.randn(3, 6)
    made.nola_beta["default"].data.fill_(1)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)(x)
    compiled.square().sum().backward()
    torch.testing.assert_close(compiled, made(x))
    assert made.nola_alpha["default"].grad.abs().min() > 0


def test_dropout_works_in_training_only():
    made = layer(lora_dropout=0.5)
    made.nola_beta["default"].data.fill_(1)
    x = torch.randn(40, 6)
    assert not torch.equal(made(x), made(x))
    made.eval()
    assert torch.equal(made(x), made(x))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_basis": 0}, "num_basis is 0"),
        ({"r": -1}, "r is -1"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"lora_dropout": 1}, "lora_dropout is 1"),
    ],
)
def test_wrong_settings(setting, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        NolaConfig(**setting)


def test_only_linear_layers():
    with pytest.raises(TypeError, match="embed_tokens: is a Embedding"):
        get_peft_model(llama(), NolaConfig(target_modules=["embed_tokens"]))
