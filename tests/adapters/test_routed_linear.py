"""A Linear with experts: one wide product against a loop over them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_fuse.adapters.routed_linear import routed_linear
from hf_fuse.adapters.routing import route, router_logits

TOKENS, INPUTS, OUTPUTS, EXPERTS, RANK = 21, 8, 10, 5, 3


def made(shared_A: bool = False, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    shapes = [(TOKENS, OUTPUTS), (TOKENS, INPUTS), (EXPERTS, INPUTS), (EXPERTS, RANK, INPUTS), (EXPERTS, OUTPUTS, RANK)]
    if shared_A:
        shapes[3] = (RANK, INPUTS)
    return tuple(torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)


def routed(base, x, router, A, B, strategy="dense", **options):
    return routed_linear(base, x, route(router_logits(x, router), strategy).weights_TE, A, B, 2.0, **options)


def naive(base, x, router, A, B, strategy="dense"):
    weights = route(router_logits(x, router), strategy).weights_TE
    for expert in range(EXPERTS):
        A_ri = A if A.dim() == 2 else A[expert]
        base = base + 2.0 * weights[:, expert, None] * (x @ A_ri.T @ B[expert].T)
    return base


@pytest.mark.parametrize("strategy", ["dense", "mola", "dynmole", "top_p"])
@pytest.mark.parametrize("shared_A", [False, True])
def test_equals_experts_one_by_one(strategy, shared_A):
    tensors = made(shared_A)
    got, expected = routed(*tensors, strategy), naive(*tensors, strategy)
    torch.testing.assert_close(got, expected)
    given = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, tensors, given), torch.autograd.grad(expected, tensors, given)):
        torch.testing.assert_close(a, b)


def test_gradients_are_those_of_finite_differences():
    assert torch.autograd.gradcheck(routed, made(), fast_mode=True)


def test_one_expert_is_peft_lora():
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False)
    linear = get_peft_model(nn.Sequential(nn.Linear(64, 48)), config).base_model.model[0]
    x = torch.randn(30, 64)
    A, B = linear.lora_A["default"].weight, linear.lora_B["default"].weight
    got = routed_linear(linear.base_layer(x), x, torch.ones(30, 1), A[None], B[None], 2.0)
    torch.testing.assert_close(got, linear(x), rtol=0, atol=1e-6)


def test_untrained_experts_are_the_base():
    base, x, router, A, B = made(dtype=torch.bfloat16)
    assert torch.equal(routed(base, x, router, A, torch.zeros_like(B)), base)


@pytest.mark.parametrize(
    "base_dtype, dtype", [("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")]
)
def test_mixed_precision(base_dtype, dtype):
    base, x, router, A, B = made()
    low = [base.to(getattr(torch, base_dtype)), x.to(getattr(torch, base_dtype))]
    low += [part.to(getattr(torch, dtype)) for part in (router, A, B)]
    y = routed(*low)
    expected = naive(*(part.double() for part in low))
    assert y.dtype == getattr(torch, base_dtype)
    assert (y - expected).norm() < 0.01 * expected.norm()


def test_autocast():
    base, x, router, A, B = made(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = routed(base.bfloat16(), x, router, A, B)
    expected = naive(base, x, router, A, B)
    assert y.dtype == torch.bfloat16
    assert (y - expected).norm() < 0.02 * expected.norm()


def test_dropout_is_of_the_input_and_keeps_the_mean():
    base, x, router, A, B = made()
    torch.manual_seed(1)
    once = routed(base, x, router, A, B, dropout=0.5)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    weights = route(router_logits(x, router), "dense").weights_TE
    torch.testing.assert_close(once, routed_linear(base, dropped, weights, A, B, 2.0))


def test_compiles_to_one_graph():
    tensors = made(dtype=torch.float32)
    compiled = torch.compile(routed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), routed(*tensors))


def test_meta_and_no_tokens():
    assert routed(*(tensor.to("meta") for tensor in made())).shape == (TOKENS, OUTPUTS)
    base, x, *rest = made()
    assert routed(base[:0], x[:0], *rest).shape == (0, OUTPUTS)
