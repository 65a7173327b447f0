"""Losses for narrower uses: the spec's numbers, identities, and batches in which there is nothing to learn."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_cases import bert, vit_mae

from hf_fuse.diagnostics.icnn import icnn
from hf_fuse.errors import FuseError
from hf_fuse.losses.adamixup import adamixup
from hf_fuse.losses.aggregate_responses import aggregate_responses
from hf_fuse.losses.amcl import amcl
from hf_fuse.losses.bias_loss import bias_loss, variances
from hf_fuse.losses.block_rank import attention_mass, block_rank
from hf_fuse.losses.ens_loss import ens_loss, slopes
from hf_fuse.losses.entropy_bonus import entropy_bonus
from hf_fuse.losses.hpm import mining_noise, patches, ranking
from hf_fuse.losses.ignite import ignite
from hf_fuse.losses.isogclr import isogclr
from hf_fuse.losses.ler import ler
from hf_fuse.losses.look import leave_one_out, look
from hf_fuse.losses.m3col import m3col, mixed_targets, soft_recognition
from hf_fuse.losses.metrix import metrix
from hf_fuse.losses.nspt import nspt
from hf_fuse.losses.proto_triplet import proto_triplet, triplets


def rows(count=6, size=4, seed=0):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def of_pairs(margins):
    """Logits of two classes and labels with these margins."""
    labels = torch.arange(len(margins)) % 2
    signed = torch.tensor(margins) * (2 * labels - 1)
    return torch.stack([-signed / 2, signed / 2], -1), labels


# ---- EnsLoss


def test_ens_loss_deals_slopes_by_rank():
    margins = torch.tensor([-1.0, 0, 0.5, 2])
    # e^n, of which 0.4 is cut off.
    g = slopes(margins, np.array([-1.0, 0.4, -2.0, -0.2]), 0.0)
    assert g.tolist() == pytest.approx([-1, -0.819, -0.368, -0.068], abs=1e-3)
    assert (g * margins).mean().item() == pytest.approx(0.170, abs=1e-3)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(slopes(margins[order], np.array([-1.0, 0.4, -2.0, -0.2]), 0.0), g[order])
    for power in (-1.0, -0.3, 0.5, 1.0):
        many = torch.linspace(-3, 3, 50)
        g = slopes(many, np.random.default_rng(0).standard_normal(50), power)
        assert (g.diff() >= 0).all() and (g < 0).all() and g.min() >= -1 - 1e-5


def test_ens_loss_has_the_gradient_of_its_slopes():
    logits, labels = of_pairs([-1.0, 0.2, 0.5, 2.0, -0.3, 1.5])
    logits.requires_grad_()
    value = ens_loss(logits, labels, step=3)
    (gradient,) = torch.autograd.grad(value, logits)
    by_margin = gradient[torch.arange(6), labels] * 6
    order = torch.tensor([-1.0, 0.2, 0.5, 2.0, -0.3, 1.5]).argsort()
    assert (by_margin[order].diff() >= 0).all() and (by_margin < 0).all()
    assert torch.allclose(gradient.sum(-1), torch.zeros(6), atol=1e-7)
    assert ens_loss(logits, labels, step=3).item() == value.item() != ens_loss(logits, labels, step=4).item()
    # Another family every ten epochs.
    families = [ens_loss(logits, labels, epoch=epoch).item() for epoch in (0, 9.9, 10)]
    assert families[0] == families[1] != families[2]
    assert ens_loss(logits, labels, epoch=0, period=0) == ens_loss(logits, labels, epoch=10, period=0)
    assert ens_loss(logits[:0], labels[:0]).item() == 0
    with pytest.raises(FuseError, match="logits are of 3 classes, expected 2"):
        ens_loss(rows(4, 3), torch.zeros(4, dtype=torch.long))


def test_ens_loss_finds_the_line_between_two_classes():
    labels = torch.arange(200) % 2
    x = rows(200, 2) + 2.0 * torch.stack([labels, -labels], -1)
    layer = nn.Linear(2, 2)
    for step in range(100):
        layer.zero_grad()
        ens_loss(layer(x), labels, step=step, epoch=step / 10).backward()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter -= 0.5 * parameter.grad
    assert (layer(x).argmax(-1) == labels).float().mean() > 0.9  # 0.92 is the best possible


# ---- AMCL, iSogCLR


def prepared(loss, dataset=None):
    torch.manual_seed(0)
    loss.prepare(bert(), dataset)
    return loss


def test_amcl_with_a_constant_temperature_is_info_nce_over_heads():
    loss = prepared(amcl(heads=2, size=8, hidden=4, beta=0.5, preferred=0.5, lowest=0.1, highest=1.9))
    first, second = rows(5, 16), rows(5, 16, seed=1)
    for temperature in loss.temperatures:
        nn.init.zeros_(temperature.out.weight)
        nn.init.zeros_(temperature.out.bias)  # the middle of the range: 1
    scores = sum(
        F.normalize(project(first), dim=-1) @ F.normalize(project(second), dim=-1).T for project in loss.projections
    )
    own = torch.arange(5)
    expected = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2 + 0.5 * 2 * 1.0
    assert loss(first, second).item() == pytest.approx(expected.item(), rel=1e-5)


def test_amcl_learns_a_temperature_per_pair():
    loss = prepared(amcl(heads=1, size=8, hidden=64, preferred=0.3))
    first, second = F.normalize(rows(3, 8), dim=-1), F.normalize(rows(4, 8, seed=1), dim=-1)
    temperature = loss.temperatures[0]
    tau = temperature(first, second)
    assert tau.shape == (3, 4) and len(tau.unique()) == 12
    side_by_side = torch.cat([first[1], second[2]])
    weight = torch.cat([temperature.first.weight, temperature.second.weight], -1)
    raw = temperature.out((weight @ side_by_side + temperature.first.bias).relu())
    assert tau[1, 2].item() == pytest.approx(0.05 + 1.95 * raw.sigmoid().item(), rel=1e-5)
    # The penalty alone leads to the preferred temperature.
    loss.beta = 100.0
    features = rows(5, 16), rows(5, 16, seed=1)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        loss(*features).backward()
        optimizer.step()
    project = loss.projections[0]
    tau = temperature(*(F.normalize(project(rows), dim=-1) for rows in features))
    assert tau.mean().item() == pytest.approx(0.3, abs=0.05)
    alone = loss(features[0][:1], features[1][:1])
    alone.backward()
    assert alone.item() == 0
    with pytest.raises(FuseError, match="preferred is 3.0"):
        amcl(preferred=3.0)


def test_isogclr_temperatures_follow_their_gradient():
    h = torch.tensor([-0.3, -0.7, -1.1], dtype=torch.float64)
    tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    (tau * (h / tau).exp().mean().log() + tau * 0.3).backward()
    assert tau.grad.item() == pytest.approx(-0.3576, abs=1e-4)
    loss = prepared(isogclr(first=0.2, learning_rate=0.1), range(4))
    table = torch.cat([torch.zeros(4, 1), h.float().expand(4, 3)], -1)
    for row in range(1, 4):  # the diagonal doesn't count
        table[row, [0, row]] = table[row, [row, 0]]
    value = loss.of_differences(table, torch.arange(4))
    rows_N3, written = loss.table.read(torch.arange(4))
    slope = 0.9 * -0.3576
    assert written.all()
    assert rows_N3[2].tolist() == pytest.approx(
        [(h / 0.2).exp().mean().log().item(), 0.2 - 0.1 * slope, slope], abs=1e-4
    )
    assert value.item() == pytest.approx((0.2 * (h / 0.2).exp().mean().log() + 0.06).item(), abs=1e-5)


def test_isogclr_has_the_gradient_of_its_objective_at_the_first_visit():
    h = rows(4, 4).requires_grad_()
    off = ~torch.eye(4, dtype=torch.bool)
    expected = (0.1 * (h / 0.1)[off].view(4, 3).logsumexp(-1)).mean()
    (wanted,) = torch.autograd.grad(expected, h)
    loss = prepared(isogclr(), range(9))
    (found,) = torch.autograd.grad(loss.of_differences(h, torch.tensor([7, 2, 0, 5])), h)
    assert torch.allclose(found, wanted, atol=1e-6)
    assert loss.table.written.nonzero().flatten().tolist() == [0, 2, 5, 7]


def test_isogclr_averages_denominators_and_starts_at_the_first_visit():
    loss = prepared(isogclr(gamma=0.8, learning_rate=0.0), range(6))
    first, second = rows(4, 4), rows(4, 4, seed=1)
    off = ~torch.eye(4, dtype=torch.bool)
    loss.of_differences(first, torch.tensor([0, 1, 2, 3]))
    loss.of_differences(second, torch.tensor([4, 1, 2, 3]))
    means = [(h / 0.1).double()[off].view(4, 3).exp().mean(-1) for h in (first, second)]
    s = loss.table.values[:, 0].double().exp()
    assert s[4].item() == pytest.approx(means[1][0].item(), rel=1e-4)
    assert torch.allclose(s[1:4], 0.2 * means[0][1:] + 0.8 * means[1][1:], rtol=1e-4)
    large = prepared(isogclr(first=0.005, lowest=0.005), range(4)).of_differences(2 * off.float(), torch.arange(4))
    assert large.isfinite()
    alone = loss(rows(1), rows(1, seed=1), torch.tensor([5]))
    assert alone.item() == 0 and not loss.table.written[5]
    with pytest.raises(FuseError, match="training set is a stream"):
        prepared(isogclr(), iter([]))


# ---- Metrix, AdaMixUp


def test_metrix_mixes_a_positive_with_a_negative():
    z = F.normalize(rows(6), dim=-1)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    distances = torch.cdist(z, z)
    positive, negative = torch.zeros(6, 6, dtype=torch.bool), labels[:, None] != labels
    positive[[0, 1, 2, 3, 4, 5], [1, 0, 3, 2, 5, 4]] = True
    clean = distances[positive].mean() + (0.5 - distances[negative]).clamp(min=0).mean()
    assert metrix(3 * z, labels, mixed=0.0).item() == pytest.approx(clean.item(), rel=1e-5)
    kinds = set()
    for step in range(6):
        random = np.random.default_rng((0, step))
        share, with_itself = random.beta(2.0, 2.0), random.random() < 0.5
        kinds.add(bool(with_itself))
        order = torch.from_numpy(random.random((6, 6)))
        other = z[(order * negative).argmax(-1)]
        partner = z if with_itself else z[positive.float().argmax(-1)]
        d = (z - F.normalize(share * partner + (1 - share) * other, dim=-1)).norm(dim=-1)
        mixed = (share * d + (1 - share) * (0.5 - d).clamp(min=0)).mean()
        assert metrix(z, labels, step=step).item() == pytest.approx((clean + 0.4 * mixed).item(), rel=1e-4)
    assert kinds == {True, False}


@pytest.mark.parametrize("loss", [metrix, proto_triplet, lambda z, y: nspt(z, z.detach(), y)], ids=["mx", "pt", "ns"])
def test_classes_of_one_sample_teach_nothing(loss):
    z = torch.eye(4).requires_grad_()  # farther from each other than the margin
    nothing = loss(z, torch.arange(4))
    nothing.backward()
    assert nothing.item() == 0 and (z.grad == 0).all()
    one_class = loss(z[:1], torch.zeros(1, dtype=torch.long))
    one_class.backward()
    assert one_class.item() == 0 and z.grad.isfinite().all()


@pytest.mark.parametrize("loss", [metrix, proto_triplet, lambda z, y: nspt(z, z, y)], ids=["mx", "pt", "ns"])
def test_labels_of_tokens_are_refused(loss):
    with pytest.raises(FuseError, match="6 labels for 4 samples: this loss expects one class per sample"):
        loss(rows(4), torch.zeros(6, dtype=torch.long))


def test_adamixup_learns_how_much_to_mix():
    loss, model = prepared(adamixup(hidden=8)), bert()
    x, labels, head = rows(6, 16).requires_grad_(), torch.tensor([0, 1, 2, 0, 1, 2]), model.classifier
    torch.manual_seed(3)
    value = loss(x, labels, lambda move: move(x).tanh(), head.weight, head.bias)
    torch.manual_seed(3)
    partners, u = torch.randperm(6), torch.rand(6)
    a, d, _ = loss.policy(torch.cat([x, x[partners]], -1)).softmax(-1).unbind(-1)
    share = a + u * d
    assert ((share > 0) & (share < 1)).all()
    mixed = (share[:, None] * x + (1 - share[:, None]) * x[partners]).tanh()
    two = [F.cross_entropy(head(mixed), of, reduction="none") for of in (labels, labels[partners])]
    told = F.softplus(-loss.intrusion(x)).mean() + F.softplus(loss.intrusion(mixed)).mean()
    expected = (share * two[0] + (1 - share) * two[1]).mean() + told / 2
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    value.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in loss.parameters())
    with pytest.raises(FuseError, match="needs a label for each sample"):
        loss(x[:4], labels[:4], lambda move: move(x), head.weight)


# ---- BlockRank


def test_block_rank():
    # One head and one asking token, whose attention is the mass itself.
    mass = torch.tensor([0.639, 0.126, 0.235])
    attention = torch.zeros(1, 1, 4, 4)
    attention[0, 0, 3, :3] = mass * 0.5  # the rest is on itself
    attention[0, 0, 3, 3] = 0.5
    documents, asking = torch.tensor([[0, 1, 2, -100]]), torch.tensor([[0, 0, 0, 1]])
    found = attention_mass(attention, documents, asking, 3)
    assert torch.allclose(found[0], mass, atol=1e-6)
    first = block_rank((attention,), documents, asking, torch.tensor([[1, 0, 0]]))
    assert first.item() == pytest.approx(0.00035, abs=1e-5)
    both = block_rank((attention,), documents, asking, torch.tensor([[1, 0, 1]]))
    scores = mass / 0.05
    assert both.item() == pytest.approx((scores.logsumexp(0) - scores[[0, 2]].logsumexp(0)).item(), abs=1e-6)
    absent = block_rank((attention,), documents, asking, torch.tensor([[0, 1, -100]]))
    assert absent.item() == pytest.approx((scores[:2].logsumexp(0) - scores[1]).item(), rel=1e-5)


def test_block_rank_averages_heads_and_asking_tokens_after_normalising():
    attention = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)).softmax(-1)
    documents = torch.tensor([[0, 0, 1, 1, -100, -100], [1, 0, 0, 1, 1, -100]])
    asking = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1]])
    found = attention_mass(attention, documents, asking, 2)
    assert torch.allclose(found.sum(-1), torch.ones(2))
    p = attention[0, :, 4:, :4]
    p = p / p.sum(-1, keepdim=True)
    assert found[0, 0].item() == pytest.approx(p[..., :2].sum(-1).mean().item(), rel=1e-5)


def test_block_rank_without_anything_to_rank_is_0():
    attention = torch.rand(2, 1, 4, 4).requires_grad_()
    documents, asking = torch.tensor([[0, 1, -100, -100]] * 2), torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0]])
    value = block_rank((attention,), documents, asking, torch.tensor([[0, 0], [1, 0]]))
    value.backward()
    assert value.item() == 0 and attention.grad.isfinite().all()
    with pytest.raises(FuseError, match="Pad both columns like input_ids"):
        block_rank((attention,), documents[:, :3], asking, torch.ones(2, 2))
    with pytest.raises(FuseError, match="a token is of document 1, but relevant_documents has only 1"):
        block_rank((attention,), documents, asking, torch.ones(2, 1))


# ---- HPM


def test_hpm_ranks_masked_patches():
    predicted, true = torch.tensor([[0.2, 0.1, 0.9]]), torch.tensor([[1.0, 2, 3]])
    everything = torch.ones(1, 3, dtype=torch.bool)
    assert ranking(predicted, true, everything).item() == pytest.approx(0.506, abs=1e-3)
    two = ranking(predicted, true, torch.tensor([[True, False, True]]))
    assert two.item() == pytest.approx(math.log(1 + math.exp(-0.7)), rel=1e-5)
    assert ranking(predicted, true**2 + 5, everything) == ranking(predicted, true, everything)
    assert ranking(10 * true, true, everything) < ranking(-10 * true, true, everything)
    assert ranking(predicted, torch.ones(1, 3), everything).item() == 0
    assert ranking(predicted, true, ~everything).item() == 0


def test_the_hardest_patches_are_masked():
    predicted, random = rows(5, 16), torch.rand(5, 16)
    noise = mining_noise(predicted, random, 4)
    last = noise.argsort(-1)[:, 4:]  # what ViTMAE masks, of three quarters
    for sample in range(5):
        assert {*predicted[sample].topk(4).indices.tolist()} <= {*last[sample].tolist()}
    assert torch.equal(mining_noise(predicted, random, 0), random)


def test_patches_are_those_of_vit_mae():
    model, pixels = vit_mae(), torch.rand(2, 1, 8, 8)
    assert torch.equal(patches(pixels, 2), model.patchify(pixels))


# ---- entropy bonus, IGNITE


class Line(nn.Module):
    def __init__(self, outputs=3):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs))

    def forward(self, x):
        return self.layers(x)


def test_entropy_bonus_moves_its_anchor_with_the_steps():
    model, x = Line(), rows(6)
    loss = entropy_bonus(divergence=2.0, decay=0.75)
    loss.prepare(model, None)

    def value(step):
        return loss(model(x), torch.zeros(6), lambda move: model(move(x)), step)

    def entropy(logits):
        return torch.distributions.Categorical(logits=logits).entropy().mean().item()

    assert value(0).item() == pytest.approx(-entropy(model(x)), rel=1e-5)  # the anchor is the model
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3)
    anchor = {name: 0.75 * old + 0.25 * (old + 0.3) for name, old in start.items()}
    log_p = model(x).log_softmax(-1)
    log_a = torch.func.functional_call(model, anchor, x).log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_a)).sum(-1).mean().item()
    expected = -entropy(model(x)) + 2 * divergence
    for _ in range(2):  # micro-batches of one step
        assert value(1).item() == pytest.approx(expected, rel=1e-4)
    value(1).backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    log_p = model(x).log_softmax(-1)
    (log_p.exp() * (log_p + 2 * (log_p - log_a.detach()))).sum(-1).mean().backward()
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        assert torch.allclose(gradient, parameter.grad, atol=1e-6)


def test_entropy_bonus_in_parts_and_alone(monkeypatch):
    import sys

    model, x = Line(), rows(7)
    loss = entropy_bonus(divergence=0.0)
    loss.prepare(model, None)
    whole = loss(model(x), torch.zeros(7), None)
    (gradient,) = torch.autograd.grad(whole, model.layers[0].weight)
    monkeypatch.setattr(sys.modules["hf_fuse.losses.entropy_bonus"], "ROWS_AT_A_TIME", 3)
    parts = loss(model(x), torch.zeros(7), None)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-6)
    assert torch.allclose(torch.autograd.grad(parts, model.layers[0].weight)[0], gradient, atol=1e-7)
    assert loss(torch.zeros(2, 4), torch.zeros(2), None).item() == pytest.approx(-math.log(4))
    assert loss(torch.zeros(0, 4), torch.zeros(0), None).item() == 0
    assert not loss.state_dict()
    with pytest.raises(FuseError, match="no parameter of the model is trained"):
        entropy_bonus().prepare(Line().requires_grad_(False), None)


def test_ignite_has_the_gradient_of_the_gradients_length():
    model, x = Line(1).double(), rows(6).double()
    parameters = [*model.parameters()]
    g = torch.autograd.grad(model(x).mean(), parameters, create_graph=True)
    norm = torch.stack([part.square().sum() for part in g]).sum().sqrt()
    wanted = torch.autograd.grad(0.5 * norm, parameters, allow_unused=True)
    loss = ignite(rho=0.5, allowed=0.1, learning_rate=0.2, radius=1e-3)
    loss.prepare(model, None)
    before = [parameter.detach().clone() for parameter in parameters]
    value = loss(model(x), lambda move: model(move(x)))
    assert value.item() == pytest.approx(0.5 * norm.item(), rel=1e-5)
    found = torch.autograd.grad(value, parameters)
    for one, other in zip(found, wanted):
        expected = torch.zeros_like(one) if other is None else other
        assert (one - expected).abs().max() < 2e-3
    assert sum(part.abs().sum() for part in found) > 0.1
    assert all(torch.equal(old, new) for old, new in zip(before, parameters))
    assert loss.multiplier.item() == pytest.approx(1 + 0.2 * (0.5 * norm.item() - 0.1), rel=1e-5)
    assert loss.state_dict().keys() == {"multiplier"}
    loss.allowed = 1e6
    loss(model(x), lambda move: model(move(x)))
    assert loss.multiplier.item() == 0
    assert loss(model(x) * 0, lambda move: model(move(x))).item() == 0


# ---- bias loss, bags


def test_bias_loss_weighs_by_variance():
    labels, logits = torch.tensor([0, 1, 2]), rows(3, 3)
    spread = torch.tensor([0.1, 0.3, 0.5]).sqrt()[:, None, None]
    states = torch.tensor([[1.0], [-1.0]]).expand(2, 4) * spread
    assert variances(states).tolist() == pytest.approx([0.1, 0.3, 0.5])
    weights = torch.tensor([0.700, 0.862, 1.050])
    expected = (weights * F.cross_entropy(logits, labels, reduction="none")).mean()
    assert bias_loss(logits, labels, (states,)).item() == pytest.approx(expected.item(), rel=1e-3)
    flat = bias_loss(logits, labels, (states[:1].expand(3, 2, 4),))
    assert flat.item() == pytest.approx(0.7 * F.cross_entropy(logits, labels).item(), rel=1e-5)
    padded = torch.cat([states, torch.full((3, 3, 4), 99.0)], 1)
    mask = torch.tensor([1, 1, 0, 0, 0]).expand(3, 5)
    assert variances(padded, mask).tolist() == pytest.approx([0.1, 0.3, 0.5])
    ignored = bias_loss(logits, torch.tensor([0, -100, 2]), (states,))
    expected = (weights * F.cross_entropy(logits, labels, reduction="none"))[[0, 2]].mean()
    assert ignored.item() == pytest.approx(expected.item(), rel=1e-3)
    assert bias_loss(logits, torch.full((3,), -100), (states,)).item() == 0


def test_bags():
    f, bag = torch.tensor([[0.2], [0.8], [0.5]]), torch.tensor([7, 7, 7])
    label = torch.full((3,), 0.6)
    for r, expected in ((0.0, 0.01), (1.0, 0.07), (0.3, 0.028)):
        assert aggregate_responses(f, label, bag, instance=r).item() == pytest.approx(expected, abs=1e-6)
    alone = aggregate_responses(f, label, torch.arange(3), instance=0.0)
    assert alone.item() == pytest.approx(F.mse_loss(f[:, 0], label).item())
    # Bags weighed by their sizes: a batch may be split between them.
    two = torch.tensor([0, 0, 0, 1])
    f, label = torch.tensor([[0.2], [0.8], [0.5], [0.9]]), torch.tensor([0.6, 0.6, 0.6, 0.1])
    parts = 0.75 * aggregate_responses(f[:3], label[:3], two[:3]) + 0.25 * aggregate_responses(
        f[3:], label[3:], two[3:]
    )
    order = torch.tensor([3, 1, 0, 2])
    assert aggregate_responses(f[order], label[order], two[order]).item() == pytest.approx(parts.item(), rel=1e-5)
    assert aggregate_responses(f[:0], label[:0], two[:0]).item() == 0


def test_bags_of_classes():
    logits, shares = rows(4, 3), torch.tensor([[0.5, 0.5, 0.0]] * 4)
    p = logits.softmax(-1).mean(0)
    expected = -(0.5 * p[0].log() + 0.5 * p[1].log())
    bag = torch.zeros(4, dtype=torch.long)
    assert aggregate_responses(logits, shares, bag).item() == pytest.approx(expected.item(), rel=1e-5)
    own = F.cross_entropy(logits, shares)
    assert aggregate_responses(logits, shares, bag, instance=1.0).item() == pytest.approx(own.item(), rel=1e-5)
    for labels in (torch.zeros(4, dtype=torch.long), torch.zeros(4, 2), torch.zeros(4)):
        with pytest.raises(FuseError, match="Expected floats: the bag's mean, or its share of each class"):
            aggregate_responses(logits, labels, bag)


# ---- LOOK, prototypes, NSPT


def test_look_is_the_error_of_nearest_neighbours():
    s, own = torch.tensor([[0.9, 0.8, 0.6, 0.5]]) / 0.1, torch.tensor([[True, False, True, False]])
    known = torch.ones(1, 4, dtype=torch.bool)
    assert leave_one_out(s, own, known, 3).item() == pytest.approx(0.3004, abs=1e-4)
    # None of its class is among the two nearest: the third is counted in.
    late = torch.tensor([[False, False, True, True]])
    expected = s[0, :3].logsumexp(0) - s[0, 2]
    assert leave_one_out(s, late, known, 2).item() == pytest.approx(expected.item(), rel=1e-6)
    unknown = torch.tensor([[True, True, False, False]])
    scores = s.clone().requires_grad_()
    nothing = leave_one_out(scores, late, unknown, 2)
    nothing.sum().backward()
    assert nothing.item() == 0 and (scores.grad == 0).all()


def test_look_remembers_features_when_their_step_is_over():
    loss = prepared(look(neighbours=3), range(8))
    first, labels, ids = rows(4, 16).requires_grad_(), torch.tensor([0, 1, 0, 1]), torch.tensor([5, 1, 0, 2])
    assert loss(first[:2], labels[:2], ids[:2], 0).item() == 0
    assert loss(first[2:], labels[2:], ids[2:], 0).item() == 0  # another micro-batch of the step
    assert not loss.bank.written.any()
    second = rows(2, 16, seed=1).requires_grad_()
    value = loss(second, torch.tensor([0, 1]), torch.tensor([5, 7]), 1)
    z, bank = F.normalize(second, dim=-1), F.normalize(first.detach(), dim=-1)
    scores = z @ bank.T / 0.1
    scores[0, 0] = -math.inf  # itself
    own = torch.tensor([[False, False, True, False], [False, True, False, True]])
    expected = []
    for score, of_class in zip(scores, own):
        near = score.topk(3).indices
        near = near if of_class[near].any() else torch.cat([near, score.masked_fill(~of_class, -9e9).argmax()[None]])
        expected.append(score[near].logsumexp(0) - score[near][of_class[near]].logsumexp(0))
    assert value.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)
    state = loss.state_dict()  # of a checkpoint: with this step's
    assert state["bank.written"].nonzero().flatten().tolist() == [0, 1, 2, 5, 7]
    assert torch.allclose(state["bank.values"][5], z[0].detach())


def test_proto_triplet():
    own, other = torch.tensor([0.141, 0.566]), torch.tensor([0.849, 1.273])
    distances = torch.stack([torch.stack([own[0], other[0]]), torch.stack([other[1], own[1]])])
    assert triplets(distances, torch.tensor([0, 1]), 0.5).tolist() == [0, 0]
    assert triplets(distances, torch.tensor([0, 1]), 0.8).tolist() == pytest.approx([0.092, 0.093], abs=1e-3)
    x = torch.tensor([[0.0, 0], [2, 0], [3, 0], [5, 0], [9, 9]])
    labels = torch.tensor([4, 4, 1, 1, 8])
    # Means 1 and 4; that of the last class is far away, and alone has no own mean.
    expected = [2 - 4 + 3, 2 - 2 + 3, 2 - 2 + 3, 2 - 4 + 3]
    value = proto_triplet(x, labels, margin=3.0)
    assert value.item() == pytest.approx(sum(expected) / 4, rel=1e-4)


def test_nspt():
    new, old, labels = F.normalize(rows(4), dim=-1), F.normalize(rows(4, seed=1), dim=-1), torch.tensor([0, 0, 1, 1])
    rehearsed = torch.tensor([1, 0, 1, 1])
    s = new @ new.T / 0.1
    pairs = {0: 1, 2: 3, 3: 2}
    expected = [torch.cat([s[i, :i], s[i, i + 1 :]]).logsumexp(0) - new[i] @ old[p] / 0.1 for i, p in pairs.items()]
    value = nspt(new, 2 * old, labels, rehearsed)
    assert value.item() == pytest.approx((sum(expected) / 3).item(), rel=1e-5)
    assert nspt(new, new, labels).item() == pytest.approx(_sup_con(new, labels), rel=1e-5)
    assert nspt(new, old, labels, torch.zeros(4)).item() == 0
    with pytest.raises(FuseError, match="both models need the same width"):
        nspt(new, rows(4, 5), labels)
    unlabelled = torch.tensor([-100, *labels.tolist()])
    assert nspt(new, old, labels, torch.tensor([1, *rehearsed.tolist()]), unlabelled) == nspt(
        new, old, labels, rehearsed
    )


def _sup_con(z, labels):
    from hf_fuse.losses.sup_con import supervised_contrast

    return supervised_contrast(z, labels, 0.1).item()


# ---- LER, M3CoL


def test_ler_keeps_confident_predictions_of_old_classes():
    loss = prepared(ler(old_classes=2, threshold=0.7, strength=0.4))
    logits = torch.tensor([[0.3, 0.0, 0.0], [0.0, 0.3, 0.0], [0.0, 0.0, 0.3], [0.01, 0.0, 0.0]], requires_grad=True)
    labels = torch.tensor([-100, 1, -100, -100])  # the second is labelled, the third new, the last undecided
    value = loss(logits, labels, 0)
    q = (logits[0].detach() / 0.05).softmax(-1)
    expected = -(q * (logits[0] / 0.05).log_softmax(-1)).sum() / 4  # the prior is still even
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    value.backward()
    assert (logits.grad[1:] == 0).all()
    assert torch.allclose(logits.grad[0], torch.zeros(3), atol=1e-6)  # already at its target


def test_ler_averages_predictions_once_per_step():
    def after(parts):
        loss = prepared(ler(decay=0.9))
        for part in parts:
            loss(part, torch.full((len(part),), -100), 0)
        assert torch.allclose(loss.prior_C, torch.full((3,), 1 / 3))
        return loss

    logits = rows(6, 3)
    whole, split = after([logits]), after(logits.split([1, 2, 3]))
    expected = 0.9 / 3 + 0.1 * logits.softmax(-1).mean(0)
    for loss in (whole, split):
        value = loss(logits, torch.full((6,), -100), 1)
        assert torch.allclose(loss.prior_C, expected, atol=1e-6)
    q, kept = (logits / 0.05).softmax(-1), (logits / 0.1).softmax(-1).amax(-1) >= 0.7
    loss_N = -(q * (logits / 0.05 + 0.4 * expected.log()).log_softmax(-1)).sum(-1)
    assert value.item() == pytest.approx((loss_N * kept).mean().item(), rel=1e-4)
    assert {*whole.state_dict()} == {"prior_C", "present", "step"}
    assert loss(rows(0, 3), torch.zeros(0, dtype=torch.long), 1).item() == 0


def test_m3col_recognises_both_partners():
    scores = torch.tensor([[1.0, 0.2], [0.1, 0.9]]) / 0.1
    targets = mixed_targets(torch.tensor([1, 0]), torch.tensor([0.8, 0.6]))
    assert targets.tolist() == [[pytest.approx(0.8), pytest.approx(0.2)], [pytest.approx(0.4), pytest.approx(0.6)]]
    assert soft_recognition(scores, targets).item() == pytest.approx(2.400, abs=1e-3)
    itself = mixed_targets(torch.tensor([0, 2, 1]), torch.tensor([0.3, 0.9, 0.5]))
    assert torch.allclose(itself.sum(-1), torch.ones(3)) and itself[0, 0].item() == pytest.approx(1)


def test_m3col_mixes_one_modality_at_a_time():
    images, texts = F.normalize(rows(5), dim=-1), F.normalize(rows(5, seed=1), dim=-1)
    own = torch.arange(5)
    plain = (F.cross_entropy(images @ texts.T / 0.1, own) + F.cross_entropy(texts @ images.T / 0.1, own)) / 2
    assert m3col(2 * images, texts, mixed=0.0).item() == pytest.approx(plain.item(), rel=1e-5)
    random, expected = np.random.default_rng((0, 2)), 0
    for x, other in ((images, texts), (texts, images)):
        partners = torch.from_numpy(random.permutation(5))
        b = torch.from_numpy(random.beta(0.15, 0.15, 5)).float()
        b[torch.from_numpy(random.random(5)) >= 0.5] = 1
        scores = F.normalize(b[:, None] * x + (1 - b[:, None]) * x[partners], dim=-1) @ other.T / 0.1
        log_p = scores.log_softmax(-1)
        expected = expected - (b * log_p[own, own] + (1 - b) * log_p[own, partners]).mean() / 2
    assert m3col(images, texts, step=2).item() == pytest.approx(expected.item(), rel=1e-5)
    soft = m3col(images, texts, progress=0.5, mix_until=0.5)
    cross = F.cross_entropy(images @ texts.T / 0.1, (texts @ texts.T / 0.125).softmax(-1))
    cross = cross + F.cross_entropy(texts @ images.T / 0.1, (images @ images.T / 0.125).softmax(-1))
    assert soft.item() == pytest.approx(cross.item() / 2, rel=1e-5)
    assert m3col(images[:1], texts[:1]).item() == pytest.approx(0, abs=1e-6)


# ---- ICNN


def test_icnn():
    x, labels = torch.tensor([[0.0], [1], [9], [10]]), torch.tensor([3, 3, 5, 5])
    # Distances over the largest, to the nearest sample of the same class and to both of the other one.
    near, far = 0.1, [(0.9 + 1.0) / 2, (0.8 + 0.9) / 2]
    expected = [((1 - near + f) / 2 + 0.5) / 2 for f in far]  # one of two neighbours is of the same class
    assert icnn(x, labels, neighbours=2) == pytest.approx(sum(expected) / 2)
    expected = [((1 - near + f) / 2 + 1.0) / 2 for f in (0.9, 0.8)]
    assert icnn(x, labels, neighbours=1) == pytest.approx(sum(expected) / 2)
    assert icnn(7 * x + 2, labels, neighbours=2) == pytest.approx(icnn(x, labels, neighbours=2))
    assert icnn(x, torch.tensor([0, 1, 0, 1]), neighbours=2) < icnn(x, labels, neighbours=2)
    with pytest.raises(FuseError, match="expected two classes or more, of two samples each"):
        icnn(x, torch.tensor([0, 0, 0, 1]))
