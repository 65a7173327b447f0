"""Stages, balanced classes and the Step Law: exact counts, limits, figures of the specifications."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig

from hf_fuse import class_balanced, cli, dmt_stages, step_law
from hf_fuse.data.step_law import parameters_outside_embeddings
from hf_fuse.errors import FuseError


def rows(prefix: str, count: int) -> Dataset:
    return Dataset.from_dict({"text": [f"{prefix}{number}" for number in range(count)]})


def test_stages_have_exact_counts_and_fixed_rows():
    maths, code, general = rows("maths", 512), rows("code", 100), rows("general", 60)
    first, second = dmt_stages([maths, code], general)
    assert sorted(first["text"]) == sorted([*maths["text"], *code["text"]])
    assert Counter(text.rstrip("0123456789") for text in second["text"]) == {"general": 60, "maths": 2, "code": 1}
    assert second["text"] == dmt_stages([maths, code], general)[1]["text"]
    assert second["text"] != dmt_stages([maths, code], general, seed=1)[1]["text"]
    alone = dmt_stages([maths], general)[1]["text"]
    assert {text for text in alone if text.startswith("maths")} <= set(second["text"])


def test_limits_of_stages():
    special, general = rows("maths", 8), rows("general", 5)
    assert sorted(dmt_stages([special], general, fraction=0)[1]["text"]) == general["text"]
    whole = dmt_stages([special], general, fraction=1)[1]
    assert sorted(whole["text"]) == sorted([*special["text"], *general["text"]])
    with pytest.raises(FuseError, match="fraction is 2"):
        dmt_stages([special], general, fraction=2)
    with pytest.raises(FuseError, match="set 0 .* has the columns words"):
        dmt_stages([special.rename_column("text", "words")], general)
    with pytest.raises(FuseError, match="set 1 .* is empty"):
        dmt_stages([special, special.select([])], general)
    with pytest.raises(FuseError, match="holds no dataset"):
        dmt_stages([], general)


def test_balanced_classes_come_in_rounds():
    labels = ["rare"] * 2 + ["some"] * 7 + ["many"] * 21
    data = Dataset.from_dict({"label": labels, "row": range(30)})
    view = class_balanced(data)
    assert Counter(view["label"]) == {"rare": 10, "some": 10, "many": 10}
    for start in range(0, 30, 3):
        assert len(set(view["label"][start : start + 3])) == 3
    repeats = Counter(view["row"])
    assert [repeats[0], repeats[1]] == [5, 5] and {repeats[row] for row in range(2, 9)} == {1, 2}
    assert max(repeats[row] for row in range(9, 30)) == 1
    assert view["row"] == class_balanced(data)["row"] != class_balanced(data, seed=1)["row"]
    assert Counter(class_balanced(data, size=5)["label"]).most_common(1)[0][1] == 2
    with pytest.raises(FuseError, match="Did you mean 'label'"):
        class_balanced(data, "labels")
    with pytest.raises(FuseError, match="size is 2"):
        class_balanced(data, size=2)
    with pytest.raises(FuseError, match="row 1 .* has no class"):
        class_balanced(Dataset.from_dict({"label": [0, None]}))
    with pytest.raises(FuseError, match="more than one value per row"):
        class_balanced(Dataset.from_dict({"label": [[0], [1, 2]]}))


def test_step_law():
    found = step_law(1e9, 1e11)
    assert f"{found.learning_rate:.2e}" == "1.63e-03" and found.batch_tokens == pytest.approx(1.108e6, rel=1e-3)
    assert round(found.batch_tokens / 2048) == 541 and found.warning is None
    found = step_law(1.25e8, 2.5e9)
    assert f"{found.learning_rate:.2e}" == "2.32e-03" and found.batch_tokens == pytest.approx(134.8e3, rel=1e-3)
    assert "was fitted on" in step_law(7e9, 1e12).warning
    for tokens in (0, float("inf"), float("nan")):
        with pytest.raises(FuseError, match=f"tokens is {tokens}"):
            step_law(1e9, tokens)


def test_step_law_of_a_model(tmp_path, capsys, tiny_family):
    config = LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    layers = sum(p.numel() for p in model.model.layers.parameters())
    assert parameters_outside_embeddings(config) == layers + 8
    config.tie_word_embeddings = True
    assert parameters_outside_embeddings(config) == layers + 8
    with pytest.raises(FuseError, match="vit: is not a causal language model"):
        parameters_outside_embeddings(ViTConfig())
    cli.app(["step-law", "1e9", "--tokens", "1e11", "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["learning_rate"] == step_law(1e9, 1e11).learning_rate
    cli.app(["step-law", "1e9", "--tokens", "1e11"], standalone_mode=False)
    assert "learning rate: 0.00163" in capsys.readouterr().out
    cli.app(["step-law", str(tiny_family("plain").base), "--tokens", "1e9"], standalone_mode=False)
    said = capsys.readouterr()
    assert "batch: " in said.out and "note: the law was fitted" in said.err
