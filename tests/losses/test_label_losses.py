"""Losses on logits and labels that came with retrieval, metrics and mixing: the spec's numbers and identities."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import balanced_accuracy_score, f1_score

from hf_fuse.errors import FuseError
from hf_fuse.losses.any_loss import any_loss, soft_metric
from hf_fuse.losses.comp_sum import comp_sum
from hf_fuse.losses.decoupled_mixup import decoupled_mixup
from hf_fuse.losses.decoupled_softmax import decoupled_softmax
from hf_fuse.losses.nested_dropout import (
    accuracy_by_width,
    drawn_width,
    keep_first,
    nested_dropout,
    width_probabilities,
)
from hf_fuse.losses.replay import replay
from hf_fuse.losses.smooth_adversarial import smooth_adversarial
from hf_fuse.losses.soft_top_k import shift, soft_top_k
from hf_fuse.losses.spherical_z import spherical_z

SCORES, TWO = torch.tensor([[2.0, 1, 0, -1]]), torch.tensor([[1.0, 1, 0, 0]])


def random_logits(count=6, classes=5, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, classes, generator=random) * 2, torch.randint(classes, (count,), generator=random)


# ---- decoupled softmax, soft top-k


def test_decoupled_softmax():
    assert decoupled_softmax(SCORES, TWO).item() == pytest.approx(0.2887, abs=1e-4)
    logits, labels = random_logits()
    assert decoupled_softmax(logits, labels).item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    half = decoupled_softmax(logits, labels, temperature=0.5).item()
    assert half == pytest.approx(F.cross_entropy(2 * logits, labels).item(), rel=1e-6)


def test_labels_of_one_sample_do_not_compete():
    logits = SCORES.clone().requires_grad_()
    decoupled_softmax(logits, TWO).backward()
    assert (logits.grad[0, :2] < 0).all() and (logits.grad[0, 2:] > 0).all()
    alone = decoupled_softmax(SCORES, torch.tensor([[1.0, -1, 0, 0]]))
    higher = decoupled_softmax(SCORES + torch.tensor([0, 5.0, 0, 0]), torch.tensor([[1.0, -1, 0, 0]]))
    assert alone == higher  # an entry below 0 takes no part


@pytest.mark.parametrize("loss", [decoupled_softmax, soft_top_k])
def test_samples_with_no_label_or_all(loss):
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([[0.0] * 4, [1.0] * 4, [0, 1.0, 0, 0]])
    value = loss(logits, labels)
    value.backward()
    assert value.isfinite() and logits.grad.isfinite().all()
    assert (logits.grad[0] == 0).all()
    assert 3 * value.item() == pytest.approx(sum(loss(logits[i : i + 1], labels[i : i + 1]).item() for i in range(3)))


def test_soft_top_k():
    t = shift(SCORES, torch.tensor([[2]]), 2.0)
    assert t.item() == pytest.approx(-0.5, abs=1e-5)
    assert (2 * (SCORES + t)).sigmoid()[0].tolist() == pytest.approx([0.953, 0.731, 0.269, 0.047], abs=1e-3)
    scores = SCORES.clone().requires_grad_()
    value = soft_top_k(scores, TWO, k=2)
    assert value.item() == pytest.approx(0.1809, abs=1e-4)
    (-2 * value).backward()  # the sum over both labels of log p
    assert scores.grad[0].tolist() == pytest.approx([0.036, 0.281, -0.257, -0.059], abs=1e-3)
    assert soft_top_k(SCORES, TWO, k=None).item() == pytest.approx(0.1809, abs=1e-4)


def test_soft_top_k_sums_to_k_and_its_gradient_is_exact():
    logits, _ = random_logits(4, 7)
    for k in (1, 3, 6):
        p = (1.5 * (logits + shift(logits, torch.full((4, 1), k), 1.5))).sigmoid()
        assert p.sum(-1).tolist() == pytest.approx([k] * 4, abs=1e-4)
    labels = (torch.rand(4, 7, generator=torch.Generator().manual_seed(1)) < 0.4).float()
    torch.autograd.gradcheck(
        lambda x: soft_top_k(x, labels, k=3),
        logits.double().requires_grad_(),
        eps=1e-2,
        atol=1e-3,
        rtol=1e-2,
    )
    assert soft_top_k(SCORES, TWO, k=9).item() == pytest.approx(0, abs=1e-4)


def test_multi_hot_labels_must_fit():
    with pytest.raises(FuseError, match=r"labels have shape \[1, 3\], the logits \[1, 4\]"):
        decoupled_softmax(SCORES, torch.ones(1, 3))


# ---- any_loss


def binary(probabilities):
    p = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([torch.zeros_like(p), (p / (1 - p)).log()], -1).float()


def test_any_loss():
    logits, labels = binary([0.9, 0.6, 0.4, 0.2]), torch.tensor([1, 0, 1, 0])
    a = (73 * (torch.tensor([0.9, 0.6, 0.4, 0.2]) - 0.5)).sigmoid()
    assert a.tolist() == pytest.approx([1, 0.9993, 0.0007, 0], abs=1e-4)
    assert any_loss(logits, labels).item() == pytest.approx(0.4997, abs=1e-4)
    assert any_loss(logits, labels, metric="balanced_accuracy").item() == pytest.approx(1 - 0.5003, abs=1e-4)
    softer = any_loss(logits, labels, 0.0).item()
    a10 = (10 * (torch.tensor([0.9, 0.6, 0.4, 0.2]) - 0.5)).sigmoid()
    assert softer == pytest.approx(1 - 2 * (a10[0] + a10[2]).item() / (2 + a10.sum().item()), abs=1e-5)
    assert any_loss(logits, labels, 0.25).item() == pytest.approx(
        any_loss(logits, labels, first_amplification=41.5, amplification=41.5).item()
    )


def test_any_loss_becomes_the_metric_itself():
    random = np.random.default_rng(0)
    p, labels = random.uniform(0.01, 0.99, 200), random.integers(0, 2, 200)
    predicted = (p > 0.5).astype(int)
    sharp = {"amplification": 1e5, "anneal_until": 0.0}
    logits, y = binary(p.tolist()), torch.tensor(labels)
    recall, specificity = predicted[labels == 1].mean(), 1 - predicted[labels == 0].mean()
    expected = {
        "f_beta": f1_score(labels, predicted),
        "balanced_accuracy": balanced_accuracy_score(labels, predicted),
        "accuracy": (labels == predicted).mean(),
        "geometric_mean": math.sqrt(recall * specificity),
    }
    for metric, value in expected.items():
        assert any_loss(logits, y, metric=metric, **sharp).item() == pytest.approx(1 - value, abs=2e-4), metric
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert any_loss(logits[order], y[order]).item() == pytest.approx(any_loss(logits, y).item(), rel=1e-5)


def test_any_loss_leaves_out_classes_that_the_batch_lacks():
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([[1.0, 0, 1]] * 3 + [[0, 0, 1.0]] * 3)
    value = any_loss(logits, labels)
    value.backward()
    assert (logits.grad[:, 1:] == 0).all() and logits.grad[:, 0].abs().sum() > 0
    one_class = any_loss(logits, torch.zeros(6, dtype=torch.long)[:6] + 1)
    assert one_class.item() == 0
    one_class.backward()
    with pytest.raises(FuseError, match="Give it two classes"):
        any_loss(logits[:, :1], torch.zeros(6, dtype=torch.long))


def test_counts_of_whole_numbers_are_the_usual_metric():
    sharp = torch.tensor([[1.0], [1], [0], [0]])
    labels = torch.tensor([[1.0], [0], [1], [0]])
    assert soft_metric(sharp, labels, "f_beta", 2.0).item() == pytest.approx(0.5)
    assert soft_metric(sharp, labels, "geometric_mean").item() == pytest.approx(0.5, abs=1e-6)


# ---- spherical z


def test_spherical_z():
    labels = torch.tensor([0])
    assert spherical_z(SCORES, labels).item() == pytest.approx(0.2322, abs=1e-4)
    assert spherical_z(3 * SCORES + 7, labels).item() == pytest.approx(0.2322, abs=1e-4)
    assert spherical_z(SCORES, labels, a=2.0, b=1.0).item() == pytest.approx(
        math.log1p(math.exp(2 * (1 - 1.34164))) / 2, abs=1e-4
    )
    equal = torch.ones(1, 4, requires_grad=True)
    value = spherical_z(equal, labels)
    value.backward()
    assert value.item() == pytest.approx(math.log(2)) and equal.grad.isfinite().all()


# ---- decoupled mixup


def test_decoupled_mixup():
    logits = torch.tensor([[2.0, 1, 0]])
    one = {"labels_N": torch.tensor([0]), "partner_labels_N": torch.tensor([1]), "shares_N": torch.tensor([0.7])}
    assert decoupled_mixup(logits, **one, eta=0.0).item() == pytest.approx(0.7076, abs=1e-4)
    assert decoupled_mixup(logits, **one).item() == pytest.approx(0.7259, abs=1e-4)
    assert decoupled_mixup(logits, **one).item() == pytest.approx(
        0.7076 + 0.1 * (0.7 * 0.1269 + 0.3 * 0.3133), abs=1e-4
    )
    # The reference swaps the weights when a > b.
    turned = decoupled_mixup(logits, torch.tensor([1]), torch.tensor([0]), torch.tensor([0.3]))
    assert turned.item() == pytest.approx(0.7259, abs=1e-4)


def test_decoupled_mixup_of_two_or_equal_classes():
    logits, labels = random_logits(6, 2)
    shares = torch.linspace(0.1, 0.9, 6)
    partners = 1 - labels
    plain = decoupled_mixup(logits, labels, partners, shares, eta=0.0)
    assert decoupled_mixup(logits, labels, partners, shares, eta=3.0).item() == pytest.approx(plain.item())
    same = decoupled_mixup(logits, labels, labels, shares, eta=3.0)
    assert same.item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)


def test_the_other_label_does_not_matter_to_a_decoupled_term():
    logits = torch.tensor([[2.0, 1, 0, 0.5]])
    raised = logits + torch.tensor([0, 3.0, 0, 0])
    given = {"labels_N": torch.tensor([0]), "partner_labels_N": torch.tensor([1]), "shares_N": torch.tensor([1.0])}
    with_, without = decoupled_mixup(logits, **given, eta=1.0), decoupled_mixup(logits, **given, eta=0.0)
    with_raised = decoupled_mixup(raised, **given, eta=1.0) - decoupled_mixup(raised, **given, eta=0.0)
    assert (with_ - without).item() == pytest.approx(with_raised.item(), abs=1e-6)


# ---- nested dropout


def test_widths_of_nested_dropout():
    expected = [0.612, 0.289, 0.083, 0.014, 0.0015, 0.0001]
    assert width_probabilities(6, sigma=2.0).tolist() == pytest.approx(expected, abs=1e-3)
    drawn = [drawn_width(6, sigma=2.0, mu=0.0, seed=0, step=step) for step in range(2000)]
    assert drawn == [drawn_width(6, sigma=2.0, mu=0.0, seed=0, step=step) for step in range(2000)]
    shares = [drawn.count(k) / 2000 for k in range(1, 4)]
    assert shares == pytest.approx(expected[:3], abs=0.04)


def test_nested_dropout_is_cross_entropy_of_cut_features():
    torch.manual_seed(0)
    head, features, labels = torch.nn.Linear(5, 3), torch.randn(8, 5), torch.randint(3, (8,))
    k = drawn_width(5, sigma=3.0, mu=0.0, seed=0, step=7)
    cut = features * (torch.arange(5) < k)
    value = nested_dropout(features, labels, head.weight, head.bias, 7, sigma=3.0)
    assert value.item() == pytest.approx(F.cross_entropy(head(cut), labels).item(), rel=1e-6)
    whole = nested_dropout(features, labels, head.weight, head.bias, 0, sigma=0.01, mu=5.0)
    assert whole.item() == pytest.approx(F.cross_entropy(head(features), labels).item(), rel=1e-6)
    accuracies = accuracy_by_width(features, labels, head.weight, head.bias)
    assert accuracies[k - 1].item() == (head(cut).argmax(-1) == labels).float().mean().item()
    before = head(cut)
    keep_first(head, k)
    assert torch.allclose(head(features), before, atol=1e-6)


# ---- replay, smooth adversarial


def test_replay_is_cross_entropy():
    logits, labels = random_logits()
    assert replay(logits, labels).item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)


def test_smooth_adversarial_finds_what_moves_the_margins_most():
    """For a linear model the farthest point of the ball is known: the first singular vector of the margins' map."""
    torch.manual_seed(0)
    weight, x, labels = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])

    def value(**options):
        return smooth_adversarial(x @ weight.T, labels, lambda move: move(x) @ weight.T, radius=0.1, **options)

    plain = comp_sum(x @ weight.T, labels, tau=1.0)
    assert value(nu=0.0).item() == pytest.approx(plain.item(), rel=1e-6)
    farthest = [0.1 * torch.linalg.matrix_norm(weight[y] - weight, ord=2).item() for y in labels.tolist()]
    found = value(steps=40).item() - plain.item()
    assert found == pytest.approx(sum(farthest) / 5, rel=1e-3)
    assert value(steps=1).item() - plain.item() <= found
    scaled = value(nu=0.0, rho=2.0).item()
    assert scaled == pytest.approx(comp_sum(x @ weight.T / 2, labels, tau=1.0).item())


def test_both_ends_of_the_adversarial_distance_learn():
    weight, x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).requires_grad_(), torch.ones(2, 4)
    labels = torch.tensor([0, 1])
    loss = smooth_adversarial(x @ weight.T, labels, lambda move: move(x) @ weight.T, nu=1.0)
    (gradient,) = torch.autograd.grad(loss, weight)
    (alone,) = torch.autograd.grad(comp_sum(x @ weight.T, labels, tau=1.0), weight)
    assert gradient.isfinite().all() and (gradient - alone).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "loss",
    [
        decoupled_softmax, soft_top_k, spherical_z, replay, any_loss,
        lambda x, y: decoupled_mixup(x, y, y, x[:, 0]),
        lambda x, y: nested_dropout(x, y, torch.ones(3, 3)),
    ],
    ids=["decoupled_softmax", "soft_top_k", "spherical_z", "replay", "any_loss", "decoupled_mixup", "nested_dropout"],
)  # fmt: skip
def test_nothing_selected_gives_0_with_gradient(loss, dtype):
    logits = torch.zeros(4, 3, dtype=dtype, requires_grad=True)
    value = loss(logits[:0], torch.zeros(0, dtype=torch.long))
    value.backward()
    assert value.item() == 0 and value.dtype == torch.float32
    assert (logits.grad == 0).all()
