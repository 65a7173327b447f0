"""Teachers with other tokenizers in the trainer: live and cached, the same numbers in every layout."""

import math

import pytest
import torch
from fusion_cases import aligned, encoded, make_trainer, ours, rows, student, teacher, theirs, weights_of
from safetensors.torch import load_file
from tiny_tokenizers import byte_bpe, sentence_piece, texts
from training_cases import llama, train

from hf_fuse.distill.aligned_teacher import AlignedTeacher
from hf_fuse.distill.cache import CachedRow, CacheFacts, CacheWriter, TeacherCache, text_key, tokenizer_key
from hf_fuse.distill.pairing import Encoding, pair_row
from hf_fuse.distill.top_k import TopK
from hf_fuse.errors import FuseError

KL = {"task": 0.5, "forward_kl": 0.5}
FUSE = {"task": 0.9, "fuse_llm": {"weight": 0.1, "fusion": "avg_ce"}}


def same(one, other, to=1e-6):
    for left, right in zip(one[0], other[0], strict=True):
        assert right == pytest.approx(left, rel=2e-5, abs=2e-5)
    for name, value in one[1].items():
        assert (value - other[1][name]).abs().max() < to, name


def both():
    """The pivot itself, with its own tokens, and a teacher with others."""
    return [aligned(student(3), ours(), k=8), aligned(k=8)]


def test_the_same_tokenizer_is_the_plain_teacher(tmp_path):
    plain = train(make_trainer(tmp_path, 8, 1, [student(3)], KL))
    same(plain, train(make_trainer(tmp_path, 8, 1, [aligned(student(3), ours(), k=400)], KL)), to=2e-6)
    # Fewer tokens give a lower bound.
    fewer = train(make_trainer(tmp_path, 8, 1, [aligned(student(3), ours(), k=8)], KL))
    assert 0 < fewer[0][0]["forward_kl"] < plain[0][0]["forward_kl"]


def test_an_equal_teacher_leaves_the_student_alone(tmp_path):
    for objectives in ({"task": 0.0, "fuse_llm": 1.0}, {"task": 0.0, "gld": 1.0}):
        teachers = [aligned(student(), ours(), k=16)]
        trainer = make_trainer(tmp_path, 8, 1, teachers, objectives, max_steps=1)
        before = weights_of(trainer)
        logs, after = train(trainer)
        assert logs[0][[*objectives][1]] == pytest.approx(0, abs=1e-4)
        if "fuse_llm" in objectives:  # the L1 distances of the other have a kink there
            assert all((after[name] - value).abs().max() < 1e-6 for name, value in before.items())


CASES = {
    "forward_kl": (lambda: [aligned()], KL),
    "uld": (lambda: [aligned()], {"task": 0.5, "uld": 1.0}),
    "gld": (lambda: [aligned()], {"task": 0.5, "gld": {"weight": 0.1, "k": 6}}),
    "fuse_llm": (both, FUSE),
    "fusion_x": (both, {"task": 0.5, "fusion_x": {"weight": 0.5, "balance": 0.0}}),
    "mixed": (lambda: [student(3), aligned()], KL),
}


@pytest.mark.parametrize("case", CASES)
def test_accumulation_changes_nothing(case, tmp_path):
    teachers, objectives = CASES[case]
    whole = train(make_trainer(tmp_path, 8, 1, teachers(), objectives))
    same(whole, train(make_trainer(tmp_path, 2, 4, teachers(), objectives)))
    if case in ("forward_kl", "fuse_llm", "mixed"):
        same(whole, train(make_trainer(tmp_path, 4, 2, teachers(), objectives, chunk_size=7)))
    name = [*objectives][1]
    assert math.isfinite(whole[0][0][name]) and whole[0][0][name] > 0


def test_values_of_a_teacher_with_other_tokens(tmp_path):
    """The trainer's first loss, from the definitions: both models on their own tokens of each text."""
    mine = aligned(k=6)
    trainer = make_trainer(tmp_path, 24, 1, [mine], {"task": 0.0, "forward_kl": 1.0}, max_steps=1)
    model, other = student().eval(), teacher().eval()
    total, count = 0.0, 0
    for row in rows():
        (pair,) = pair_row(row, ours(), theirs())
        with torch.no_grad():
            q = model(torch.tensor([pair.student.ids])).logits[0].softmax(-1)
            p = other(torch.tensor([pair.teachers[0].ids])).logits[0].softmax(-1)
        count += pair.student.predictions
        for place, found in enumerate(pair.places):
            if found is None:
                continue
            mapped = torch.zeros(400)
            kept = p[found[1] - 1].topk(6)
            for value, token in zip(kept.values, kept.indices):
                partner = int(mine.mapping.ids_V[token]) if token < len(mine.mapping.ids_V) else -1
                if partner >= 0:
                    mapped[partner] += value
            known = mapped > 0
            ours_q = q[place - 1]
            total += (mapped[known] * (mapped[known] / ours_q[known]).log()).sum()
            tail = 1 - mapped.sum()
            total += tail * (tail / (1 - ours_q[known].sum())).log()
    logs, _ = train(trainer)
    assert logs[0]["forward_kl"] == pytest.approx((total / count).item(), rel=1e-4)


def cache_of(folder, model, encoding, k):
    """What a teacher says about the texts, in its own tokens."""
    facts = CacheFacts("tiny", tokenizer_key(encoding.tokenizer), model.config.vocab_size, k)
    folder.mkdir()
    writer = CacheWriter(folder, facts)
    model.eval()
    for row in rows():
        for side in encoding.sides(row, ours()):
            with torch.no_grad():
                logits = model(torch.tensor([side.ids])).logits[0]
            kept = torch.tensor([place for place, label in enumerate(side.labels) if label != -100])
            ids = torch.tensor(side.ids)
            top = TopK.of(logits[kept - 1], k, ids[kept])
            writer.add(CachedRow(ids, kept, top, -top.label_log_prob_N.mean().item(), text_key(row)))
    writer.finish()
    return folder


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    return [
        cache_of(folder / "pivot", student(3), ours(), 8),
        cache_of(folder / "other", teacher(), theirs(), 8),
    ]


@pytest.mark.parametrize("case", ["fuse_llm", "gld", "fusion_x"])
def test_a_cache_gives_what_the_live_teacher_gives(case, caches, tmp_path):
    objectives = {**CASES[case][1]}
    cached = [aligned(str(caches[0]), ours()), aligned(TeacherCache(caches[1]))]
    live = train(make_trainer(tmp_path, 8, 1, both(), objectives))
    found = train(make_trainer(tmp_path, 8, 1, cached, objectives))
    # Log probabilities in fp16. After a step, the L1 distances of GLD have other signs here and there.
    name = [*objectives][1]
    assert found[0][0][name] == pytest.approx(live[0][0][name], rel=2e-3, abs=1e-3)
    same(found, train(make_trainer(tmp_path, 4, 2, cached, objectives)))


def test_the_selector_is_trained_and_saved_in_checkpoints_alone(tmp_path):
    objectives = {"task": 0.5, "fusion_x": 0.5}
    trainer = make_trainer(tmp_path, 8, 1, both(), objectives, save_strategy="steps", save_steps=3)
    gate = trainer._stateful[0].loss.gate
    before = [parameter.detach().clone() for parameter in gate.parameters()]
    train(trainer)
    assert all((one - two).abs().max() > 0 for one, two in zip(before, gate.parameters()))
    states = load_file(tmp_path / "checkpoint-3" / "objective_states_0.safetensors")
    assert "fusion_x.gate.0.weight" in states
    assert not any("gate.0" in name for name in load_file(tmp_path / "checkpoint-3" / "model.safetensors"))


def test_pieces_of_long_texts_learn_from_pieces(tmp_path):
    data = [{"text": text[:500]} for text in texts()[:3]]
    mine = Encoding(byte_bpe(), 48)
    found = AlignedTeacher(teacher(), data, student=mine, encoding=Encoding(sentence_piece(), 40), k=8)
    sides = [side for row in data for side in mine.sides(row)]
    trainer = make_trainer(tmp_path, 4, 1, [found], {"task": 0.5, "gld": {"weight": 0.1, "k": 5}})
    trainer.train_dataset = trainer.eval_dataset = [{"input_ids": side.ids, "labels": side.labels} for side in sides]
    logs, _ = train(trainer)
    assert len(sides) > 9 and all(math.isfinite(entry["gld"]) for entry in logs[:-1])


def test_what_does_not_fit_is_refused(caches, tmp_path):
    def refused(match, teachers, objectives, **changes):
        with pytest.raises(FuseError, match=match):
            train(make_trainer(tmp_path, 8, 1, teachers, objectives, **changes))

    refused("fuses teachers that may read in other tokens", [student(3)], FUSE)
    refused("compares whole sequences", [aligned()], {"gld": 1.0}, chunk_size=4)
    others = AlignedTeacher(teacher(), rows()[:2], student=ours(), encoding=theirs())
    refused("is none of the data", [others], KL)
    turned = AlignedTeacher(teacher(), rows(), student=theirs(), encoding=ours())
    refused("aligned with another tokenizer", [turned], KL)
    refused("the student's tokenizer has 400 tokens, its vocabulary 32", [aligned()], KL, model=llama)
    refused("compares them token by token|needs logits|top-K", [aligned()], {"dhkd": 1.0})
    with pytest.raises(FuseError, match="made with another tokenizer"):
        aligned(str(caches[1]), ours())
    with pytest.raises(FuseError, match="no tokenizer beside it"):
        AlignedTeacher(teacher(), rows(), student=ours())
    short = AlignedTeacher(str(caches[1]), rows(), student=ours(), encoding=Encoding(sentence_piece(), 20))
    refused("is not in it, or was read with another", [short], KL)
    assert len(encoded()) == len(rows())
