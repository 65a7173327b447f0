"""Choosing training texts: figures of the specifications, limits, and a real choice between two kinds of text."""

from __future__ import annotations

import json

import numpy as np
import pytest
from datasets import Dataset
from tiny_models import llama_family

from hf_fuse import cli, select
from hf_fuse.data.methods import dsir as dsir_file
from hf_fuse.data.methods.dsir import dsir
from hf_fuse.data.selection import best
from hf_fuse.data.stdlib_text import stdlib_domains
from hf_fuse.errors import FuseError, RecipeError

WORDS = {"a": 0, "b": 1, "c": 2}


@pytest.fixture(scope="module")
def texts():
    """Documents of code and of prose, of some length."""
    domains = {domain.name: domain for domain in stdlib_domains(source_characters=300_000)}
    return {
        name: [text[:1500] for text in domains[name].train if len(text) > 600][:40] for name in ("source", "manual")
    }


def test_dsir_weighs_by_hand_counts(monkeypatch):
    monkeypatch.setattr(dsir_file, "_buckets", lambda text, count: [WORDS[word] for word in text.split()])
    target, raw = "a a a a a b b b c c", "a a b b b c c c c c"  # .5 .3 .2 and .2 .3 .5
    found = dsir([raw], [target], buckets=3, min_words=0)
    log_ratio = np.log([2.5, 1.0, 0.4])
    assert found == pytest.approx([[2, 3, 5] @ log_ratio], abs=1e-6)
    texts = ["a a a b", "b c c c", "a a c c c c b b b c"]  # the whole of what the raw distribution is counted from
    weights = dsir([raw, *texts], [target], buckets=3, min_words=0)
    counts = np.array([2 + 3 + 0 + 2, 3 + 1 + 1 + 3, 5 + 0 + 3 + 5])
    log_ratio = np.log(np.array([0.5, 0.3, 0.2]) + 1e-8) - np.log(counts / counts.sum() + 1e-8)
    assert weights[1:3] == pytest.approx([[3, 1, 0] @ log_ratio, [0, 1, 3] @ log_ratio])


def test_the_specification_example_of_dsir():
    log_ratio = np.log(np.array([0.5, 0.3, 0.2]) + 1e-8) - np.log(np.array([0.2, 0.3, 0.5]) + 1e-8)
    assert [round(float(np.array(counts) @ log_ratio), 3) for counts in ([3, 1, 0], [0, 1, 3])] == [2.749, -2.749]


def test_dsir_finds_the_kind_of_text_and_repeats_itself(texts, tmp_path):
    rows = texts["source"][20:] + texts["manual"][20:]
    kinds = ["source"] * len(texts["source"][20:]) + ["manual"] * len(texts["manual"][20:])
    Dataset.from_dict({"text": rows, "kind": kinds}).to_parquet(tmp_path / "pool.parquet")
    Dataset.from_dict({"text": texts["manual"][:20]}).to_parquet(tmp_path / "target.parquet")
    recipe = {
        "method": "dsir", "data": str(tmp_path / "pool.parquet"), "target": str(tmp_path / "target.parquet"),
        "keep": 10, "parameters": {"min_words": 20},
    }  # fmt: skip
    made = select(recipe, tmp_path / "chosen")
    kept = Dataset.from_parquet(str(made.output / "data.parquet"), cache_dir=str(tmp_path / "cache"))
    assert (made.rows, made.kept) == (len(rows), 10)
    assert kept["kind"].count("manual") >= 9, "far more than the half that chance gives"
    assert [rows.index(text) for text in kept["text"]] == sorted(rows.index(text) for text in kept["text"])
    again = select(recipe, tmp_path / "again")
    for name in ("data.parquet", "select_results.json", "fuse_recipe.yaml", "scores.png"):
        assert (again.output / name).read_bytes() == (made.output / name).read_bytes(), name
    select(made.output / "fuse_recipe.yaml", tmp_path / "third")
    assert (tmp_path / "third" / "data.parquet").read_bytes() == (made.output / "data.parquet").read_bytes()


def test_color_filter_of_one_model_is_zero_and_of_two_their_difference(texts, tmp_path, capsys):
    family = llama_family(tmp_path / "models", layers=1, models=2)
    rows = [text[:200] for text in texts["manual"][:6]]
    Dataset.from_dict({"text": rows}).to_json(tmp_path / "pool.jsonl")
    recipe = {"method": "color_filter", "data": str(tmp_path / "pool.jsonl"), "prior": str(family.base), "keep": 0.5}
    made = select(recipe | {"conditional": str(family.base)}, tmp_path / "same")
    assert made.kept == 3
    same = Dataset.from_parquet(str(made.output / "data.parquet"), cache_dir=str(tmp_path / "cache"))
    assert same["score"] == [0.0] * 3 and same["text"] == rows[:3], "equal scores: the earlier rows"

    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe | {"conditional": str(family.tuned[0])}))
    cli.app(
        ["select", str(tmp_path / "recipe.yaml"), "--keep", "6", "-o", str(tmp_path / "two"), "--json"],
        standalone_mode=False,
    )
    assert json.loads(capsys.readouterr().out)["kept"] == 6
    from transformers import AutoModelForCausalLM, AutoTokenizer

    scores = Dataset.from_parquet(str(tmp_path / "two" / "data.parquet"), cache_dir=str(tmp_path / "cache"))["score"]
    tokenizer, losses = AutoTokenizer.from_pretrained(family.base), []
    for folder in (family.base, family.tuned[0]):
        model = AutoModelForCausalLM.from_pretrained(folder)
        ids = tokenizer(rows[2], return_tensors="pt")["input_ids"]
        losses.append(model(ids, labels=ids).loss.item())
    assert len(ids[0]) <= model.config.max_position_embeddings, "one window, so that the model's own loss is the same"
    assert scores[2] == pytest.approx(losses[0] - losses[1], abs=1e-4)


def test_best_keeps_what_is_possible():
    scores = np.array([1.0, -np.inf, 3.0, 2.0, 3.0])
    assert best(scores, 2).tolist() == [2, 4]
    assert best(scores, 0.01).tolist() == [2], "at least one"
    assert best(scores, 1).tolist() == [2], "a whole number is a count"
    assert best(scores, 4, np.random.default_rng(0)).tolist() == [0, 2, 3, 4]
    with pytest.raises(FuseError, match="5 of 5 rows are to be kept, but only 4 are long enough"):
        best(scores, 1.0)


def test_drawing_follows_the_weights():
    scores = np.log([0.7, 0.2, 0.1])
    first = [best(scores, 1, np.random.default_rng(seed))[0] for seed in range(2000)]
    assert np.bincount(first) / 2000 == pytest.approx([0.7, 0.2, 0.1], abs=0.03)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "dsri"}, "Did you mean 'dsir'"),
        ({"keep": 0.0}, "a share above 0"),
        ({"keep": 0}, "at least 1"),
        ({"target": None}, "target is missing; dsir needs target"),
        ({"prior": "org/model"}, "dsir takes no prior"),
        ({"parameters": {"bucket": 3}}, "Did you mean 'buckets'"),
        ({"dat": "x"}, "Did you mean 'data'"),
    ],
)
def test_bad_recipes_are_one_error(change, message, tmp_path):
    recipe = {"method": "dsir", "data": "pool.jsonl", "target": "target.jsonl", "keep": 0.1} | change
    with pytest.raises(RecipeError, match=message):
        select({key: value for key, value in recipe.items() if value is not None}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_bad_data_is_one_error(tmp_path):
    for name, columns in {"pool": {"text": ["some words", " "]}, "other": {"text": ["words"], "n": [1]}}.items():
        Dataset.from_dict(columns).to_json(tmp_path / f"{name}.jsonl")
    recipe = {"method": "dsir", "target": str(tmp_path / "other.jsonl"), "keep": 1}
    Dataset.from_dict({"text": ["words", "more words"]}).to_json(tmp_path / "whole.jsonl")
    with pytest.raises(FuseError, match=r"pool.*: row 1 \(counted from 0\) holds no text"):
        both = [str(tmp_path / "whole.jsonl"), str(tmp_path / "pool.jsonl")]
        select(recipe | {"data": both}, tmp_path / "out")
    both = [str(tmp_path / "pool.jsonl"), str(tmp_path / "other.jsonl")]
    with pytest.raises(FuseError, match="has the columns text, n, but .*pool.*has text"):
        select(recipe | {"data": both}, tmp_path / "out")
    with pytest.raises(FuseError, match="only 0 are long enough"):
        select(recipe | {"data": str(tmp_path / "other.jsonl")}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
