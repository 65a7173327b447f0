"""The routed feed-forward layer: every way of evaluating it against a plain loop over experts, and its properties."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_fuse.adapters import expert_loop
from hf_fuse.adapters.routed_ffn import routed_ffn
from hf_fuse.adapters.routing import route, router_logits

TOKENS, HIDDEN, WIDTH, EXPERTS, RANK = 37, 8, 12, 4, 4
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
    return torch.autograd.grad(y, leaves, torch.randn(y.shape, dtype=y.dtype), allow_unused=True, retain_graph=True)


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
