"""Losses of routers: values that are known in closed form, padding, gradients, and agreement with transformers."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from hf_fuse.adapters.routing import route
from hf_fuse.errors import FuseError
from hf_fuse.losses.load_balance import load_balance
from hf_fuse.losses.localized_balance import localized_balance
from hf_fuse.losses.router_entropy import normalized_entropy, router_entropy
from hf_fuse.losses.router_z import router_z
from hf_fuse.losses.soft_load_balance import soft_load_balance

BATCH, LENGTH, EXPERTS = 3, 5, 4
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])


def logits(layers: int = 2, experts: int = EXPERTS, seed: int = 0) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seed)
    return tuple(torch.randn(BATCH, LENGTH, experts).requires_grad_() for _ in range(layers))


def weights_of(router_logits, strategy="top_k", **options) -> tuple[torch.Tensor, ...]:
    return tuple(route(part.flatten(0, -2), strategy, **options).weights_TE.view_as(part) for part in router_logits)


def every_loss(router_logits, mask):
    """Name -> value, of all losses that take a mask."""
    weights = weights_of(router_logits)
    return {
        "load_balance": load_balance(router_logits, mask),
        "load_balance per layer": load_balance(router_logits, mask, reduction="per_layer"),
        "load_balance of weights": load_balance(router_logits, mask, weights, normalize_topk=True),
        "soft_load_balance": soft_load_balance(router_logits, weights, mask),
        "localized_balance": localized_balance(weights, mask, torch.tensor([0, 1, 1]), delta=0.3),
        "router_z": router_z(router_logits, mask),
        "router_entropy": router_entropy(router_logits, mask),
    }


@pytest.mark.parametrize("experts, top_k", [(4, 1), (4, 2), (8, 2), (4, 4), (1, 1)])
@pytest.mark.parametrize("reduction", ["global", "per_layer"])
def test_balance_is_k_with_a_router_of_zeros(experts, top_k, reduction):
    zeros = (torch.zeros(64, experts),) * 3
    assert load_balance(zeros, top_k=top_k, reduction=reduction) == pytest.approx(top_k)
    assert load_balance(zeros, top_k=top_k, reduction=reduction, normalize_topk=True) == pytest.approx(1)
    assert load_balance(zeros, top_k=top_k, reduction="sum", normalize_topk=True) == pytest.approx(3)


def test_balance_is_the_number_of_experts_at_collapse():
    collapsed = (50.0 * torch.eye(EXPERTS)[0].expand(64, EXPERTS),)
    assert load_balance(collapsed, top_k=1) == pytest.approx(EXPERTS)
    assert soft_load_balance(collapsed, weights_of(collapsed, top_k=1)) == pytest.approx(EXPERTS)


@pytest.mark.parametrize("mask", [None, MASK])
def test_balance_is_that_of_transformers(mask):
    layers = logits(3, 8)
    expected = load_balancing_loss_func(tuple(part.flatten(0, 1) for part in layers), 8, 2, mask)
    torch.testing.assert_close(load_balance(layers, mask), expected)


def test_layers_make_up_for_each_other_only_if_pooled():
    collapsed = torch.zeros(64, 2)
    collapsed[:, 0] = 60
    opposite = (collapsed, collapsed.flip(1))
    assert load_balance(opposite, top_k=1) == pytest.approx(1)
    assert load_balance(opposite, top_k=1, reduction="per_layer") == pytest.approx(2)


def test_balance_of_given_weights():
    layers = logits()
    torch.testing.assert_close(load_balance(layers, None, weights_of(layers)), load_balance(layers))
    # Dense: every expert is chosen by all, so f = 1 and the sum is E; over the mean number of experts it is 1.
    dense = weights_of(layers, "dense")
    assert load_balance(layers, None, dense).item() == pytest.approx(EXPERTS)
    assert load_balance(layers, None, dense, normalize_topk=True).item() == pytest.approx(1)


def test_balance_teaches_by_probabilities_alone():
    (layer,) = logits(1)
    (gradient,) = torch.autograd.grad(load_balance((layer,)), layer)
    flat = layer.detach().flatten(0, 1).requires_grad_()
    share = torch.zeros_like(flat).scatter(1, flat.topk(2, 1).indices, 1).mean(0)
    (expected,) = torch.autograd.grad(EXPERTS * (share * flat.softmax(-1).mean(0)).sum(), flat)
    torch.testing.assert_close(gradient.flatten(0, 1), expected)


def test_layers_of_different_numbers_of_experts():
    layers = (torch.zeros(10, 2), torch.zeros(10, 8))
    assert load_balance(layers, reduction="sum", normalize_topk=True) == pytest.approx(2)
    assert router_entropy(layers) == pytest.approx(1)
    with pytest.raises(FuseError, match=r"theirs have \[2, 8\] experts"):
        load_balance(layers)


def test_soft_balance_is_one_if_uniform_and_teaches_both_factors():
    zeros = (torch.zeros(64, EXPERTS),)
    assert soft_load_balance(zeros, weights_of(zeros, "dense")) == pytest.approx(1)
    layers, weights = logits(1), weights_of(logits(1), "dense")
    expected = EXPERTS * (weights[0].flatten(0, 1).mean(0) * layers[0].flatten(0, 1).softmax(-1).mean(0)).sum()
    loss = soft_load_balance(layers, weights)
    torch.testing.assert_close(loss, expected)
    assert torch.autograd.grad(loss, weights[0], retain_graph=True)[0].abs().sum() > 0
    assert torch.autograd.grad(loss, layers[0])[0].abs().sum() > 0


def test_router_z_of_the_specification():
    assert router_z((torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]]),)) == pytest.approx(3.502, abs=5e-4)
    assert router_z((torch.zeros(3, 8),)) == pytest.approx(math.log(8) ** 2)
    assert router_z((torch.tensor([[1000.0, 0.0]]),)) == pytest.approx(1e6)


P = torch.tensor([[0.7, 0.2, 0.05, 0.05]])


def entropy(probabilities: torch.Tensor, q: float, kind: str = "tsallis") -> float:
    return normalized_entropy(probabilities.log(), q, kind).item()


def test_tsallis_of_the_specification():
    assert entropy(P, 1.1) == pytest.approx(0.619, abs=5e-4)
    assert entropy(P, 1.1) * (1 - 4**-0.1) / 0.1 == pytest.approx(0.801, abs=5e-4)  # not normalised


@pytest.mark.parametrize("kind", ["tsallis", "renyi"])
@pytest.mark.parametrize("q", [0.5, 1.0, 1.1, 2.0, 3.0])
def test_entropy_is_one_if_uniform_and_zero_if_certain(q, kind):
    for experts in (2, 6, 64):
        assert entropy(torch.full((1, experts), 1 / experts), q, kind) == pytest.approx(1, abs=2e-6)
    assert entropy(torch.tensor([[1.0, 0, 0, 0]]), q, kind) == pytest.approx(0, abs=1e-6)
    assert entropy(torch.ones(1, 1), q, kind) == 0
    assert entropy(P[:, [2, 0, 3, 1]], q, kind) == pytest.approx(entropy(P, q, kind), abs=1e-6)
    assert 0 < entropy(P, q, kind) < 1


def test_index_two_is_the_gini_impurity():
    assert entropy(P, 2.0) == pytest.approx((1 - P.square().sum().item()) / (1 - 1 / 4))


@pytest.mark.parametrize("kind", ["tsallis", "renyi"])
@pytest.mark.parametrize("q", [1 + 1e-5, 1 - 1e-5, 1 + 1e-7])
def test_index_near_one_is_shannon(q, kind):
    """1 - sum p^q over q - 1 has two right digits left at 1 + 1e-5 in fp32."""
    shannon = -(P * P.log()).sum().item() / math.log(4)
    assert entropy(P, q, kind) == pytest.approx(shannon, abs=2e-5)


@pytest.mark.parametrize("kind", ["tsallis", "renyi"])
@pytest.mark.parametrize("q", [0.5, 1.0, 1.1, 2.0])
def test_entropy_has_finite_gradients_where_the_router_is_certain(q, kind):
    extreme = torch.tensor([[300.0, 0.0, -300.0], [0.0, 0.0, 0.0]]).requires_grad_()
    (gradient,) = torch.autograd.grad(router_entropy((extreme,), entropy=kind, entropy_index=q), extreme)
    assert gradient.isfinite().all()


def test_localized_balance():
    even = torch.full((BATCH, LENGTH, EXPERTS), 1 / EXPERTS)
    assert localized_balance((even,)) == 0
    # All on one of four: loads (n, 0, 0, 0) have mean n / 4 and variance n^2 / 4 (over n - 1 = 3): 4.
    assert localized_balance((torch.eye(4)[0].expand(1, LENGTH, 4),)) == pytest.approx(4)
    # The first half is for type 1: with delta = 1 a sample of that type is to use no other.
    first_half = torch.tensor([0.5, 0.5, 0, 0]).expand(1, LENGTH, 4)
    second_half = first_half.flip(-1)
    of_type_1 = torch.tensor([1])
    assert localized_balance((first_half,), None, of_type_1, delta=0.5) == pytest.approx(4 / 3)
    # Uneven loads that the importances even out: 1.5 * (.125, .125), .5 * (.375, .375).
    uneven = torch.tensor([0.125, 0.125, 0.375, 0.375]).expand(1, LENGTH, 4)
    assert localized_balance((uneven,), None, of_type_1, delta=0.5) == pytest.approx(0, abs=1e-7)
    assert localized_balance((uneven,), None, 1 - of_type_1, delta=0.5) > 0.5
    assert torch.isfinite(localized_balance((second_half,), None, of_type_1, delta=1.0))


@pytest.mark.parametrize(
    "weights, options, message",
    [
        (torch.ones(1, 2, 4), {"delta": 0.1}, "needs task_types"),
        (torch.ones(1, 2, 3), {"delta": 0.1, "task_types": torch.ones(1)}, "there are 3"),
        (torch.ones(2, 4), {}, r"\(batch, sequence, experts\), got \(2, 4\)"),
    ],
)
def test_localized_balance_says_what_is_missing(weights, options, message):
    with pytest.raises(FuseError, match=message):
        localized_balance((weights,), **options)


def test_padding_takes_no_part():
    layers = logits()
    others = tuple(torch.where(MASK.bool().unsqueeze(-1), part, torch.randn_like(part) * 30) for part in layers)
    broken = tuple(torch.where(MASK.bool().unsqueeze(-1), part, torch.inf) for part in layers)
    expected = every_loss(layers, MASK)
    without = every_loss(layers, None)
    for name, value in every_loss(others, MASK).items():
        torch.testing.assert_close(value, expected[name], msg=name)
        assert not torch.allclose(value, without[name]), name
    for name in ("router_z", "router_entropy"):
        torch.testing.assert_close(every_loss(broken, MASK)[name], expected[name], msg=name)


def test_kept_tokens_alone_give_the_same():
    layers = logits()
    alone = tuple(part[MASK.bool()] for part in layers)
    for loss in (load_balance, router_z, router_entropy):
        torch.testing.assert_close(loss(layers, MASK), loss(alone))


def test_nothing_but_padding_is_zero_with_zero_gradients():
    layers = logits()
    for name, value in every_loss(layers, torch.zeros_like(MASK)).items():
        assert value == 0, name
        for gradient in torch.autograd.grad(value, layers, retain_graph=True, allow_unused=True):
            assert gradient is None or (gradient == 0).all(), name


def test_experts_have_no_order():
    layers, order = logits(), torch.tensor([2, 0, 3, 1])
    permuted = tuple(part[..., order] for part in layers)
    expected = every_loss(layers, MASK)
    for name, value in every_loss(permuted, MASK).items():
        if name != "localized_balance":  # there the halves mean something
            torch.testing.assert_close(value, expected[name], msg=name)


def test_half_precision_is_computed_in_fp32():
    layers = tuple(part.bfloat16() for part in logits())
    exact = every_loss(tuple(part.float() for part in layers), MASK)
    for name, value in every_loss(layers, MASK).items():
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(value, exact[name], rtol=1e-2, atol=1e-3, msg=name)


def test_a_mask_of_other_tokens():
    with pytest.raises(FuseError, match=r"\(3, 4\), 12 tokens, but the router saw 15"):
        router_z(logits(), MASK[:, :4])


def test_gradients_are_those_of_finite_differences():
    layers = tuple(part.detach().double().requires_grad_() for part in logits())
    weights = tuple(part.detach().double().softmax(-1).requires_grad_() for part in logits(seed=1))
    check = partial(torch.autograd.gradcheck, fast_mode=True)
    assert check(lambda *parts: router_z(parts, MASK), layers)
    assert check(lambda *parts: router_entropy(parts, MASK), layers)
    assert check(lambda *parts: soft_load_balance(parts[:2], parts[2:], MASK), (*layers, *weights))
