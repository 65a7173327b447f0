"""Model cards: the front matter is parsed by the Hub client itself and checked by the server, the snippet is run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hub_server import HubServer
from test_hub import save_model

from hf_fuse.card import agreed_license, card_for_repo, merge_card, read_license, write_metrics
from hf_fuse.errors import FuseError
from hf_fuse.hub import push

RECIPE = """\
# three experts
method: ties
base_model: lab/base
models:
- path: lab/code
  weight: 0.5
- path: /home/ada/my runs/prose model
- path: ../private/law
parameters:
  density: [0.2, 0.5]
output: /scratch/out
"""
BASE = {"ref": "lab/base", "repo_id": "lab/base", "commit": "a" * 40, "license": "apache-2.0", "role": "base"}
CODE = {"ref": "lab/code", "repo_id": "lab/code", "commit": "b" * 40, "license": "apache-2.0", "role": "model",
        "weight": 0.5}  # fmt: skip
PROSE = {"ref": "/home/ada/my runs/prose model", "repo_id": None, "commit": None, "license": None, "role": "model",
         "weight": [0.1, 0.9]}  # fmt: skip
LAW = {"ref": "../private/law", "repo_id": None, "commit": None, "license": None, "role": "model", "weight": None}


def info(**changes) -> dict:
    return {
        "title": "Merged", "method": "ties", "summary": "Two experts and their base, merged from /home/ada/runs/x.",
        "paper": "https://arxiv.org/abs/2306.01708", "architecture": "LlamaForCausalLM", "recipe_yaml": RECIPE,
        "parents": [BASE, CODE, PROSE, LAW], "versions": {"hf_fuse": "0.1.0", "torch": "2.13.0"},
        "warnings": ["tokenizer of /home/ada/my_runs/prose has 2 more tokens"],
        "figures": {"similarity": "/home/ada/out/similarity.png", "mean norm": 0.25},
    } | changes  # fmt: skip


def metadata(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def check_with_the_hub(hub: HubServer, card: str) -> None:
    """Both judges: the client's own parser, and the endpoint that every commit asks."""
    from huggingface_hub import ModelCard
    from huggingface_hub.utils import get_session

    assert ModelCard(card).data.to_dict()
    answer = get_session().post(f"{hub.url}/api/validate-yaml", json={"content": card, "repoType": "model"})
    assert answer.status_code == 200 and answer.json() == {"errors": [], "warnings": []}, answer.text


def test_front_matter(hub: HubServer) -> None:
    from huggingface_hub import ModelCard

    card = merge_card(info())
    check_with_the_hub(hub, card)
    assert metadata(card) == {
        "base_model": ["lab/base", "lab/code"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "hf_fuse", "ties"],
        "license": "apache-2.0",
    }
    parsed = ModelCard(card).data
    assert parsed.base_model == ["lab/base", "lab/code"] and parsed.get("base_model_relation") == "merge"


def test_body() -> None:
    card = merge_card(info())
    assert "# Merged\n" in card
    assert "`ties` ([paper](https://arxiv.org/abs/2306.01708))" in card
    assert f"| [lab/base](https://huggingface.co/lab/base/tree/{'a' * 40}) | base | `{'a' * 12}` |" in card
    assert "| prose model | model | local | [0.1, 0.9] |" in card and "| law | model | local |  |" in card
    assert "![similarity](similarity.png)" in card and "| mean norm | 0.25 |" in card
    assert "- hf_fuse 0.1.0\n- torch 2.13.0" in card
    assert "tokenizer of prose has 2 more tokens" in card
    recipe = yaml.safe_load(re.search("```yaml\n(.*?)```", card, re.S)[1])
    assert recipe == yaml.safe_load(RECIPE) | {
        "models": [{"path": "lab/code", "weight": 0.5}, {"path": "prose model"}, {"path": "law"}], "output": "out",
    }  # fmt: skip


def test_no_local_paths_anywhere(tmp_path: Path) -> None:
    parent = PROSE | {"ref": str(tmp_path / "expert")}
    relative = PROSE | {"ref": "private/runs/expert3/"}
    windows = PROSE | {"ref": r"C:\Users\ada\expert2"}
    recipe = yaml.safe_dump({"models": [{"path": parent["ref"]}, {"path": windows["ref"]}, {"path": "~/secret/m"}]})
    card = merge_card(
        info(parents=[parent, windows, relative], recipe_yaml=recipe, warnings=[f"{tmp_path}/expert has no card"])
    )
    for trace in (str(tmp_path), "/home", "Users", "~/", "secret", "private", str(Path.home()) + "/"):
        assert trace not in card, trace
    assert "expert" in card and "expert2" in card and "| expert3 |" in card
    assert "base_model" not in metadata(card)
    with pytest.raises(FuseError, match="not a Hub id"):
        merge_card(info(parents=[BASE | {"repo_id": "/models/base"}]))


def test_recipe_without_local_paths_stays_as_written() -> None:
    recipe = "# my comment\nmethod: ties   # spaced\nmodels: [lab/a, lab/b]"
    assert f"```yaml\n{recipe}\n```" in merge_card(info(recipe_yaml=recipe))


def test_licences(caplog) -> None:
    def card_of(*licenses: str | None) -> tuple[dict, str]:
        parents = [BASE | {"repo_id": f"lab/m{i}", "license": value} for i, value in enumerate(licenses)]
        card = merge_card(info(parents=parents))
        return metadata(card), card

    data, card = card_of("apache-2.0", "apache-2.0")
    assert data["license"] == "apache-2.0" and "licence" not in card

    data, card = card_of("apache-2.0", "cc-by-nc-4.0")
    assert "license" not in data
    assert "licences differ (lab/m0: apache-2.0, lab/m1: cc-by-nc-4.0)" in card and "licences differ" in caplog.text

    data, card = card_of("mit", None)
    assert data["license"] == "mit" and "stated by lab/m0, but not by lab/m1" in card

    data, card = card_of(None, None)
    assert "license" not in data and "No parent states a licence" in card

    data, _ = card_of("other (llama3.2)", "other (llama3.2)")
    assert data["license"] == "other" and data["license_name"] == "llama3.2"
    assert agreed_license([BASE | {"license": "other (a)"}, CODE | {"license": "other (b)"}])[0] is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\n---\n# x", "mit"),
        ("---\r\nlicense: mit\r\n---\r\n# x", "mit"),
        ("---\nlicense: other\nlicense_name: llama3.2\n---\n", "other (llama3.2)"),
        ("---\nlicense:\n- mit\n- bsd\n---\n", "mit, bsd"),
        ("---\ntags: [a]\n---\nlicense: mit", None),
        ("# no front matter\nlicense: mit", None),
        ("---\nlicense: [unclosed\n---\n", None),
        ("---\nlicense: no\n---\n", None),
        ("---\n- a list\n---\n", None),
        ("", None),
    ],
)
def test_read_license(tmp_path: Path, text: str, expected: str | None) -> None:
    assert read_license(tmp_path) is None
    (tmp_path / "README.md").write_bytes(text.encode())
    assert read_license(tmp_path) == expected


def snippet(card: str) -> str:
    return re.search("```python\n(.*?)```", card, re.S)[1]


@pytest.mark.parametrize("branch", [None, "exp/1"])
def test_usage_snippet_runs_from_the_hub(
    hub: HubServer, repo_id: str, hub_cache: Path, tmp_path: Path, capsys, branch: str | None
) -> None:
    folder = save_model(tmp_path / "merged")
    (folder / "README.md").write_text(merge_card(info()))
    push(folder, repo_id, revision=branch)
    card = hub.read(repo_id, "README.md", branch or "main").decode()
    assert f'model_id = "{repo_id}"' in card and ('revision="exp/1"' in card) == bool(branch)
    assert 'model_id = "."' in (folder / "README.md").read_text()
    exec(snippet(card), {})
    assert len(capsys.readouterr().out) > 1


def test_usage_snippet_runs_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    save_model(tmp_path / "merged")
    monkeypatch.chdir(tmp_path / "merged")
    exec(snippet(merge_card(info())), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("architecture", "auto_class", "tag"),
    [
        ("GPT2LMHeadModel", "AutoModelForCausalLM", "text-generation"),
        ("BertForSequenceClassification", "AutoModelForSequenceClassification", "text-classification"),
        ("RobertaForMaskedLM", "AutoModelForMaskedLM", "fill-mask"),
        ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM", None),
        ("MarianMTModel", "AutoModelForSeq2SeqLM", "translation"),
        ("ViTForImageClassification", "AutoModelForImageClassification", "image-classification"),
        ("LlavaForConditionalGeneration", "LlavaForConditionalGeneration", None),
        ("llama", "AutoModel", None),
        (None, "AutoModel", None),
    ],
)
def test_class_in_the_snippet(architecture: str | None, auto_class: str, tag: str | None) -> None:
    card = merge_card(info(architecture=architecture))
    assert f"model = {auto_class}.from_pretrained" in snippet(card)
    assert metadata(card).get("pipeline_tag") == tag
    compile(snippet(card), "card", "exec")
    assert "AutoTokenizer" not in snippet(merge_card(info(architecture=architecture, has_tokenizer=False)))


def test_classes_agree_with_transformers() -> None:
    """Every architecture that transformers loads with an Auto class is sent to that one, or imported by name."""
    from transformers.models.auto import modeling_auto

    from hf_fuse.card import _task

    tables = {
        "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        "AutoModelForImageClassification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    }
    known = {name: [] for table in tables.values() for names in table.values() for name in _names(names)}
    for auto_class, table in tables.items():
        for names in table.values():
            for name in _names(names):
                known[name].append(auto_class)
    wrong = {name: _task(name)[0] for name, right in known.items() if _task(name)[0] not in (*right, None)}
    assert not wrong
    found = sum(_task(name)[0] is not None for name in known)
    assert found > 0.9 * len(known)


def _names(value: str | tuple) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def test_card_for_repo_leaves_other_cards_alone() -> None:
    text = "# mine\nmodel_id = 'x'\nfrom_pretrained(model_id)\n"
    assert card_for_repo(text, "a/b", "dev") == text
    assert 'model_id = "a/b"' in merge_card(info(repo_id="a/b"))


# Metrics

RESULT = {"task": "text-generation", "dataset": "lab/text", "metric": "perplexity", "value": 7.5, "split": "test"}


def test_metrics_are_added_and_replaced(hub: HubServer, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    readme = tmp_path / "README.md"
    original = merge_card(info())
    readme.write_text(original)
    readme.chmod(0o640)
    assert write_metrics(readme, [RESULT, RESULT | {"metric": "accuracy", "value": 0.5}]) == []
    assert write_metrics(readme, [RESULT | {"value": 6.25}, RESULT | {"dataset": "/data/private/held_out.txt"}]) == []
    text = readme.read_text()
    check_with_the_hub(hub, text)
    assert "/data" not in text and readme.stat().st_mode & 0o777 == 0o640
    results = ModelCard.load(readme).data.eval_results
    found = {(r.task_type, r.dataset_type, r.metric_type, r.metric_value) for r in results}
    assert found == {
        ("text-generation", "lab/text", "perplexity", 6.25),
        ("text-generation", "lab/text", "accuracy", 0.5),
        ("text-generation", "held_out.txt", "perplexity", 7.5),
    }
    assert metadata(text)["model-index"][0]["name"] == "Merged"
    rest = {key: value for key, value in metadata(text).items() if key != "model-index"}
    assert rest == metadata(original) and text.split("---\n", 2)[2] == original.split("---\n", 2)[2]
    assert not list(tmp_path.glob("*.partial"))


def test_metrics_keep_the_rest_of_a_strange_card(tmp_path: Path) -> None:
    """Comments, order, unknown keys, and results the Trainer left without a dataset or metric."""
    readme = tmp_path / "README.md"
    readme.write_text(
        "---\n# chosen with care\nlicense: mit   # really\nmodel-index:\n- name: mine\n  results:\n  - task:\n"
        "      type: fill-mask\n    metrics: []\n  - task:\n      type: text-generation\n    dataset:\n"
        "      type: lab/text\n      name: Text\n      split: test\n    metrics:\n    - type: perplexity\n"
        "      value: 9\n      verified: true\n# about tags\ntags: [b, a]\nodd_key: {x: 1}\n---\n"
        "# Mine\n\n--- a rule\n---\n"
    )
    notes = write_metrics(readme, [RESULT, RESULT | {"dataset": "lab/other"}])
    assert len(notes) == 1 and "without dataset and metrics" in notes[0]
    text = readme.read_text()
    assert text.startswith("---\n# chosen with care\nlicense: mit   # really\n# about tags\ntags: [b, a]\nodd_key:")
    assert text.endswith("---\n# Mine\n\n--- a rule\n---\n")
    entry = metadata(text)["model-index"][0]
    assert entry["name"] == "mine" and len(entry["results"]) == 3
    assert entry["results"][0] == {"task": {"type": "fill-mask"}, "metrics": []}
    assert entry["results"][1]["metrics"] == [{"type": "perplexity", "value": 7.5}]
    assert entry["results"][1]["dataset"]["name"] == "Text"


def test_metrics_survive_an_unusual_layout(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("---\n{license: mit, model-index: [{name: x, results: []}]}\n---\nbody\n")
    write_metrics(readme, [RESULT])
    data = metadata(readme.read_text())
    assert data["license"] == "mit" and data["model-index"][0]["results"][0]["metrics"][0]["value"] == 7.5
    assert readme.read_text().endswith("---\nbody\n")


def test_metrics_need_no_front_matter(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# Mine\ntext\n")
    write_metrics(readme, [RESULT])
    text = readme.read_text()
    assert metadata(text)["model-index"][0]["name"] == "Mine" and text.endswith("---\n\n# Mine\ntext\n")


def test_metrics_that_are_refused(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    with pytest.raises(FuseError, match="README.md: cannot be read"):
        write_metrics(readme, [RESULT])
    readme.write_text("---\nlicense: mit\n---\n")
    before = readme.read_text()
    with pytest.raises(FuseError, match="lacks dataset"):
        write_metrics(readme, [RESULT | {"dataset": None}])
    with pytest.raises(FuseError, match="not finite"):
        write_metrics(readme, [RESULT | {"value": float("nan")}])
    assert readme.read_text() == before
    readme.write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(FuseError, match="front matter is not valid YAML"):
        write_metrics(readme, [RESULT])
    readme.write_text("---\nmodel-index: 3\n---\n")
    with pytest.raises(FuseError, match="model-index is not a list"):
        write_metrics(readme, [RESULT])
