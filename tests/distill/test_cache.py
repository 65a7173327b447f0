"""The cache of a teacher's predictions: what comes back, what is refused, and what a killed writer leaves."""

import json
import pickle

import pytest
import torch
from safetensors.numpy import load_file, save_file

from hf_fuse.distill.cache import (
    CACHE_FILE,
    CachedRow,
    CacheFacts,
    CacheWriter,
    TeacherCache,
    cache_bytes,
    row_key,
    text_key,
)
from hf_fuse.distill.top_k import TopK
from hf_fuse.errors import CheckpointError

FACTS = CacheFacts("teacher", "tokenizer", vocabulary=100, k=8)


def cached_rows(count=5, vocabulary=100, k=8):
    random = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        length = number + 2
        logits = 3 * torch.randn(length, vocabulary, generator=random)
        labels = torch.randint(vocabulary, (length,), generator=random)
        ids = torch.randint(vocabulary, (length + 3,), generator=random)
        top = TopK.of(logits, k, labels)
        loss = -top.label_log_prob_N.mean().item()
        rows.append(CachedRow(ids, torch.arange(length) + 3, top, loss, text_key({"text": str(number // 2)})))
    return rows


def written(folder, rows, facts=FACTS, **options):
    folder.mkdir(exist_ok=True)
    writer = CacheWriter(folder, facts, **options)
    for row in rows:
        writer.add(row)
    writer.finish()
    return TeacherCache(folder)


@pytest.mark.parametrize(("vocabulary", "code"), [(100, "uint16"), (70_000, "int32")])
def test_what_is_written_is_read(vocabulary, code, tmp_path):
    rows = cached_rows(vocabulary=vocabulary)
    facts = CacheFacts("teacher", "tokenizer", vocabulary=vocabulary, k=8)
    cache = pickle.loads(pickle.dumps(written(tmp_path / "cache", rows, facts, shard_bytes=500)))
    shards = sorted((tmp_path / "cache").glob("*.safetensors"))
    assert len(shards) > 1 and len(cache) == 5 and cache.facts == facts
    assert load_file(shards[0])["top_ids"].dtype == code
    for row in rows:
        (number,) = cache.find(row_key(row.input_ids_S.tolist()))
        found, top = cache.row(number), row.predictions
        assert found.input_ids_S.equal(row.input_ids_S) and found.positions_N.equal(row.positions_N)
        assert cache.positions(number).tolist() == row.positions_N.tolist()
        assert found.text_key == row.text_key and found.cross_entropy == pytest.approx(row.cross_entropy)
        assert found.predictions.ids_NK.equal(top.ids_NK)
        torch.testing.assert_close(found.predictions.log_probs_NK, top.log_probs_NK, rtol=1e-3, atol=0)
        for name in ("tail_log_prob_N", "label_log_prob_N", "log_z_N"):
            assert getattr(found.predictions, name).equal(getattr(top, name))
    assert cache.of_text(text_key({"text": "1", "other column": 1})) == [2, 3] and cache.find(b"none") == []


def test_the_size_is_known_beforehand(tmp_path):
    rows = cached_rows(50)
    written(tmp_path / "cache", rows)
    size = (tmp_path / "cache" / "predictions-00001.safetensors").stat().st_size
    tokens, predictions = (sum(len(getattr(row, name)) for row in rows) for name in ("input_ids_S", "positions_N"))
    assert 0 < size - cache_bytes(tokens, predictions, 8, 100) < 52 * 50 + 1200
    assert cache_bytes(0, 1, 16, 32_000) == 80 and cache_bytes(0, 1, 16, 128_256) == 112


def test_rows_with_fewer_tokens_than_k(tmp_path):
    row = cached_rows(1)[0]
    top = row.predictions.each(lambda values: values[:, :2] if values.dim() == 2 else values)
    found = written(tmp_path / "cache", [CachedRow(row.input_ids_S, row.positions_N, top, 1.0, row.text_key)]).row(0)
    assert found.predictions.ids_NK[:, 2:].eq(0).all() and not found.predictions.known_NK[:, 2:].any()
    assert found.predictions.known_NK[:, :2].all()


def test_a_killed_writer_is_gone_on_from(tmp_path):
    rows, folder = cached_rows(), tmp_path / "cache"
    folder.mkdir()
    killed = CacheWriter(folder, FACTS, shard_bytes=500)
    for row in rows[:4]:
        killed.add(row)
    with pytest.raises(CheckpointError, match="unfinished cache"):
        TeacherCache(folder)
    again = CacheWriter(folder, FACTS, shard_bytes=500)
    assert 0 < again.rows <= 4
    for row in rows[again.rows :]:
        again.add(row)
    again.finish()
    whole = written(tmp_path / "whole", rows, shard_bytes=500)
    for number in range(5):
        for name in ("input_ids_S", "positions_N"):
            assert getattr(TeacherCache(folder).row(number), name).equal(getattr(whole.row(number), name))
    other = CacheFacts("teacher", "tokenizer", vocabulary=100, k=8, revision="abc", data="x")
    with pytest.raises(CheckpointError, match="its revision is unknown, not abc; data is unknown, not x"):
        CacheWriter(folder, other)


def test_the_folders_name_does_not_count_where_the_weights_are_known():
    facts = CacheFacts("a", "tokenizer", vocabulary=100, k=8, weights="same")
    moved = CacheFacts("b", "tokenizer", vocabulary=100, k=8, weights="same")
    changed = CacheFacts("a", "tokenizer", vocabulary=100, k=8, weights="other")
    assert facts.differences(moved) == [] and facts.differences(changed) == ["weights is same, not other"]


def damaged(folder, change):
    path = folder / "predictions-00001.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return TeacherCache(folder)


def test_damage_is_noticed(tmp_path):
    folder = tmp_path / "cache"
    rows = cached_rows()

    def refused(match, change):
        written(folder, rows)
        with pytest.raises(CheckpointError, match=match):
            damaged(folder, change).row(0)
        for path in folder.iterdir():
            path.unlink()

    refused("no shard", lambda tensors: tensors.pop("log_z"))
    refused("no shard", lambda tensors: tensors.update(log_z=tensors["log_z"].astype("float64")))
    refused("top_ids doesn't fit", lambda tensors: tensors.update(positions=tensors["positions"][1:]))
    refused("token_starts doesn't fit", lambda tensors: tensors["token_starts"].__setitem__(1, 99))
    refused("beyond the vocabulary", lambda tensors: tensors["top_ids"].__setitem__((0, 0), 100))
    large = CacheFacts("teacher", "tokenizer", vocabulary=70_000, k=8)  # whose ids have a sign
    written(folder, cached_rows(vocabulary=70_000), large)
    with pytest.raises(CheckpointError, match="beyond the vocabulary"):
        damaged(folder, lambda tensors: tensors["top_ids"].__setitem__((0, 0), -1)).row(0)
    cache = written(tmp_path / "other", rows)
    folder = cache.folder
    said = json.loads((folder / CACHE_FILE).read_text())
    for change in ({"vocabulary": "100"}, {"k": None}, {"temperature": "1"}, {"rows": "5"}, {"more": 1}):
        (folder / CACHE_FILE).write_text(json.dumps(said | change))
        with pytest.raises(CheckpointError, match=f"{CACHE_FILE}: .*Make the cache again"):
            TeacherCache(folder)
    (folder / CACHE_FILE).write_text(json.dumps(said))
    (cache.folder / "predictions-00001.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="predictions-00001"):
        TeacherCache(folder)
    (folder / CACHE_FILE).write_text(json.dumps({"format": 2}))
    with pytest.raises(CheckpointError, match="version 1"):
        TeacherCache(folder)
    with pytest.raises(CheckpointError, match="holds no teacher_cache.json"):
        TeacherCache(tmp_path)
