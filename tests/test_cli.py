"""The command line: every command explains itself, overrides win, and nothing is imported that is not needed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from hf_fuse import cli, method_list, registry
from hf_fuse.errors import RecipeError
from hf_fuse.schemas import RECIPES, method_schema

COMMANDS = ("merge", "plan", "list", "schema", "push", "inspect", "eval", "demo", "sweep", "train", "learn", "compress")


def run(*arguments: str) -> None:
    cli.app(list(arguments), standalone_mode=False)


def in_a_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    run(command, "--help")
    assert "Usage:" in capsys.readouterr().out


def test_list(capsys):
    run("list")
    shown = capsys.readouterr().out
    assert all(name in shown for name in registry.names("merge"))
    run("list", "ties")
    shown = capsys.readouterr().out
    assert "density" in shown and "method: ties" in shown and "arxiv.org" in shown
    run("list", "subspace_boosting")
    shown = capsys.readouterr().out
    assert "post:\n  subspace_boosting:\n    beta: 0.2" in shown and "spectral:" not in shown
    run("list", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert {entry["name"] for entry in facts if entry["kind"] == "merge"} == set(registry.names("merge"))
    assert {entry["name"] for entry in facts if entry["kind"] == "post"} == set(registry.names("post"))
    assert all(option["meaning"] for entry in facts for option in entry["parameters"].values())


def test_list_covers_all_kinds_and_tells_them_apart(capsys):
    run("list", "--json")
    facts = json.loads(capsys.readouterr().out)
    of = {kind: {entry["name"] for entry in facts if entry["kind"] == kind} for kind in registry.KINDS}
    assert of == {kind: set(registry.names(kind)) for kind in registry.KINDS} and "llm_drop" in of["compress"]
    run("list", "--kind", "compress")
    shown = capsys.readouterr().out
    assert "llm_drop" in shown and "ties" not in shown
    run("list", "low_rank_experts")
    shown = capsys.readouterr().out
    assert "rank: 32" in shown and "calibration:" in shown and "arxiv.org/abs/2310.01334" in shown
    run("list", "fisher")  # an estimator, and the merge that uses it
    shown = capsys.readouterr().out
    assert "estimator: fisher" in shown and "method: fisher" in shown
    run("list", "comp_sum")
    assert "objectives:\n  comp_sum:" in capsys.readouterr().out
    for arguments, words in ((["tise"], "Did you mean 'ties'"), (["--kind", "merg"], "Did you mean 'merge'"),
                             (["ties", "--kind", "compress"], "no method is called 'ties'")):  # fmt: skip
        with pytest.raises(RecipeError, match=words):
            run("list", *arguments)


@pytest.mark.parametrize("kind", registry.KINDS)
def test_every_method_has_a_schema_and_recipes_in_which_its_defaults_pass(kind):
    for name in registry.names(kind):
        method, schema = registry.get(kind, name), method_schema(name, kind)
        assert set(schema["properties"]) == set(method.options) and schema["additionalProperties"] is False
        for option in method.options.values():
            if "default" in schema["properties"][option.name] and not option.per_model:
                assert option.check(option.default, "here") == option.default
        if kind in method_list.RECIPES:
            assert name in method_list.RECIPES[kind](method_list.method_facts(method), method)


def test_schema_of_a_method(capsys):
    run("schema", "--method", "llm_drop")
    found = json.loads(capsys.readouterr().out)
    assert found["required"] == ["drop"] and found["properties"]["drop"]["minimum"] == 0
    assert found["properties"]["target"]["enum"] == ["attention", "mlp", "joint", "block"]
    assert "ranking" in found["properties"]["target"]["description"]
    run("schema", "compress")
    assert {"method", "calibration"} <= set(json.loads(capsys.readouterr().out)["properties"])
    for command in RECIPES:
        run("schema", command)
        assert json.loads(capsys.readouterr().out)["type"] == "object"
    with pytest.raises(RecipeError, match="several kinds.*merge, learn"):
        run("schema", "--method", "fisher")
    with pytest.raises(RecipeError, match="'comprss' has no recipe. Did you mean 'compress'"):
        run("schema", "comprss")


def test_schema_is_a_schema_of_recipes(capsys):
    run("schema")
    schema = json.loads(capsys.readouterr().out)
    assert {"method", "models", "base_model", "slices", "tokenizer"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False
    run("schema", "train")
    schema = json.loads(capsys.readouterr().out)
    assert {"model", "adapter", "data", "train"} <= set(schema["properties"])


def test_plan_as_json_with_overrides(tiny_family, tmp_path, capsys):
    family = tiny_family("plain")
    (tmp_path / "recipe.yaml").write_text(
        f"method: ties\nbase_model: {family.base}\nmodels: [{family.tuned[0]}, {family.tuned[1]}]\n"
    )
    run("plan", str(tmp_path / "recipe.yaml"), "--json", "--parameters.density", "1e-1", "--models.1.weight=0.5")
    plan = json.loads(capsys.readouterr().out)
    assert plan["method"] == "ties" and len(plan["parents"]) == 3 and plan["bytes_written"] > 0
    with pytest.raises(RecipeError, match="density is 3"):
        run("plan", str(tmp_path / "recipe.yaml"), "--parameters.density", "3")
    with pytest.raises(RecipeError, match="--densty: no such option or recipe key.*--parameters.densty"):
        run("plan", str(tmp_path / "recipe.yaml"), "--densty", "3")


def test_start_up_imports_little():
    loaded = in_a_process(
        "import sys, hf_fuse, hf_fuse.cli, hf_fuse.recipe\n"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub', 'matplotlib', 'datasets') if m in sys.modules])"
    )
    assert loaded.strip() == "[]"


def test_a_merge_never_imports_transformers(tiny_family, tmp_path):
    family = tiny_family("plain")
    loaded = in_a_process(
        "import sys, hf_fuse\n"
        f"hf_fuse.merge({{'method': 'linear', 'models': [{str(family.tuned[0])!r}, {str(family.tuned[1])!r}]}},"
        f" output={str(tmp_path / 'out')!r})\n"
        "print([m for m in ('transformers', 'peft', 'datasets', 'matplotlib') if m in sys.modules])"
    )
    assert loaded.strip().splitlines()[-1] == "[]"
