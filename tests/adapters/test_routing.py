"""Routing strategies: who is chosen, with what weight, and what the gate's options do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hf_fuse.adapters.routing import STRATEGIES, jittered, route, router_logits, routing_options
from hf_fuse.errors import RecipeError

# Probabilities .5 .25 .15 .1 in different orders.
PROBABILITIES = torch.tensor([[0.5, 0.25, 0.15, 0.1], [0.1, 0.15, 0.25, 0.5], [0.25, 0.5, 0.1, 0.15]])
LOGITS = PROBABILITIES.log()


def random_logits(tokens: int = 64, experts: int = 6) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(tokens, experts)


def test_top_k_renormalises_the_likeliest():
    routes = route(LOGITS, "mixlora", top_k=2)
    expected = torch.tensor([[2 / 3, 1 / 3, 0, 0], [0, 0, 1 / 3, 2 / 3], [1 / 3, 2 / 3, 0, 0]])
    torch.testing.assert_close(routes.weights_TE, expected)
    assert routes.chosen_TK.tolist() == [[0, 1], [3, 2], [1, 0]]
    torch.testing.assert_close(routes.probabilities_TE, PROBABILITIES)


def test_top_k_of_one_expert_is_exactly_one():
    assert torch.equal(route(torch.randn(9, 1), top_k=1).weights_TE, torch.ones(9, 1))


def test_all_experts_chosen_is_dense():
    logits = random_logits()
    torch.testing.assert_close(route(logits, top_k=6).weights_TE, route(logits, "dense").weights_TE)


def test_the_chosen_may_underflow():
    """p / sum p would be 0 / 0 for the third-ranked."""
    routes = route(torch.tensor([[0.0, -500.0, -1000.0]]), ranks=[2])
    assert routes.probabilities_TE[0, 2] == 0
    assert routes.weights_TE.tolist() == [[0.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    "top_p, expected", [(0.6, [2, 2, 2]), (0.76, [3, 3, 3]), (0.4, [1, 1, 1]), (0.0, [1, 1, 1]), (1.0, [4, 4, 4])]
)
def test_top_p_includes_the_expert_that_crosses(top_p, expected):
    routes = route(LOGITS, "mixlora-dynamic", top_p=top_p)
    chosen = routes.weights_TE != 0
    assert chosen.sum(1).tolist() == expected
    # Not renormalised.
    torch.testing.assert_close(routes.weights_TE, PROBABILITIES * chosen)
    assert routes.chosen_TK is None


@pytest.mark.parametrize("top_p, keep_top_k, expected", [(0.8, 1, 2), (0.7, 1, 1), (0.1, 2, 2), (1, 1, 4)])
def test_tsallis_leaves_the_expert_that_crosses_out(top_p, keep_top_k, expected):
    routes = route(LOGITS, "dynmole", top_p=top_p, keep_top_k=keep_top_k, entropy_threshold=1.0)
    chosen = routes.weights_TE != 0
    assert chosen.sum(1).tolist() == [expected] * 3
    torch.testing.assert_close(routes.weights_TE, PROBABILITIES * chosen)


def test_tsallis_gives_undecided_tokens_all_experts():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.1], [5.0, 0.0, 0.0, 0.0]])
    chosen = route(logits, "dynmole", keep_top_k=1).weights_TE != 0
    assert chosen.sum(1).tolist() == [4, 1]


@pytest.mark.parametrize("experts", [2, 3, 5, 6, 7, 8, 12])
def test_threshold_of_one_switches_soft_routing_off(experts):
    """Even for uniform tokens, whose entropy may round to a little more than 1."""
    for entropy_index in (0.5, 1.0, 1.1, 1.3, 2.0):
        routes = route(torch.zeros(1, experts), "dynmole", keep_top_k=1, top_p=0, entropy_threshold=1.0,
                       entropy_index=entropy_index)  # fmt: skip
        assert (routes.weights_TE != 0).sum() == 1


def test_tsallis_with_everything_kept_is_dense():
    logits = random_logits()
    routes = route(logits, "dynmole", top_p=1.0, entropy_threshold=1.0, keep_top_k=6)
    torch.testing.assert_close(routes.weights_TE, logits.softmax(-1))


def test_tsallis_with_a_tiny_nucleus_is_top_k_without_renormalisation():
    logits = random_logits()
    routes = route(logits, "dynmole", top_p=0.0, entropy_threshold=1.0, keep_top_k=2)
    chosen = route(logits, top_k=2).weights_TE != 0
    torch.testing.assert_close(routes.weights_TE, logits.softmax(-1) * chosen)


def test_share_of_undecided_tokens_at_initialisation():
    """The specification measured 79 % with DynMoLE's router (logits of standard deviation .577, E = 6), 5.2 experts."""
    torch.manual_seed(0)
    logits = router_logits(torch.randn(4000, 1024), torch.empty(6, 1024).uniform_(-(1024**-0.5), 1024**-0.5))
    chosen = (route(logits, "dynmole").weights_TE != 0).sum(1)
    assert (chosen == 6).float().mean() == pytest.approx(0.79, abs=0.03)
    assert chosen.float().mean() == pytest.approx(5.2, abs=0.15)


def test_switch_weighs_by_the_probability():
    routes = route(LOGITS, "mixlora-switch")
    assert routes.weights_TE.tolist() == [[0.5, 0, 0, 0], [0, 0, 0, 0.5], [0, 0.5, 0, 0]]
    assert routes.passed_T is None


def test_switch_counts_capacity_in_each_sequence():
    logits = torch.tensor([[1.0, 0.0]]).repeat(8, 1)  # all want expert 0
    routes = route(logits, "switch", capacity=2, sequence_length=4)
    highest = logits[0].softmax(-1).max()
    assert (routes.weights_TE[:, 0] != 0).tolist() == [True, True, False, False] * 2
    torch.testing.assert_close(routes.passed_T, highest * torch.tensor([0.0, 0, 1, 1] * 2))
    one_sequence = route(logits, "switch", capacity=2)
    assert (one_sequence.passed_T > 0).sum() == 6


def test_ranks_choose_by_place():
    routes = route(LOGITS, "mixlora", ranks=[2])
    assert routes.weights_TE.tolist() == [[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    torch.testing.assert_close(route(LOGITS, "dense", ranks=[0, 1]).weights_TE, route(LOGITS, top_k=2).weights_TE)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_carry_gradients_and_depend_on_no_batch(strategy):
    logits = random_logits().requires_grad_()
    routes = route(logits, strategy)
    (gradient,) = torch.autograd.grad((routes.weights_TE * torch.randn(64, 6)).sum(), logits)
    assert gradient.abs().sum() > 0
    torch.testing.assert_close(route(logits[:5], strategy).weights_TE, routes.weights_TE[:5])
    assert routes.weights_TE.dtype == torch.float32
    assert torch.equal(routes.logits_TE.softmax(-1), routes.probabilities_TE)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_experts_have_no_order(strategy):
    logits, order = random_logits(), torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(
        route(logits[:, order], strategy).weights_TE, route(logits, strategy).weights_TE[:, order]
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_tokens(strategy):
    assert route(torch.empty(0, 4), strategy).weights_TE.shape == (0, 4)


def test_low_temperature_is_argmax():
    logits = random_logits()
    weights = route(logits, "dense", router_temperature=1e-3).weights_TE
    torch.testing.assert_close(weights, F.one_hot(logits.argmax(-1), 6).float(), atol=1e-2, rtol=0)
    high = route(logits, "dense", router_temperature=1e6).weights_TE
    torch.testing.assert_close(high, torch.full_like(high, 1 / 6), atol=1e-5, rtol=0)
    assert torch.equal(route(logits, "dense", router_temperature=1.0).logits_TE, logits)


@pytest.mark.parametrize("activation, low, high", [("tanh", -1, 1), ("sigmoid", 0, 1)])
def test_bounded_activation_bounds_the_weights(activation, low, high):
    weights = route(100 * random_logits(), "dense", router_activation=activation).weights_TE
    # One logit at the top, five at the bottom is the most decided that it gets.
    most = torch.tensor([high] + [low] * 5).float().softmax(0)[0]
    assert weights.max() <= most + 1e-6


def test_activation_comes_before_the_temperature():
    logits = random_logits()
    routes = route(logits, "dense", router_activation="gelu", router_temperature=0.5)
    torch.testing.assert_close(routes.logits_TE, F.gelu(logits) / 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_fp32_also_under_autocast(dtype):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(8, 64), torch.randn(4, 64), torch.randn(4)
    x, weight = x.to(dtype).requires_grad_(), weight.requires_grad_()
    exact = x.double() @ weight.double().T + bias
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = router_logits(x, weight, bias)
        assert logits.dtype == torch.float32
        assert (logits - exact).abs().max() < 1e-4
    d_x, d_weight = torch.autograd.grad(logits.sum(), (x, weight))
    assert d_x.dtype == dtype and d_weight.dtype == torch.float32
    torch.testing.assert_close(d_weight, x.float().sum(0).expand(4, -1))


def test_router_keeps_its_input_in_its_own_precision():
    saved = []
    x = torch.randn(8, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        router_logits(x, torch.randn(4, 64, requires_grad=True))
    assert [tensor.dtype for tensor in saved if tensor.shape == x.shape] == [torch.bfloat16]


def test_jitter_is_a_bounded_factor_of_a_copy():
    x = torch.ones(2000)
    noisy = jittered(x, 0.1)
    assert torch.equal(x, torch.ones(2000))
    assert 0.9 <= noisy.min() < 0.91 and 1.09 < noisy.max() <= 1.1
    assert torch.equal(jittered(x, 0.0), x)


def test_options_of_a_strategy():
    assert routing_options("mixlora") == {"top_k": 2}
    assert routing_options("mixlora-switch") == {"capacity": None, "sequence_length": None}
    assert routing_options("dynmole")["top_p"] == 0.75


@pytest.mark.parametrize(
    "strategy, options, message",
    [
        ("top_k", {"top_k": 7}, "top_k is 7, expected 1 to num_experts = 6"),
        ("top_k", {"top_k": 0}, "top_k is 0"),
        ("mixlroa", {}, "there is no 'mixlroa'. Did you mean 'mixlora'"),
        ("top_p", {"top_p": 1.5}, "top_p is 1.5"),
        ("dynmole", {"keep_top_k": 9}, "keep_top_k is 9"),
        ("top_k", {"router_temperature": 0}, "router_temperature is 0"),
        ("top_k", {"router_activation": "relu"}, "there is no 'relu'"),
        ("top_k", {"ranks": [6]}, "from 0 to 5"),
        ("top_k", {"ranks": [1, 1]}, "different numbers"),
        ("top_k", {"ranks": []}, "different numbers"),
        ("switch", {"capacity": 2, "sequence_length": 7}, "64 tokens .* sequences of 7"),
        ("switch", {"capacity": 0}, "capacity is 0"),
    ],
)
def test_bad_options(strategy, options, message):
    with pytest.raises(RecipeError, match=message):
        route(random_logits(), strategy, **options)
