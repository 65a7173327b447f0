"""Distillation methods: the closed forms and numbers of the papers, and what must be zero."""

import math

import pytest
import torch
import torch.nn.functional as F
from distill_cases import ONE_TEACHER

from hf_fuse import registry
from hf_fuse.distill.methods.dhkd import dhkd
from hf_fuse.distill.methods.forward_kl import forward_kl
from hf_fuse.distill.methods.jsd import jsd
from hf_fuse.distill.methods.pld import pld
from hf_fuse.distill.methods.reverse_kl import reverse_kl
from hf_fuse.distill.methods.uld import uld
from hf_fuse.distill.methods.weak_to_strong import weak_to_strong
from hf_fuse.distill.top_k import TopK
from hf_fuse.errors import FuseError

DIVERGENCES = [forward_kl, reverse_kl, jsd]


def pair(rows=6, tokens=9, scale=2.0):
    random = torch.Generator().manual_seed(0)
    return [torch.randn(rows, tokens, generator=random) * scale for _ in range(2)]


def labels(rows=6, tokens=9):
    return torch.randint(tokens, (rows,), generator=torch.Generator().manual_seed(1))


def gradient(method, student, *others, **options):
    student = student.clone().requires_grad_()
    value = method(student, *others, **options)
    (found,) = torch.autograd.grad(value, student)
    return value.item(), found


def logs(*probabilities):
    return torch.tensor([probabilities]).log()


# ---- every method


def call(name, student, teacher, chosen):
    method = registry.get("distill", name).function
    return method(student, teacher, chosen) if name == "pld" else method(student, teacher)


@pytest.mark.parametrize("name", ONE_TEACHER)
def test_sums_over_predictions_in_fp32(name):
    student, teacher = pair()
    whole = call(name, student, teacher, labels())
    assert whole.shape == () and whole.dtype == torch.float32
    rows = [call(name, student[i : i + 1], teacher[i : i + 1], labels()[i : i + 1]) for i in range(6)]
    assert whole.item() == pytest.approx(sum(rows).item(), rel=1e-5)
    assert call(name, student[:0], teacher[:0], labels()[:0]).item() == 0
    half = call(name, student.bfloat16(), teacher.bfloat16(), labels())
    rounded = call(name, student.bfloat16().float(), teacher.bfloat16().float(), labels())
    assert half.dtype == torch.float32 and half.item() == rounded.item()


@pytest.mark.parametrize("name", ONE_TEACHER)
def test_extreme_logits_give_finite_values_and_gradients(name):
    student = torch.tensor([[300.0, -300.0, 0.0], [-500.0, 0.0, 500.0]])
    value, found = gradient(lambda s: call(name, s, -student, torch.tensor([0, 1])), student)
    assert math.isfinite(value) and found.isfinite().all()


@pytest.mark.parametrize("name", sorted({*ONE_TEACHER} - {"pld", "weak_to_strong"}))
def test_nothing_to_learn_from_an_equal_teacher(name):
    student, _ = pair()
    value, found = gradient(lambda s: call(name, s, student, labels()), student)
    assert value == pytest.approx(0, abs=1e-6)
    # The L1 distance of sorted probabilities has a kink there.
    assert name == "uld" or found.abs().max() < 1e-6


@pytest.mark.parametrize("name", ONE_TEACHER)
def test_a_method_needs_equal_vocabularies_or_sorts_them(name):
    student, teacher = pair()
    if name == "uld":
        assert uld(student, teacher[:, :5]).isfinite()
    else:
        with pytest.raises(FuseError, match="same vocabulary"):
            call(name, student, teacher[:, :5], labels(tokens=5))


# ---- divergences


def test_forward_and_reverse_kl():
    student, teacher = pair()
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    assert forward_kl(student, teacher).item() == pytest.approx(
        F.kl_div(log_s, log_t, reduction="sum", log_target=True)
    )
    assert reverse_kl(student, teacher).item() == pytest.approx(
        F.kl_div(log_t, log_s, reduction="sum", log_target=True)
    )
    a, b = logs(0.5, 0.5), logs(0.9, 0.1)
    assert forward_kl(a, b).item() == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-5)
    assert reverse_kl(a, b).item() == pytest.approx(-math.log(2 * 0.3), rel=1e-5)


@pytest.mark.parametrize("method", DIVERGENCES)
def test_temperature(method):
    student, teacher = pair()
    cool = method(student / 3, teacher / 3).item()
    assert method(student, teacher, temperature=3.0, scale_by_t2=False).item() == pytest.approx(cool, rel=1e-5)
    assert method(student, teacher, temperature=3.0).item() == pytest.approx(9 * cool, rel=1e-5)


def test_jsd_is_trls_or_continuous_at_the_ends():
    student, teacher = pair()
    forward, reverse = forward_kl(student, teacher).item(), reverse_kl(student, teacher).item()
    assert jsd(student, teacher, beta=0.0).item() == forward and jsd(student, teacher, beta=1.0).item() == reverse
    assert jsd(student, teacher, beta=1e-3).item() == pytest.approx(forward, rel=0.02)
    assert jsd(student, teacher, beta=1 - 1e-3).item() == pytest.approx(reverse, rel=0.02)
    assert jsd(student, teacher, beta=1e-3, continuous=False).item() < 0.01 * forward
    p, q = student.softmax(-1), teacher.softmax(-1)
    m = 0.7 * p + 0.3 * q
    expected = 0.3 * (q * (q / m).log()).sum() + 0.7 * (p * (p / m).log()).sum()
    assert jsd(student, teacher, beta=0.3, continuous=False).item() == pytest.approx(expected.item(), rel=1e-5)
    assert jsd(student, teacher, beta=0.3).item() == pytest.approx(expected.item() / 0.21, rel=1e-5)
    assert jsd(student, teacher).item() == pytest.approx(jsd(teacher, student).item(), rel=1e-5)


# ---- top-K


@pytest.mark.parametrize("method", DIVERGENCES)
def test_all_tokens_kept_is_the_whole_divergence(method):
    student, teacher = pair()
    whole = gradient(method, student, teacher, temperature=2.0)
    kept = gradient(method, student, TopK.of(teacher, 20, temperature=2.0), temperature=2.0)
    assert kept[0] == pytest.approx(whole[0], rel=1e-5)
    torch.testing.assert_close(kept[1], whole[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", DIVERGENCES)
def test_buckets_bound_the_divergence_from_below(method):
    student, teacher = pair(8, 500)
    values = [method(student, TopK.of(teacher, k)).item() for k in (1, 4, 16, 64, 499)]
    assert all(value > 0 for value in values) and values == sorted(values)
    assert values[-1] <= method(student, teacher).item() * (1 + 1e-6)
    value, found = gradient(method, teacher, TopK.of(teacher, 16))
    assert value == pytest.approx(0, abs=1e-5) and found.abs().max() < 1e-6


def test_the_bucket_keeps_the_mass_outside_of_the_top():
    # Renormalised, these three would be (0.867, 0.117, 0.016).
    teacher = torch.zeros(1, 1000)
    teacher[0, :3] = torch.tensor([5.0, 3.0, 1.0])
    top = TopK.of(teacher, 3)
    assert top.log_probs_NK.exp()[0].tolist() == pytest.approx([0.127, 0.017, 0.002], abs=5e-4)
    assert top.log_probs_NK.softmax(-1)[0].tolist() == pytest.approx([0.867, 0.117, 0.016], abs=5e-4)
    assert top.tail_log_prob_N.exp().item() == pytest.approx(1 - 0.1467, abs=5e-4)
    student = torch.zeros(1, 1000, requires_grad=True)
    optimizer = torch.optim.Adam([student], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        forward_kl(student, top).backward()
        optimizer.step()
    assert student.softmax(-1)[0, :3].tolist() == pytest.approx([0.127, 0.017, 0.002], abs=1e-3)


def test_an_overconfident_student_is_pulled_back_through_the_bucket():
    student = torch.tensor([[60.0, 0.0, 0.0, 0.0]])
    _, found = gradient(forward_kl, student, TopK.of(torch.tensor([[1e-4, 0, 0, 0]]), 1))
    assert found[0].tolist() == pytest.approx([0.75, -0.25, -0.25, -0.25], abs=1e-4)


def test_a_top_k_can_be_stored_in_half_precision():
    student, teacher = pair(8, 500)
    top = TopK.of(teacher, 16)
    half = TopK(top.ids_NK.int(), top.log_probs_NK.half(), top.tail_log_prob_N.half())
    assert forward_kl(student, half).item() == pytest.approx(forward_kl(student, top).item(), rel=2e-3)


@pytest.mark.parametrize("name", [*(method.__name__ for method in DIVERGENCES), "pld", "uld", "weak_to_strong"])
def test_places_without_a_token_count_nothing(name):
    student, teacher = pair(tokens=30)
    teacher[0, 0] = 9.0  # the filler's id as the likeliest token
    chosen = teacher.topk(3).indices[:, 2]
    chosen[0] = 0
    top = TopK.of(teacher, 4, chosen)
    filled = TopK(
        F.pad(top.ids_NK, (0, 3)), F.pad(top.log_probs_NK, (0, 3), value=-torch.inf), top.tail_log_prob_N,
        top.label_log_prob_N,
    )  # fmt: skip
    exact, padded = (gradient(lambda s, t=t: call(name, s, t, chosen), student) for t in (top, filled))
    assert padded[0] == pytest.approx(exact[0], rel=1e-5)
    torch.testing.assert_close(padded[1], exact[1])


@pytest.mark.parametrize("method", [*DIVERGENCES, uld])
def test_a_top_k_belongs_to_its_temperature(method):
    student, teacher = pair()
    with pytest.raises(FuseError, match="temperature 2, but the loss has 1"):
        method(student, TopK.of(teacher, 3, temperature=2.0))


# ---- DHKD


def test_dhkd_numbers():
    student, teacher = torch.tensor([[2.0, 3, 4]]), torch.tensor([[-2.0, -1, 0]])
    assert dhkd(student, teacher).item() == pytest.approx(5.20537, abs=1e-5)
    assert dhkd(student, teacher, mean_over_classes=True).item() == pytest.approx(5.20537 / 3, abs=1e-5)
    # A shift is invisible to the softmax.
    assert forward_kl(student, teacher, temperature=2.0).item() == pytest.approx(0, abs=1e-6)
    assert dhkd(torch.tensor([[500.0]]), torch.zeros(1, 1)).item() == pytest.approx(497.2, abs=0.05)
    assert dhkd(torch.tensor([[0.1]]), torch.zeros(1, 1)).item() == pytest.approx(0.1**2 / 8, rel=1e-2)


def test_dhkd_is_binary_kl_norm():
    student, teacher = pair()
    shifted = torch.sigmoid((student - teacher).double() / 2)
    expected = 4 * (0.5 * (0.5 / shifted).log() + 0.5 * (0.5 / (1 - shifted)).log()).sum()
    value, found = gradient(dhkd, student, teacher)
    assert value == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(found, torch.tanh((student - teacher) / 4))


# ---- PLD

PLD_STUDENT, PLD_TEACHER = torch.tensor([[1.0, 0, -1, 0.5]]), torch.tensor([[2.0, 1, 0, 3]])
FIRST = torch.tensor([0])


def test_pld_numbers():
    value, found = gradient(pld, PLD_STUDENT, PLD_TEACHER, FIRST)
    assert value == pytest.approx(0.59316, abs=1e-5)
    assert found[0].tolist() == pytest.approx([-0.12460, 0.23133, 0.11716, -0.22388], abs=1e-5)
    assert found.sum().item() == pytest.approx(0, abs=1e-6)
    sure = PLD_TEACHER + torch.tensor([60.0, 0, 0, 0])
    cross_entropy = F.cross_entropy(PLD_STUDENT, FIRST).item()
    assert cross_entropy == pytest.approx(0.74657, abs=1e-5)
    assert pld(PLD_STUDENT, sure, FIRST).item() == pytest.approx(cross_entropy, rel=1e-5)


def test_pld_looks_at_ranks_and_is_invariant_to_shifts():
    student, teacher = pair()
    value = pld(student, teacher, labels()).item()
    assert pld(student + 5, teacher - 3, labels()).item() == pytest.approx(value, rel=1e-5)
    uniform = pld(student, torch.zeros_like(teacher), labels()).item()
    order = (
        torch.zeros_like(teacher).scatter(-1, labels().unsqueeze(-1), 1.0).argsort(dim=-1, descending=True, stable=True)
    )
    ranked = student.gather(-1, order)
    list_mle = sum((ranked[:, k:].logsumexp(-1) - ranked[:, k]).sum() for k in range(9)) / 9
    assert uniform == pytest.approx(list_mle.item(), rel=1e-5)


@pytest.mark.parametrize("k", [1, 3, 8, 9])
def test_pld_top_k_is_the_first_k_terms(k):
    student, teacher = pair()
    chosen = labels()
    chosen[0], chosen[1] = teacher[0].argmax(), teacher[1].argmin()
    order = teacher.scatter(-1, chosen.unsqueeze(-1), torch.inf).argsort(-1, descending=True)
    ranked, alpha = student.gather(-1, order), teacher.softmax(-1).gather(-1, order)
    terms = [alpha[:, j] * (ranked[:, j:].logsumexp(-1) - ranked[:, j]) for j in range(k)]
    value, found = gradient(pld, student, TopK.of(teacher, k, chosen), chosen)
    assert value == pytest.approx(sum(term.sum() for term in terms).item(), rel=1e-5)
    assert found.isfinite().all() and found.sum(-1).abs().max() < 1e-5
    if k == 9:
        assert value == pytest.approx(pld(student, teacher, chosen).item(), rel=1e-5)


def test_pld_heeds_labels_that_the_teacher_denies():
    wrong = torch.tensor([[-20.0, 1, 0, 3]])
    ignored = gradient(pld, PLD_STUDENT, wrong, FIRST)[1][0, 0]
    heeded = gradient(pld, PLD_STUDENT, wrong, FIRST, label_floor=0.5)[1][0, 0]
    assert abs(ignored) < 1e-6 and heeded < -0.1
    # No weight moves where the label has more than the floor.
    assert pld(PLD_STUDENT, PLD_TEACHER, FIRST, label_floor=0.2).item() == pytest.approx(0.59316, abs=1e-5)
    assert pld(PLD_STUDENT, PLD_TEACHER, FIRST, label_floor=1.0).item() == pytest.approx(0.74657, abs=1e-5)


def test_pld_needs_the_labels_probability():
    with pytest.raises(FuseError, match="lacks the labels"):
        pld(PLD_STUDENT, TopK.of(PLD_TEACHER, 2), FIRST)


# ---- ULD


def test_uld_numbers():
    student, teacher = logs(0.7, 0.2, 0.1), logs(0.1, 0.5, 0.3, 0.1)
    assert uld(student, teacher).item() == pytest.approx(0.4, abs=1e-6)
    assert uld(teacher, student).item() == pytest.approx(0.4, abs=1e-6)
    assert uld(student, student[:, [2, 0, 1]]).item() == pytest.approx(0, abs=1e-6)


def test_uld_of_the_top():
    student, teacher = pair()
    whole = uld(student, teacher).item()
    assert uld(student, TopK.of(teacher, 9)).item() == pytest.approx(whole, rel=1e-5)
    # 0.7, 0.2 and the rest 0.1 against 0.5, 0.3 and 0.2.
    top = TopK.of(logs(0.1, 0.5, 0.3, 0.1), 2)
    assert uld(logs(0.7, 0.2, 0.1), top).item() == pytest.approx(0.4, abs=1e-6)
    assert uld(logs(0.7, 0.3), TopK.of(logs(0.1, 0.5, 0.3, 0.1), 3)).item() == pytest.approx(0.4, abs=1e-6)


# ---- weak to strong

STRONG = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.4, 0.6], [0.2, 0.8]]).log()
WEAK = torch.tensor([[0.8, 0.2], [0.3, 0.7], [0.6, 0.4], [0.3, 0.7]]).log()


def test_weak_to_strong_numbers():
    plain = weak_to_strong(STRONG, WEAK, confidence=0.0).item() / 4
    assert plain == pytest.approx(0.68315, abs=1e-5)
    assert plain == pytest.approx(F.cross_entropy(STRONG, WEAK.exp()).item(), rel=1e-5)
    confident = weak_to_strong(STRONG, WEAK, confidence=0.5, threshold="prior").item() / 4
    assert confident == pytest.approx(0.51034, abs=1e-5)
    value, found = gradient(weak_to_strong, WEAK, WEAK, confidence=0.0)
    entropy = -(WEAK.exp() * WEAK).sum().item()
    assert value == pytest.approx(entropy, rel=1e-5) and found.abs().max() < 1e-6


def test_weak_to_strong_predicts_as_often_as_the_prior():
    weak = torch.tensor([[0.25, 0.75]]).log().expand(4, 2)
    own = weak_to_strong(STRONG, weak, confidence=1.0, threshold="prior").item()
    assert own == pytest.approx(-math.log(0.9 * 0.4 * 0.6 * 0.8), rel=1e-5)
    own = weak_to_strong(STRONG, weak, confidence=1.0).item()
    assert own == pytest.approx(-math.log(0.9 * 0.6 * 0.6 * 0.8), rel=1e-5)


def test_weak_to_strong_warms_up_linearly():
    values = [weak_to_strong(STRONG, WEAK, progress, warm_up=0.2).item() for progress in (0.0, 0.1, 0.2, 0.9)]
    assert values[0] == pytest.approx(4 * 0.68315, abs=1e-4)
    assert values[1] == pytest.approx((values[0] + values[2]) / 2, rel=1e-5) and values[2] == values[3]


def test_weak_to_strong_prior_is_for_two_classes():
    with pytest.raises(FuseError, match="two classes, there are 9"):
        weak_to_strong(*pair(), threshold="prior")
