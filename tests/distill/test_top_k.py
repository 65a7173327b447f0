"""Methods on a top-K: exact on what is kept, and silent about what isn't."""

import math

import pytest
import torch
import torch.nn.functional as F

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


def pair(rows=6, tokens=30, scale=2.0):
    random = torch.Generator().manual_seed(0)
    return [torch.randn(rows, tokens, generator=random) * scale for _ in range(2)]


def gradient(method, student, *others, **options):
    student = student.clone().requires_grad_()
    value = method(student, *others, **options)
    (found,) = torch.autograd.grad(value, student)
    return value.item(), found


@pytest.mark.parametrize("method", [*DIVERGENCES, uld, pld, weak_to_strong, dhkd])
def test_nothing_is_learnt_where_no_token_is_known(method):
    student, _ = pair()
    nothing = torch.full((6,), -torch.inf)
    unknown = TopK(
        torch.zeros(6, 3).long(), nothing[:, None].expand(6, 3), torch.zeros(6), nothing, log_z_N=torch.zeros(6)
    )
    more = (torch.arange(6),) if method in (pld, dhkd) else ()
    value, found = gradient(method, student, unknown, *more)
    assert value == pytest.approx(0, abs=1e-6) and found.abs().max() < 1e-6


@pytest.mark.parametrize("method", DIVERGENCES)
def test_tokens_beyond_the_students_vocabulary_go_to_the_tail(method):
    student, teacher = pair(6, 30)
    top, width = TopK.of(teacher, 8), 25
    inside = [[(token, p) for token, p in zip(*row) if token < width]
              for row in zip(top.ids_NK.tolist(), top.log_probs_NK.exp().tolist())]  # fmt: skip
    assert min(map(len, inside)) < 8
    found = method(student[:, :width], top.within(width)).item()
    expected = 0.0
    for row, kept in enumerate(inside):
        ids, ps = torch.tensor([token for token, _ in kept]), torch.tensor([p for _, p in kept])
        alone = TopK(ids[None], ps.log()[None], (1 - ps.sum()).log()[None])
        expected += method(student[row : row + 1, :width], alone).item()
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("taken_at", [1.0, 3.0])
def test_dhkd_of_a_top_k_is_that_of_these_tokens_and_the_label(taken_at):
    student, teacher = pair(6, 30)
    chosen = teacher.argsort(descending=True)[:, 9].clone()
    chosen[:2] = teacher[:2].argmax(-1)  # of these the label is among the four already
    rows = torch.arange(6)
    union = torch.zeros(6, 30, dtype=torch.bool).scatter(-1, teacher.topk(4).indices, True)
    union[rows, chosen] = True
    assert union.sum(-1).tolist() == [4, 4, 5, 5, 5, 5]
    expected = gradient(lambda s: dhkd(s[union][None], teacher[union][None]), student)
    top = TopK.of(teacher, 4, chosen, temperature=taken_at)
    value, found = gradient(dhkd, student, top, chosen)
    assert value == pytest.approx(expected[0], rel=1e-5)
    torch.testing.assert_close(found, expected[1], atol=1e-5, rtol=1e-4)
    mean = dhkd(student, top, chosen, mean_over_classes=True).item()
    each = [dhkd(student[r][union[r]][None], teacher[r][union[r]][None], mean_over_classes=True) for r in rows]
    assert mean == pytest.approx(sum(each).item(), rel=1e-5)
    whole = gradient(dhkd, student, TopK.of(teacher, 30, chosen), chosen)
    assert whole[0] == pytest.approx(dhkd(student, teacher).item(), rel=1e-5)
    with pytest.raises(FuseError, match="lacks their logsumexp"):
        dhkd(student, TopK(top.ids_NK, top.log_probs_NK, top.tail_log_prob_N), chosen)


@pytest.mark.parametrize("method", [*DIVERGENCES, uld, pld, weak_to_strong, dhkd])
def test_fillers_count_nothing_and_all_tokens_are_the_whole(method):
    student, teacher = pair()
    teacher[0, 0] = 9.0  # the filler's id as the likeliest token
    chosen = teacher.topk(3).indices[:, 2].clone()
    chosen[0] = 0
    more = (chosen,) if method in (pld, dhkd) else ()
    top = TopK.of(teacher, 4, chosen)
    filled = TopK(
        F.pad(top.ids_NK, (0, 3)), F.pad(top.log_probs_NK, (0, 3), value=-torch.inf), *top.tensors[2:4],
        log_z_N=top.log_z_N,
    )  # fmt: skip
    exact, padded = (gradient(method, student, given, *more) for given in (top, filled))
    assert padded[0] == pytest.approx(exact[0], rel=1e-5)
    torch.testing.assert_close(padded[1], exact[1])
    whole, kept = (gradient(method, student, given, *more) for given in (teacher, TopK.of(teacher, 30, chosen)))
    assert kept[0] == pytest.approx(whole[0], rel=1e-5)
    torch.testing.assert_close(kept[1], whole[1], atol=1e-5, rtol=1e-4)


def test_the_bucket_is_what_the_kept_tokens_lack():
    student, teacher = pair(1, 500, 3.0)
    top = TopK.of(teacher, 16)
    assert 0.6 < top.log_probs_NK.exp().sum() < 0.95
    full, bucket = forward_kl(student, teacher).item(), forward_kl(student, top).item()
    log_s_K = student.log_softmax(-1).gather(-1, top.ids_NK)
    unnormalised = (top.log_probs_NK.exp() * (top.log_probs_NK - log_s_K)).sum().item()
    p, q = top.log_probs_NK.logsumexp(-1).exp().item(), log_s_K.logsumexp(-1).exp().item()
    assert bucket == pytest.approx(unnormalised + (1 - p) * math.log((1 - p) / (1 - q)), rel=1e-4)
    assert bucket < full
    # Where the student has more on the kept tokens than the teacher, the sum without a tail is no divergence at all.
    sure = teacher.scatter(-1, top.ids_NK, teacher.gather(-1, top.ids_NK) + 5)
    log_s_K = sure.log_softmax(-1).gather(-1, top.ids_NK)
    assert (top.log_probs_NK.exp() * (top.log_probs_NK - log_s_K)).sum() < 0 < forward_kl(sure, top)


def test_parts_of_a_top_k():
    _, teacher = pair()
    top = TopK.of(teacher, 4, torch.arange(6))
    again = TopK.joined([top.rows(slice(0, 2)), top.rows(slice(2, 6))])
    assert all(one.equal(other) for one, other in zip(top.tensors, again.tensors, strict=True))
    assert TopK.joined([TopK.of(teacher, 4), top]).label_log_prob_N is None
    assert TopK.from_tensors(top.tensors, 2.0).temperature == 2.0
