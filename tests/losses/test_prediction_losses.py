"""Losses on logits and labels: the spec's numbers, identities, and nothing selected gives 0."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_fuse.errors import FuseError
from hf_fuse.losses.class_balanced import balancing_weights, class_balanced
from hf_fuse.losses.comp_sum import comp_sum
from hf_fuse.losses.dkl import dkl
from hf_fuse.losses.ldam import class_margins, ldam
from hf_fuse.losses.logit_z import logit_z

COUNTS = torch.tensor([1000, 100, 10])


def logits_and_labels(count=7, classes=5):
    random = torch.Generator().manual_seed(0)
    return torch.randn(count, classes, generator=random) * 3, torch.randint(classes, (count,), generator=random)


def test_logit_z():
    logits = torch.tensor([[2.0, 1, 0], [0, 0, 0]])
    assert logit_z(logits, torch.tensor([0, 0])).item() == pytest.approx(3.502, abs=1e-3)
    # A shift moves the normaliser, which is what the loss is about.
    assert logit_z(logits - math.log(3), torch.tensor([0, 0])) < logit_z(logits, torch.tensor([0, 0]))


@pytest.mark.parametrize(
    ("tau", "expected"), [(0, 0.5032), (0.5, 0.4521), (1, 0.4076), (1.5, 0.3688), (1.7, 0.3546), (2, 0.3348)]
)
def test_comp_sum(tau, expected):
    assert comp_sum(torch.tensor([[2.0, 1, 0]]), torch.tensor([0]), tau=tau).item() == pytest.approx(expected, abs=1e-4)


def test_comp_sum_is_cross_entropy_at_1_and_continuous_there():
    logits, labels = logits_and_labels()
    expected = F.cross_entropy(logits, labels).item()
    assert comp_sum(logits, labels, tau=1.0).item() == pytest.approx(expected, rel=1e-6)
    for tau in (1 - 2e-4, 1 + 2e-4):
        assert comp_sum(logits, labels, tau=tau).item() == pytest.approx(expected, rel=1e-2)
    values = [comp_sum(logits, labels, tau=tau / 10).item() for tau in range(21)]
    assert values == sorted(values, reverse=True)


def test_comp_sum_gradients_and_hopeless_examples():
    logits, labels = logits_and_labels(3, 4)
    for tau in (0.0, 0.5, 1.0, 1.5, 2.0):
        # fp32 inside: looser than gradcheck's defaults for fp64.
        torch.autograd.gradcheck(
            lambda x, tau=tau: comp_sum(x, labels, tau=tau),
            logits.double().requires_grad_(),
            eps=1e-2,
            atol=2e-2,
            rtol=2e-2,
        )
    hopeless = torch.tensor([[0.0, 500.0]], requires_grad=True)
    value = comp_sum(hopeless, torch.tensor([0]), tau=0.0)
    value.backward()
    assert value.isfinite() and hopeless.grad.isfinite().all()


@pytest.mark.parametrize(("beta", "expected"), [(0.99, [0.230, 0.363, 2.407]), (0.9999, [0.028, 0.271, 2.700])])
def test_class_weights(beta, expected):
    assert balancing_weights(COUNTS, beta).tolist() == pytest.approx(expected, abs=1e-3)


def test_class_weights_at_the_ends():
    assert balancing_weights(COUNTS, 0).tolist() == [1, 1, 1]
    inverse = 1 / COUNTS.double()
    assert balancing_weights(COUNTS, 1).tolist() == pytest.approx((3 * inverse / inverse.sum()).tolist())
    assert balancing_weights(COUNTS, 1 - 1e-9).tolist() == pytest.approx(
        balancing_weights(COUNTS, 1).tolist(), rel=1e-4
    )
    assert balancing_weights(torch.tensor([10, 0]), 0.99).isfinite().all()


def test_class_balanced_is_deferred():
    logits, labels = logits_and_labels(classes=3)
    plain = F.cross_entropy(logits, labels).item()
    weights = balancing_weights(COUNTS, 0.99)
    weighted = (weights[labels] * F.cross_entropy(logits, labels, reduction="none")).mean().item()
    given = {"beta": 0.99, "defer_until": 0.8}
    assert class_balanced(logits, labels, COUNTS, 0.79, **given).item() == pytest.approx(plain, rel=1e-6)
    assert class_balanced(logits, labels, COUNTS, 0.8, **given).item() == pytest.approx(weighted, rel=1e-6)
    assert abs(plain - weighted) > 0.1
    assert class_balanced(logits, labels, COUNTS, beta=0.0).item() == pytest.approx(plain, rel=1e-6)


def test_ldam():
    assert class_margins(COUNTS, 0.5).tolist() == pytest.approx([0.158, 0.281, 0.5], abs=1e-3)
    logits, labels = logits_and_labels(classes=3)
    lowered = logits.clone()
    for row, label in enumerate(labels.tolist()):
        lowered[row, label] -= class_margins(COUNTS, 0.5)[label]
    assert ldam(logits, labels, COUNTS, scale=2.0).item() == pytest.approx(F.cross_entropy(2 * lowered, labels).item())
    assert ldam(logits, labels, COUNTS, max_margin=0.0).item() == pytest.approx(F.cross_entropy(logits, labels).item())


def test_dkl():
    first, second, labels = torch.tensor([[2.0, 0, 0]]), torch.tensor([[1.0, 0.5, 0]]), torch.tensor([0])
    assert dkl(first, second, labels, symmetric=False).item() == pytest.approx(0.1745, abs=1e-4)
    assert dkl(first, second, labels).item() == pytest.approx(0.1904, abs=1e-4)
    assert dkl(second, first, labels).item() == pytest.approx(0.1904, abs=1e-4)
    assert dkl(first, first + 5, labels, temperature=0.1).item() == pytest.approx(0, abs=1e-6)
    sharper = dkl(first, second, labels, temperature=0.5, symmetric=False)
    assert sharper.item() == pytest.approx(dkl(2 * first, 2 * second, labels, symmetric=False).item())


def test_both_views_learn():
    first, second = (logits_and_labels()[0] * factor for factor in (1, 2))
    first.requires_grad_(), second.requires_grad_()
    dkl(first, second, torch.zeros(7, dtype=torch.long), symmetric=False).backward()
    assert first.grad.abs().sum() > 0 and second.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "loss",
    [
        logit_z,
        comp_sum,
        lambda x, y: class_balanced(x, y, COUNTS),
        lambda x, y: ldam(x, y, COUNTS),
        lambda x, y: dkl(x, x, y),
    ],
    ids=["logit_z", "comp_sum", "class_balanced", "ldam", "dkl"],
)
def test_nothing_selected_gives_0_with_gradient(loss, dtype):
    logits = torch.zeros(4, 3, dtype=dtype, requires_grad=True)
    value = loss(logits[:0], torch.zeros(0, dtype=torch.long))
    value.backward()
    assert value.item() == 0 and value.dtype == torch.float32
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("labels", [torch.zeros(2), torch.zeros(2, 3)])
def test_labels_that_are_no_classes_are_refused(labels):
    logits = torch.zeros(2, 3)
    losses = (comp_sum, lambda x, y: class_balanced(x, y, COUNTS), lambda x, y: ldam(x, y, COUNTS))
    for loss in losses:
        with pytest.raises(FuseError, match="expects the index of a class"):
            loss(logits, labels)
