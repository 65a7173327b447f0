"""Fusion of several teachers: FuseLLM, Fusion-X and GLD, by the numbers of the papers and what must be zero."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_fuse.distill.methods.forward_kl import forward_kl
from hf_fuse.distill.methods.fuse_llm import fuse_llm, source_weights
from hf_fuse.distill.methods.fusion_x import fusion_x, selected, variation
from hf_fuse.distill.methods.gld import gld, node_features
from hf_fuse.distill.sources import Source, fused, label_probability
from hf_fuse.distill.top_k import TopK
from hf_fuse.distill.vocabulary_map import VocabularyMap
from hf_fuse.errors import FuseError


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def logits(seed, rows=6, tokens=9):
    return torch.randn(rows, tokens, generator=seeded(seed)) * 2


LABELS = torch.randint(9, (6,), generator=seeded(9))
SEQUENCES = torch.tensor([0, 0, 0, 1, 1, 1])


def source(logits_NV, ce=1.0, k=4, place=None, mapping=None, sequences=SEQUENCES):
    count = len(logits_NV)
    place = torch.arange(count) if place is None else torch.tensor(place)
    ce = torch.full((len(place),), float(ce)) if not isinstance(ce, torch.Tensor) else ce
    return Source(TopK.of(logits_NV, k, LABELS[:count] % logits_NV.shape[-1]), sequences[:count], place, ce, mapping)


def gradient(loss, student):
    student = student.clone().requires_grad_()
    value = loss(student)
    return value.item(), torch.autograd.grad(value, student)[0]


# ---- FuseLLM


def test_one_source_with_the_same_tokens_is_the_plain_divergence():
    student, teacher = logits(0), logits(1)
    for k in (4, 9):
        found = gradient(lambda s, k=k: fuse_llm(s, [source(teacher, k=k)], LABELS), student)
        plain = gradient(lambda s, k=k: forward_kl(s, TopK.of(teacher, k)), student)
        assert found[0] == pytest.approx(plain[0], rel=1e-5)
        torch.testing.assert_close(found[1], plain[1], atol=1e-6, rtol=1e-5)
    whole = fuse_llm(student, [source(teacher, k=9)], LABELS, support="renormalized")
    assert whole.item() == pytest.approx(forward_kl(student, teacher).item(), rel=1e-5)


def test_an_equal_student_has_nothing_to_learn_unless_the_tail_is_thrown_away():
    student = logits(0)
    value, found = gradient(lambda s: fuse_llm(s, [source(student, k=3)] * 2, LABELS, fusion="avg_ce"), student)
    assert value == pytest.approx(0, abs=1e-5) and found.abs().max() < 1e-6
    value, found = gradient(lambda s: fuse_llm(s, [source(student, k=3)], LABELS, support="renormalized"), student)
    mass = student.softmax(-1).topk(3).values.sum(-1)
    assert value == pytest.approx(-mass.log().sum().item(), rel=1e-5) and found.abs().max() > 0.01


def test_renormalised_targets_teach_overconfidence():
    """Three tokens of a thousand with 0.127, 0.017 and 0.002: what each kind of loss is at rest with."""
    kept = torch.tensor([0.127, 0.017, 0.002])
    teacher = torch.full((1, 1000), math.log((1 - kept.sum().item()) / 997))
    teacher[0, :3] = kept.log()
    own = source(teacher, k=3, sequences=torch.zeros(1))
    _, found = gradient(lambda s: fuse_llm(s, [own], LABELS[:1]), teacher)
    assert found.abs().max() < 1e-6
    sharp = torch.full((1, 1000), -40.0)
    sharp[0, :3] = (kept / kept.sum()).log()
    _, found = gradient(lambda s: fuse_llm(s, [own], LABELS[:1], support="renormalized"), sharp)
    assert found.abs().max() < 1e-6
    assert sharp.softmax(-1)[0, 0].item() == pytest.approx(0.87, abs=0.005)


def test_the_source_with_the_least_cross_entropy_is_taken():
    ce = [torch.tensor([1.2] * 3 + [0.5] * 3), torch.tensor([0.9] * 6)]
    sources = [source(logits(1), ce[0]), source(logits(2), ce[1])]
    assert source_weights(sources, "min_ce").tolist() == [[0, 1]] * 3 + [[1, 0]] * 3
    rewards = torch.tensor([math.exp(-1.2), math.exp(-0.9)])
    torch.testing.assert_close(rewards, torch.tensor([0.3012, 0.4066]), atol=5e-5, rtol=0)
    torch.testing.assert_close(source_weights(sources, "avg_ce")[0], rewards.softmax(-1))
    student = logits(0)
    expected = forward_kl(student[:3], TopK.of(logits(2)[:3], 4)) + forward_kl(student[3:], TopK.of(logits(1)[3:], 4))
    assert fuse_llm(student, sources, LABELS).item() == pytest.approx(expected.item(), rel=1e-5)
    # A tie in fp32 goes to the first; -2.000 and -2.003, equal in bf16, are none.
    close = [source(logits(1), 2.003), source(logits(2), 2.0)]
    assert source_weights(close, "min_ce")[0].tolist() == [0, 1]


def test_a_mixture_of_whole_distributions_is_the_mixture():
    one, other = logits(1), logits(2)
    weights = torch.tensor([[0.3, 0.7]]).expand(6, 2)
    top = fused([source(one, k=9).everywhere(), source(other, k=9).everywhere()], weights)
    expected = 0.3 * one.softmax(-1) + 0.7 * other.softmax(-1)
    found = torch.zeros(6, 18).scatter_add(-1, top.ids_NK, top.log_probs_NK.exp())[:, :9]
    torch.testing.assert_close(found, expected)
    assert top.tail_log_prob_N.exp().max() < 1e-6
    # Cut down, each side's own tokens are there, and all of it still sums to 1.
    top = fused([source(one, k=3).everywhere(), source(other, k=3).everywhere()], weights)
    torch.testing.assert_close(top.log_probs_NK.exp().sum(-1) + top.tail_log_prob_N.exp(), torch.ones(6))
    assert top.ids_NK[0][top.known_NK[0]].unique().numel() == top.known_NK[0].sum()


def test_predictions_without_a_source_count_nothing_or_their_label():
    student, teacher = logits(0), logits(1)
    some = source(teacher, place=[0, -1, 2, -1, 4, 5])
    value, found = gradient(lambda s: fuse_llm(s, [some], LABELS), student)
    chosen = torch.tensor([0, 2, 4, 5])
    assert value == pytest.approx(forward_kl(student[chosen], TopK.of(teacher[chosen], 4)).item(), rel=1e-5)
    assert found[[1, 3]].abs().max() == 0 and found[chosen].abs().max() > 0
    labelled = fuse_llm(student, [some], LABELS, unaligned="label").item()
    expected = F.cross_entropy(student[[1, 3]], LABELS[[1, 3]], reduction="sum").item()
    assert labelled == pytest.approx(value + expected, rel=1e-5)
    # The best source decides for its whole row, also where it has nothing to say; a mean asks the others.
    other = source(logits(2), 2.0)
    alone = fuse_llm(student, [some, other], LABELS)
    assert alone.item() == pytest.approx(value, rel=1e-5)
    assert fuse_llm(student, [some, other], LABELS, fusion="avg_ce").item() != pytest.approx(value, rel=1e-2)


def test_tokens_without_a_partner_go_to_the_tail():
    mapping = VocabularyMap(torch.tensor([3, -1, 3, 0, -1, 1, 2, 8, 7]), torch.zeros(9, dtype=torch.uint8))
    nothing = VocabularyMap(torch.full((9,), -1), torch.zeros(9, dtype=torch.uint8))
    student, teacher = logits(0), logits(1)
    p, q = teacher.softmax(-1), student.softmax(-1)
    ours = torch.stack([p[:, 3], p[:, 5], p[:, 6], p[:, 0] + p[:, 2], p[:, 8], p[:, 7]], -1)
    theirs = q[:, [0, 1, 2, 3, 7, 8]]
    full = [torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (ours, theirs)]
    expected = (full[0] * (full[0].log() - full[1].log())).sum()
    found = fuse_llm(student, [source(teacher, k=9, mapping=mapping)], LABELS)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    for support in ("tail", "renormalized"):
        value, slope = gradient(
            lambda s, support=support: fuse_llm(s, [source(teacher, mapping=nothing)], LABELS, support=support), student
        )
        assert value == 0 and slope.abs().max() == 0


def test_temperature_is_for_what_was_renormalised():
    with pytest.raises(FuseError, match="can't be tempered"):
        fuse_llm(logits(0), [source(logits(1))], LABELS, teacher_temperature=2.0)
    found = fuse_llm(logits(0), [source(logits(1), k=9)], LABELS, teacher_temperature=2.0, support="renormalized")
    p = (logits(1) / 2).softmax(-1)
    assert found.item() == pytest.approx((p * (p.log() - logits(0).log_softmax(-1))).sum().item(), rel=1e-5)


# ---- Fusion-X


def test_selection_and_balance():
    torch.testing.assert_close(
        selected(torch.tensor([[0.5, 0.3, 0.12, 0.08]]), 0.15), torch.tensor([[0.625, 0.375, 0.0, 0.0]])
    )
    assert selected(torch.tensor([[0.3, 0.4, 0.3]]), 0.5).tolist() == [[0, 1, 0]]
    assert variation(torch.tensor([1.0, 3.0])).item() == pytest.approx(0.5)
    assert variation(torch.tensor([2.0, 2.0])).item() == 0 and variation(torch.tensor([2.0])).item() == 0


def with_gate(count, **options):
    torch.manual_seed(0)
    made = fusion_x(**options)
    made.make_gate(count)
    return made


def test_one_teacher_is_fuse_llm():
    own = source(logits(1))
    found = with_gate(1, selection=0.0)(logits(0), [own], LABELS)
    assert found.item() == pytest.approx(fuse_llm(logits(0), [own], LABELS).item(), rel=1e-5)


def test_the_gate_learns_whom_to_trust_and_the_student_does_not_bend_it():
    # The second teacher knows the labels and says so; the first one says what the student says.
    student = logits(0)
    knowing = F.one_hot(LABELS, 9) * 6.0
    sources = [source(student, 1.5, k=9), source(knowing, 0.1, k=9)]
    gate = with_gate(2)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)

    def weight():
        rewards = torch.tensor([[math.exp(-1.5), math.exp(-0.1)]])
        return gate.gate(rewards).softmax(-1)[0, 1].item()

    before = weight()
    for _ in range(40):
        optimizer.zero_grad()
        gate(student, sources, LABELS).backward()
        optimizer.step()
    assert weight() > before + 0.1
    leaf = student.clone().requires_grad_()
    still = with_gate(2, selection=0.0, balance=0.0)
    still(leaf, sources, LABELS).backward()
    assert all(parameter.grad is None or parameter.grad.abs().max() == 0 for parameter in still.parameters())
    assert leaf.grad.abs().max() > 0


def test_the_gate_is_for_a_number_of_teachers():
    with pytest.raises(FuseError, match="gate is for 2 teachers, not for 1"):
        with_gate(2)(logits(0), [source(logits(1))], LABELS)


def test_probability_of_labels():
    top = TopK(
        torch.tensor([[3, 1], [3, 0]]), torch.tensor([[0.5, 0.2], [0.5, 0.0]]).log(), torch.tensor([0.3, 0.5]).log()
    )
    found = label_probability(top, torch.tensor([1, 0]), 9)
    torch.testing.assert_close(found, torch.tensor([0.2, 0.5 / 8]))


# ---- GLD

ZS, ZT = torch.tensor([[3.0, 1, 0], [2, 2, 1]]), torch.tensor([[4.0, 1, 0], [2, 1, 1]])
RAW = {"standardize": "none", "k": 3}


def test_gld_example():
    torch.testing.assert_close(node_features(ZS), torch.tensor([3.6667, 2.3333, 0.8333]), atol=1e-4, rtol=0)
    torch.testing.assert_close(node_features(ZT), torch.tensor([4.6667, 1.5, 0.6667]), atol=1e-4, rtol=0)
    own, row = source(ZT, k=3), torch.zeros(2)
    # Two predictions, each of which counts the sequence's 2.0 once.
    assert gld(ZS, [own], SEQUENCES[:2], **RAW, token_weight=0).item() == pytest.approx(4.0, rel=1e-5)
    assert gld(ZS, [own], row, **RAW, structure_weight=0).item() == pytest.approx(2.0, rel=1e-5)
    assert gld(ZS, [source(ZS, k=3)], row, **RAW).item() == pytest.approx(0, abs=1e-5)
    # Which tokens they are doesn't matter.
    shuffled = source(ZT[:, [2, 0, 1]], k=3)
    assert gld(ZS[:, [1, 2, 0]], [shuffled], row, **RAW, token_weight=0).item() == pytest.approx(4.0, rel=1e-5)


def test_node_features_are_those_of_the_graph():
    z = logits(3, rows=11, tokens=7)
    graph = z.T @ z / len(z)
    torch.testing.assert_close(node_features(z), graph @ torch.ones(7) / 7)


def test_gld_over_other_vocabularies_and_lengths():
    student, teacher = logits(0), logits(1, rows=5, tokens=30)
    sequences = torch.tensor([0, 0, 1, 1, 1])
    own = source(teacher, k=5, place=[0, -1, 1, 2, 3, 4], sequences=sequences)

    def direct(standardize):
        def prepared(values):
            top = values.log_softmax(-1).topk(5).values
            return standardize(top)

        ours, theirs = prepared(student), prepared(teacher)
        total = sum((ours[n] - theirs[p]).abs().sum() for n, p in enumerate([0, -1, 1, 2, 3, 4]) if p >= 0)
        for number in (0, 1):
            sides = [z[of == number] for z, of in ((ours, SEQUENCES), (theirs, sequences))]
            nodes = [(z.T @ z / len(z)).sum(-1).div(5).sort(descending=True).values for z in sides]
            total = total + 3 * (nodes[0] - nodes[1]).abs().sum()
        return total.item()

    def z_score(values):
        return (values - values.mean(-1, keepdim=True)) / values.std(-1, keepdim=True, correction=0)

    assert gld(student, [own], SEQUENCES, k=5).item() == pytest.approx(direct(z_score), rel=1e-4)
    found = gld(student, [own], SEQUENCES, k=5, standardize="logsumexp").item()
    assert found == pytest.approx(direct(lambda values: values), rel=1e-4)
    # Neither sees a shift of the logits; raw ones do.
    for how in ("z_score", "logsumexp"):
        moved = gld(student + 1, [own], SEQUENCES, k=5, standardize=how).item()
        assert moved == pytest.approx(gld(student, [own], SEQUENCES, k=5, standardize=how).item(), rel=1e-3)
    moved = gld(ZS + 1, [source(ZT, k=3)], SEQUENCES[:2], **RAW, token_weight=0) / 2
    assert moved.item() > 5


def test_gld_refuses_what_it_cannot_compare():
    with pytest.raises(FuseError, match="needs 7 tokens of each prediction, the teacher's keep 4"):
        gld(logits(0), [source(logits(1))], SEQUENCES, k=7)
    with pytest.raises(FuseError, match="k is 10, but the student's vocabulary has 9"):
        gld(logits(0), [source(logits(1))], SEQUENCES)
    flat = torch.zeros(6, 9)
    _, found = gradient(lambda s: gld(s, [source(logits(1))], SEQUENCES, k=4), flat)
    assert found.isfinite().all()


@pytest.mark.parametrize("method", [fuse_llm, gld])
def test_no_predictions(method):
    student = logits(0).requires_grad_()
    none = source(logits(1)[:0], torch.zeros(0), sequences=SEQUENCES[:0])
    value = method(student[:0], [none], LABELS[:0], **({"k": 4} if method is gld else {}))
    value.backward()
    assert value.item() == 0 and student.grad.abs().max() == 0
