"""mergekit's YAML: what it is translated to, and what stops."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_fuse.errors import RecipeError
from hf_fuse.merge.parameters import option_value, resolve_value
from hf_fuse.recipe import load_recipe, read_yaml
from hf_fuse.recipe_mergekit import translate
from hf_fuse.recipe_mergekit_parameters import METHODS, first_found
from hf_fuse.registry import get


def recipe_of(text: str) -> dict[str, Any]:
    """What is translated, after the recipe's own validation has accepted it."""
    data = read_yaml(text)
    load_recipe(data)
    return translate(data, "file.yml")


# --- translation -----------------------------------------------------------------------------------------


def test_slerp_starts_from_the_base_wherever_it_is_listed():
    recipe = recipe_of("""
        merge_method: slerp
        base_model: org/first
        slices:
          - sources:
              - {model: org/second, layer_range: [0, 8]}
              - {model: org/first, layer_range: [2, 10]}
        parameters:
          t:
            - {filter: attn, value: [0, 1]}
            - {filter: "*", value: 0.5}
            - {filter: never, value: 1}
        dtype: bfloat16
    """)
    assert recipe["slices"] == [
        {
            "sources": [
                {"model": {"path": "org/first"}, "layers": [2, 10]},
                {"model": {"path": "org/second"}, "layers": [0, 8]},
            ]
        }
    ]
    assert recipe["parameters"] == {"t": [{"filter": "attn", "value": [0.0, 1.0]}, {"value": 0.5}]}
    assert recipe["out_dtype"] == "bfloat16" and "dtype" not in recipe
    assert recipe["dialect"] == "mergekit"


def test_slerp_in_models_form_gets_the_base_that_is_not_listed():
    recipe = recipe_of("{merge_method: slerp, base_model: a, models: [{model: b}], parameters: {t: 0.3}}")
    assert recipe["models"] == [{"path": "a"}, {"path": "b"}]


def test_ties_gets_mergekits_formula_and_defaults():
    recipe = recipe_of("""
        merge_method: ties
        base_model: base
        models:
          - model: base
          - {model: a, parameters: {weight: 1, density: [1, 0.5]}}
          - {model: b, parameters: {weight: "1e-1"}}
        parameters: {int8_mask: true, normalize: "no", rescale: false}
        dtype: torch.float16
    """)
    assert recipe["models"] == [
        {"path": "a", "weight": 1.0, "parameters": {"density": [1.0, 0.5]}},
        {"path": "b", "weight": 0.1},
    ]
    assert recipe["parameters"] == {
        "normalize": False, "density": 1.0, "scope": "tensor", "trim": "exact", "tie": "positive",
    }  # fmt: skip
    assert recipe["out_dtype"] == "float16"


def test_linear_counts_the_base_as_a_model():
    recipe = recipe_of("{merge_method: linear, base_model: a, models: [{model: b}], parameters: {weight: 2}}")
    assert recipe["models"] == [{"path": "b"}, {"path": "a"}]
    assert recipe["base_model"] == {"path": "a"}


@pytest.mark.parametrize(
    ("flags", "axis"),
    [
        ("", None),
        ("nuslerp_flatten: true, nuslerp_row_wise: true", "tensor"),
        ("nuslerp_flatten: false", "rows"),
        ("nuslerp_flatten: false, nuslerp_row_wise: true", "columns"),
        (
            "nuslerp_flatten: [{filter: mlp, value: false}], nuslerp_row_wise: true",
            [{"filter": "mlp", "value": "columns"}, {"value": "tensor"}],
        ),
        ("nuslerp_flatten: false, nuslerp_row_wise: [no, yes]", ["rows", "columns"]),
    ],
)
def test_nuslerp_flags_become_an_axis(flags: str, axis: Any):
    text = "{merge_method: nuslerp, models: [{model: a}, {model: b}], parameters: {weight: 1, FLAGS}}"
    assert recipe_of(text.replace("FLAGS", flags))["parameters"].get("axis") == axis


def test_a_slice_sees_the_files_nuslerp_flags():
    recipe = recipe_of("""
        merge_method: nuslerp
        slices:
          - sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]
            parameters: {nuslerp_row_wise: true}
        parameters: {weight: 1, nuslerp_flatten: false}
    """)
    assert recipe["slices"][0]["parameters"] == {"axis": "columns"}
    assert recipe["parameters"]["axis"] == "rows"


@pytest.mark.parametrize("rescale", [None, True, False])
def test_dare_keeps_mergekits_l1_rescaling(rescale: bool | None):
    given_ = "" if rescale is None else f", rescale: {rescale}"
    text = "{merge_method: dare_ties, base_model: a, models: [{model: b}], parameters: {weight: 1" + given_ + "}}"
    parameters = recipe_of(text)["parameters"]
    assert parameters["rescale"] == ("none" if rescale is False else "l1_norm")
    assert parameters["density"] == 1.0


def test_filters_without_a_last_word_keep_mergekits_default_and_ask_for_what_has_none():
    recipe = recipe_of("""
        merge_method: dare_linear
        base_model: base
        models: [{model: a, parameters: {weight: [{filter: mlp, value: 1}]}}]
        parameters: {density: {filter: mlp, value: 0.5}}
    """)
    assert recipe["parameters"]["density"] == [{"filter": "mlp", "value": 0.5}, {"value": 1.0}]
    assert recipe["parameters"]["weight"] == [{"value": "given by no filter"}]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("org/name", {"path": "org/name"}),
        ("org/name@v1", {"path": "org/name", "revision": "v1"}),
        ("org/n@v1+me/lora@v2", {"path": "org/n", "revision": "v1", "adapter": "me/lora", "adapter_revision": "v2"}),
        ("{model: org/n@v1, lora: me/lora}", {"path": "org/n", "revision": "v1", "adapter": "me/lora"}),
        (
            "{model: {path: org/n, revision: v1}, lora: {path: l}, override_architecture: null}",
            {"path": "org/n", "revision": "v1", "adapter": "l"},
        ),
    ],
)
def test_model_references(written: str, meant: dict[str, str]):
    quoted = written if written.startswith("{") else f'"{written}"'
    recipe = recipe_of(f"{{merge_method: passthrough, models: [{{model: {quoted}}}]}}")
    assert recipe["models"] == [meant]


def test_a_folder_with_plus_and_at_in_its_name_is_a_folder(tmp_path: Path):
    folder = tmp_path / "a+b@c"
    folder.mkdir()
    recipe = recipe_of(f'{{merge_method: passthrough, models: [{{model: "{folder}"}}]}}')
    assert recipe["models"] == [{"path": str(folder)}]


def test_modules_of_the_whole_model_stand_between_slices_and_file():
    recipe = recipe_of("""
        merge_method: linear
        modules:
          default:
            models: [{model: a}, {model: b}]
            parameters: {weight: [{filter: mlp, value: 3}]}
        parameters: {weight: 2}
    """)
    assert recipe["parameters"]["weight"] == [{"filter": "mlp", "value": 3.0}, {"value": 2.0}]


def test_tokenizer_settings():
    recipe = recipe_of("""
        merge_method: linear
        models: [{model: a+l, parameters: {weight: 1}}, {model: b@v, parameters: {weight: 1}}]
        tokenizer:
          source: a
          tokens:
            <x>: {source: b@v, force: true}
            <y>: {source: {kind: zero}}
            <z>: {source: {kind: model_token, model: b@v, token_id: 3}}
          pad_to_multiple_of: 64
        chat_template: chatml
    """)
    assert recipe["tokenizer"] == {
        "source": "a+l",
        "tokens": {
            "<x>": {"source": "b@v", "force": True},
            "<y>": {"source": {"kind": "zero"}},
            "<z>": {"source": {"kind": "model_token", "model": "b@v", "token_id": 3}},
        },
        "pad_to_multiple_of": 64,
    }
    assert recipe["chat_template"] == "chatml"


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ("dtype: float64", {"dtype": "float64", "out_dtype": "float64"}),
        ("dtype: float32, out_dtype: bfloat16", {"out_dtype": "bfloat16"}),
        ("out_dtype: float16", {"out_dtype": "float16"}),
        ("dtype: null", {}),
    ],
)
def test_types(types: str, expected: dict[str, str]):
    recipe = recipe_of(f"{{merge_method: passthrough, models: [{{model: a}}], {types}}}")
    assert {key: value for key, value in recipe.items() if "dtype" in key} == expected


@pytest.mark.parametrize("method", METHODS)
def test_every_translated_parameter_is_an_option_of_our_method(method: str):
    rule, options = METHODS[method], get("merge", method).options
    targets = {p.target for p in rule.parameters.values() if p.only is None} | set(rule.fixed)
    if method == "nuslerp":
        targets = targets - {"nuslerp_flatten", "nuslerp_row_wise"} | {"axis"}
    assert targets <= set(options)
    for name, parameter in rule.parameters.items():
        if parameter.per_model and parameter.target == "weight":
            assert options["weight"].per_model, name


# What mergekit does where a file says nothing.
MERGEKITS_DEFAULTS = {
    "linear": {"normalize": True},
    "slerp": {"threshold": 0.9995},
    "nuslerp": {"axis": "tensor"},
    "multislerp": {"normalize": True},
    "karcher": {"max_iter": 10, "tol": 1e-5, "weight": 1.0},
    "task_arithmetic": {"normalize": False, "lambda": 1.0},
    "ties": {"normalize": True, "lambda": 1.0, "density": 1.0, "scope": "tensor", "trim": "exact", "tie": "positive"},
    "dare_linear": {"normalize": False, "lambda": 1.0, "density": 1.0, "rescale": "l1_norm"},
    "dare_ties": {"normalize": False, "lambda": 1.0, "density": 1.0, "rescale": "l1_norm"},
    "della": {"normalize": True, "lambda": 1.0, "density": 1.0, "rescale": "l1_norm", "epsilon": 0.15, "ranks": "row"},
    "della_linear": {
        "normalize": False, "lambda": 1.0, "density": 1.0, "rescale": "l1_norm", "epsilon": 0.15, "ranks": "row"
    },
    "breadcrumbs": {
        "normalize": False, "lambda": 1.0, "density": 1.0, "gamma": 0.01, "precedence": "density", "scope": "tensor"
    },
    "breadcrumbs_ties": {
        "normalize": False, "lambda": 1.0, "density": 1.0, "gamma": 0.01, "precedence": "density", "scope": "tensor"
    },
    "sce": {"density": 1.0},
    "ram": {"epsilon": 1e-5},
    "ramplus_tl": {"epsilon": 1e-5, "r": 0.1, "alpha": 0.2},
    "nearswap": {"t": 0.1},  # required: what the file says
    "arcee_fusion": {},
    "model_stock": {"rows": False, "clamp": False},
    "passthrough": {"scale": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_what_a_file_leaves_out_is_mergekits_default(method: str):
    """Written into the recipe, or ours anyway."""
    rule = METHODS[method]
    required = {name: 0.1 for name, parameter in rule.parameters.items() if parameter.required}
    models = [{"model": name} for name in "abc"[: rule.models[1] or 3]]
    recipe = translate(
        {"merge_method": method, "models": models, "parameters": required}
        | ({"base_model": "base"} if rule.base == "required" else {}),
        "file.yml",
    )
    defaults = {option.name: option.default for option in get("merge", method).options.values()}
    effective = defaults | recipe.get("parameters", {})
    expected = MERGEKITS_DEFAULTS[method]
    assert {name: effective[name] for name in expected} == expected
    said = set(expected) | {"weight", "t"}
    assert set(defaults) <= said, "an option whose default in mergekit is not stated here"


# --- what stops ------------------------------------------------------------------------------------------

TA = "{merge_method: task_arithmetic, base_model: base"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TA + ", models: [{model: a}], paramters: {}}", ["'paramters'", "'parameters'"]),
        (TA + ", models: [{model: a, weight: 1}]}", ["models.0", "weight belongs under 'parameters'"]),
        (TA + ", models: [{model: a, parameters: {weigth: 1}}]}", ["models.0.parameters", "'weigth'", "'weight'"]),
        (TA + ", models: [{model: a}]}", ["models.0", "'weight'", "for a"]),
        (TA + ", models: [{model: a}, {model: a}], parameters: {weight: 1}}", ["models.1", "twice"]),
        (TA + ", models: [{model: base}], parameters: {weight: 1}}", ["at least 1", "besides the base", "found 0"]),
        ("{merge_method: nearswap, base_model: b, models: [{model: a}]}", ["nearswap", "'t'"]),
        (
            "{merge_method: arcee_fusion, base_model: b, models: [{model: a}, {model: c}]}",
            ["arcee_fusion takes 1 model(s) besides the base, found 2"],
        ),
        ("{merge_method: sce, base_model: b, models: [{model: a}]}", ["sce takes at least 2", "found 1"]),
        ("{merge_method: della, base_model: b, models: [{model: a}]}", ["models.0", "'weight'"]),
        (
            "{merge_method: breadcrumbs, base_model: b, models: [{model: a}], parameters: {weight: 1, rescale: true}}",
            ["rescale: false only"],
        ),
        (
            "{merge_method: multislerp, models: [{model: a}, {model: b}], parameters: {weight: 1, eps: 1e-3}}",
            ["eps: 1e-08 only"],
        ),
        (TA + "}", ["exactly one of models, slices and modules", "none"]),
        (TA + ", models: [{model: a}], slices: [{}]}", ["models and slices"]),
        (TA + ", models: [{parameters: {weight: 1}}]}", ["models.0", "'model' is missing"]),
        ("{merge_method: ties, models: [{model: a}], parameters: {weight: 1}}", ["ties needs base_model"]),
        (
            "{merge_method: ties, base_model: b, models: [{model: a}], parameters: {weight: 1, rescale: true}}",
            ["rescale: false only"],
        ),
        ("{merge_method: slerp, base_model: b, models: [{model: a}]}", ["slerp", "'t'"]),
        ("{merge_method: slerp, base_model: a, models: [{model: b}, {model: c}], parameters: {t: 1}}", ["found 2"]),
        ("{merge_method: model_stock, base_model: b, models: [{model: a}]}", ["at least 2", "found 1"]),
        ("{merge_method: passthrough, base_model: b, models: [{model: a}]}", ["takes 1", "found 2"]),
        ("{merge_method: linear, base_model: b, models: [{model: a, parameters: {weight: 1}}]}",
         ["base_model, which mergekit adds", "'weight'"]),
        (
            "{merge_method: ties, base_model: b, slices: [{sources: [{model: a, layer_range: [0, 2]}]}],"
            " parameters: {weight: 1}}",
            ["slices.0.sources", "needs the base model b among them"],
        ),
        (
            "{merge_method: linear, parameters: {weight: 1}, slices: [{sources: [{model: a, layer_range: [0, 2]},"
            " {model: b, layer_range: [1, 2]}]}]}",
            ["same length", "[2, 1]"],
        ),
        ("{merge_method: passthrough, slices: [{sources: [{model: a}]}]}", ["layer_range", "None"]),
        ("{merge_method: passthrough, slices: [{sources: [{model: a, layer_range: [3, 3]}]}]}", ["holds no layers"]),
        ("{merge_method: passthrough, modules: {text_decoder: {models: [{model: a}]}}}", ["modules", "text_decoder"]),
        (
            "{merge_method: passthrough, models: [{model: {model: {path: a}, override_architecture: X}}]}",
            ["models.0.model", "override_architecture is not supported"],
        ),
        ("{merge_method: passthrough, models: [{model: a+b+c}]}", ["more than one '+'"]),
        ("{merge_method: passthrough, models: [{model: a@b@c}]}", ["a@b@c"]),
        ("{merge_method: passthrough, models: [{model: a}], dtype: fp16}", ["dtype", "'fp16'", "float16"]),
        ("{merge_method: passthrough, models: [{model: a}], tokenizer_source: b}", ["tokenizer_source", "b is none"]),
        (
            "{merge_method: passthrough, models: [{model: a}], tokenizer_source: base, tokenizer: {source: base}}",
            ["either tokenizer or tokenizer_source"],
        ),
        (
            "{merge_method: passthrough, models: [{model: a}], tokenizer: {tokens: {x: {source: {kind: mean}}}}}",
            ["tokenizer.tokens.x.source.kind", "'mean'"],
        ),
        ("{merge_method: passthrough, models: [{model: a}], chat_template: none}", ["chat_template", "chatml"]),
        ("{merge_method: linear, models: [{model: a, parameters: {weight: nine}}]}", ["weight", "'nine'", "number"]),
        ("{merge_method: linear, models: [{model: a, parameters: {weight: .nan}}]}", ["weight", "number"]),
        ("{merge_method: linear, models: [{model: a}], parameters: {weight: []}}", ["weight", "empty"]),
        ("{merge_method: linear, models: [{model: a}], parameters: {weight: [1, {value: 2}]}}", ["weight.0", "mixed"]),
        ("{merge_method: linear, models: [{model: a}], parameters: {weight: [{filter: a}]}}", ["weight.0", "'value'"]),
        (
            "{merge_method: linear, models: [{model: a}], parameters: {weight: [{filtr: a, value: 1}]}}",
            ["weight.0", "'filtr'", "'filter'"],
        ),
        (
            "{merge_method: nuslerp, models: [{model: a}, {model: b}], parameters: {weight: 1,"
            " nuslerp_flatten: [true, false], nuslerp_row_wise: [true, false]}}",
            ["nuslerp_flatten and nuslerp_row_wise can't both vary"],
        ),
        ("{merge_method: tise, models: [{model: a}]}", ["'tise'", "'ties'"]),
        ("{merge_method: [ties], models: [{model: a}]}", ["merge_method", "['ties']"]),
    ],
)  # fmt: skip
def test_what_stops_names_place_and_feature(text: str, said: list[str]):
    with pytest.raises(RecipeError) as caught:
        load_recipe(read_yaml(text))
    message = str(caught.value)
    assert all(part in message for part in said), message
    assert "\n" not in message


def test_files_of_mergekits_other_programs_are_named(tmp_path: Path):
    path = tmp_path / "file.yml"
    path.write_text("base_model: a\ngate_mode: hidden\nexperts: [{source_model: b, positive_prompts: [x]}]\n")
    with pytest.raises(RecipeError, match="mergekit-moe"):
        load_recipe(path)
    path.write_text("{merge_method: passthrough, models: [{model: a}]}\n---\n{name: two}\n")
    with pytest.raises(RecipeError, match=r"file.yml line 2: a second document begins"):
        load_recipe(path)


def test_a_density_above_one_keeps_everything_and_is_said(caplog: pytest.LogCaptureFixture):
    text = "{merge_method: ties, base_model: a, models: [{model: b}], parameters: {weight: 1, density: DENSITY}}"
    for density in ("53", "[0.5, 1.5]", "[{filter: mlp, value: 2}, {value: 0.5}]"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            recipe_of(text.replace("DENSITY", density))
        assert "parameters.density: above 1 everything is kept" in caplog.text, density
    options = get("merge", "ties").options["density"]
    found = [
        option_value(options, name, [("", {"density": [0.5, 1.5]}, t)], "mergekit")
        for name, t in (("a", 0.0), ("b", 0.25), ("c", 0.75))
    ]
    assert found == [0.5, 0.75, 1.0]  # capped after the interpolation, not before


def test_what_mergekit_does_not_read_is_said(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        recipe = recipe_of("""
            merge_method: task_arithmetic
            base_model: base
            slices:
              - sources:
                  - {model: base, layer_range: [0, 2], parameters: {weight: 9}}
                  - {model: a, layer_range: [0, 2], parameters: {weight: 1, lambda: 0.5}}
                residual_weight: 0.1
            parameters: {density: 0.5, int8_mask: true}
        """)
    assert recipe["slices"][0]["sources"][1] == {"model": {"path": "a"}, "layers": [0, 2], "weight": 1.0}
    assert recipe["slices"][0]["sources"][0] == {"model": {"path": "base"}, "layers": [0, 2]}
    assert "parameters" not in recipe
    for place in ("residual_weight", "parameters.density", "sources.1.parameters.lambda", "sources.0: mergekit"):
        assert place in caplog.text
    assert "int8_mask" not in caplog.text


# --- settings in several scopes --------------------------------------------------------------------------

NUMBERS = st.floats(-2, 2, allow_nan=False)
LEAVES = st.one_of(NUMBERS, st.lists(NUMBERS, min_size=1, max_size=3))
CONDITIONS = st.lists(
    st.one_of(
        st.fixed_dictionaries({"filter": st.sampled_from(["mlp", "attn", "layers.1", "norm"]), "value": LEAVES}),
        st.fixed_dictionaries({"value": LEAVES}),
    ),
    min_size=1,
    max_size=3,
)
SETTINGS = st.one_of(st.none(), LEAVES, CONDITIONS)
NAMES = st.sampled_from(["layers.0.mlp.w", "layers.1.mlp.w", "layers.1.attn.w", "layers.2.norm.w", "embed.w"])


@given(st.lists(SETTINGS, min_size=1, max_size=4), NAMES, st.sampled_from([0.0, 0.25, 1.0]))
def test_settings_joined_over_scopes_resolve_like_scope_after_scope(scopes: list, name: str, depth: float):
    expected = None
    for setting in scopes:
        if expected is None and setting is not None:
            expected = resolve_value(setting, name, depth, "mergekit")
    joined = first_found(*scopes)
    assert (None if joined is None else resolve_value(joined, name, depth, "mergekit")) == expected
