"""The routed feed-forward layer: every way of evaluating it against a plain loop over experts, and its properties."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from hf_fuse.adapters import expert_loop
from hf_fuse.adapters.routed_ffn import _best_kernel, routed_ffn
from hf_fuse.adapters.routing import Routes, route, router_logits
from hf_fuse.errors import FuseError

TOKENS, HIDDEN, WIDTH, EXPERTS, RANK = 37, 8, 16, 4, 8
KERNELS = ("loop", "slots", "groups")
SCALING = {"gate": 2.0, "up": 0.5, "down": 1.5}


class Layer:
    """A feed-forward layer, inputs and leaves of one kind."""

    def __init__(self, kind="gated", names=("gate", "up", "down"), bias=False, dtype=torch.float64, experts=EXPERTS):
        torch.manual_seed(0)
        self.kind = kind
        width = 2 * WIDTH if kind == "fused" else WIDTH
        make = {"bias": bias, "dtype": dtype}
        self.up, self.down = nn.Linear(HIDDEN, width, **make), nn.Linear(WIDTH, HIDDEN, **make)
        self.gate = nn.Linear(HIDDEN, WIDTH, **make) if kind == "gated" else None
        for module in (self.up, self.down, self.gate):
            if module is not None:
                module.requires_grad_(False)
        names = [name for name in names if name != "gate" or kind == "gated"]
        sizes = {"gate": (HIDDEN, WIDTH), "up": (HIDDEN, width), "down": (WIDTH, HIDDEN)}
        self.factors = {
            name: (
                torch.randn(experts, RANK, sizes[name][0], dtype=dtype).requires_grad_(),
                torch.randn(experts, sizes[name][1], RANK, dtype=dtype).requires_grad_(),
            )
            for name in names
        }
        self.x = torch.randn(TOKENS, HIDDEN, dtype=dtype).requires_grad_()
        self.router = torch.randn(experts, HIDDEN, dtype=dtype).requires_grad_()

    @property
    def leaves(self):
        return [self.x, self.router, *itertools.chain(*self.factors.values())]

    def routes(self, strategy="top_k", x=None, **options):
        return route(router_logits(self.x if x is None else x, self.router), strategy, **options)

    def __call__(self, routes, x=None, activation=F.silu, **options):
        return routed_ffn(
            self.x if x is None else x,
            routes,
            gate=self.gate,
            up=self.up,
            down=self.down,
            activation=activation,
            fused_gate_up=self.kind == "fused",
            factors=self.factors,
            **{"scaling": SCALING, **options},
        )

    def naive(self, routes, activation=F.silu):
        """Nothing shared: every expert a whole layer on all tokens."""
        y = 0
        for expert in range(routes.weights_TE.shape[1]):

            def projected(name, x, expert=expert):
                out = getattr(self, name)(x)
                if name in self.factors:
                    A, B = self.factors[name]
                    out = out + x @ A[expert].T @ B[expert].T * SCALING[name]
                return out

            if self.kind == "gated":
                h = activation(projected("gate", self.x)) * projected("up", self.x)
            elif self.kind == "fused":
                gate, up = projected("up", self.x).chunk(2, -1)
                h = activation(gate) * up
            else:
                h = activation(projected("up", self.x))
            y = y + routes.weights_TE[:, expert, None] * projected("down", h)
        return y


def gradients(y, leaves):
    torch.manual_seed(1)
    given = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    return torch.autograd.grad(y, leaves, given, allow_unused=True, retain_graph=True)


def assert_same(layer, strategy, kernel, **options):
    routes = layer.routes(strategy, **options)
    expected = layer.naive(routes)
    got = layer(routes, kernel=kernel)
    tolerance = {"rtol": 1e-4, "atol": 1e-3} if got.dtype == torch.float32 else {}
    torch.testing.assert_close(got, expected, **tolerance)
    names = ["x", "router", *(f"{n} {f}" for n in layer.factors for f in "AB")]
    for name, a, b in zip(names, gradients(got, layer.leaves), gradients(expected, layer.leaves)):
        torch.testing.assert_close(a, b, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def dtype_for(kernel):
    return torch.float32 if kernel == "groups" else torch.float64  # grouped products know no fp64


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(expert_loop, "ROWS", 5)


@pytest.mark.parametrize("names", [("gate", "up", "down"), ("up",), ("down",), ("gate", "down"), ()])
@pytest.mark.parametrize("kind", ["gated", "plain", "fused"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_equals_experts_one_by_one(kind, names, kernel):
    layer = Layer(kind, names, bias=True, dtype=dtype_for(kernel))
    assert_same(layer, "top_k", kernel)


@pytest.mark.parametrize(
    "strategy, options",
    [
        ("top_k", {"top_k": 1}),
        ("top_k", {"top_k": EXPERTS}),
        ("dense", {}),
        ("top_p", {}),
        ("tsallis", {"entropy_threshold": 0.5}),
        ("switch", {}),
        ("top_k", {"ranks": [2]}),
    ],
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_any_routing(strategy, options, kernel):
    layer = Layer(bias=True, dtype=dtype_for(kernel))
    if kernel == "groups" and layer.routes(strategy, **options).chosen_TK is None:
        pytest.skip("grouped products need the same number of experts for every token")
    assert_same(layer, strategy, kernel, **options)


def test_gradients_are_those_of_finite_differences():
    layer = Layer(bias=True)
    routes = layer.routes()
    weights = torch.where(routes.weights_TE == 0, 0, routes.weights_TE).detach()

    def output(x, weights, *factors):
        layer.factors = {name: factors[2 * i : 2 * i + 2] for i, name in enumerate(layer.factors)}
        return layer(routes._replace(weights_TE=torch.where(routes.weights_TE == 0, 0, weights)), x=x)

    rows = slice(0, 6)
    routes = Routes(*(None if part is None else part[rows] for part in routes))
    inputs = (layer.x[rows].detach().requires_grad_(), weights[rows].requires_grad_(), *layer.leaves[2:])
    assert torch.autograd.gradcheck(output, inputs, fast_mode=True)


def test_one_expert_is_peft_lora():
    class FeedForward(nn.Module):
        def __init__(self):
            super().__init__()
            for name, (inputs, outputs) in {"gate": (64, 96), "up": (64, 96), "down": (96, 64)}.items():
                setattr(self, name, nn.Linear(inputs, outputs, bias=name != "up"))

        def forward(self, x):
            return self.down(F.silu(self.gate(x)) * self.up(x))

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["gate", "up", "down"], init_lora_weights=False)
    model = get_peft_model(FeedForward(), config).base_model.model
    linears = {name: getattr(model, name) for name in ("gate", "up", "down")}
    pairs = {n: (m.lora_A["default"].weight, m.lora_B["default"].weight) for n, m in linears.items()}
    factors = {
        name: (A.detach()[None].requires_grad_(), B.detach()[None].requires_grad_()) for name, (A, B) in pairs.items()
    }
    x = torch.randn(50, 64)
    expected = model(x)
    got = routed_ffn(
        x,
        route(router_logits(x, torch.randn(1, 64)), top_k=1),
        **{name: module.base_layer for name, module in linears.items()},
        activation=F.silu,
        factors=factors,
        scaling=2.0,
    )
    assert torch.equal(got, expected)
    expected.square().sum().backward()
    got.square().sum().backward()
    for name, (A, B) in pairs.items():
        torch.testing.assert_close(factors[name][0].grad[0], A.grad)
        torch.testing.assert_close(factors[name][1].grad[0], B.grad)


@pytest.mark.parametrize("dtype, distance", [(torch.float32, 2e-6), (torch.bfloat16, 0)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_untrained_experts_are_the_base(dtype, distance, kernel):
    layer = Layer(dtype=dtype)
    layer.factors = {name: (A, torch.zeros_like(B)) for name, (A, B) in layer.factors.items()}
    base = layer.down(F.silu(layer.gate(layer.x)) * layer.up(layer.x))
    # In bf16 only weights kept in fp32 until the sum make this exact.
    assert (layer(layer.routes(), kernel=kernel) - base).abs().max() <= distance


@pytest.mark.parametrize("kernel", KERNELS[:2])
def test_order_of_experts_does_not_matter(kernel):
    layer = Layer()
    expected = layer(layer.routes(), kernel=kernel)
    order = torch.tensor([2, 0, 3, 1])
    layer.router = layer.router[order]
    layer.factors = {name: (A[order], B[order]) for name, (A, B) in layer.factors.items()}
    torch.testing.assert_close(layer(layer.routes(), kernel=kernel), expected)


@pytest.mark.parametrize("kernel", KERNELS[:2])
def test_equal_experts_make_the_router_irrelevant(kernel):
    layer = Layer()
    layer.factors = {name: (A[:1].expand_as(A), B[:1].expand_as(B)) for name, (A, B) in layer.factors.items()}
    one = layer(layer.routes(), kernel=kernel)
    layer.router = torch.randn_like(layer.router)
    torch.testing.assert_close(layer(layer.routes(), kernel=kernel), one)


@pytest.mark.parametrize("kernel", KERNELS)
def test_idle_experts_have_zero_gradients(kernel):
    layer = Layer(dtype=dtype_for(kernel))
    # Positive inputs, and a router that finds experts 0 and 1 ever likelier than 2 and 3.
    layer.x = layer.x.detach().abs()
    layer.router = torch.tensor([[2.0], [1.0], [-1.0], [-2.0]], dtype=layer.x.dtype).repeat(1, HIDDEN)
    layer(layer.routes(), kernel=kernel).square().sum().backward()
    for A, B in layer.factors.values():
        for gradient in (A.grad, B.grad):
            assert gradient[:2].abs().sum(dim=(1, 2)).min() > 0
            assert torch.equal(gradient[2:], torch.zeros_like(gradient[2:]))


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_tokens(kernel):
    layer = Layer(bias=True, dtype=dtype_for(kernel))
    layer.x = layer.x.detach()[:0].requires_grad_()
    y = layer(layer.routes(), kernel=kernel)
    assert y.shape == (0, HIDDEN)
    y.sum().backward()
    assert all(torch.equal(B.grad, torch.zeros_like(B)) for _, B in layer.factors.values())


@pytest.mark.parametrize("kernel", KERNELS)
def test_tokens_beyond_the_capacity_are_passed_on(kernel):
    layer = Layer(bias=True, dtype=dtype_for(kernel))
    free, limited = layer.routes("switch"), layer.routes("switch", capacity=3)
    passed = limited.passed_T > 0
    assert passed.sum() >= TOKENS - 3 * EXPERTS
    y, unlimited = layer(limited, kernel=kernel), layer(free, kernel=kernel)
    highest = free.probabilities_TE.max(1, keepdim=True).values
    torch.testing.assert_close(y[passed], (highest * layer.x)[passed])
    torch.testing.assert_close(y[~passed], unlimited[~passed])


@pytest.mark.parametrize("kernel", ["loop", "slots"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_twice(kernel, reentrant):
    layer = Layer()

    def output(x):
        return layer(layer.routes(x=x), x=x, kernel=kernel)

    def once(x):
        return checkpoint(output, x, use_reentrant=reentrant)

    def whole(x):
        return checkpoint(once, x, use_reentrant=reentrant)

    leaves = [layer.x, layer.router, *itertools.chain(*layer.factors.values())]
    results = []
    for forward in (output, whole):
        for leaf in leaves:
            leaf.grad = None
        forward(layer.x).square().sum().backward()
        results.append([leaf.grad for leaf in leaves])
    for plain, checkpointed in zip(*results):
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize("backend, strategy", [("aot_eager", "top_k"), ("eager", "tsallis")])
def test_compiles_to_one_graph(backend, strategy):
    layer = Layer(bias=True, dtype=torch.float32)

    def output(x):
        return layer(layer.routes(strategy, x=x), x=x, dropout=0.0)

    compiled = torch.compile(output, fullgraph=True, backend=backend)
    y, expected = compiled(layer.x), output(layer.x)
    torch.testing.assert_close(y, expected)
    for a, b in zip(gradients(y, layer.leaves), gradients(expected, layer.leaves)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_compiles_under_autocast():
    layer = Layer(dtype=torch.float32)

    @partial(torch.compile, fullgraph=True, backend="aot_eager")
    def output(x):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(layer.routes(x=x), x=x)

    expected = layer(layer.routes())
    assert (output(layer.x) - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast(kernel):
    layer = Layer(dtype=torch.float32, bias=True)
    expected = layer(layer.routes(), kernel="loop")
    with torch.autocast("cpu", torch.bfloat16):
        routes = layer.routes()
        assert routes.logits_TE.dtype == routes.weights_TE.dtype == torch.float32
        exact = layer.x.double() @ layer.router.double().T
        assert (routes.logits_TE - exact).abs().max() < 1e-5  # in bf16 it would be 1e-2
        y = layer(routes, kernel=kernel)
    assert y.dtype == torch.bfloat16
    scale = expected.abs().max()
    assert (y - expected).abs().max() < 0.02 * scale
    for name, low, high in zip(["x", "router"], gradients(y, layer.leaves), gradients(expected, layer.leaves)):
        assert low.dtype == torch.float32, name
        assert (low - high).abs().max() < 0.05 * high.abs().max(), name


@pytest.mark.parametrize("kernel", ["loop", "slots"])
@pytest.mark.parametrize(
    "base, factors",
    [("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "bfloat16")],
)
def test_mixed_precision(kernel, base, factors):
    layer, exact = Layer(bias=True), Layer(bias=True)
    base, precision = getattr(torch, base), getattr(torch, factors)

    def rounded(leaf, dtype):
        low = leaf.detach().to(dtype)
        return low.requires_grad_(), low.double().requires_grad_()

    for name in ("gate", "up", "down"):
        getattr(layer, name).to(base)
        getattr(exact, name).to(base).double()
    layer.x, exact.x = rounded(layer.x, base)
    layer.router, exact.router = rounded(layer.router, precision)
    for name, pair in layer.factors.items():
        layer.factors[name], exact.factors[name] = zip(*(rounded(part, precision) for part in pair))
    routes = layer.routes()
    y, expected = layer(routes, kernel=kernel), exact(exact.routes(), kernel=kernel)
    assert y.dtype == base and routes.weights_TE.dtype == torch.float32
    assert (y - expected).norm() < 0.02 * expected.norm()
    for leaf, low, high in zip(layer.leaves, gradients(y, layer.leaves), gradients(expected, exact.leaves)):
        assert low.dtype == leaf.dtype
        assert (low - high).norm() < 0.06 * high.norm()


def test_gradients_of_factors_are_summed_in_fp32():
    """Over thousands of tokens a bf16 sum would stop growing."""
    tokens = 1500
    x = torch.ones(tokens, HIDDEN, dtype=torch.bfloat16)
    one = torch.ones(1, 1, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    B = torch.zeros(1, HIDDEN, 1, dtype=torch.bfloat16, requires_grad=True)
    routes = Routes(torch.ones(tokens, 1), torch.ones(tokens, 1), torch.zeros(tokens, 1))
    identity = nn.Identity()
    y = routed_ffn(
        x, routes, up=identity, down=identity, activation=identity, factors={"up": (one, B)}, scaling=1.0, kernel="loop"
    )
    y.sum().backward()
    assert (B.grad.float() / (tokens * HIDDEN) - 1).abs().max() < 0.01


@pytest.mark.parametrize("dropout, hidden_dropout", [(0.5, 0.0), (0.0, 0.5), (0.25, 0.5)])
@pytest.mark.parametrize("kind", ["gated", "plain", "fused"])
def test_dropout_is_the_same_whatever_the_kernel(dropout, hidden_dropout, kind):
    layer = Layer(kind, bias=True, dtype=torch.float32)
    results = []
    for kernel in KERNELS:
        torch.manual_seed(3)
        y = layer(layer.routes(), kernel=kernel, dropout=dropout, hidden_dropout=hidden_dropout)
        results.append([y, *gradients(y, layer.leaves)])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(results[0][0], layer(layer.routes()))


def test_dropout_keeps_the_mean():
    layer = Layer(names=("down",))
    layer.x = layer.x.detach()[:1].expand(5000, -1)  # many draws at once
    routes = layer.routes()
    y = layer(routes, dropout=0.3, hidden_dropout=0.4).mean(0)
    expected = layer(routes)[0]
    assert (y - expected).norm() < 0.05 * expected.norm()


def test_dropout_of_the_layer_itself():
    layer = Layer(names=())
    layer.down = nn.Identity()
    torch.manual_seed(0)
    base = F.silu(layer.gate(layer.x)) * layer.up(layer.x)
    ratio = layer(layer.routes(), hidden_dropout=0.75) / base
    assert set(ratio.detach().round(decimals=5).unique().tolist()) == {0.0, 4.0}


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.GELU(approximate="tanh"), nn.Identity(), torch.sigmoid, torch.tanh]
)
@pytest.mark.parametrize("kind", ["gated", "plain"])
def test_any_activation(activation, kind):
    layer = Layer(kind)
    routes = layer.routes()
    expected, got = layer.naive(routes, activation), layer(routes, activation=activation)
    for a, b in zip(gradients(got, layer.leaves), gradients(expected, layer.leaves)):
        torch.testing.assert_close(a, b)


def test_an_activation_that_learns():
    layer = Layer()
    activation = nn.PReLU(dtype=torch.float64)
    layer(layer.routes(), activation=activation).sum().backward()
    assert activation.weight.grad.abs() > 0


def test_projections_are_only_called():
    """As quantised ones must be: no weight is read. Conv1D's lies the other way round."""
    layer = Layer(bias=True)
    expected = layer(layer.routes())
    for name in ("gate", "up", "down"):
        linear = getattr(layer, name)
        conv = Conv1D(linear.out_features, linear.in_features).double()
        conv.weight.data, conv.bias.data = linear.weight.data.T.contiguous(), linear.bias.data
        setattr(layer, name, conv)
    torch.testing.assert_close(layer(layer.routes()), expected)


def test_runs_on_the_meta_device():
    with torch.device("meta"):
        layer = Layer(bias=True)
        y = layer(layer.routes())
        assert y.shape == (TOKENS, HIDDEN) and y.is_meta
        assert all(g.is_meta for g in torch.autograd.grad(y.sum(), layer.leaves))


@pytest.mark.parametrize(
    "device, dtype, rank, chosen, expected",
    [
        ("cpu", torch.bfloat16, 128, True, "loop"),
        ("meta", torch.float32, 128, True, "slots"),
        ("meta", torch.bfloat16, 64, True, "slots"),
        ("meta", torch.bfloat16, 72, True, "groups"),
        ("meta", torch.bfloat16, 76, True, "slots"),
        ("meta", torch.bfloat16, 128, False, "slots"),
    ],
)
def test_the_kernel_follows_from_device_and_sizes(device, dtype, rank, chosen, expected):
    factors = {"down": (torch.empty(8, rank, 16, device=device), torch.empty(8, 16, rank, device=device))}
    chosen_TK = torch.zeros(3, 2, dtype=torch.long) if chosen else None
    assert _best_kernel(torch.empty(3, 16, device=device), F.silu, factors, dtype, chosen_TK) == expected


@pytest.mark.parametrize("kernel", ["loop", "slots"])
def test_saves_six_tenths_of_plain_lora(kernel, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "recipes" / "benchmarks")
    from routed_adapters import Layer as BenchmarkLayer
    from routed_adapters import Shapes, saved_bytes

    layer = BenchmarkLayer(Shapes(tokens=256, hidden=128, width=352, rank=1))
    saved = {
        name: saved_bytes(forward, layer.x, layer.parameters())
        for name, forward in (
            ("lora", partial(layer.lora_ffn, layer.plain)),
            ("routed", partial(layer.routed_ffn, kernel)),
            ("naive", layer.expert_by_expert),
        )
    }
    assert saved["routed"] <= 0.62 * saved["lora"] < 0.3 * saved["naive"]


@pytest.mark.parametrize("kind, name", [("plain", "gate"), ("fused", "gate"), ("gated", "gate_up")])
def test_factors_of_no_projection(kind, name):
    layer = Layer(kind)
    layer.factors[name] = layer.factors["up"]
    with pytest.raises(FuseError, match=f"no projection '{name}', only"):
        layer(layer.routes())
