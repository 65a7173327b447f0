"""Losses on features: the spec's numbers, identities, single samples, and old models."""

import math

import pytest
import torch
import torch.nn.functional as F
from training_cases import bert

from hf_fuse.diagnostics.similarities import similarity_statistics
from hf_fuse.errors import FuseError
from hf_fuse.losses.barlow_twins import barlow_twins, correlation, redundancy
from hf_fuse.losses.bct import bct
from hf_fuse.losses.hoc import hoc
from hf_fuse.losses.info_nce import info_nce
from hf_fuse.losses.mann_whitney import mann_whitney, pairwise
from hf_fuse.losses.mixed_barlow import mixed_barlow
from hf_fuse.losses.oca import oca
from hf_fuse.losses.probe_regression import probe_regression, running_sums
from hf_fuse.losses.sup_con import sup_con, supervised_contrast


def rows(count=6, size=4, seed=0):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def with_cosines(scores):
    """Unit rows x, y with the cosines x_i . y_j = scores_ij, for small scores."""
    scores = torch.tensor(scores, dtype=torch.float64)
    count = len(scores)
    gram = torch.eye(2 * count, dtype=torch.float64)
    gram[:count, count:], gram[count:, :count] = scores, scores.T
    values, vectors = torch.linalg.eigh(gram)
    assert values.min() > -1e-9
    points = vectors * values.clamp(min=0).sqrt()
    return points[:count], points[count:]


# ---- Mann-Whitney, InfoNCE


def test_mann_whitney():
    s = torch.tensor([[0.9, 0.2], [0.4, 0.5]])
    positives, negatives = s.diagonal(), torch.stack([s[0, 1], s[1, 0]])
    assert pairwise(positives, negatives, 1.0).item() == pytest.approx(0.519, abs=1e-3)
    assert pairwise(positives, negatives, 0.1).item() == pytest.approx(0.0924, abs=1e-4)
    raised = torch.tensor([[0.9, 0.2], [1.0, 1.1]])
    moved = pairwise(raised.diagonal(), torch.stack([raised[0, 1], raised[1, 0]]), 0.1)
    assert moved.item() == pytest.approx(0.4069, abs=1e-4)
    for scores in (s, raised):
        expected = F.cross_entropy(scores / 0.1, torch.arange(2)).item()
        assert expected == pytest.approx(0.1571, abs=1e-4)


def test_losses_of_features_are_those_of_their_cosines():
    scores = [[0.5, 0.2, -0.1], [0.1, 0.4, 0.2], [0.0, 0.3, 0.6]]
    first, second = with_cosines(scores)
    s = torch.tensor(scores)
    negatives = s[~torch.eye(3, dtype=torch.bool)]
    value = mann_whitney(3 * first, second, temperature=0.2)
    assert value.item() == pytest.approx(pairwise(s.diagonal(), negatives, 0.2).item(), rel=1e-4)
    value = info_nce(first, 2 * second, temperature=0.2)
    assert value.item() == pytest.approx(F.cross_entropy(s / 0.2, torch.arange(3)).item(), rel=1e-4)
    both = (F.cross_entropy(s / 0.2, torch.arange(3)) + F.cross_entropy(s.T / 0.2, torch.arange(3))) / 2
    assert info_nce(first, second, temperature=0.2, symmetric=True).item() == pytest.approx(both.item(), rel=1e-4)


@pytest.mark.parametrize(("t", "r", "loss"), [(0.07, [0.997, 0.003, 0], 0.0137), (0.2, [0.867, 0.117, 0.016], 0.229),
                                              (1.0, [0.472, 0.316, 0.212], 0.944)])  # fmt: skip
def test_temperature_concentrates_on_the_hardest_negative(t, r, loss):
    s = torch.tensor([0.8, 0.5, 0.1, -0.3]).double()
    points = torch.stack([s, (1 - s.square()).sqrt()], -1)
    query = torch.tensor([[1.0, 0]], dtype=torch.float64)
    value = info_nce(query, points, temperature=t)
    assert value.item() == pytest.approx(loss, abs=2e-3)
    second = points.float().requires_grad_()
    assert similarity_statistics(query.float(), points.float(), temperature=t)["hardness_entropy"].item() == (
        pytest.approx(-sum(x * math.log(x) for x in r if x > 0), abs=2e-2)
    )
    assert (torch.softmax(s[1:] / t, 0)).tolist() == pytest.approx(r, abs=1e-3)
    info_nce(query.float(), second, temperature=t, hardest=1).backward()
    assert (second.grad[2:] == 0).all() and second.grad[1].abs().sum() > 0


def test_groups_are_no_negatives_and_further_rows_are():
    first, second = rows(4), rows(4, seed=1)
    ids = torch.tensor([0, 0, 1, 2])
    s = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T / 0.1
    allowed = s.masked_fill((ids[:, None] == ids) & ~torch.eye(4, dtype=torch.bool), -math.inf)
    value = info_nce(first, second, ids, temperature=0.1)
    assert value.item() == pytest.approx(F.cross_entropy(allowed, torch.arange(4)).item(), rel=1e-5)
    kept = (ids[:, None] != ids) & ~torch.eye(4, dtype=torch.bool)
    value = mann_whitney(first, second, ids, temperature=0.1)
    assert value.item() == pytest.approx(pairwise(s.diagonal(), s[kept], 1.0).item(), rel=1e-4)
    hard = rows(3, seed=2)
    more = torch.cat([s, F.normalize(first, dim=-1) @ F.normalize(hard, dim=-1).T / 0.1], 1)
    value = info_nce(first, torch.cat([second, hard]), temperature=0.1)
    assert value.item() == pytest.approx(F.cross_entropy(more, torch.arange(4)).item(), rel=1e-5)


def test_pairs_in_parts_are_the_same(monkeypatch):
    import sys

    positives, negatives = rows(7, 1)[:, 0].requires_grad_(), rows(9, 1, seed=1)[:, 0].requires_grad_()
    whole = pairwise(positives, negatives, 0.5)
    gradients = torch.autograd.grad(whole, (positives, negatives))
    monkeypatch.setattr(sys.modules["hf_fuse.losses.mann_whitney"], "PAIRS_AT_A_TIME", 20)
    parts = pairwise(positives, negatives, 0.5)
    assert parts.item() == pytest.approx(whole.item())
    for one, other in zip(torch.autograd.grad(parts, (positives, negatives)), gradients):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("loss", [mann_whitney, info_nce, lambda a, b: barlow_twins()(a, b)], ids=["mw", "nce", "bt"])
def test_a_sample_alone_gives_0_with_gradient(loss):
    first, second = rows(1).requires_grad_(), rows(1, seed=1).requires_grad_()
    value = loss(first, second)
    value.backward()
    assert value.item() == 0 and first.grad.isfinite().all()


def test_similarity_statistics():
    first = torch.eye(4)
    found = similarity_statistics(first, first, labels_N=torch.tensor([0, 0, 1, 1]), temperature=0.1)
    assert found["positive_cosine"] == pytest.approx(1)
    assert found["uniformity"].item() == pytest.approx(-4.0)  # all distances are 2
    assert found["tolerance"] == pytest.approx(0)
    assert found["hardness_entropy"].item() == pytest.approx(math.log(3), rel=1e-5)


# ---- SupCon, Barlow Twins


def test_sup_con():
    z = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    labels = torch.tensor([0, 0, 1, 1])
    expected = math.log(1 + 2 * math.exp(-10))
    assert sup_con(temperature=0.1)(z, labels).item() == pytest.approx(expected, abs=1e-6)
    near = F.normalize(torch.tensor([[1.0, 0], [0.98, 0.2], [0, 1], [0.2, 0.98]]), dim=-1)
    order = torch.tensor([2, 0, 3, 1])
    assert sup_con()(near[order], labels[order]).item() == pytest.approx(sup_con()(near, labels).item(), rel=1e-5)


def test_sup_con_of_instances_is_nt_xent_and_skips_lonely_samples():
    z = F.normalize(rows(6), dim=-1)
    ids = torch.tensor([0, 1, 2, 0, 1, 2])
    scores = (z @ z.T / 0.5).fill_diagonal_(-math.inf)
    nt_xent = F.cross_entropy(scores, torch.tensor([3, 4, 5, 0, 1, 2]))
    assert supervised_contrast(z, ids, 0.5).item() == pytest.approx(nt_xent.item(), rel=1e-5)
    one_alone = torch.tensor([0, 0, 1, 2, 3, 4])
    value = supervised_contrast(z, one_alone, 0.5)
    assert value.item() == pytest.approx(
        (-scores[:2].log_softmax(-1)[0, 1] - scores.log_softmax(-1)[1, 0]).item() / 2, rel=1e-5
    )
    lonely = z.clone().requires_grad_()
    nothing = supervised_contrast(lonely, torch.arange(6), 0.5)
    nothing.backward()
    assert nothing.item() == 0 and (lonely.grad == 0).all()


def test_barlow_twins():
    design = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    assert barlow_twins()(design, design).item() == pytest.approx(0, abs=1e-8)
    double = torch.stack([design[:, 0], design[:, 0]], -1)
    assert redundancy(correlation(double, double), 1.0).item() == pytest.approx(2, abs=1e-4)
    assert barlow_twins()(double, double).item() == pytest.approx(0.0102, abs=1e-5)
    # Biased deviations: with those over B - 1 this would be 0.1875.
    z = torch.linalg.qr(rows(4, 3))[0]
    assert (1 - correlation(z, z).diagonal()).abs().max() < 1e-3
    assert barlow_twins()(5 * z + 1, z).item() == pytest.approx(barlow_twins()(z, z).item(), abs=1e-3)


def test_mixed_barlow():
    x, second, weight = rows(8), rows(8, seed=1), rows(4, 4, seed=2)
    loss = mixed_barlow(scale=5.0)
    loss.prepare(None, None)
    torch.manual_seed(5)
    value = loss(x @ weight, second, lambda move: (move(x) @ weight).tanh()).item()
    torch.manual_seed(5)
    partners, a = torch.randperm(8), torch.rand(()).item()
    z, mixed = x @ weight, ((a * x + (1 - a) * x[partners]) @ weight).tanh()

    def c(one, other):
        one, other = ((v - v.mean(0)) / v.std(0, correction=0) for v in (one, other))
        return one.T @ other / 8

    expected = (1 - c(z, second).diag()).square().sum() + 0.0051 * (
        c(z, second) - c(z, second).diag().diag()
    ).norm() ** 2
    for view in (z, second):
        target = a * c(z, view) + (1 - a) * c(z[partners], view)
        expected = expected + 5 * 0.0051 * (c(mixed, view) - target).square().sum()
    assert value == pytest.approx(expected.item(), rel=1e-3)
    alone = loss(x[:1], second[:1], lambda move: move(x[:1]))
    assert alone.item() == 0


# ---- backward compatibility


def test_bct_is_the_old_classifier_on_new_features():
    torch.manual_seed(0)
    features, labels, old = rows(6).requires_grad_(), torch.tensor([0, 1, 2, 0, 1, 3]), torch.nn.Linear(4, 3)
    value = bct(features, labels, old.weight.detach(), old.bias.detach())
    known = F.cross_entropy(old(features[:5]), labels[:5], reduction="sum") / 6
    assert value.item() == pytest.approx(known.item(), rel=1e-6)
    value.backward()
    assert (features.grad[5] == 0).all() and features.grad[0].abs().sum() > 0
    nothing = bct(features, torch.full((6,), 7), old.weight.detach())
    nothing.backward()
    assert nothing.item() == 0
    with pytest.raises(FuseError, match="features have 4 numbers, the old classifier takes 5"):
        bct(features, labels, torch.zeros(3, 5))


def test_oca_compares_the_first_numbers_with_old_means():
    means = F.normalize(rows(3, 2, seed=3), dim=-1)
    features = torch.cat([means[[0, 1, 2, 0]] * 3, rows(4, 2)], -1).requires_grad_()
    labels = torch.tensor([0, 1, 2, 0])
    expected = 10 * F.cross_entropy(means[labels] @ means.T, labels)
    assert oca(features, labels, means).item() == pytest.approx(expected.item(), rel=1e-5)
    turned = oca(features, labels, -means)
    assert turned.item() == pytest.approx(10 + 10 * F.cross_entropy(-means[labels] @ means.T, labels).item(), rel=1e-5)
    turned.backward()
    assert (features.grad[:, 2:] == 0).all()
    absent = means.clone()
    absent[2] = math.nan
    value = oca(features, labels, absent)
    others = 10 * F.cross_entropy((means[labels] @ means.T)[[0, 1, 3], :2], labels[[0, 1, 3]], reduction="sum") / 4
    assert value.item() == pytest.approx(others.item(), rel=1e-5)
    with pytest.raises(FuseError, match="fewer than the old model's 5"):
        oca(features, labels, torch.zeros(3, 5))


def test_an_orthogonal_layer_before_a_linear_classifier_is_none():
    """Why oca has no layer of its own: gradient descent on (W, O) with W O = V does to V what it does without O."""
    torch.manual_seed(0)
    z, turn = rows(5), torch.linalg.qr(torch.randn(4, 4))[0]
    head = torch.randn(3, 4)
    assert torch.allclose((z @ turn.T) @ head.T, z @ (head @ turn).T, atol=1e-5)
    assert torch.allclose((z @ turn.T).norm(dim=-1), z.norm(dim=-1), atol=1e-5)


def test_hoc_masks_the_other_samples_of_a_class():
    new, old = rows(4), rows(4, seed=1)
    labels = torch.tensor([0, 0, 1, 2])
    scores = 10 * F.normalize(old, dim=-1) @ F.normalize(new, dim=-1).T
    scores = scores.masked_fill((labels[:, None] == labels) & ~torch.eye(4, dtype=torch.bool), -math.inf)
    assert hoc(new, old, labels).item() == pytest.approx(F.cross_entropy(scores, torch.arange(4)).item(), rel=1e-5)
    one_class = hoc(new, old, torch.zeros(4, dtype=torch.long))
    assert one_class.item() == pytest.approx(0, abs=1e-6)
    # Bounded below, unlike with similarities of 0 in the denominator.
    assert hoc(old, old, labels).item() >= 0
    with pytest.raises(FuseError, match="both models need the same width"):
        hoc(new, rows(4, 5), labels)


# ---- probe


def test_running_sums_give_the_product():
    first, second = [7, 3, 9, 4], [8, 8, 2]  # 4937 * 288
    sums = running_sums(first, second)
    product = 4937 * 288
    assert [c % 10 for c in sums] == [int(digit) for digit in reversed(f"{product:07d}")]
    assert sums[1] == 7 * 8 + 3 * 8 + sums[0] // 10
    assert sums[0] == 56


def test_a_probe_fits_a_linear_target_alone():
    torch.manual_seed(0)
    states, direction = torch.randn(8, 5, 16), torch.randn(16)
    targets = 100 + 30 * (states @ direction)
    targets[:, 0] = math.nan
    loss = probe_regression(layer=0, target_mean=100.0, target_std=30.0)
    loss.prepare(bert(), None)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        value = loss((states,), targets)
        value.backward()
        optimizer.step()
    assert value.item() < 1e-3
    assert torch.allclose(loss.probe.weight[0], direction, atol=0.05)
    states.requires_grad_()
    nothing = loss((states,), torch.full((8, 5), math.nan))
    nothing.backward()
    assert nothing.item() == 0 and (states.grad == 0).all()
    with pytest.raises(FuseError, match="Pad them like input_ids, with NaN"):
        loss((states,), targets[:, :4])
