"""Where two tokenizers have read the same text, which tokens mean the same, and the reports about it."""

import json
import random
import time

import numpy as np
import pytest
import torch
from tiny_tokenizers import byte_bpe, sentence_piece, texts, word_piece

from hf_fuse.cli import app
from hf_fuse.distill.alignment import NOWHERE, content_spans, reading
from hf_fuse.distill.edit_distance import edit_distances, nearest_words
from hf_fuse.distill.pairing import Encoding, pair_row, token_pairs
from hf_fuse.distill.time_warping import _path, time_warped
from hf_fuse.distill.token_texts import bytes_of, special_partners, token_texts
from hf_fuse.distill.tokenizer_report import compare_tokenizers
from hf_fuse.distill.top_k import TopK
from hf_fuse.distill.vocabulary_map import NO_TOKEN, VocabularyMap, vocabulary_map
from hf_fuse.errors import FuseError

TEXT = "The naïve Café 日本語 isn't  two\nspaces 🙂 the module returns."


def levenshtein(one, other):
    row = list(range(len(other) + 1))
    for i, a in enumerate(one):
        following = [i + 1]
        for j, b in enumerate(other):
            following.append(min(row[j + 1] + 1, following[j] + 1, row[j] + (a != b)))
        row = following
    return row[-1]


# ---- places in a text


@pytest.mark.parametrize("make", [byte_bpe, sentence_piece])
def test_bytes_read_are_those_of_the_tokens(make):
    """Also within a character: the tokens' own bytes, one after the other, are the text."""
    tokenizer = make()
    read = reading(tokenizer, TEXT)
    pieces = [bytes_of(token_texts(tokenizer)[token] or "") for token in read.ids]
    done = b""
    for piece, here in zip(pieces, read.read):
        done += piece
        # SentencePiece puts a space before the text.
        if here != NOWHERE:
            assert done.removeprefix(b" ") == TEXT.encode()[:here]
    assert read.read[-1] == len(TEXT.encode()) and read.read.count(NOWHERE) <= 1


def test_lossy_tokenizers_are_placed_by_their_offsets():
    read = reading(word_piece(), "The Café  日 returns")
    ends = dict(zip(word_piece().convert_ids_to_tokens(read.ids), read.read))
    assert ends["the"] == 3 and ends["##f"] == 7 and ends["##e"] == 9 and ends["[UNK]"] == 14 and ends["returns"] == 22


def places(text, student, teacher, **options):
    (pair,) = pair_row({"text": text}, Encoding(student, 512), Encoding(teacher, 512), **options)
    return pair


@pytest.mark.parametrize("student", [byte_bpe, sentence_piece, word_piece])
@pytest.mark.parametrize("teacher", [byte_bpe, sentence_piece, word_piece])
def test_aligned_predictions_follow_on_the_same_text(student, teacher):
    ours, theirs = student(), teacher()
    pair = places(TEXT, ours, theirs)
    found = [(place, other[1]) for place, other in enumerate(pair.places) if other]
    assert len(found) >= 7
    whole = [reading(tokenizer, TEXT).read for tokenizer in (ours, theirs)]
    for place, other in found:
        assert pair.student.labels[place] != -100 and pair.teachers[0].labels[other] != -100
        if student is not teacher:
            assert whole[0][place - 1] == whole[1][other - 1] != NOWHERE
        else:
            assert place == other
    if student is teacher:
        assert len(found) == len(pair.student.ids) - 1


def test_the_end_of_a_text_is_predicted_by_both():
    pair = places("the module returns.", byte_bpe(), sentence_piece())
    assert pair.student.ids[-1] == byte_bpe().eos_token_id
    assert pair.teachers[0].ids[pair.places[-1][1]] == sentence_piece().eos_token_id


def test_pieces_of_a_long_text_find_each_other():
    text = texts()[0][:1500]
    pairs = pair_row({"text": text}, Encoding(byte_bpe(), 100), Encoding(sentence_piece(), 64))
    (whole,) = pair_row({"text": text}, Encoding(byte_bpe(), 5000), Encoding(sentence_piece(), 5000))
    assert len(pairs) > 3 and max(len(pair.teachers) for pair in pairs) > 1
    by_piece = [
        found and (pair.student.ids[place], pair.teachers[found[0]].ids[found[1]])
        for pair in pairs
        for place, found in enumerate(pair.places)
    ]
    at_once = [
        found and (whole.student.ids[place], whole.teachers[0].ids[found[1]])
        for place, found in enumerate(whole.places)
    ]
    # All but what begins a piece on either side, which nothing predicts.
    same = sum(one == other for one, other in zip(by_piece, at_once))
    assert len(by_piece) == len(at_once) and same > 0.95 * len(at_once)
    assert all(one == other for one, other in zip(by_piece, at_once) if one)


CHAT = [
    {"role": "user", "content": " What is it? "},
    {"role": "assistant", "content": "A naïve module."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "It returns 日."},
]


def test_between_chat_templates_the_messages_are_aligned():
    (pair,) = pair_row({"messages": CHAT}, Encoding(byte_bpe(), 300), Encoding(sentence_piece(), 300))
    teacher = pair.teachers[0]
    ours, theirs = token_texts(byte_bpe()), token_texts(sentence_piece())
    found = [(pair.student.ids[place], teacher.ids[other[1]]) for place, other in enumerate(pair.places) if other]
    # First letters, which follow on the templates' own words, and what closes a turn.
    assert [(ours[a], theirs[b]) for a, b in found if ours[a] in ("A", "I")] == [("A", "A"), ("I", "I")]
    closing = (byte_bpe().convert_tokens_to_ids("<|im_end|>"), sentence_piece().eos_token_id)
    assert found.count(closing) == 2
    assert {place for place, other in enumerate(pair.places) if other} <= {
        place for place, label in enumerate(pair.student.labels) if label != -100
    }
    said = "".join(text for text in (ours[a] for a, _ in found) if text)
    assert bytes_of(said).decode() == "A naïve module.It returns 日."


def test_contents_that_a_template_changed_have_no_place():
    assert content_spans("[a] one [b] THREE [c] two", [" one ", "three", "two"]) == [(4, 7), None, (22, 25)]
    assert content_spans("aa aa", ["aa", "aa", ""]) == [(0, 2), (3, 5), None]


def test_completions_are_aligned_as_one_text():
    row = {"prompt": "the mod", "completion": "ule returns."}
    (pair,) = pair_row(row, Encoding(byte_bpe(), 300), Encoding(word_piece(), 300))
    assert pair.student.labels[0] == -100 and sum(bool(found) for found in pair.places) >= 1
    with pytest.raises(FuseError, match="does not tell where its tokens lie"):
        reading(SlowTokenizer(), "a")


class SlowTokenizer:
    is_fast = False
    name_or_path = "slow"


# ---- words


def test_edit_distances_and_nearest_words_are_exact():
    draw = random.Random(0)
    words, known = (
        ["".join(draw.choice("abcde ") for _ in range(draw.randint(0, 11))) for _ in range(count)]
        for count in (250, 300)
    )
    pairs = [(draw.choice(words), draw.choice(known)) for _ in range(500)]
    assert edit_distances(*zip(*pairs)).tolist() == [levenshtein(*pair) for pair in pairs]
    plain = [word.strip().casefold() for word in known]
    for word, found in zip(words, nearest_words(words, known)):
        best = min(
            (levenshtein(word, other), word.strip().casefold() != plain[place], place)
            for place, other in enumerate(known)
        )
        assert found == ((best[2], best[0]) if best[0] <= min(2, len(word) // 2) else (-1, 0)), word


def test_nearest_words_do_not_compare_all_pairs():
    draw = random.Random(0)
    words = ["".join(draw.choice("etaoinshrdlu") for _ in range(draw.randint(3, 11))) for _ in range(10_000)]
    start = time.perf_counter()
    found = nearest_words(words[:1000], words[1000:])
    # All pairs would be 10^7 distances of some 10 us each.
    assert time.perf_counter() - start < 20 and len(found) == 1000


# ---- vocabularies


def test_tokens_are_the_text_they_stand_for():
    ours, theirs, words = (token_texts(make()) for make in (byte_bpe, sentence_piece, word_piece))
    ids = [make().convert_tokens_to_ids for make in (byte_bpe, sentence_piece, word_piece)]
    assert ours[ids[0]("Ġthe")] == " the" and words[ids[2]("the")] == " the"
    assert ours[ids[0]("Ã")] == theirs[ids[1]("<0xC3>")] == "\udcc3"
    assert words[ids[2]("##s")] == "s" and words[ids[2](".")] == "."
    assert ours[byte_bpe().eos_token_id] is None


def test_vocabulary_maps():
    same = vocabulary_map(byte_bpe(), byte_bpe())
    assert torch.equal(same.ids_V, torch.arange(400))
    exact, nearest = (vocabulary_map(sentence_piece(), byte_bpe(), kind) for kind in ("exact", "min_ed"))
    ours, theirs = token_texts(byte_bpe()), token_texts(sentence_piece())
    for number, partner in enumerate(exact.ids_V.tolist()):
        if partner != NO_TOKEN and theirs[number] is not None:
            assert theirs[number] == ours[partner]
        elif theirs[number]:
            other = int(nearest.ids_V[number])
            limit = min(2, len(theirs[number]) // 2)
            assert other == NO_TOKEN or levenshtein(theirs[number], ours[other]) <= limit
    counts = nearest.counts()
    assert counts["same text"] > 280 and counts["nearest text"] > 50 and sum(counts.values()) == len(theirs)


def test_special_tokens_go_by_what_they_do():
    ours, theirs = byte_bpe(), sentence_piece()
    turn = ours.convert_tokens_to_ids("<|im_end|>")
    assert special_partners(ours, theirs) == {turn: theirs.eos_token_id, ours.eos_token_id: theirs.eos_token_id}
    assert special_partners(theirs, ours) == {theirs.eos_token_id: turn}
    assert special_partners(word_piece(), ours) == {word_piece().sep_token_id: ours.eos_token_id}


def test_tokens_seen_together_are_partners():
    ours, theirs = byte_bpe(), sentence_piece()
    pairs = token_pairs(pair for text in texts()[:5] for pair in pair_row(
        {"text": text}, Encoding(ours, 5000), Encoding(theirs, 5000)
    ))  # fmt: skip
    seen = vocabulary_map(theirs, ours, "statistical", pairs)
    assert seen.counts()["seen together"] > 10
    number = next(n for n, how in enumerate(seen.how_V.tolist()) if how == 4)
    counts = {b: count for (a, b), count in pairs.items() if a == number}
    names = token_texts(theirs), token_texts(ours)
    scores = {b: count / (1 + levenshtein(names[0][number], names[1][b])) for b, count in counts.items() if names[1][b]}
    assert scores[int(seen.ids_V[number])] == max(scores.values())


def test_mapped_probabilities_stay_a_distribution():
    mapping = VocabularyMap(torch.tensor([5, 7, 5, -1, 2]), torch.zeros(5, dtype=torch.uint8))
    probabilities = torch.tensor([[0.2, 0.1, 0.15, 0.3, 0.05], [0.2, 0.1, 0.15, 0.3, 0.05]])
    order = probabilities.sort(descending=True)
    top = TopK(order.indices, order.values.log(), torch.tensor([0.2, 0.2]).log())
    made = mapping(top)
    assert made.ids_NK[0].tolist() == [5, 7, 2, 0, 0] and made.known_NK[0].tolist() == [True] * 3 + [False] * 2
    torch.testing.assert_close(made.log_probs_NK[0, :3].exp(), torch.tensor([0.35, 0.1, 0.05]))
    torch.testing.assert_close(made.tail_log_prob_N.exp(), torch.tensor([0.5, 0.5]))
    first = mapping(top, collisions="first")
    torch.testing.assert_close(first.log_probs_NK[0, :3].exp(), torch.tensor([0.2, 0.1, 0.05]))
    torch.testing.assert_close(first.tail_log_prob_N.exp(), torch.tensor([0.65, 0.65]))
    # Rows of embeddings that no token has are padding, whatever the teacher says of them.
    padded = TopK(torch.tensor([[9, 1]]), torch.tensor([[0.6, 0.3]]).log(), torch.tensor([0.1]).log())
    assert mapping(padded).ids_NK.tolist() == [[7, 0]]
    torch.testing.assert_close(mapping(padded).tail_log_prob_N.exp(), torch.tensor([0.7]))


# ---- FuseLLM's own alignment


def test_time_warping():
    assert time_warped(["unbelievable"], ["un", "believ", "able"]) == [NOWHERE]
    assert time_warped(["unbelievable"], ["un", "believ", "able"], accept="suffix") == [2]
    assert time_warped(["a", "cat"], ["a", "cat"]) == [0, 1]
    assert time_warped([], ["a"]) == [] and time_warped(["a"], []) == [NOWHERE]
    draw = np.random.default_rng(0)
    for _ in range(50):
        costs = draw.integers(0, 4, draw.integers(1, 8, 2))
        best = np.full((costs.shape[0] + 1, costs.shape[1] + 1), np.inf)
        best[0, 0] = 0
        for i, j in np.ndindex(*costs.shape):
            best[i + 1, j + 1] = costs[i, j] + min(best[i, j], best[i, j + 1], best[i + 1, j])
        path = _path(costs)
        assert sum(costs[place] for place in path) == best[-1, -1] and path[0] == (0, 0)


def test_boundaries_find_what_time_warping_finds_and_more():
    text = texts()[0][:600]
    ours, theirs = byte_bpe(), sentence_piece()
    exact, warped, suffix = (
        places(text, ours, theirs, align=how).places for how in ("boundaries", "dtw", "dtw_suffix")
    )
    counts = [sum(bool(found) for found in some) for some in (exact, warped, suffix)]
    assert counts[0] > counts[2] >= counts[1] > 0
    # Where warping agrees with a boundary it is right; elsewhere it may be anywhere.
    right = sum(one == other for one, other in zip(exact, warped) if other)
    assert right > 0.8 * counts[1]


# ---- the report


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    byte_bpe().save_pretrained(root / "student")
    sentence_piece().save_pretrained(root / "teacher")
    rows = [{"text": text[:400]} for text in texts()[:6]]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_report(folders, capsys):
    arguments = [str(folders / "student"), str(folders / "teacher"), str(folders / "rows.jsonl")]
    found = compare_tokenizers(*arguments)
    pairs = [
        pair
        for text in texts()[:6]
        for pair in pair_row({"text": text[:400]}, Encoding(byte_bpe(), 9999), Encoding(sentence_piece(), 9999))
    ]
    share = sum(bool(found) for pair in pairs for found in pair.places) / sum(p.student.predictions for p in pairs)
    assert found.aligned == pytest.approx(share) and 0.5 < share < 1 and 0 < found.same_next < 1
    assert sum(found.seen.values()) == pytest.approx(1) and sum(found.vocabulary.values()) == 500
    assert all("".join(ours) == "".join(theirs) for ours, theirs in found.example) and len(found.example) > 5
    itself = compare_tokenizers(arguments[0], arguments[0], arguments[2])
    assert itself.aligned == itself.same_next == 1 and not itself.partners
    app(["tokenizer-report", *arguments[:2], "--data", arguments[2], "--limit", "2"], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "same text" in printed and "in pieces between shared places" in printed
    app(["tokenizer-report", *arguments[:2], "--data", arguments[2], "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["aligned"] == found.aligned
    with pytest.raises(FuseError, match="no such folder"):
        compare_tokenizers("a/b/c", *arguments[1:])
