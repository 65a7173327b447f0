"""Recipes: what is read, what is refused, and what is written back."""

from __future__ import annotations

import pytest

from hf_fuse.errors import RecipeError
from hf_fuse.recipe import dump_recipe, load_recipe, parse_size, read_yaml

PLAIN = {"method": "ties", "models": ["org/a", "org/b@v2"], "base_model": "org/base"}


def test_short_forms_of_references():
    recipe = load_recipe({**PLAIN, "models": ["org/a", "org/b@v2", "org/c+org/lora@main"], "push": "me/x"})
    assert [model.key for model in recipe.models] == ["org/a", "org/b@v2", "org/c+org/lora@main"]
    assert recipe.models[2].adapter == "org/lora" and recipe.models[2].adapter_revision == "main"
    assert recipe.push.repo == "me/x"
    assert [ref.key for ref in recipe.references][0] == "org/base"


@pytest.mark.parametrize("text, value", [("1e-4", 1e-4), ("-1E5", -1e5), (".5e3", 500.0), ("1e", "1e"), ("0.3", 0.3)])
def test_numbers_as_people_write_them(text, value):
    assert read_yaml(f"x: {text}") == {"x": value}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"modles": []}, "unknown key 'modles'. Did you mean 'models'?"),
        (
            {"method": "ties", "models": ["a"], "density": 0.1},
            "'density' is a parameter of ties. It belongs under parameters; as a dotted key it is parameters.density.",
        ),
        ({"models": [{"path": "a", "wieght": 1}]}, "unknown key 'wieght' in models.0. Did you mean 'weight'?"),
        ({"models": []}, "give either models"),
        ({"dtype": "float16"}, "dtype"),
        ({"seed": -1}, "seed"),
        ({"push": {"repository": "x"}}, "push"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe(PLAIN | change)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_overrides_win_and_reach_into_lists():
    recipe = load_recipe(PLAIN, {"parameters.density": 0.3, "models.1.weight": 2, "method": "dare_ties"})
    assert recipe.parameters == {"density": 0.3} and recipe.models[1].weight == 2 and recipe.method == "dare_ties"
    assert recipe.models[1].revision == "v2"
    with pytest.raises(RecipeError, match="'5' is not the index"):
        load_recipe(PLAIN, {"models.5.weight": 1})


def test_the_given_dictionary_is_left_alone():
    given = {**PLAIN, "parameters": {}}
    load_recipe(given, {"parameters.density": 0.3})
    assert given["parameters"] == {}


def test_files(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("method: linear\nmodels: [a, b]\nmethod: ties\n")
    with pytest.raises(RecipeError, match="line 3: the key 'method' appears twice"):
        load_recipe(path)
    path.write_text("method: [linear\n")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(path)
    path.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(path)


def test_written_and_read_again():
    recipe = load_recipe({**PLAIN, "parameters": {"density": [0.1, 0.5], "lambda": [{"filter": "mlp", "value": 1}]}})
    assert load_recipe(read_yaml(dump_recipe(recipe))) == recipe


@pytest.mark.parametrize("text, size", [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), (1000, 1000), ("1GiB", 2**30)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["0GB", "five", "-1MB"])
def test_sizes_that_are_none(text):
    with pytest.raises(RecipeError, match="max_shard_size"):
        parse_size(text)
